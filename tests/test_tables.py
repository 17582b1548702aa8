"""Tensors as tables: what is joined comes apart again."""

import torch

from mmpose_dp.tables import SmallTogether, parts_of

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


def test_narrow_tables_wait_and_wide_ones_do_not():
    together, wide = SmallTogether(), torch.zeros(2, SmallTogether._NARROW)
    narrow = [torch.full((2, width), float(width)) for width in (3, 1)]
    assert together.rest() == []
    assert together.add(7, narrow[0]) == [] and together.add(5, narrow[1]) == []
    ((numbers, table),) = together.add(6, wide)
    assert numbers == [6] and table is wide
    ((numbers, table),) = together.rest()
    assert numbers == [7, 5] and torch.equal(table, torch.cat(narrow, 1))
    assert together.rest() == []
