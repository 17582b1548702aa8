"""Tensors as tables: what is joined comes apart again."""

import torch

from mmpose_dp.tensors import parts_of

SHAPES = [torch.Size(shape) for shape in ((2, 3), (), (0,), (4,))]


def test_parts_are_views_in_their_order():
    flat = torch.arange(22.0).view(2, 11)
    parts = parts_of(flat, SHAPES)
    assert [part.shape for part in parts] == [(2, *shape) for shape in SHAPES]
    assert torch.equal(torch.cat([part.reshape(2, -1) for part in parts], 1), flat)
    parts[1].zero_()
    assert flat[0, 6] == flat[1, 6] == 0
    assert parts_of(torch.zeros(0, 0), []) == []
    assert [part.shape for part in parts_of(flat[0], SHAPES)] == SHAPES  # also of a shape ()
