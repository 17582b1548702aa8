"""Fills forwards of private samples up to one size with blank samples. Must not change a sample, or add one of a record.

PyTorch chooses kernels, and orders sums, by the shape of a forward. If the shape followed the number of records in a step, one
record more would change the last bits of all others' gradients, and could move one of their ReLUs across its kink. In forwards of
one shape, a record's gradient does not depend on the others, or on its place among them (docs/guarantee.md, "Rounding").
"""

import copy
from typing import Any

import torch

from mmpose_dp.models.heads.private_head import labels_in
from mmpose_dp.privacy.records import PADDING


def padded(batch: dict, size: int) -> dict:
    """A collated batch, filled up at its end with blank samples to ``size`` samples; unchanged if it has as many or more."""
    missing = size - len(batch['inputs'])
    if missing <= 0:
        return batch
    blanks = [_blank(batch['data_samples'][0]) for _ in range(missing)]
    pictures = [torch.full_like(batch['inputs'][0], 127) for _ in range(missing)]
    return dict(inputs=[*batch['inputs'], *pictures], data_samples=[*batch['data_samples'], *blanks])


def _blank(sample: Any) -> Any:
    """A data sample of the same form, whose labels are all 0.5, or 0 where they are whole numbers."""
    blank = copy.deepcopy(sample)
    for value in labels_in(blank):
        value.fill_(0.5 if value.is_floating_point() else 0)
    if 'gt_instances' in blank:
        del blank.gt_instances
    blank.set_metainfo(dict(dp_record=PADDING, dp_weight=1.0, img_path='', id=-1, img_id=-1))
    return blank
