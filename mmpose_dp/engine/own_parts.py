"""Names the parts of a training that are other code than this project's and OpenMMLab's, for the statement.

Must not judge them, and must not look at records.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from mmengine.runner import BaseLoop, Runner
from mmpose.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn
from torch.nn.modules import module as torch_modules

from mmpose_dp.datasets.nested import with_held, with_inner
from mmpose_dp.datasets.own_code import KNOWN, own_name
from mmpose_dp.datasets.resolving import resolved
from mmpose_dp.gradients import rule_for
from mmpose_dp.models import unwrapped
from mmpose_dp.privacy.accounting import ACCOUNTANTS

from .schedules import schedulers_of

_NONE = 'none'
_SUPPOSED = (
    'the guarantee supposes that these treat each record by itself, and that those for validation read no private record; '
    'mmpose_dp cannot check that in full'
)


def own_parts(runner: Runner) -> set[str]:
    """Module and class of each such model part, data set, transform, codec, hook, optimizer, schedule, loop, metric and backend;
    of each accountant and layer rule; and each module of ``custom_imports`` that has none of these, since it ran too."""
    names = {name for name in map(own_name, _parts(runner)) if name}
    imports = (runner.cfg.get('custom_imports') or {}).get('imports') or []
    modules = [imports] if isinstance(imports, str) else imports
    others = [one for one in modules if one.partition('.')[0] not in KNOWN]
    return names | {one for one in others if not any(name.startswith(f'{one}.') for name in names)}


def own_code_in_words(names: Iterable[str]) -> str:
    """A statement's ``own_code``."""
    return f'{", ".join(sorted(names))}: {_SUPPOSED}' if names else _NONE


def names_in(statement: dict[str, Any]) -> set[str]:
    """The names that an earlier statement has."""
    words = str(statement.get('own_code', _NONE))
    return set() if words == _NONE else {*words.partition(': ')[0].split(', ')}


def _parts(runner: Runner) -> Iterator[Any]:
    wrapper, loader = runner.optim_wrapper, runner.train_dataloader
    yield from (runner, wrapper, wrapper.optimizer, wrapper.public_optimizer, runner.train_loop, *_by_name(runner))
    yield from (loader.batch_sampler, loader.dataset, *_of_loader(loader), *runner.hooks)
    shown = runner.visualizer._vis_backends.values()  # each inside of showing.GuardedVisBackend
    yield from (runner.log_processor, runner.visualizer, *(getattr(one, 'backend', one) for one in shown))
    yield from schedulers_of(runner)
    hooks = [
        value for name, value in vars(torch_modules).items() if name.startswith('_global_') and isinstance(value, dict)
    ]
    yield from (one for found in hooks for one in found.values())  # of every module there is
    for module in unwrapped(runner.model).modules():
        yield from (module, rule_for(module))
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
        evaluator = getattr(validation, 'evaluator', None)
        yield from (validation, evaluator, *getattr(evaluator, 'metrics', ()), *_of_loader(validation.dataloader))


def _of_loader(loader: Any) -> Iterator[Any]:
    """What a data loader is, and what it calls."""
    yield from (loader, loader.sampler)
    yield from (getattr(one, 'func', one) for one in (loader.collate_fn, loader.worker_init_fn))


def _by_name(runner: Runner) -> Iterator[Any]:
    """What a config chooses by its name, and no object is left of."""
    constructor = (runner.cfg.get('optim_wrapper') or {}).get('constructor')
    yield resolved(OPTIM_WRAPPER_CONSTRUCTORS, constructor)
    plan = runner.optim_wrapper.plan
    accountant = None if plan is None else ACCOUNTANTS[plan.accountant]
    yield getattr(accountant, 'func', accountant)
