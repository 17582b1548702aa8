"""Samples that depend on one another are refused, whichever they are and whatever is NaN; others are left alone."""

import pytest
import torch
from torch import nn

from mmpose_dp.gradients.engine import Engine
from mmpose_dp.privacy.clipping import ClippedSum
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.records import Samples
from tests.support.core import Tied, loop_engine, looped

C = 0.1


class Carry(nn.Module):
    """Each sample sees the one before it; the first keeps to itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        return torch.cat([y[:1], y[1:] + torch.tanh(y[:-1])])


class OneSided(Carry):
    """Each sample sees the one after it."""

    def forward(self, x):
        y = self.conv(x)
        return torch.cat([y[:-1] + torch.tanh(y[1:]), y[-1:]])


def losses(model, x, engine):
    with engine.capture():
        out = model(x).flatten(1)
    return out.square().mean(1) + out[:, 0]


@pytest.mark.parametrize('kind', [Engine, loop_engine])
@pytest.mark.parametrize('model', [Carry, OneSided])
def test_samples_that_depend_on_those_on_one_side(model, kind):
    model = model()
    engine = kind(model, list(model.parameters()))
    with pytest.raises(PrivacyError, match='another'):
        engine.backward(losses(model, torch.randn(4, 4, 8, 8), engine))


@pytest.mark.parametrize('kind', [Engine, loop_engine])
@pytest.mark.parametrize('unreadable', [slice(None), slice(0, 1), slice(3, 4)])
def test_a_batch_with_nan_does_not_switch_the_check_off(kind, unreadable):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    engine = kind(model, list(model.parameters()))
    x = torch.randn(4, 4, 8, 8)
    x[unreadable] = float('nan')
    engine.backward(losses(model, x, engine))
    mixing = lambda x: (lambda y: y + y.mean(0, keepdim=True))(model(x))  # noqa: E731
    with pytest.raises(PrivacyError, match='another'):
        engine.backward(losses(mixing, torch.randn(4, 4, 8, 8), engine))


def test_nan_in_the_first_batch_does_not_switch_the_check_of_the_sum_off():
    model, x = Tied(), torch.randn(3, 8)
    engine = Engine(model, list(model.parameters()))

    def backward(hidden):
        with engine.capture():
            out = model(x)
        out.register_hook(lambda grad: grad * torch.tensor([[float('nan') if hidden else 1.0], [1.0], [1.0]]))
        engine.backward(out.square().mean(1))

    backward(hidden=True)
    with pytest.raises(PrivacyError, match='linear.weight'):
        backward(hidden=False)


class Innermost(nn.Module):
    """Its scale has no rule and meets the samples in the middle: it is looped."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 8, 1, 1))

    def forward(self, x):
        return torch.tanh(x.permute(1, 2, 0, 3) * self.scale).permute(2, 0, 1, 3)


@pytest.mark.parametrize('first_is_finite', [True, False])
def test_what_is_looped_wants_one_record_at_a_time(first_is_finite):
    """In one graph, 0 * NaN would carry one sample's NaN into the others' gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Innermost())
    engine = Engine(model, list(model.parameters()))
    x = torch.randn(3, 4, 8, 8)
    if not first_is_finite:
        x[1] = float('nan')
    engine.backward(losses(model, x, engine))
    assert looped(engine) and engine.one_at_a_time
    assert loop_engine(model, engine.params).one_at_a_time


def test_a_loss_with_parameters_keeps_samples_apart():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.loss_module = nn.Linear(8, 8), nn.Linear(8, 8)

    torch.manual_seed(0)
    model = Head()
    engine = Engine(model, list(model.parameters()), [model.loss_module])
    x = torch.randn(5, 8)

    def total(x):
        with engine.capture():
            out = model.first(x)
            each = [model.loss_module(sample).square().mean() for sample in out.split(1)]
        collector = ClippedSum(engine.params, Samples.from_keys(range(len(x))), C)
        engine.backward(each, collector)
        return torch.cat([t.flatten() for t in collector.total()])

    total(x)
    wild = x.clone()
    wild[3] = float('nan')
    torch.testing.assert_close(total(wild), total(x[[0, 1, 2, 4]]))
    assert not engine.one_at_a_time


class FrozenMixer(nn.Module):
    """Mixes samples where nothing is trained, as a frozen BatchNorm without statistics of its own does."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.conv.requires_grad_(False)

    def forward(self, x):
        y = self.conv(x)
        return self.last(y - y.mean(0, keepdim=True))


@pytest.mark.parametrize('kind', [Engine, loop_engine])
def test_samples_that_mix_in_a_frozen_part(kind):
    model = FrozenMixer()
    engine = kind(model, list(model.last.parameters()))
    with pytest.raises(PrivacyError, match='from (the images|conv) on'):
        engine.backward(losses(model, torch.randn(4, 4, 8, 8), engine))


@pytest.mark.parametrize('kind', [Engine, loop_engine])
@pytest.mark.parametrize('silent', [[0, 3], [0, 1, 2, 3], [1, 2, 3]])
def test_samples_without_a_loss_do_not_switch_the_check_off(kind, silent):
    """Nobody is annotated in them, so that they have no gradient that could be seen to reach another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    engine = kind(model, list(model.parameters()))
    weights = torch.ones(4)
    weights[silent] = 0
    mixing = lambda x: (lambda y: y + y.mean(0, keepdim=True))(model(x))  # noqa: E731
    with pytest.raises(PrivacyError, match='another'):  # noqa: PT012
        for loud in (weights, torch.ones(4)):
            engine.backward(losses(mixing, torch.randn(4, 4, 8, 8), engine) * loud)
    assert not engine._unmixed
