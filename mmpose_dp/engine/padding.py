"""Fills forwards of private samples up to one size. Must not change a sample, and must not add one that is anybody's.

Kernels are chosen, and sums are ordered, by the shape of a forward. If the shape followed the number of records in a step, one
record more would change the last bits of all others' gradients, and could tip one of their ReLUs over its kink. In forwards of
one shape, a record's gradient is the same to the bit whoever else is there, and in whichever place (tests/test_zoo.py).
"""

import copy
from typing import Any

import torch

from mmpose_dp.models.heads.private_head import labels_in
from mmpose_dp.privacy.records import PADDING


def padded(batch: dict, size: int) -> dict:
    """A collated batch with as many samples that are nobody's at its end as it takes to have ``size``; none if it has more."""
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
