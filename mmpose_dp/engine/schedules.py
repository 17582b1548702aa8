"""Runs the schedules of a training ahead of it: what would fail in a later epoch, and what steps would change nothing.

Must not leave a trace in an optimizer or a scheduler.
"""

import warnings
from typing import Any

from mmengine.runner import Runner

from mmpose_dp.messages import failure
from mmpose_dp.privacy.errors import ConfigError

from .training_settings import unfinished_schedules


def schedulers_of(runner: Runner) -> list[Any]:
    """A runner's schedulers, of whatever optimizer."""
    found = runner.param_schedulers or []
    return found if isinstance(found, list) else [s for part in found.values() for s in part]


def try_schedules(runner: Runner, start: int = 0) -> list[list[float]]:
    """Runs every scheduler through all steps of the epochs from ``start`` on, and restores all.

    It looks at the group of parameters with the largest learning rate: others may be frozen by an lr_mult of 0.

    Returns the learning rate of each step, by epoch. Raises ConfigError for a scheduler that fails.
    """
    optimizer, schedulers, loop = runner.optim_wrapper.optimizer, schedulers_of(runner), runner.train_loop
    groups, states = optimizer.param_groups, [dict(vars(s)) for s in schedulers]
    largest = max(range(len(groups)), key=lambda number: _rate(groups[number]))
    optimizer.param_groups = [dict(groups[largest], params=[])]
    for scheduler in schedulers:
        if len(getattr(scheduler, 'base_values', ())) == len(groups):
            scheduler.base_values = [scheduler.base_values[largest]]
    base = runner.optim_wrapper.base_param_settings
    kept = None if base is None else dict(base)
    rates: list[list[float]] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for epoch in range(start, loop.max_epochs):
                rates.append([])
                for _ in range(loop.sampler.steps_per_epoch(epoch < loop.public_epochs)):
                    rates[-1] += [group['lr'] for group in optimizer.param_groups]
                    for scheduler in [s for s in schedulers if not s.by_epoch]:
                        scheduler.verbose = False
                        scheduler.step()
                for scheduler in [s for s in schedulers if s.by_epoch]:
                    scheduler.verbose = False
                    scheduler.step()
        return rates
    except Exception as error:
        raise ConfigError(
            f'param_scheduler: {type(scheduler).__name__} fails in epoch {epoch + 1} of {loop.max_epochs}: '
            f'{failure(error)}'
        ) from error
    finally:
        optimizer.param_groups = groups
        for scheduler, state in zip(schedulers, states):
            vars(scheduler).clear()
            vars(scheduler).update(state)
        if base is not None:
            base.update(kept)


def _rate(group: dict) -> float:
    """The learning rate of a group before any schedule."""
    return group.get('initial_lr', group['lr'])


def idle_steps(runner: Runner) -> list[str]:
    """A sentence if private steps that are still to come have a learning rate of 0, or next to it.

    For a training from its start, also one for each schedule by step that is longer than the training.
    """
    loop, start = runner.train_loop, runner.epoch
    unfinished = [] if start else unfinished_schedules(runner.cfg, loop.max_iters)
    rates = dict(enumerate(try_schedules(runner, start), start + 1))
    largest = max(_rate(group) for group in runner.optim_wrapper.param_groups)
    least = 1e-6 * largest
    private = [(epoch, x) for epoch, each in rates.items() if epoch > loop.public_epochs for x in each]
    idle = [epoch for epoch, x in private if x <= least]
    if not idle:
        return unfinished
    words = 'let the schedule end later, or write its eta_min'
    if not largest:
        words = 'write optim_wrapper.optimizer.lr, such as 1e-4 for AdamW'
    elif start:
        words = (
            'a resume keeps the schedule of its checkpoint. To go on with another one, write load_from=<the checkpoint> without '
            'resume, in this work dir, where all steps count'
        )
    return [
        *unfinished,
        f'{"param_scheduler" if largest else "optim_wrapper.optimizer"}: the learning rate is 0 in {len(idle)} of {len(private)} '
        f'private steps to come, first in epoch {idle[0]}. They spend privacy and change nothing: {words}',
    ]
