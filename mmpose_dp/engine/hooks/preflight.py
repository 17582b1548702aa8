"""Tries before the first step what would otherwise fail later, when privacy has been spent.

A sample of each part goes through the model, two samples and all annotations through validation, the schedules through all
epochs; the settings of hooks are checked. Must not count, keep or show anything: the model sees noise of a private sample's
shape, and all states are restored.
"""

import copy
import inspect
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import get_file_backend
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, EMAHook, Hook
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner
from mmengine.runner.amp import autocast
from mmengine.runner.loops import ValLoop
from torch import nn

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.datasets.randomness import kept_randomness
from mmpose_dp.messages import failure
from mmpose_dp.models import unwrapped
from mmpose_dp.privacy.errors import ConfigError, DataError, PrivacyError
from mmpose_dp.privacy.noise import RandomSource

from ..dry_run import blank_batch, refuse_early_mixing, refuse_loss_of_unseen_joints, rehearse, try_batch
from ..padding import padded
from ..schedules import schedulers_of, try_schedules
from ..unread import refuse_unread
from ..val_trial import ends_of, in_words, try_annotations, untouched, warn_of_other_order
from .foreign_hooks import refuse_hooks
from .resuming import checkpoint_folders

_TRIES = 20  # samples that are tried to find one that the pipeline can use


def refuse_late_failures(runner: Runner) -> None:
    """Raises PrivacyError, naming the key, for anything that would end this training after privacy was spent."""
    refuse_unread(runner.cfg)
    refuse_hooks(runner.hooks)
    _try_log(runner)
    with untouched_training(runner):
        _try_records(runner)
        with _quiet():
            metrics = _try_validation(runner)
    _check_checkpoints(runner, metrics)
    _check_monitors(runner, metrics)
    _check_averages(runner)
    try_schedules(runner)


@contextmanager
def untouched_training(runner: Runner) -> Iterator[None]:
    """Restores random generators, the model's modes and buffers, and the private random source afterwards."""
    model, dataset = unwrapped(runner.model), runner.train_dataloader.dataset
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes, secret, dataset.random = [(m, m.training) for m in model.modules()], dataset.random, RandomSource()
    try:
        with kept_randomness(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a warning could name a record
            yield
    finally:
        dataset.random = secret
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the terminal what metrics print: scores of two samples look like those of the model."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


# ---- training ------------------------------------------------------------------------------------------------------
def _try_records(runner: Runner) -> None:
    """Runs a sample of each part, and one of each pipeline that a hook will switch to, through the model and its loss."""
    dataset, wrapper = runner.train_dataloader.dataset, runner.optim_wrapper
    model = unwrapped(runner.model).train()
    for name, indices in indices_of_parts(dataset):
        packed = first_usable(dataset, indices)
        if packed is not None:
            try_batch(model, blank_batch(packed), f'train_dataloader.dataset.{name}', wrapper.amp_dtype)
            refuse_early_mixing(model, blank_batch(packed, 3), f'train_dataloader.dataset.{name}')
            rehearse(wrapper, padded(blank_batch(packed, 2), 3), f'train_dataloader.dataset.{name}')
            refuse_loss_of_unseen_joints(wrapper, packed, f'train_dataloader.dataset.{name}')
    for hook in runner.hooks:
        steps = getattr(hook, 'switch_pipeline', None)
        if isinstance(steps, (list, tuple)):
            _try_switch(dataset, model, wrapper.amp_dtype, steps, type(hook).__name__)


def first_usable(dataset: PublicPrivateDataset, indices: range) -> dict | None:
    """The first packed sample that the pipeline can use, if there is one among the first few."""
    return next((samples[0] for samples in (dataset[i] for i in indices[:_TRIES]) if samples), None)


def indices_of_parts(dataset: PublicPrivateDataset) -> list[tuple[str, range]]:
    """The config key of each part of a data set, and the indices of its samples."""
    found, start = [], 0
    for name, part in dataset.parts().items():
        found.append((name, range(start, start + len(part))))
        start += len(part)
    return found


def _try_switch(dataset: PublicPrivateDataset, model: nn.Module, dtype: Any, steps: Any, hook: str) -> None:
    """Runs one sample through a pipeline that ``hook`` will switch to, then restores the old one."""
    olds = [(part, part.pipeline) for part in (dataset.private, dataset.views) if part is not None]
    key = f'custom_hooks: switch_pipeline of {hook}'
    try:
        dataset.pipeline = list(steps)
        packed = first_usable(dataset, range(len(dataset.private)))
        if packed is None:
            raise DataError(f'{key}: the pipeline fails on the first samples of train_dataloader.dataset.private')
        try_batch(model, blank_batch(packed), key, dtype)
    except PrivacyError:
        raise
    except Exception as error:  # a transform can raise anything
        raise ConfigError(f'{key} cannot be built: {failure(error)}') from error
    finally:
        for part, pipeline in olds:
            part.pipeline = pipeline
        dataset.try_first_samples()  # the forms of samples are those of the old pipeline again
        dataset.switched = False


# ---- validation ----------------------------------------------------------------------------------------------------
def _try_validation(runner: Runner) -> dict[str, Any] | None:
    """Validates the first and the last sample as training will, and returns the metrics; None if nothing is validated."""
    loop = runner.val_loop
    if not isinstance(loop, ValLoop):
        return None
    dataset, stage = loop.dataloader.dataset, 'the pipeline of val_dataloader.dataset'
    warn_of_other_order(runner.train_dataloader.dataset.metainfo, getattr(dataset, 'metainfo', None) or {})
    ends = ends_of(dataset)
    try:
        with untouched(loop.evaluator.metrics):
            batch = loop.dataloader.collate_fn([dataset[i] for i in ends])
            stage = 'the model, in predicting val_dataloader.dataset'
            model: Any = unwrapped(runner.model).eval()
            with autocast(enabled=loop.fp16):
                outputs = model.val_step(batch)
            stage = 'val_evaluator'
            loop.evaluator.process(data_samples=outputs, data_batch=batch)
            metrics = loop.evaluator.evaluate(len(outputs))
        for hook in _foreign(runner.hooks):
            stage = f'the hook {type(hook).__name__}, after a validation batch,'
            one = copy.copy(hook)  # the hook may keep a count
            one.before_val(runner)
            one.before_val_epoch(runner)
            one.before_val_iter(runner, batch_idx=0, data_batch=batch)
            one.after_val_iter(runner, batch_idx=0, data_batch=batch, outputs=outputs)
    except Exception as error:
        count = 'two' if len(ends) == 2 else len(ends)
        raise ConfigError(
            f'{stage} fails on {count} samples, as it would after the first epochs: {in_words(dataset, error)}'
        ) from error
    _try_all_annotations(loop, outputs[0])
    return metrics


def _try_all_annotations(loop: ValLoop, output: Any) -> None:
    """What fails in a single annotation, such as a key that it lacks."""
    dataset = loop.dataloader.dataset
    try:
        with untouched(loop.evaluator.metrics):
            given = try_annotations(loop, output)
            if given:
                loop.evaluator.evaluate(given)
    except PrivacyError:
        raise
    except Exception as error:  # whatever a metric meets
        raise ConfigError(
            'val_evaluator fails on the annotations of val_dataloader.dataset, as it would after the first epochs: '
            + in_words(dataset, error)
        ) from error


def _foreign(hooks: list[Hook]) -> list[Hook]:
    """The hooks of MMPose or the user that act after a validation batch."""
    named = [(hook, type(hook).after_val_iter.__module__) for hook in hooks]
    return [hook for hook, module in named if module.split('.')[0] not in ('mmengine', 'mmpose_dp')]


# ---- hooks ---------------------------------------------------------------------------------------------------------
def _check_checkpoints(runner: Runner, metrics: dict[str, Any] | None) -> None:
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            _check_checkpoint_settings(hook)
            _check_other_settings(runner, hook)
            _check_best(hook, metrics)
            _check_folder(runner, hook)


def _check_checkpoint_settings(hook: CheckpointHook) -> None:
    key = 'default_hooks.checkpoint'
    for name in ('interval', 'max_keep_ckpts', 'save_begin'):
        if type(getattr(hook, name, 0)) is not int:
            raise ConfigError(f'{key}.{name}={getattr(hook, name)!r} must be a whole number')
    published = getattr(hook, 'published_keys', None)
    if published:
        raise ConfigError(
            f'{key}.published_keys={published!r} writes a file that does not say what its training has spent, so that a training '
            "from it would not know either, and its meta holds the config's paths: take it out, and give the checkpoint to "
            'tools/publish_model.py'
        )
    try:
        distinct = hook.filename_tmpl.format(1) != hook.filename_tmpl.format(2)
    except (AttributeError, IndexError, KeyError, ValueError):
        distinct = False
    if not distinct:
        raise ConfigError(
            f"{key}.filename_tmpl={hook.filename_tmpl!r} must hold one {{}} for the epoch, such as 'epoch_{{}}.pth'"
        )


def _check_other_settings(runner: Runner, hook: CheckpointHook) -> None:
    """Refuses settings that the hook does not know: it gives them to save_checkpoint, after the first epochs."""
    given = getattr(hook, 'args', None) or {}
    known = dict.fromkeys(('save_optimizer', 'save_param_scheduler', 'meta', 'by_epoch', 'backend_args'))
    try:
        inspect.signature(runner.save_checkpoint).bind('', '', None, **known, **given)
    except TypeError as error:
        raise ConfigError(
            f'default_hooks.checkpoint has {", ".join(given)}, which CheckpointHook does not know: correct the name, or take it out'
        ) from error


def _check_best(hook: CheckpointHook, metrics: dict[str, Any] | None) -> None:
    """Refuses a ``save_best`` that is not among the metrics."""
    if hook.save_best is None or not metrics:
        return
    first, key = next(iter(metrics)), 'default_hooks.checkpoint'
    missing = [name for name in hook.save_best if name != 'auto' and name not in metrics]
    if missing:
        raise ConfigError(
            f'{key}.save_best={missing[0]!r}: val_evaluator gives {", ".join(metrics)}; write one of them'
        )
    if 'auto' in hook.save_best:
        trial = copy.copy(hook)
        trial.is_better_than = {}
        try:
            trial._init_rule(list(hook.rules), [first])
        except ValueError as error:
            raise ConfigError(
                f"{key}.rule is needed with save_best='auto', since it is not known whether a larger {first} is better: write "
                "rule='greater' or rule='less'"
            ) from error


def _check_folder(runner: Runner, hook: CheckpointHook) -> None:
    """Refuses a folder to which checkpoints cannot be written."""
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
    except Exception as error:  # an OSError, or anything from a storage backend
        raise ConfigError(f'{where}: checkpoints cannot be written to {folder}: {failure(error)}') from error


def _size_of_checkpoint(runner: Runner, hook: CheckpointHook) -> int:
    """Bytes of the weights and, if the optimizer is saved, of its two moments."""
    trained = sum(p.numel() for p in runner.optim_wrapper.params) if hook.save_optimizer else 0
    return sum(x.numel() * x.element_size() for x in unwrapped(runner.model).state_dict().values()) + 8 * trained


def _check_averages(runner: Runner) -> None:
    """Refuses averages of the weights that begin after the last step, where mmengine stops without a key."""
    loop = runner.train_loop
    for hook in (hook for hook in runner.hooks if isinstance(hook, EMAHook)):
        key, last = ('begin_epoch', loop.max_epochs) if hook.enabled_by_epoch else ('begin_iter', loop.max_iters)
        if getattr(hook, key) > last:
            raise ConfigError(
                f'custom_hooks: {type(hook).__name__}.{key}={getattr(hook, key)} is after the end of this training, {last}: write '
                'a smaller number, or take the hook out'
            )


def _try_log(runner: Runner) -> None:
    """Writes a line of the log, of made-up numbers: the first one is written after the step that it is of."""
    hub, processor = runner.message_hub, copy.deepcopy(runner.log_processor)
    kept = dict(hub.log_scalars)
    names = {
        'lr',
        'time',
        'data_time',
        'epsilon',
        *(one.get('data_src') for one in getattr(processor, 'custom_cfg', ())),
    }
    try:
        hub.log_scalars.update({f'train/{name}': HistoryBuffer([1.0], [1]) for name in names})
        processor.get_log_after_iter(runner, 0, 'train')
    except Exception as error:  # of mmengine, or of a processor of one's own
        raise ConfigError(f'log_processor cannot write a line of the log: {failure(error)}') from error
    finally:
        hub.log_scalars.clear()
        hub.log_scalars.update(kept)


def _check_monitors(runner: Runner, metrics: dict[str, Any] | None) -> None:
    """Refuses a monitor of a metric that validation does not give."""
    if metrics is None:
        return
    waiting = [('EarlyStoppingHook', hook.monitor) for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]
    waiting += [('param_scheduler', s.monitor) for s in schedulers_of(runner) if hasattr(s, 'monitor')]
    for name, monitor in waiting:
        if monitor not in metrics:
            raise ConfigError(
                f'{name}.monitor={monitor!r}: val_evaluator gives {", ".join(metrics)}; write one of them'
            )
