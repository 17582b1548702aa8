"""Refuses, by name, hooks that cannot do in private training what they do in plain training.

Must not run a hook: its source code shows what it reads.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from mmengine.hooks import Hook

from mmpose_dp.privacy.errors import ConfigError

# by the name of the class or of a base class
_REFUSED = {
    'CheckInvalidLossHook': 'it would stop training because of a private loss, which nobody may see; a record whose gradient '
    'is not finite contributes nothing anyway',
    'YOLOXPoseModeSwitchHook': 'it exchanges the data loader, whose sampling the accountant relies on; to switch pipelines, use '
    'mmdet.PipelineSwitchHook',
    'YOLOXModeSwitchHook': 'it switches off mixing transforms, which private training does not have; to switch pipelines, use '
    'mmdet.PipelineSwitchHook',
    'PreciseBNHook': 'it computes the statistics of BatchNorm from private pictures without noise; private training keeps those '
    'of load_from, or learns them in public epochs',
    'MeanTeacherHook': 'it trains a second model inside the first',
}
# they average statistics over processes: those of MMPose and mmdet, and mmengine's
_AVERAGING = frozenset({'SyncBuffersHook', 'SyncNormHook'})
_METHODS = ('before_train_iter', 'after_train_iter', '_before_iter', '_after_iter')
_HIDDEN = 'data_batch is None and outputs holds only what may be logged'


def averages(hook: Hook) -> bool:
    """Whether a hook does nothing but average statistics over processes."""
    return any(kind.__name__ in _AVERAGING for kind in type(hook).__mro__)


def refuse_hooks(hooks: list[Hook]) -> None:
    """Raises ConfigError for a hook that reads or changes something that private training does not allow."""
    for hook in hooks:
        for kind in type(hook).__mro__:
            if kind.__name__ in _REFUSED:
                raise ConfigError(
                    f'custom_hooks: {type(hook).__name__} cannot be used in private training: {_REFUSED[kind.__name__]}. '
                    'Remove it'
                )
        for name, what in _reads(type(hook)):
            raise ConfigError(
                f'custom_hooks: {type(hook).__name__}.{name} reads {what}, which private training does not show: {_HIDDEN}. '
                'Remove the hook, or change it so that it does not need them'
            )


def _reads(kind: type) -> Iterator[tuple[str, str]]:
    """The methods around a training step that use the batch or a private loss, and what they use."""
    for name in _METHODS:
        method = getattr(kind, name, None)
        if method is None or method.__module__.split('.')[0] in ('mmengine', 'mmpose', 'mmpose_dp'):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            continue
        parameters = [*inspect.signature(method).parameters, *[''] * 5]
        batch, outputs = parameters[3], parameters[4]
        if batch and _is_used(tree, batch):
            yield name, batch
        if outputs and _reads_loss(tree, outputs):
            yield name, f"{outputs}['loss']"


def _is_used(tree: ast.AST, name: str) -> bool:
    """Whether something is read from ``name`` without a check for None."""
    nodes = list(ast.walk(tree))
    if any(isinstance(node, ast.Compare) and _is(node.left, name) for node in nodes):
        return False
    tests = [node.test for node in nodes if isinstance(node, (ast.If, ast.IfExp))]
    if any(_is(test, name) or (isinstance(test, ast.UnaryOp) and _is(test.operand, name)) for test in tests):
        return False
    taken = [node.value for node in nodes if isinstance(node, (ast.Subscript, ast.Attribute))]
    taken += [node.iter for node in nodes if isinstance(node, ast.For)]
    taken += [
        arg
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'len'
        for arg in node.args
    ]
    return any(_is(node, name) for node in taken)


def _reads_loss(tree: ast.AST, name: str) -> bool:
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript) and _is(node.value, name)]
    return any(isinstance(node.slice, ast.Constant) and node.slice.value == 'loss' for node in read)


def _is(node: Any, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
