"""What would fail late fails first: everything that can be known before a step is tried before the first one.

One row of each half goes through the model, two rows through validation, the schedules through all epochs, and the hooks'
settings are looked at. Must not count, keep or show anything: the model sees noise in a private record's shape, and states
are put back.
"""

import copy
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.fileio import get_file_backend
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.runner import Runner
from mmengine.runner.amp import autocast
from mmengine.runner.loops import ValLoop
from torch import nn

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.noise import RandomSource

from ..dry_run import blank_batch, try_batch
from .foreign_hooks import refuse_hooks
from .resuming import checkpoint_folders

_TRIES = 20  # rows of a half that are looked at for one that the pipeline can use


def refuse_late_failures(runner: Runner) -> None:
    """Raises PrivacyError, naming the key, for what would end this training after steps were paid for."""
    refuse_hooks(runner.hooks)
    with _untouched(runner):
        _try_records(runner)
        metrics = _try_validation(runner)
    _check_checkpoints(runner, metrics)
    _check_monitors(runner, metrics)
    _try_schedules(runner)


@contextmanager
def _untouched(runner: Runner) -> Iterator[None]:
    """Afterwards random generators, the model's mode and buffers, and the private draws are as before."""
    model, dataset = _core(runner), runner.train_dataloader.dataset
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes, secret, dataset.random = [(m, m.training) for m in model.modules()], dataset.random, RandomSource()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # one could name a record
            yield
    finally:
        dataset.random = secret
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def _core(runner: Runner) -> nn.Module:
    return getattr(runner.model, 'module', runner.model)


# ---- training ------------------------------------------------------------------------------------------------------
def _try_records(runner: Runner) -> None:
    """A row of each half, and of each pipeline that a hook will switch to, through the model and its loss."""
    dataset, wrapper = runner.train_dataloader.dataset, runner.optim_wrapper
    model = _core(runner).train()
    for half, indices in halves(dataset):
        row = next((rows[0] for rows in (dataset[i] for i in indices[:_TRIES]) if rows), None)
        if row is not None:
            try_batch(model, blank_batch(row), f'train_dataloader.dataset.{half}', wrapper.amp_dtype)
    for hook in runner.hooks:
        steps = getattr(hook, 'switch_pipeline', None)
        if isinstance(steps, (list, tuple)):
            _try_switch(dataset, model, wrapper.amp_dtype, steps, type(hook).__name__)


def halves(dataset: PublicPrivateDataset) -> list[tuple[str, range]]:
    """The parts of a data set by the key that made them, and the indices of their rows."""
    found, start = [], 0
    for name, part in dataset.parts().items():
        found.append((name, range(start, start + len(part))))
        start += len(part)
    return found


def _try_switch(dataset: PublicPrivateDataset, model: nn.Module, dtype: Any, steps: Any, hook: str) -> None:
    """One row through a pipeline that ``hook`` will switch to; then the old one is back."""
    olds = [(part, part.pipeline) for part in (dataset.private, dataset.views) if part is not None]
    key = f'custom_hooks: switch_pipeline of {hook}'
    try:
        dataset.pipeline = list(steps)
        rows = next((rows for rows in (dataset[i] for i in range(min(_TRIES, len(dataset.private)))) if rows), None)
        if rows is None:
            raise PrivacyError(f'{key}: the pipeline fails on the first rows of train_dataloader.dataset.private')
        try_batch(model, blank_batch(rows[0]), key, dtype)
    except PrivacyError:
        raise
    except Exception as error:  # whatever a transform makes of its arguments
        raise PrivacyError(f'{key} cannot be built: {type(error).__name__}: {error}') from error
    finally:
        for part, pipeline in olds:
            part.pipeline = pipeline
        dataset.try_first_samples()  # the forms of samples are those of the old pipeline again
        dataset.switched = False


# ---- validation ----------------------------------------------------------------------------------------------------
def _try_validation(runner: Runner) -> dict[str, Any] | None:
    """The metrics of two rows, which are made as in training; None where nothing is validated."""
    loop = runner.val_loop
    if not isinstance(loop, ValLoop):
        return None
    dataset, stage = loop.dataloader.dataset, 'val_dataloader.dataset: its pipeline'
    try:
        batch = loop.dataloader.collate_fn([dataset[i] for i in sorted({0, len(dataset) - 1})])
        stage = 'the model, in predicting val_dataloader.dataset'
        model = _core(runner).eval()
        with autocast(enabled=loop.fp16):
            outputs = model.val_step(batch)
        stage = 'val_evaluator'
        loop.evaluator.process(data_samples=outputs, data_batch=batch)
        metrics = loop.evaluator.evaluate(len(outputs))
        for hook in _foreign(runner.hooks):
            stage = f'the hook {type(hook).__name__}, after a validation batch,'
            one = copy.copy(hook)  # it may count
            one.before_val(runner)
            one.before_val_epoch(runner)
            one.before_val_iter(runner, batch_idx=0, data_batch=batch)
            one.after_val_iter(runner, batch_idx=0, data_batch=batch, outputs=outputs)
        return metrics
    except Exception as error:
        raise PrivacyError(
            f'{stage} fails on two rows, as it would after the first epochs: {type(error).__name__}: {error}'
        ) from error
    finally:
        for metric in loop.evaluator.metrics:
            metric.results.clear()


def _foreign(hooks: list[Hook]) -> list[Hook]:
    """Hooks of MMPose's or the user's that do something after a validation batch."""
    named = [(hook, type(hook).after_val_iter.__module__) for hook in hooks]
    return [hook for hook, module in named if module.split('.')[0] not in ('mmengine', 'mmpose_dp')]


# ---- what hooks and schedulers will do with it ---------------------------------------------------------------------
def _check_checkpoints(runner: Runner, metrics: dict[str, Any] | None) -> None:
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            _check_checkpoint_settings(hook)
            _check_best(hook, metrics)
            _check_folder(runner, hook)


def _check_checkpoint_settings(hook: CheckpointHook) -> None:
    key = 'default_hooks.checkpoint'
    for name in ('interval', 'max_keep_ckpts', 'save_begin'):
        if type(getattr(hook, name, 0)) is not int:
            raise PrivacyError(f'{key}.{name}={getattr(hook, name)!r} must be a whole number')
    try:
        distinct = hook.filename_tmpl.format(1) != hook.filename_tmpl.format(2)
    except (AttributeError, IndexError, KeyError, ValueError):
        distinct = False
    if not distinct:
        raise PrivacyError(
            f"{key}.filename_tmpl={hook.filename_tmpl!r} must hold one {{}} for the epoch, such as 'epoch_{{}}.pth'"
        )


def _check_best(hook: CheckpointHook, metrics: dict[str, Any] | None) -> None:
    """``save_best`` against what validation gives."""
    if hook.save_best is None or not metrics:
        return
    first, key = next(iter(metrics)), 'default_hooks.checkpoint'
    missing = [name for name in hook.save_best if name != 'auto' and name not in metrics]
    if missing:
        raise PrivacyError(
            f'{key}.save_best={missing[0]!r}: val_evaluator gives {", ".join(metrics)}; write one of them'
        )
    if 'auto' in hook.save_best:
        trial = copy.copy(hook)
        trial.is_better_than = {}
        try:
            trial._init_rule(list(hook.rules), [first])
        except ValueError as error:
            raise PrivacyError(
                f"{key}.rule is needed with save_best='auto': whether more or less of {first} is better is not known. Write "
                "rule='greater' or 'less'"
            ) from error


def _check_folder(runner: Runner, hook: CheckpointHook) -> None:
    """That checkpoints can be written where the hook puts them."""
    folder = checkpoint_folders(runner.work_dir, hook.out_dir)[-1]
    where = 'work_dir' if hook.out_dir in (None, runner.work_dir) else 'default_hooks.checkpoint.out_dir'
    try:
        if '://' in str(folder):
            get_file_backend(str(folder), backend_args=hook.backend_args)
            return
        if hook.backend_args is not None:
            get_file_backend(str(folder), backend_args=hook.backend_args)
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        free, needed = shutil.disk_usage(folder).free, _size_of_checkpoint(runner, hook)
        if free < needed:
            raise OSError(f'{free / 2**20:.0f} MiB are free, and a checkpoint is about {needed / 2**20:.0f} MiB')
    except Exception as error:  # OSError, or whatever a storage backend raises
        raise PrivacyError(
            f'{where}: checkpoints cannot be written to {folder}: {type(error).__name__}: {error}'
        ) from error


def _size_of_checkpoint(runner: Runner, hook: CheckpointHook) -> int:
    """Bytes of the weights and, where it is kept, of an optimizer's two moments."""
    trained = sum(p.numel() for p in runner.optim_wrapper.params) if hook.save_optimizer else 0
    return sum(x.numel() * x.element_size() for x in _core(runner).state_dict().values()) + 8 * trained


def _check_monitors(runner: Runner, metrics: dict[str, Any] | None) -> None:
    """What waits for a metric that never comes."""
    waiting = [('EarlyStoppingHook', hook.monitor) for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]
    waiting += [('param_scheduler', s.monitor) for s in _schedulers(runner) if hasattr(s, 'monitor')]
    for name, monitor in waiting if metrics is not None else ():
        if monitor not in metrics:
            raise PrivacyError(
                f'{name}.monitor={monitor!r}: val_evaluator gives {", ".join(metrics)}; write one of them'
            )


def _schedulers(runner: Runner) -> list[Any]:
    found = runner.param_schedulers or []
    return found if isinstance(found, list) else [s for part in found.values() for s in part]


def _try_schedules(runner: Runner) -> None:
    """Every scheduler through all steps and epochs, for one group of parameters; then all is as before."""
    optimizer, schedulers, loop = runner.optim_wrapper.optimizer, _schedulers(runner), runner.train_loop
    groups, states = optimizer.param_groups, [dict(vars(s)) for s in schedulers]
    optimizer.param_groups = [dict(group, params=[]) for group in groups[:1]]
    base = runner.optim_wrapper.base_param_settings
    kept = None if base is None else dict(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for epoch in range(loop.max_epochs):
                steps = loop.sampler.steps_per_epoch(epoch < loop.public_epochs)
                for scheduler in schedulers:
                    scheduler.verbose = False
                    for _ in range(1 if scheduler.by_epoch else steps):
                        scheduler.step()
    except Exception as error:
        raise PrivacyError(
            f'param_scheduler: {type(scheduler).__name__} fails in epoch {epoch + 1} of {loop.max_epochs}: '
            f'{type(error).__name__}: {error}'
        ) from error
    finally:
        optimizer.param_groups = groups
        for scheduler, state in zip(schedulers, states):
            vars(scheduler).clear()
            vars(scheduler).update(state)
        if base is not None:
            base.update(kept)
