"""Describes what a config trains with, and what in it can have no effect. Must not change a config or build anything."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

FROM_RANDOM = (
    'Private training starts without load_from. It rarely works from random weights: set load_from to a checkpoint that was '
    'trained on public data, or keep the weights of the backbone with model=dict(backbone=dict(init_cfg=...))'
)
REPLACED = 'replaced_by_private'  # the key under which mmpose_dp.configs.private keeps the words of what it replaced
WRITTEN = 'written_by_private'  # and the keys that it wrote
_SCALES_EACH = re.compile('Adam|Adagrad|Adadelta|Adafactor|RMSprop|Rprop|Lion')  # optimizers that scale each parameter


def settings_in_words(cfg: Any) -> dict[str, str]:
    """Optimizer, epochs, schedule, validation and checkpoints of a config, one short text each."""
    loop, wrapper, hooks = (_dict(cfg.get(key)) for key in ('train_cfg', 'optim_wrapper', 'default_hooks'))
    optimizer, model = _dict(wrapper.get('optimizer')), _dict(cfg.get('model'))
    first = [*_listed(model.get('init_cfg')), *_listed(_dict(model.get('backbone')).get('init_cfg'))]
    public, factors = _dict(wrapper.get('public_optimizer')), sorted(_dict(wrapper.get('paramwise_cfg')))
    by_part = f', with paramwise_cfg ({", ".join(factors)})' if factors else ''
    epochs = f'{loop["max_epochs"]}' if 'max_epochs' in loop else f'{loop.get("max_iters", "not set")} steps'
    public_epochs = f', {loop["public_epochs"]} of them public' if loop.get('public_epochs') else ''
    interval = _dict(hooks.get('checkpoint')).get('interval', 1)
    return {
        'optimizer': _optimizer(optimizer) + (f'; {_optimizer(public)} in public epochs' if public else '') + by_part,
        'epochs': epochs + public_epochs,
        'schedule': ', '.join(map(_schedule, _listed(cfg.get('param_scheduler')))) or 'none',
        'validation': f'every {loop.get("val_interval", 1)} epochs',
        'checkpoints': f'every {interval} epochs',
        'weights of the backbone': _start(cfg.get('load_from'), first),
    }


def _start(load_from: Any, init_cfgs: list[dict]) -> str:
    """Where the weights of a backbone come from: the names of the files."""
    own = [str(one.get('checkpoint')) for one in init_cfgs if 'Pretrained' in _type(one)]
    files = [('load_from', str(load_from))] * bool(load_from) + [('init_cfg', name) for name in own]
    return ', else '.join(f'{key} {name.rpartition("/")[2]}' for key, name in files) or 'random: no load_from'


def _optimizer(settings: dict) -> str:
    rest = [f'{key} {settings[key]}' for key in ('lr', 'momentum', 'weight_decay') if key in settings]
    return ', '.join([_type(settings), *rest]) if settings else 'none'


def _schedule(settings: dict) -> str:
    """A scheduler, with where it acts."""
    unit = 'epoch' if settings.get('by_epoch', True) else 'step'
    if 'milestones' in settings:
        return f'{_type(settings)} at {unit} {", ".join(map(str, settings["milestones"]))}'
    end = settings.get('end', settings.get('T_max'))
    return f'{_type(settings)}{f" to {unit} {end}" if end is not None else ""}'


def _type(settings: dict) -> str:
    kind = settings.get('type', '?')
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition('.')[2]


def _dict(node: Any) -> dict:
    return node if isinstance(node, dict) else {}


def _listed(node: Any) -> list[dict]:
    return [one for one in (node if isinstance(node, (list, tuple)) else [node]) if isinstance(one, dict)]


def idle_schedules(cfg: Any) -> list[str]:
    """A sentence for each scheduler by epoch that acts only after the last epoch."""
    epochs = _dict(cfg.get('train_cfg')).get('max_epochs')
    if not isinstance(epochs, int):
        return []
    return [
        f'param_scheduler: {words} beyond train_cfg.max_epochs={epochs}, so the learning rate does not fall as planned. Write '
        'param_scheduler for this number of epochs'
        for words in _beyond(cfg, True, epochs)
    ]


def unfinished_schedules(cfg: Any, steps: int) -> list[str]:
    """A sentence for each scheduler by step, such as a warm-up, that is not at its end when training is, after ``steps``."""
    return [
        f'param_scheduler: {words} beyond the {steps} steps of this training, so the learning rate does not become what was '
        "planned. Write fewer steps, or leave param_scheduler out for the method's own"
        for words in _beyond(cfg, False, steps)
    ]


def _beyond(cfg: Any, by_epoch: bool, last: int) -> Iterator[str]:
    """What each scheduler, by epoch or by step, does after the ``last`` one."""
    for settings in _listed(cfg.get('param_scheduler')):
        if bool(settings.get('by_epoch', True)) is not by_epoch:
            continue
        late = [x for x in settings.get('milestones', [settings.get('begin', 0)]) if type(x) is int and x >= last]
        ends = settings.get('T_max', settings.get('end'))
        if late:
            yield f'{_type(settings)} at {", ".join(map(str, late))} acts'
        elif type(ends) is int and ends > last and 'milestones' not in settings:
            yield f'{_type(settings)} goes on to {ends},'


def out_of_subspace(cfg: Any) -> list[str]:
    """A sentence if the optimizer scales each parameter, which moves it out of the subspace of ``optim_wrapper.projector``."""
    wrapper = _dict(cfg.get('optim_wrapper'))
    optimizer = _type(_dict(wrapper.get('optimizer')))
    if not wrapper.get('projector') or not _SCALES_EACH.search(optimizer):
        return []
    projector = _dict(wrapper['projector'])
    name, step = ('hybrid', 0.025) if projector.get('preconditioned') else ('projected', 2e-4)
    if projector.get('type') == 'KroneckerProjector':
        name, step = 'kronecker', 0.05
    longest = wrapper.get('max_grad_norm')
    rate = step / longest if isinstance(longest, (int, float)) and longest > 0 else step / 1e-3
    return [
        f'optim_wrapper.optimizer is {optimizer}, beside optim_wrapper.projector: it scales each parameter by itself, so each step '
        'leaves the subspace by the full learning rate, and no gradient corrects what noise does there. It lost points in every '
        f"benchmark run with a learning rate above 1e-4. Write that of recipe '{name}': "
        f"optimizer=dict(type='SGD', lr={rate:.3g}, momentum=0.9)"
    ]


def mostly_random(model: nn.Module, loaded: Iterable[str]) -> str:
    """A sentence if files fill some of the model's weights, but less than half of them; else empty.

    Args:
        model: the model.
        loaded: the names of the tensors that a file fills.
    """
    filled = set(loaded)
    sizes = {name: param.numel() for name, param in model.named_parameters() if param.dim() > 1}
    known, whole = sum(size for name, size in sizes.items() if name in filled), sum(sizes.values())
    if not filled or 2 * known >= whole:
        return ''
    return (
        f'only {known:,} of {whole:,} weights of the model come from a file, and the rest starts at random. Private '
        'training rarely works from random weights: load_from should be a checkpoint of this whole model'
    )


def left_random(model: nn.Module, left_out: Iterable[nn.Parameter], loaded: Iterable[str], trainable: str) -> str:
    """A sentence if ``trainable`` freezes weights that no file has filled, so that nothing ever trains them; else empty.

    Args:
        model: the model.
        left_out: the parameters that the choice freezes, and that public epochs do not train either.
        loaded: the names of the tensors that a file fills.
    """
    frozen, filled = {id(param) for param in left_out}, set(loaded)
    sizes: Counter[str] = Counter()
    for name, param in model.named_parameters():
        if id(param) in frozen and name not in filled and param.dim() > 1:  # norms and biases do not start at random
            sizes[name.partition('.')[0]] += param.numel()
    if not sizes:
        return ''
    parts = ', '.join(f'{part} ({size:,} numbers)' for part, size in sizes.items())
    return (
        f'optim_wrapper.trainable={trainable!r} leaves {parts} at random weights that nothing trains, so the model cannot learn: '
        'set load_from to a checkpoint that has them, or add them to trainable, or let public epochs train the whole model '
        '(train_cfg.public_epochs with optim_wrapper.public_optimizer)'
    )
