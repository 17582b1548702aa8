"""Collates packed samples into batches, and splits batches into records. Must not add, drop or repeat a sample."""

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.registry import FUNCTIONS

from mmpose_dp.privacy.errors import DataError

from .steps import OfStep


def by_record(batch: dict[str, list]) -> list[dict[str, list]]:
    """Splits a collated batch into one part per record; the public samples are one part together.

    FeatureMaskingHead.loss explains ``dp_record``, by which the samples are split.
    """
    parts: dict[int | None, list[int]] = {}
    for index, sample in enumerate(batch['data_samples']):
        parts.setdefault(sample.metainfo.get('dp_record', -1 - index), []).append(index)
    return [{key: [values[index] for index in part] for key, values in batch.items()} for part in parts.values()]


@FUNCTIONS.register_module()
def collate_samples(items: Sequence[Sequence[dict]]) -> dict[str, Any]:
    """Collates the packed samples of several indices into the batch that MMPose's preprocessor takes. It may be empty.

    If the sampler attached a ``Step``, the batch holds it under ``step``; the train loop removes it.

    Raises DataError for images of different sizes: the preprocessor would pad each to the largest, and so reveal the others.
    """
    batch: dict[str, Any] = {
        key: [packed[key] for samples in items for packed in samples] for key in ('inputs', 'data_samples')
    }
    sizes = {tuple(image.shape) for image in batch['inputs']}
    if len(sizes) > 1:
        raise DataError(
            f'train_dataloader.dataset gives images of different sizes, {sorted(sizes)[:3]}: put TopdownAffine, with one '
            'input_size, into the pipeline'
        )
    if isinstance(items, OfStep):
        batch['step'] = items.step
    return batch


def batches_of(dataset: Any, samples: Sequence[int], size: int) -> Iterator[dict[str, Any]]:
    """Collates ``size`` samples of a data set at a time. A sample that cannot be used is left out, and so is an empty batch."""
    for start in range(0, len(samples), size):
        batch = collate_samples([dataset[i] for i in samples[start : start + size]])
        if batch['inputs']:
            yield batch
