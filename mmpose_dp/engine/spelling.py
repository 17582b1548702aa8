"""Refuses keys of a config that nothing would read, with the closest name. Must not build anything or change the config.

mmengine ignores an unknown key at the top of a config, so a misspelled budget would leave the default in force. Further down, a
class raises a TypeError that does not name the key's place.
"""

import difflib
import inspect
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.registry import Registry
from mmengine.runner import Runner
from mmpose.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATORS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
)
from torch.utils.data import DataLoader

from mmpose_dp.datasets import PoissonBatchSampler, PublicPrivateDataset
from mmpose_dp.datasets.resolving import resolved, type_name
from mmpose_dp.extras.kronecker import PROJECTORS, projector_class
from mmpose_dp.extras.schedule import Schedule
from mmpose_dp.privacy.errors import ConfigError

from .loops import PrivateTrainLoop
from .optim_wrappers import DPOptimWrapper

# by whoever builds the object, not by the config
_GIVEN = {'self', 'runner', 'dataloader', 'sampler', 'optimizer', 'cfg'}
_RUNNER = {*inspect.signature(Runner.__init__).parameters} - {'self', 'cfg'}
TOP = {
    *_RUNNER,
    *(
        'find_unused_parameters',
        'model_wrapper_cfg',
        'sync_bn',
        'compile',
        'activation_checkpointing',
        'preprocess_cfg',
    ),
    *('efficient_conv_bn_eval', 'custom_imports', 'env_cfg', 'vis_backends', 'backend_args', 'strategy', 'runner_type'),
}
# variables of MMPose's configs, and what MMPoseInferencer reads; some have the name of a setting
VARIABLES = {'codec', 'data_mode', 'data_root', 'dataset_info', 'dataset_type', 'metainfo'}
# keys that are read beside a class's own arguments
_BESIDE = {
    DPOptimWrapper: {
        *('constructor', 'optimizer', 'public_optimizer', 'paramwise_cfg', 'clip_grad', 'accumulative_counts'),
        *('norm', 'trainable', 'lora_rank', 'experts', 'mix_from'),
    },
    PrivateTrainLoop: {'by_epoch'},
    CheckpointHook: set(),  # any other would go to Runner.save_checkpoint, which knows no more
}
_RENAMED = {'dataset_info': 'metainfo', 'img_prefix': 'data_prefix'}
_INSTEAD = {'train_cfg.max_iters': 'write max_epochs, each of num_records // expected_batch_size steps, in its place'}
_HOOKS = {  # the names that mmengine, MMPose and mmpose_dp give their hooks
    *('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint', 'visualization', 'badcase'),
    *('privacy_budget', 'public_data'),
}
_LOADER = {*inspect.signature(DataLoader).parameters, 'num_batch_per_epoch'}
_PLACES = {
    'default_hooks.privacy_budget': 'PrivacyBudgetHook',  # its module imports this one
    'train_cfg': PrivateTrainLoop,
    'train_dataloader.batch_sampler': PoissonBatchSampler,
    'train_dataloader.dataset': PublicPrivateDataset,
    'optim_wrapper': DPOptimWrapper,
    'optim_wrapper.projector': PROJECTORS['Projector'],
    'optim_wrapper.schedule': Schedule,
}


def refuse_misspelled(cfg: Any, complete: bool = True) -> None:
    """Raises ConfigError for a key, in the parts of a config that mmpose_dp reads, that nothing reads.

    ``complete``: whether no other config will be merged with this one, so that every hook must have its type.
    """
    elsewhere = settings_of(cfg)
    _refuse_untyped(_part(cfg, 'default_hooks'), complete)
    for path, node, names in _nodes(cfg):
        for key in node:
            if key not in names and key not in ('type', '_delete_', '_scope_'):
                owner = type_name(node['type']) if 'type' in node else path
                hint = _INSTEAD.get(f'{path}.{key}') or did_you_mean(key, names, elsewhere)
                raise ConfigError(f'{path}.{key} is unknown to {owner}: {hint}')


def refuse_unregistered(cfg: Any) -> None:
    """Raises ConfigError for a part of a private config that mmengine cannot build, since its type is missing or unknown."""
    if _kind(OPTIM_WRAPPERS, _part(cfg, 'optim_wrapper')) is not DPOptimWrapper:
        return
    for place, registry, node in _built(cfg):
        if not isinstance(node, dict):
            if node is None or isinstance(node, (str, int, float, list, tuple)):
                raise ConfigError(f"{place}={node!r} must be a dict with a type, such as dict(type='...')")
            continue  # an object
        kind = node.get('type')
        if kind is None:
            raise ConfigError(f"{place} has no type: add type='...', the name of its class")
        if isinstance(kind, str) and node.get('_scope_', 'mmpose') == 'mmpose' and resolved(registry, kind) is None:
            raise ConfigError(f'{place}.type={kind!r} is registered nowhere: {_where_from(kind, registry)}')


def _where_from(kind: str, registry: Registry) -> str:
    """What to do about a type that is not registered."""
    package = kind.partition('.')[0]
    if '.' in kind and find_spec(package) is None:
        return f'install {package}, which is not installed here'
    names = {*registry.module_dict, *(registry.parent.module_dict if registry.parent else ())}
    hint = '' if '.' in kind else did_you_mean(kind, names, {})
    if hint.startswith('did'):
        return f'{hint} For a class of your own, list the module that registers it in custom_imports'
    return 'correct it, or list the module that registers it in custom_imports'


def _built(cfg: Any) -> Iterator[tuple[str, Registry, Any]]:
    """The parts of a config that mmengine builds by their type, each with its place."""
    model, wrapper, visualizer = (_part(cfg, key) for key in ('model', 'optim_wrapper', 'visualizer'))
    yield 'model', MODELS, cfg.get('model')
    for name in ('data_preprocessor', 'backbone', 'neck', 'head'):
        if model.get(name) is not None:
            yield f'model.{name}', MODELS, model[name]
    yield 'optim_wrapper.optimizer', OPTIMIZERS, wrapper.get('optimizer')
    if wrapper.get('public_optimizer') is not None:
        yield 'optim_wrapper.public_optimizer', OPTIMIZERS, wrapper['public_optimizer']
    for key, registry in (('param_scheduler', PARAM_SCHEDULERS), ('custom_hooks', HOOKS)):
        yield from _each(key, registry, cfg.get(key))
    for name, hook in _part(cfg, 'default_hooks').items():
        if isinstance(hook, dict) and 'type' in hook:  # what has none is refused above
            yield f'default_hooks.{name}', HOOKS, hook
    if visualizer:
        yield 'visualizer', VISUALIZERS, visualizer
    yield from _each('visualizer.vis_backends', VISBACKENDS, visualizer.get('vis_backends'))
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        yield from _transforms(f'{loader}.dataset', _part(_part(cfg, loader), 'dataset'))
    for key in ('val_evaluator', 'test_evaluator'):
        for place, _, one in _each(key, METRICS, cfg.get(key)):
            evaluator = isinstance(one, dict) and resolved(EVALUATORS, one.get('type'))
            yield place, EVALUATORS if evaluator else METRICS, one


def _transforms(place: str, dataset: dict) -> Iterator[tuple[str, Registry, Any]]:
    """A data set, those in it, and the steps of their pipelines, but for those of other packages."""
    if dataset.get('_scope_', 'mmpose') != 'mmpose':
        return
    yield from _each(f'{place}.pipeline', TRANSFORMS, dataset.get('pipeline'))
    for key in ('private', 'public', 'dataset', 'datasets'):
        for inner, _, one in _each(f'{place}.{key}', DATASETS, dataset.get(key)):
            if isinstance(one, dict):
                yield from _transforms(inner, one)
    if dataset:
        yield place, DATASETS, dataset


def _each(key: str, registry: Registry, nodes: Any) -> Iterator[tuple[str, Registry, Any]]:
    """The parts of a list, or the one part in its place."""
    if isinstance(nodes, (list, tuple)):
        yield from ((f'{key}[{i}]', registry, one) for i, one in enumerate(nodes))
    elif nodes is not None:
        yield key, registry, nodes


def refuse_unknown_top(keys: Iterable[str], cfg: Any, arguments: Iterable[str], where: str) -> None:
    """Raises ConfigError for a key that is neither in a config nor one that mmengine reads, since it would change nothing.

    Nor would a variable of the config, such as ``max_epochs``: what its file made of it is there already.

    ``arguments``: further names that would be right. ``where``: what the message begins with, ``{}`` in place of the key.
    """
    for key in keys:
        variable = key in cfg
        if key not in TOP and not (variable and (key in VARIABLES or key not in settings_of(cfg))):
            hint = did_you_mean(key, {*arguments, *TOP}, settings_of(cfg))
            what = (
                'is a variable that nothing reads any more'
                if variable
                else 'is neither an argument nor a key of the config'
            )
            raise ConfigError(f'{where.format(key)} {what}: {hint}')


def _refuse_untyped(hooks: dict, complete: bool) -> None:
    """Raises ConfigError for settings of a hook that is not there, most likely since its name is misspelled."""
    for name, hook in hooks.items():
        if isinstance(hook, dict) and 'type' not in hook and (complete or name not in _HOOKS):
            hint = did_you_mean(name, {*_HOOKS, *hooks} - {name}, {})
            if name in _HOOKS:
                hint = (
                    f'write its type, or pass the change to private(_base_, ..., default_hooks=dict({name}=dict(...)))'
                )
            raise ConfigError(f'default_hooks.{name} has no type, so it is neither a hook nor a setting of one: {hint}')


def did_you_mean(key: str, names: Iterable[str], elsewhere: dict[str, str]) -> str:
    """What to write in place of ``key``: the closest of ``names``, or a setting with its place from ``elsewhere``."""
    names = sorted(names)
    if _RENAMED.get(key) in names:
        return f'did you mean {_RENAMED[key]}, its name since MMPose 1.0?'
    if key in elsewhere:
        here = next((name for name in names if len(key) > 4 and name.endswith(f'_{key}')), None)  # amp_dtype for dtype
        return f'did you mean {here or as_dicts(elsewhere[key])}?'
    close = _closest(key, names, [*elsewhere])
    if not close:
        return 'take it out' + (f', or write one of {", ".join(names)}' if len(names) < 20 else '')
    return f'did you mean {close if close in names else as_dicts(elsewhere[close])}?'


def _closest(key: str, names: list[str], elsewhere: list[str]) -> str:
    """The name that is most like ``key``, here if possible; empty if none is like it."""
    every = [*names, *elsewhere]
    found = (
        [name for name in names if name.lower() == key.lower()],
        difflib.get_close_matches(key, names, 1, 0.75),
        difflib.get_close_matches(key, elsewhere, 1, 0.75),
        [name for name in every if key in name.split('_')],
        [name for name in every if len(key) > 2 and any(word.startswith(key) for word in name.split('_'))],
        difflib.get_close_matches(key, every, 1, 0.6),
    )
    return next((close[0] for close in found if close), '')


def as_dicts(path: str) -> str:
    """``a.b`` as a config has it: a=dict(b=...)."""
    first, *others = path.split('.')
    return f'{first}=dict({as_dicts(".".join(others))})' if others else f'{first}=...'


def settings_of(cfg: Any) -> dict[str, str]:
    """Every setting of ours, and of the private data set, by its name, with its place."""
    found = {'lr': 'optim_wrapper.optimizer.lr', 'seed': 'randomness.seed'}
    for path, kind in _PLACES.items():  # the first place of a name is the one to mention
        for name in sorted(_names(resolved(HOOKS, kind)) - {'debug_seed'}):
            found.setdefault(name, f'{path}.{name}')
    for name in sorted(_LOADER - _GIVEN):
        found.setdefault(name, f'train_dataloader.{name}')
    private = resolved(DATASETS, _part(cfg, 'train_dataloader', 'dataset', 'private').get('type'))
    for name in sorted(_names(private) or ()):
        found.setdefault(name, f'train_dataloader.dataset.private.{name}')
    return found


def _part(node: Any, *keys: str) -> Any:
    """A part of nested dicts; an empty dict where there is none."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) or hasattr(node, 'get') else None
    return node if isinstance(node, dict) else {}


def _nodes(cfg: Any) -> Iterator[tuple[str, dict, set[str]]]:
    """The parts of a config whose keys are known: their place, themselves, and the names that are read."""
    loader, wrapper = _part(cfg, 'train_dataloader'), _part(cfg, 'optim_wrapper')
    sampled = _part(loader, 'batch_sampler').get('type') is not None
    if sampled and _kind(DATASETS, _part(loader, 'dataset')) is PublicPrivateDataset:
        yield 'train_dataloader', loader, _LOADER
    typed: list[tuple[str, Registry, Any]] = [
        ('train_dataloader.batch_sampler', DATA_SAMPLERS, _part(loader, 'batch_sampler')),
        ('train_dataloader.dataset', DATASETS, _part(loader, 'dataset')),
        *(
            (f'train_dataloader.dataset.{part}', DATASETS, _part(loader, 'dataset', part))
            for part in ('private', 'public')
        ),
        ('train_dataloader.dataset.public_view', TRANSFORMS, _part(loader, 'dataset', 'public_view')),
        ('train_cfg', LOOPS, _part(cfg, 'train_cfg')),
    ]
    private = _kind(OPTIM_WRAPPERS, wrapper) is DPOptimWrapper  # what other wrappers take, their constructors know
    if private:
        typed.append(('optim_wrapper', OPTIM_WRAPPERS, wrapper))
    typed += [(f'default_hooks.{name}', HOOKS, hook) for name, hook in _part(cfg, 'default_hooks').items()]
    typed += [(f'custom_hooks[{i}]', HOOKS, hook) for i, hook in enumerate(_listed(cfg.get('custom_hooks')))]
    for path, registry, node in typed:
        names = _names(_kind(registry, node))
        if names:
            yield path, node, names | ({'priority'} if registry is HOOKS else set())
    if private:
        projector = _part(wrapper, 'projector')
        yield 'optim_wrapper.projector', projector, _names(projector_class(projector))
        yield 'optim_wrapper.schedule', _part(wrapper, 'schedule'), _names(Schedule)


def _listed(node: Any) -> list:
    return list(node) if isinstance(node, (list, tuple)) else []


def _kind(registry: Registry, node: Any) -> Any:
    """The class of a config; None if there is none."""
    return resolved(registry, node['type']) if isinstance(node, dict) and 'type' in node else None


def _names(kind: Any) -> set[str]:
    """The names that a class reads; none where that cannot be known: of a function, or of a foreign class with ``**kwargs``."""
    if not isinstance(kind, type):
        return set()
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    own = {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    if kind not in _BESIDE and len(own) < len(parameters):
        return set()
    return own - _GIVEN - ({'batch_size'} if kind is PoissonBatchSampler else set()) | _BESIDE.get(kind, set())
