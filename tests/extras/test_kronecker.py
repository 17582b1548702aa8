"""The Kronecker projector: its coordinates and the way back, which of them it keeps, and that clipping bounds every record."""

import math

import pytest
import torch
from torch import nn

from mmpose_dp.extras.kronecker import KroneckerProjector, basis_bytes, in_passes, matrix_shape, projector_class
from mmpose_dp.gradients.blocks import StackBlock
from mmpose_dp.privacy.errors import ConfigError, DataError, PrivacyError
from mmpose_dp.privacy.mechanism import GaussianMechanism
from mmpose_dp.privacy.records import Samples
from mmpose_dp.tensors import as_vectors

# a convolution, a transposed and a depthwise one, a norm's weight, a position embedding, a number
SHAPES = [(6, 4, 3, 3), (5, 3, 2, 2), (8, 1, 3, 3), (7,), (1, 9, 4), ()]


def gradients(count, seed=0, shapes=SHAPES):
    """Per-sample gradients with few large directions per side."""
    numbers = torch.Generator().manual_seed(seed)
    found = []
    for shape in shapes:
        rows, columns = matrix_shape(torch.Size(shape))
        left, right = torch.logspace(0, -2, rows), torch.logspace(0, -2, columns)
        one = torch.randn(count, rows, columns, generator=numbers) * left[:, None] * right
        found.append(one.view(count, *shape))
    return found


def fitted(shapes=SHAPES, **settings):
    projector = KroneckerProjector(**{**dict(rank=24, width=3), **settings})
    params = [torch.zeros(shape) for shape in shapes]
    projector.fit(params, [[gradients(8, 10 * n + k, shapes) for k in range(3)] for n in range(3)])
    return projector


def dense(projector):
    """V, (p, k), from its columns."""
    columns = [torch.cat([b[k].flatten() for b in projector.basis]) for k in range(projector.rank)]
    return torch.stack(columns, 1)


def flat(parts):
    return torch.cat([as_vectors(p) for p in parts], 1)


def test_coordinates_and_the_way_back_are_v_transposed_and_v():
    projector = fitted()
    V, g, c = dense(projector), gradients(5, 99), torch.randn(projector.rank)
    assert V.square().sum(0).mean() == pytest.approx(1, rel=1e-4)
    whole = projector.coordinates(range(len(SHAPES)), flat(g))
    torch.testing.assert_close(whole, flat(g) @ V, rtol=1e-4, atol=1e-5)
    # blocks of some parameters add up to it
    parts = [projector.coordinates([i], flat([g[i]])) for i in range(len(SHAPES))]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.cat([x.flatten() for x in projector.expand(c)]), V @ c, rtol=1e-4, atol=1e-5)
    assert [x.shape for x in projector.expand(c)] == [torch.Size(s) for s in SHAPES]
    one = [x[0] for x in g]
    torch.testing.assert_close(projector.coordinates_of(one), whole[0], rtol=1e-4, atol=1e-5)
    projected = torch.cat([x.flatten() for x in projector.project(one)])
    torch.testing.assert_close(projected, V @ (V.T @ flat(g)[0]), rtol=1e-3, atol=1e-5)


def test_the_columns_are_orthogonal_and_hold_what_public_gradients_are_made_of():
    projector = fitted()
    V = dense(projector)
    gram = V.T @ V
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-4)
    directions = V / V.norm(dim=0)
    others = flat(gradients(200, 7))
    kept = (others @ directions).square().sum() / others.square().sum()
    assert projector.rank == 24 and kept > 0.7  # 24 of 392 numbers
    random = torch.linalg.qr(torch.randn(V.shape)).Q
    assert (others @ random).square().sum() / others.square().sum() < 0.3


def test_coordinates_are_scaled_by_their_public_mean_square():
    """All but the smallest have about the same mean square, so that a few of them do not decide what is clipped."""
    V, others = dense(fitted(rank=40)), flat(gradients(400, 8))
    plain = (others @ (V / V.norm(dim=0))).square().mean(0)
    large = plain > 0.2 * plain.mean()
    scaled = (others @ V).square().mean(0)[large]
    assert scaled.max() / scaled.min() < 5 < 20 < plain[large].max() / plain[large].min()


@pytest.mark.parametrize('rank', [1, 12, 10**6])
def test_no_more_coordinates_than_there_are_or_are_asked_for(rank):
    projector = fitted(rank=rank)
    sides = [[min(3, side) for side in matrix_shape(torch.Size(shape))] for shape in SHAPES]
    assert projector.rank == min(rank, sum(math.prod(pair) for pair in sides))
    assert projector.no_coordinates(4).shape == (4, projector.rank)


def test_every_record_weighs_at_most_c_whatever_the_basis_is():
    projector = fitted()
    for scale in (1.0, 1e6):
        for factors in projector.basis:
            factors.scale = factors.scale * scale
        g = gradients(6, 3)
        params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        mechanism = GaussianMechanism(params, 0.5, projector=projector)
        collector = mechanism.collector(Samples.from_keys(range(6)))
        for index, grads in enumerate(g):
            collector.add(StackBlock([index], grads))
        alone = []
        for record in range(6):
            one = mechanism.collector(Samples.from_keys([record]))
            for index, grads in enumerate(g):
                one.add(StackBlock([index], grads[record : record + 1]))
            alone.append(one.total()[0])
        assert max(float(x.norm()) for x in alone) <= 0.5
        torch.testing.assert_close(collector.total()[0], sum(alone), rtol=1e-4, atol=1e-6)


def test_a_record_that_is_not_finite_contributes_nothing():
    projector, params = fitted(), [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    g = gradients(2, 3)
    g[0][1] = math.nan
    collector = GaussianMechanism(params, 0.5, projector=projector).collector(Samples.from_keys(range(2)))
    for index, grads in enumerate(g):
        collector.add(StackBlock([index], grads))
    alone = GaussianMechanism(params, 0.5, projector=projector).collector(Samples.from_keys([0]))
    for index, grads in enumerate(g):
        alone.add(StackBlock([index], grads[:1]))
    torch.testing.assert_close(collector.total(), alone.total())


def test_public_gradients_that_are_not_finite_are_left_out():
    batches = [[gradients(8, 10 * n)] for n in range(3)]
    clean, dirty = KroneckerProjector(rank=20, width=3), KroneckerProjector(rank=20, width=3)
    params = [torch.zeros(shape) for shape in SHAPES]
    clean.fit(params, batches)
    more = [[[torch.cat([x, torch.full_like(x[:1], math.nan)]) for x in batch] for batch in part] for part in batches]
    dirty.fit(params, more)
    torch.testing.assert_close(dense(dirty).abs(), dense(clean).abs(), rtol=1e-3, atol=1e-4)


def test_no_usable_gradient_and_wrong_settings_are_refused():
    zeros = [torch.zeros(2, *shape) for shape in SHAPES]
    with pytest.raises(DataError, match='no usable gradient'):
        KroneckerProjector().fit([torch.zeros(shape) for shape in SHAPES], [[zeros]] * 3)
    for settings, name in ((dict(rank=0), 'projector.rank'), (dict(width=0), 'projector.width')):
        with pytest.raises(ConfigError, match=name):
            KroneckerProjector(**settings)
    with pytest.raises(PrivacyError, match='no basis yet'):
        KroneckerProjector().no_coordinates(1)
    with pytest.raises(
        ConfigError, match=r"type='Kronecker' is unknown; write one of \('Projector', 'KroneckerProjector'\)"
    ):
        projector_class(dict(type='Kronecker'))


def test_the_passes_share_no_sample_and_the_memory_is_that_of_the_factors():
    parts = in_passes(list(range(10)))
    assert sorted(x for part in parts for x in part) == list(range(10)) and len(parts) == 3
    params = [torch.zeros(64, 32, 3, 3)]
    assert basis_bytes(KroneckerProjector(rank=100, width=8), params) == 4 * 8 * (64 + 288) + 1200
