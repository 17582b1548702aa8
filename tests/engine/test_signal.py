"""r, the length of the mean clipped gradient: against its definition over all pairs, whatever clips, and in a subspace."""

import math

import pytest
import torch
from torch import nn

from mmpose_dp.engine.signal import MeanLength, measure
from mmpose_dp.extras.clipping_variants import MECHANISMS
from mmpose_dp.privacy.clipping import clipping_norm
from mmpose_dp.privacy.errors import DataError
from mmpose_dp.privacy.mechanism import GaussianMechanism
from mmpose_dp.privacy.projection import Projector
from tests.support.core import place

NORM = 0.5
SHAPES = (4, 3), (5,)


def params():
    return [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]


def batches(common, count=4, size=3):
    """Per-sample gradients with a common part."""
    torch.manual_seed(0)
    return [[common + torch.randn(size, *shape) for shape in SHAPES] for _ in range(count)]


def pairs(vectors):
    """The root of the mean product of two different batches' vectors; (batches, samples, p)."""
    sums = vectors.sum(1).double()
    total = sums.sum(0) @ sums.sum(0) - sum(x @ x for x in sums)
    return math.sqrt(max(float(total), 0) / (len(vectors) * (len(vectors) - 1) * vectors.shape[1] ** 2)) / NORM


def clipped(found):
    flat = torch.stack([torch.cat([g.flatten(1) for g in batch], 1) for batch in found])
    return flat * (clipping_norm(NORM) / flat.norm(dim=-1, keepdim=True)).clamp_max(1)


def test_r_is_that_of_all_pairs_of_batches():
    found = batches(0.5)
    r = measure(GaussianMechanism(params(), NORM), found, {'all': (range(2), None), 'bias': ([1], None)})
    assert r['all'] == pytest.approx(pairs(clipped(found)), rel=1e-5)
    assert r['bias'] == pytest.approx(pairs(clipped([batch[1:] for batch in found])), rel=1e-5)


def test_r_has_no_part_of_the_spread():
    """The mean of few random vectors is long; r is not."""
    length = MeanLength(GaussianMechanism(params(), NORM), range(2))
    found = batches(0.0, 200, 2)
    for batch in found[:20]:
        length.add(batch)
    short = clipped(found[:20]).flatten(0, 1).mean(0).norm() / NORM
    assert short > 0.12 and length.r < 0.1


def test_one_direction_gives_one_and_opposite_ones_give_zero():
    same = [[torch.ones(2, *shape) for shape in SHAPES]] * 3
    assert measure(GaussianMechanism(params(), NORM), same, {'a': (range(2), None)})['a'] == pytest.approx(0.999)
    opposite = [[sign * torch.ones(2, *shape) for shape in SHAPES] for sign in (1, -1)]
    assert measure(GaussianMechanism(params(), NORM), opposite, {'a': (range(2), None)})['a'] == 0.0


@pytest.mark.parametrize('clipping', MECHANISMS)
def test_every_kind_of_clipping_can_be_measured(clipping):
    r = measure(MECHANISMS[clipping](params(), NORM), batches(2.0), {'a': (range(2), None)})['a']
    assert 0.5 < r < 1


@pytest.mark.parametrize('order', ['project-then-clip', 'noise-then-project'])
def test_in_a_subspace_only_what_it_keeps_counts(order):
    projector = Projector(rank=2, order=order)
    basis = torch.linalg.qr(torch.randn(17, 2, generator=torch.Generator().manual_seed(1)))[0].T
    place(projector, [basis[:, :12].reshape(2, 4, 3), basis[:, 12:].reshape(2, 5)])
    found = batches(0.3)
    flat = torch.stack([torch.cat([g.flatten(1) for g in batch], 1) for batch in found])
    if order == 'project-then-clip':
        flat = flat @ basis.T
        wanted = flat * (clipping_norm(NORM) / flat.norm(dim=-1, keepdim=True)).clamp_max(1)
    else:
        wanted = clipped(found) @ basis.T
    r = measure(GaussianMechanism(params(), NORM), found, {'s': (range(2), projector)})['s']
    assert r == pytest.approx(pairs(wanted), rel=1e-4)


def test_one_batch_is_too_few():
    with pytest.raises(DataError, match='two batches'):
        measure(GaussianMechanism(params(), NORM), batches(1.0, 1), {'a': (range(2), None)})
