"""Checks ``train_cfg`` and the data loaders: what they may not hold is refused by name. Must not sample or train anything."""

from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler, default_collate, pseudo_collate
from mmengine.registry import FUNCTIONS
from mmpose.registry import DATA_SAMPLERS

from mmpose_dp.datasets import collate_samples
from mmpose_dp.datasets.resolving import resolved
from mmpose_dp.privacy.errors import PrivacyError

from ..leftovers import without_deletions

# what means nothing without workers
_WORKERS = ('persistent_workers', 'prefetch_factor', 'multiprocessing_context', 'timeout')


def check_train_cfg(
    max_epochs: Any, public_epochs: Any, val_begin: Any, val_interval: Any, dynamic_intervals: Any, others: dict
) -> list[tuple[int, int]] | None:
    """Raises PrivacyError, naming the key, for what PrivateTrainLoop cannot take; returns ``dynamic_intervals`` as mmengine
    wants them."""
    for key, value in others.items():
        if key == 'max_iters':
            hint = 'write max_epochs, each of num_records // expected_batch_size steps, in its place'
        else:
            hint = 'PrivateTrainLoop takes max_epochs, public_epochs, val_begin, val_interval and dynamic_intervals'
        if key not in ('_delete_', 'by_epoch') or (key == 'by_epoch' and value is not True):
            raise PrivacyError(f'train_cfg.{key}={value!r} cannot be used in private training: {hint}')
    if type(max_epochs) is not int or max_epochs < 1:
        raise PrivacyError(f'train_cfg.max_epochs={max_epochs!r} must be a whole number above 0')
    if type(public_epochs) is not int or not 0 <= public_epochs <= max_epochs:
        raise PrivacyError(
            f'train_cfg.public_epochs={public_epochs!r} must be a whole number between 0 and max_epochs={max_epochs!r}: write '
            'both in train_cfg, since without a number of yours public_epochs is that of the recipe'
        )
    for key, value, low in (('val_begin', val_begin, 0), ('val_interval', val_interval, 1)):
        if type(value) is not int or value < low:
            raise PrivacyError(f'train_cfg.{key}={value!r} must be a whole number, {low} or above')
    if dynamic_intervals is None:
        return None
    pairs = [tuple(pair) if isinstance(pair, (list, tuple)) else pair for pair in _listed(dynamic_intervals)]
    fit = [isinstance(pair, tuple) and [type(x) for x in pair] == [int, int] and min(pair) >= 1 for pair in pairs]
    if not all(fit) or pairs != sorted(pairs):
        raise PrivacyError(
            f'train_cfg.dynamic_intervals={dynamic_intervals!r} must be like [(20, 1)], epoch and interval from there on, in '
            'the order of the epochs'
        )
    return pairs


def refuse_lost_annotations(evaluator: Any) -> None:
    """Raises PrivacyError for a metric whose ``ann_file`` is not there."""
    for metric in _listed(evaluator):
        file = metric.get('ann_file') if isinstance(metric, dict) else None
        if isinstance(file, str) and '://' not in file and not Path(file).is_file():
            raise PrivacyError(
                f'val_evaluator.ann_file={file}: there is no such file. Write the annotation file of val_dataloader.dataset'
            )


def about_detections(loader: Any, error: Exception) -> str:
    """What is wrong with ``val_dataloader.dataset.bbox_file``, where it is likely to be what ``error`` is about; else empty.

    Args:
        loader: the config of the data loader.
        error: what MMPose raised.
    """
    dataset = loader.get('dataset') if isinstance(loader, dict) else None
    file = dataset.get('bbox_file') if isinstance(dataset, dict) else None
    instead = 'Write the detections in these pictures, or bbox_file=None for the annotated boxes'
    if file and isinstance(error, KeyError):
        return f'. Probably since {file} (bbox_file) has detections in a picture that ann_file does not have. {instead}'
    if file and 'need at least one array' in str(error):  # mmengine's, for a data set without samples
        return f'. Probably since {file} (bbox_file) has no detection of a person (category_id 1). {instead}'
    return ''


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def train_loader(settings: dict) -> dict:
    """``train_dataloader`` as PrivateTrainLoop builds it. Raises PrivacyError for what it would not follow."""
    collate = settings.get('collate_fn')
    kind = resolved(FUNCTIONS, collate.get('type') if isinstance(collate, dict) else collate)
    if collate is not None and kind not in (pseudo_collate, default_collate, collate_samples):
        raise PrivacyError(
            'train_dataloader.collate_fn cannot be used: private training collates samples itself, since each must keep its '
            'record. Take it out'
        )
    sampler = settings.get('sampler')
    if isinstance(sampler, dict):
        named = resolved(DATA_SAMPLERS, sampler.get('type'))
        if named not in (DefaultSampler, InfiniteSampler):
            raise PrivacyError(
                f'train_dataloader.sampler.type={sampler.get("type")!r} would have no effect: batch_sampler samples each record '
                "independently. Write sampler=dict(type='DefaultSampler', shuffle=True)"
            )
    if settings.get('num_batch_per_epoch') is not None:
        raise PrivacyError(
            'train_dataloader.num_batch_per_epoch cannot be used: an epoch is num_records // expected_batch_size steps. Take it out'
        )
    # drop_last is a batch sampler's, and Poisson batches are as large as they are
    kept = {key: value for key, value in settings.items() if key != 'drop_last'}
    kept.setdefault('sampler', dict(type='DefaultSampler'))
    kept.setdefault('pin_memory', torch.cuda.is_available())  # from which a GPU copies by itself
    return without_deletions({**without_idle_workers(kept), 'collate_fn': dict(type='collate_samples')})


def without_idle_workers(settings: dict) -> dict:
    """A data loader's settings without those of worker processes where there are none: torch would stop for them."""
    idle = _WORKERS if not settings.get('num_workers') else ()
    return {key: value for key, value in settings.items() if key not in idle}
