"""From the packed rows of a data set to batches, and from a batch to its records. Must not add, drop or repeat a row."""

from collections.abc import Sequence
from typing import Any

from mmengine.registry import FUNCTIONS

from mmpose_dp.privacy.errors import PrivacyError

from .steps import OfStep


def by_record(batch: dict[str, list]) -> list[dict[str, list]]:
    """A collated batch in parts of one record each; public rows are one part. See FeatureMaskingHead.loss for ``dp_record``."""
    parts: dict[int | None, list[int]] = {}
    for row, sample in enumerate(batch['data_samples']):
        parts.setdefault(sample.metainfo.get('dp_record', -1 - row), []).append(row)
    return [{key: [values[row] for row in rows] for key, values in batch.items()} for rows in parts.values()]


@FUNCTIONS.register_module()
def collate_samples(items: Sequence[Sequence[dict]]) -> dict[str, Any]:
    """The packed rows of several indices to the batch that MMPose's preprocessor takes; an empty draw is empty.

    Where the sampler says which ``Step`` they are of, the batch holds it as ``step``, for the train loop to take out.

    Raises PrivacyError for images of different sizes: the preprocessor would pad each to the largest, and so show the others.
    """
    batch: dict[str, Any] = {key: [row[key] for rows in items for row in rows] for key in ('inputs', 'data_samples')}
    sizes = {tuple(image.shape) for image in batch['inputs']}
    if len(sizes) > 1:
        raise PrivacyError(
            f'train_dataloader.dataset gives images of different sizes, {sorted(sizes)[:3]}: put TopdownAffine, with one '
            'input_size, into the pipeline'
        )
    if isinstance(items, OfStep):
        batch['step'] = items.step
    return batch
