"""Names the parts of a training that are other code than this project's and OpenMMLab's, for the statement.

Must not judge them, and must not look at records.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from mmengine.runner import BaseLoop, Runner
from torch import nn

from mmpose_dp.datasets.nested import with_held, with_inner
from mmpose_dp.datasets.own_code import own_name
from mmpose_dp.models import unwrapped

from .schedules import schedulers_of

_NONE = 'none'
_SUPPOSED = (
    'the guarantee supposes that these treat each record by itself, and that those for validation read no private record; '
    'mmpose_dp cannot check that in full'
)


def own_parts(runner: Runner) -> set[str]:
    """Module and class of each such model part, data set, transform, codec, hook, optimizer, schedule, loop, metric and backend."""
    return {name for name in map(own_name, _parts(runner)) if name}


def own_code_in_words(names: Iterable[str]) -> str:
    """A statement's ``own_code``."""
    return f'{", ".join(sorted(names))}: {_SUPPOSED}' if names else _NONE


def names_in(statement: dict[str, Any]) -> set[str]:
    """The names that an earlier statement has."""
    words = str(statement.get('own_code', _NONE))
    return set() if words == _NONE else {*words.partition(': ')[0].split(', ')}


def _parts(runner: Runner) -> Iterator[Any]:
    wrapper, loader = runner.optim_wrapper, runner.train_dataloader
    yield from (runner, wrapper, wrapper.optimizer, runner.train_loop)
    yield from (loader, loader.batch_sampler, loader.collate_fn, loader.dataset, *runner.hooks)
    shown = runner.visualizer._vis_backends.values()  # each inside of showing.GuardedVisBackend
    yield from (runner.log_processor, runner.visualizer, *(getattr(one, 'backend', one) for one in shown))
    yield from schedulers_of(runner)
    for module in unwrapped(runner.model).modules():
        yield module
        for name, value in vars(module).items():
            # codecs and functions, and hooks, which torch keeps in a dict each
            found = value.values() if name.endswith('_hooks') and isinstance(value, dict) else [value]
            yield from (getattr(one, 'func', one) for one in found if hasattr(one, '__dict__'))
    for part in loader.dataset.parts().values():
        yield from (part, *with_held(part.pipeline.transforms))
    for hook in runner.hooks:  # such as the averaged model of EMAHook
        yield from (value for value in vars(hook).values() if isinstance(value, nn.Module))
    validation = getattr(runner, '_val_loop', None)
    if isinstance(validation, BaseLoop):
        for part in with_inner(validation.dataloader.dataset):
            yield from (part, *with_held(getattr(getattr(part, 'pipeline', None), 'transforms', ())))
        yield validation
        yield from getattr(getattr(validation, 'evaluator', None), 'metrics', ())
