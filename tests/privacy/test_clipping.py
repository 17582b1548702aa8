"""The sensitivity: whatever one record holds, it moves the clipped sum by at most C."""

import pytest
import torch
from torch import nn

from mmpose_dp.extras.clipping_variants import automatic_factors
from mmpose_dp.gradients import layer_rules
from mmpose_dp.gradients.blocks import LayerBlock
from mmpose_dp.gradients.engine import Engine
from mmpose_dp.privacy.clipping import ClippedCoordinates, ClippedSum, clip_factors
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.records import PADDING, Samples
from tests.support.core import loop_engine, mechanism, place

C = 0.1


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 5))


def collect(collector, model, x, kind=Engine):
    engine = kind(model, list(model.parameters()))
    with engine.capture():
        out = model(x)
    engine.backward(out.square().sum(1), collector)
    return flat(collector.total())


def clipped_sum(model, x, samples, kind=Engine):
    return collect(ClippedSum(list(model.parameters()), samples, C), model, x, kind)


def samples_of(count):
    return Samples.from_keys(range(count))


def reference(model, x):
    """Per-record gradients, flat: the loop over single records."""
    flat = []
    for one in x:
        grads = torch.autograd.grad(model(one[None]).square().sum(), list(model.parameters()))
        flat.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(flat)


def clip(g, c=C):
    return g * (c / g.norm(dim=1, keepdim=True)).clamp_max(1)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize('narrow', [0, 10, 1 << 12])  # no parameter waits for the others, some do, all do
def test_parameters_that_are_joined_give_the_same_sum(model, narrow, monkeypatch):
    monkeypatch.setattr(ClippedSum, '_NARROW', narrow)
    x, params = torch.randn(4, 3, 6, 6), list(model.parameters())
    torch.testing.assert_close(clipped_sum(model, x, samples_of(4)), clip(reference(model, x)).sum(0))
    basis = Projector(rank=3)
    place(basis, [torch.randn(3, *p.shape) for p in params])
    collector = ClippedCoordinates(samples_of(4), C, basis)
    total = collect(collector, model, x)
    torch.testing.assert_close(total, clip(reference(model, x) @ basis.flat.T).sum(0), rtol=1e-4, atol=1e-6)
    assert torch.equal(flat(collector.total()), total)  # whoever asks twice gets the same


@pytest.mark.parametrize('kind', [Engine, loop_engine])
def test_clipped_sum_is_the_reference(model, kind):
    x = torch.randn(6, 3, 6, 6) * torch.tensor([1e-4, 0.01, 0.1, 1, 10, 100]).view(6, 1, 1, 1)
    got = clipped_sum(model, x, samples_of(6), kind)
    torch.testing.assert_close(got, clip(reference(model, x)).sum(0), rtol=1e-4, atol=1e-6)


def test_samples_of_one_record_are_added_before_the_norm(model):
    x = torch.randn(5, 3, 6, 6)
    samples = Samples.from_keys([7, None, 7, 3, None])
    g = reference(model, x)
    want = clip(torch.stack([g[0] + g[2], g[3]])).sum(0)
    torch.testing.assert_close(clipped_sum(model, x, samples), want, rtol=1e-4, atol=1e-6)


KINDS = [
    *('flat', 'automatic', 'adaptive', 'per-parameter'),
    *('flat, projected', 'automatic, projected', 'adaptive, projected'),
]


@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3, 1e25, float('inf'), float('nan')])
@pytest.mark.parametrize('kind', KINDS)
def test_one_record_moves_the_sum_by_at_most_c(model, scale, kind):
    x = torch.randn(4, 3, 6, 6)
    x[2] *= scale
    basis = [5 * torch.randn(3, *p.shape) for p in model.parameters()]  # far from orthonormal

    def total(batch):
        inside = Projector(rank=3)
        place(inside, basis)
        clipping, _, space = kind.partition(', ')
        params = list(model.parameters())
        collector = mechanism(params, C, inside if space else None, clipping).collector(samples_of(len(batch)))
        return collect(collector, model, batch)

    moved = total(x) - total(x[[0, 1, 3]])
    assert moved.isfinite().all()
    assert moved.norm() <= C  # with the rounding of all the others


@pytest.mark.parametrize('kind', ['flat', 'automatic', 'adaptive'])
def test_a_record_of_two_samples_leaves_the_norms_of_the_others(kind):
    """Norms that are found without the gradient are rounded up, by much where a record's positions all but cancel."""
    torch.manual_seed(0)
    layer, x, grads = nn.Linear(256, 256), torch.randn(8, 1, 256).repeat(1, 2, 1), torch.randn(1, 256)
    grads = torch.stack([grads, -grads], 1).repeat(8, 1, 1) + 1e-3 * torch.randn(256)
    grads[6:] = 0  # these two samples add nothing by themselves

    def total(*keys):
        collector = mechanism(list(layer.parameters()), C, clipping=kind).collector(Samples.from_keys(keys))
        block = LayerBlock(layer, layer_rules.Layer('', layer_rules.outer_product, ['weight', 'bias'], [0, 1]))
        block.calls = [(x[:, None], grads[:, None])]
        assert block.ghost_squares(range(8)) is not None
        collector.add(block)
        return flat(collector.total())

    alone = total(0, 1, 2, 3, 4, 5, PADDING, PADDING)
    assert alone.norm() > C / 10
    assert (total(0, 1, 2, 3, 4, 5, 6, 6) - alone).norm() <= C


def test_coordinates_are_projected_then_clipped(model):
    x = torch.randn(4, 3, 6, 6)
    projector = Projector(rank=3)
    place(projector, [torch.randn(3, *p.shape) for p in model.parameters()])
    V = torch.cat([b.flatten(1) for b in projector.basis], 1)
    want = clip(reference(model, x) @ V.T).sum(0)
    torch.testing.assert_close(
        collect(ClippedCoordinates(samples_of(4), C, projector), model, x), want, rtol=1e-4, atol=1e-6
    )


def test_clip_factors():
    norms = torch.tensor([0.0, 0.05, 0.1, 0.2, float('inf'), float('nan')])
    assert torch.allclose(clip_factors(norms, C), torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0, 0.0]))
    automatic = torch.tensor([C / 0.01, C / 0.06, C / 0.11, C / 0.21, 0.0, 0.0])
    assert torch.allclose(automatic_factors(norms, C), automatic)


def test_a_ghost_norm_of_very_small_factors_is_not_nothing(monkeypatch):
    """Squared by themselves, output gradients of 1e-23 are 0 in float32; times inputs of 1e19 they are a gradient."""
    monkeypatch.setattr(layer_rules, '_TRAFFIC', 1e9)
    model = nn.Linear(1, 4096, bias=False)
    params, x = list(model.parameters()), torch.full((2, 1), 1e19)
    engine, collector = Engine(model, params), ClippedSum(params, samples_of(2), 1e-3)
    with engine.capture():
        out = model(x)
    engine.backward((out * 2.6e-23).sum(1), collector)
    assert 0 < flat(collector.total()).norm() <= 2 * 1e-3 * (1 + 1e-5)
