"""Rules of one's own: each layer type with its rule, against one backward per sample."""

import pytest
import torch
from torch import nn

from mmpose_dp.gradients import Engine, layer_rules, register_rule, rule_for
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.core import loop_engine, sample_gradients_of


class Scale(nn.Module):
    """A layer that torch does not have."""

    def __init__(self, channels=4):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        return x * self.gain[:, None, None]


class Halved(nn.Linear):
    """A subclass of a known layer with a forward of its own: no shortcut of its parent's rule may serve it."""

    def forward(self, input):
        return super().forward(input) / 2


class Shifted(nn.BatchNorm2d):
    """The same for a BatchNorm, whose rule is fused with its backward."""

    def forward(self, input):
        return super().forward(input) * 3 + 1


def scale(module, x, grad):
    return {'gain': (x * grad).sum((2, 3))}


def halved(module, x, grad):
    weight = torch.einsum('nchi,ncho->noi', x, grad) / 2
    return {'weight': weight, 'bias': grad.sum((1, 2)) / 2}


def shifted(module, x, grad):
    return {name: 3 * g for name, g in layer_rules.batch_norm(module, x, grad).items()}


CUSTOM = {'new': (Scale, scale), 'linear': (lambda: Halved(8, 8), halved), 'norm': (lambda: Shifted(4).eval(), shifted)}


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    monkeypatch.setattr(layer_rules, '_RULES', dict(layer_rules._RULES))


def losses(engine, model, x):
    with engine.capture():
        out = model(x).flatten(1)
    return torch.tanh(out).square().mean(1)


@pytest.mark.parametrize('name', CUSTOM)
def test_a_registered_rule_is_autograd(name):
    torch.manual_seed(0)
    make, rule = CUSTOM[name]
    layer = make()
    assert rule_for(layer) is None
    register_rule(type(layer), rule)
    model, x, samples = nn.Sequential(nn.Conv2d(4, 4, 1), layer), torch.randn(3, 4, 8, 8), torch.arange(3)
    params, weights = list(model.parameters()), torch.tensor([0.5, 0.0, 2.0])
    engine, loop = Engine(model, params, kind='rules'), loop_engine(model, params)
    assert set(engine.gradient_methods().values()) == {'rule'}
    ours, reference = (sample_gradients_of(e, losses(e, model, x)) for e in (engine, loop))
    for mine, theirs in (
        *zip(ours.per_sample(samples), reference.per_sample(samples)),
        *zip(ours.weighted_sum(weights), reference.weighted_sum(weights)),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ('rule', 'message'),
    [
        (lambda module, x, grad: {'gain': (x * grad).sum((2, 3)) * 2}, '1.gain is not what autograd finds'),
        (lambda module, x, grad: {}, r"the rule of 1 returns no gradient for its parameters \['gain'\]"),
    ],
)
def test_a_wrong_rule_is_refused_on_the_first_batch(rule, message):
    register_rule(Scale, rule)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Scale())
    engine = Engine(model, list(model.parameters()))
    with pytest.raises(PrivacyError, match=message):
        sample_gradients_of(engine, losses(engine, model, torch.randn(3, 4, 8, 8))).per_sample(torch.arange(3))


def test_a_subclass_with_a_forward_of_its_own_is_not_served():
    class Other(Scale):
        def forward(self, x):
            return super().forward(x) + 1

    register_rule(Scale, scale)
    assert rule_for(Scale()) is scale
    assert rule_for(Other()) is None
