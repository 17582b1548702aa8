"""Refuses, with its place, what mmengine would stop at with an error that names no place.

Must build nothing but hooks and schedules of mmengine, and the parts of a model that could not be built.
"""

import ast
import copy
import re
import traceback
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner.priority import Priority, get_priority
from mmpose.engine.optim_wrappers import LayerDecayOptimWrapperConstructor
from mmpose.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS
from torch.optim import AdamW

from mmpose_dp.datasets.resolving import resolved, type_name
from mmpose_dp.messages import failure
from mmpose_dp.privacy.errors import ConfigError

# the default hooks that None removes (mmengine's Runner.register_default_hooks)
_REMOVABLE = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')
_NUMBER = re.compile(r'[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?')


def refuse_unbuildable(cfg: Any) -> None:
    """Raises ConfigError for a hook, a constructor or a validation of a private config that cannot be built."""
    _refuse_numbers_as_text(cfg)
    _refuse_constructor(cfg.get('optim_wrapper') or {})
    for name in ('val', 'test'):
        _refuse_half_given(cfg, name)
    schedules = cfg.get('param_scheduler')
    for number, settings in enumerate(schedules if isinstance(schedules, (list, tuple)) else [schedules]):
        _refuse_schedule(f'param_scheduler[{number}]', settings)
    for place, settings in _hooks(cfg):
        _refuse_priority(place, settings)
        kind = resolved(HOOKS, settings.get('type')) if isinstance(settings, dict) else None
        if isinstance(kind, type) and kind.__module__.startswith('mmengine.'):  # to build one of these has no effect
            try:
                kind(**{key: value for key, value in settings.items() if key not in ('type', 'priority', '_scope_')})
            except Exception as error:
                raise ConfigError(f'{place}: {kind.__name__} cannot be built: {failure(error, 300)}') from error


def refuse_unwritable_values(cfg: Config) -> None:
    """Raises ConfigError for a value that is no Python when it is written out, as every training writes its config."""
    for place, value in _leaves(cfg.to_dict(), ''):
        if not _can_be_written(value):
            raise ConfigError(
                f'{place}={value!r} is a {type(value).__name__}, which cannot be written to the copy of the config that a training '
                'keeps: write text, numbers, lists and dicts, such as str(...) of a path'
            )


def _can_be_written(value: Any) -> bool:
    """Whether mmengine, which writes ``str(value)``, writes Python; of a path, that could be a name by chance."""
    if value is None or isinstance(value, (str, bool, int, float, type)):
        return True
    try:
        ast.parse(str(value), mode='eval')
    except (SyntaxError, ValueError):
        return False
    return not isinstance(value, PurePath)


def unbuildable_in_words(cfg: Any, error: Exception) -> str:
    """The part of a config's model that cannot be built, if it is one, and why; ``error`` is that of the whole."""
    model = cfg.get('model') or {}
    parts = {f'model.{name}': model.get(name) for name in ('data_preprocessor', 'backbone', 'neck', 'head')}
    for place, part in (parts | {'model': model}).items():
        if isinstance(part, dict):
            try:
                with DefaultScope.overwrite_default_scope(cfg.get('default_scope') or 'mmpose'):
                    MODELS.build(copy.deepcopy(part))
            except Exception as inner:  # its own, or that of the whole once more
                return f'{place}: {type_name(part.get("type"))} cannot be built: {failure(inner, 300)}{_place(inner)}'
    synced = [place for place, value in _leaves(model, 'model') if value == 'SyncBN']
    if synced and 'SyncBatchNorm' in str(error):
        return f"{synced[0]}='SyncBN': several processes can use it on GPUs only. Write 'BN', or train in one process"
    return f'the config cannot be built: {failure(error, 300)}{_place(error)}'


def _place(error: Exception) -> str:
    """Where an error was raised; empty if that was where arguments are passed."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith('<frozen')]
    last = frames[-1] if frames else None
    if last is None or last.filename.endswith('build_functions.py'):
        return ''
    return f' ({Path(last.filename).name}, line {last.lineno})'


def _leaves(node: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The values in nested dicts and lists, each with its place."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f'{place}.{key}' if place else str(key))
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            yield from _leaves(value, f'{place}[{number}]')
    else:
        yield place, node


def _refuse_numbers_as_text(cfg: Any) -> None:
    """Refuses a number that is text in optimizer, schedule and data loaders, where torch stops without its name."""
    loaders = ('train_dataloader', 'val_dataloader')
    parts = [(name, cfg.get(name)) for name in ('optim_wrapper', 'param_scheduler')]
    parts += [(f'{name}.{key}', x) for name in loaders for key, x in (cfg.get(name) or {}).items() if key != 'dataset']
    for place, value in (leaf for name, part in parts for leaf in _leaves(part, name)):
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            raise ConfigError(
                f'{place}={value!r} is text and must be a number: write it without quotation marks. YAML takes a number with an '
                'exponent for text if it has no point: write 1.0e-3 there, not 1e-3'
            )


def _refuse_constructor(wrapper: dict) -> None:
    """Refuses a constructor that there is not, and MMPose's for layer decay, in whose place ours is."""
    if 'constructor' not in wrapper:
        return
    kind = wrapper['constructor']
    cls = None if kind is None else resolved(OPTIM_WRAPPER_CONSTRUCTORS, kind)
    if cls is None or cls is LayerDecayOptimWrapperConstructor:
        raise ConfigError(
            f"optim_wrapper.constructor={kind!r} cannot be used: write constructor='DPOptimWrapperConstructor', which also takes "
            'the num_layers and layer_decay_rate of LayerDecayOptimWrapperConstructor in paramwise_cfg'
        )


def _refuse_schedule(place: str, settings: Any) -> None:
    """Refuses a schedule of mmengine's whose settings it does not take."""
    kind = resolved(PARAM_SCHEDULERS, settings.get('type')) if isinstance(settings, dict) else None
    if not isinstance(kind, type) or not kind.__module__.startswith('mmengine.'):
        return
    given = {key: value for key, value in settings.items() if key not in ('type', 'convert_to_iter_based', '_scope_')}
    try:
        kind(AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3), **given)
    except Exception as error:
        raise ConfigError(f'{place}: {kind.__name__} cannot be built: {failure(error, 300)}') from error


def _refuse_priority(place: str, settings: Any) -> None:
    priority = settings.get('priority') if isinstance(settings, dict) else None
    try:
        get_priority('NORMAL' if priority is None else priority)
    except (KeyError, TypeError, ValueError):
        names = ', '.join(one.name for one in Priority)
        raise ConfigError(f'{place}.priority={priority!r}: write a number from 0 to 100, or one of {names}') from None


def _refuse_half_given(cfg: Any, name: str) -> None:
    keys = [f'{name}_dataloader', f'{name}_cfg', f'{name}_evaluator']
    none = [key for key in keys if cfg.get(key) is None]
    if none and len(none) < len(keys):
        others = ' and '.join(key for key in keys if key not in none)
        raise ConfigError(
            f'{", ".join(keys)} belong together: {" and ".join(none)} {"is" if len(none) == 1 else "are"} None or missing, and '
            f'{others} {"is" if len(none) == 2 else "are"} not. Write all three, or None for all three'
        )


def _hooks(cfg: Any) -> Iterator[tuple[str, Any]]:
    """The settings of all hooks, each with its place. Raises ConfigError for what is none."""
    for name, hook in (cfg.get('default_hooks') or {}).items():
        place = f'default_hooks.{name}'
        if hook is None and name not in _REMOVABLE:
            raise ConfigError(
                f'{place}=None cannot be used: mmengine leaves out only its own hooks this way ({", ".join(_REMOVABLE)}). '
                'visualization and badcase are off with enable=False; remove another one from the config that names it'
            )
        if isinstance(hook, (str, bool, int, float, list, tuple)):
            raise ConfigError(f"{place}={hook!r} must be a dict with a type, such as dict(type='...')")
        yield place, hook
    own = cfg.get('custom_hooks') or []
    if not isinstance(own, (list, tuple)):
        raise ConfigError('custom_hooks must be a list: write custom_hooks=[dict(...)], also for a single hook')
    yield from ((f'custom_hooks[{number}]', hook) for number, hook in enumerate(own))
