"""Per-sample gradients against the loop over single records, in fp32, layer by layer; and every refusal."""

import pytest
import torch
from torch import nn

from mmpose_dp.gradients.engine import Engine
from mmpose_dp.gradients.layer_rules import rule_for
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.core import Tied, loop_engine, looped, sample_gradients_of


class Residual(nn.Module):
    """In-place ReLU and in-place residual add, as everywhere in MMPose."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False))
        self.norm1, self.norm2 = nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4).eval()
        self.relu = nn.ReLU(inplace=True)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, x):
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        return self.relu(out)


class Shared(nn.Module):
    """One layer called three times."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(torch.tanh(self.conv(x))) + self.conv(x)


class Windows(nn.Module):
    """Samples split into windows that are folded into the leading dimension, as in Swin."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.conv = nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = x.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)  # (2n, 4, 4, 8)
        x = self.conv(x)
        return self.norm(self.linear(x.movedim(1, -1))).unflatten(0, (-1, 2)).flatten(1, 2)


LAYERS = {
    'conv': nn.Conv2d(4, 6, 3, stride=2, padding=1),
    'conv dilated': nn.Conv2d(4, 6, 3, dilation=2, bias=False),
    'conv grouped': nn.Conv2d(4, 8, (3, 2), groups=2, padding=(1, 0)),
    'conv depthwise': nn.Conv2d(4, 4, 5, groups=4, padding=2),
    'conv 1x1': nn.Conv2d(4, 6, 1),
    'deconv': nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
    'deconv output padding': nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
    'deconv grouped': nn.ConvTranspose2d(4, 6, 3, groups=2),
    'batch norm': nn.BatchNorm2d(4).eval(),
    'group norm': nn.GroupNorm(2, 4),
    'instance norm': nn.InstanceNorm2d(4, affine=True),
    'layer norm': nn.LayerNorm((4, 8, 8)),
    'layer norm last': nn.LayerNorm(8),
    'linear on samples': nn.Sequential(nn.Flatten(), nn.Linear(256, 5)),
    'linear on any rank': nn.Linear(8, 5),
    'residual': Residual(),
    'shared': Shared(),
    'windows': Windows(),
    'no gradient': nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1).requires_grad_(False)),
}


def sample_losses(model, x, engine):
    with engine.capture():
        out = model(x)
    return out.flatten(1).square().mean(1) + out.flatten(1)[:, 0]


@pytest.mark.parametrize('name', LAYERS)
def test_every_rule_agrees_with_the_loop(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), LAYERS[name])  # the first layer proves that gradients pass through
    params = [p for p in model.parameters() if p.requires_grad]
    x, samples, weights = torch.randn(3, 4, 8, 8), torch.arange(3), torch.tensor([0.5, 0.0, 2.0])
    rules, loop = Engine(model, params), loop_engine(model, params)
    ours, reference = (sample_gradients_of(e, sample_losses(model, x, e)) for e in (rules, loop))
    for mine, theirs in zip(ours.per_sample(samples), reference.per_sample(samples)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(ours.weighted_sum(weights), reference.weighted_sum(weights)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    # and the loop itself against one record alone
    for i in range(3):
        alone = torch.autograd.grad(sample_losses(model, x[i : i + 1], loop).sum(), params)
        for theirs, one in zip(reference.per_sample(samples), alone):
            torch.testing.assert_close(theirs[i], one, rtol=1e-4, atol=1e-6)


def test_a_sample_that_is_not_finite_leaves_the_others_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    engine = Engine(model, list(model.parameters()))
    x = torch.randn(3, 4, 8, 8)
    clean = sample_gradients_of(engine, sample_losses(model, x, engine)).weighted_sum(torch.tensor([1.0, 0.0, 1.0]))
    x[1] = float('nan')
    dirty = sample_gradients_of(engine, sample_losses(model, x, engine)).weighted_sum(torch.tensor([1.0, 0.0, 1.0]))
    for a, b in zip(clean, dirty):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_samples_that_mix_are_refused_beside_a_sample_that_is_not_finite():
    """A record with a NaN loss does not switch the check off for the batch it is in."""

    class Swapping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return torch.cat([y[:1], y[1:] + y[1:].flip(0)])  # the first sample keeps to itself

    model, x = Swapping(), torch.randn(3, 4, 8, 8)
    x[0] = float('nan')
    engine = Engine(model, list(model.parameters()))
    with pytest.raises(PrivacyError, match='another'):
        engine.backward(sample_losses(model, x, engine))


@pytest.mark.parametrize('kind', [Engine, loop_engine])
def test_samples_that_mix_are_refused(kind):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(x) + self.conv(x).mean(0, keepdim=True)

    model = Mixing()
    engine = kind(model, list(model.parameters()))
    with pytest.raises(PrivacyError, match='from conv on.*another'):
        engine.backward(sample_losses(model, torch.randn(3, 4, 8, 8), engine))


def test_a_layer_that_does_not_keep_samples_outermost_is_refused():
    class Transposing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):  # (n, 4, 8, 8) -> (4 * n, ...) with the samples innermost
            y = self.linear(x.transpose(0, 1).flatten(0, 1))
            return y.unflatten(0, (4, -1)).transpose(0, 1)

    model = Transposing()
    engine = Engine(model, list(model.parameters()))
    with pytest.raises(PrivacyError, match='samples outermost'):
        engine.backward(sample_losses(model, torch.randn(3, 4, 8, 8), engine))


def test_a_weight_used_outside_its_layer_is_refused():
    model = Tied()
    engine = Engine(model, list(model.parameters()))
    with pytest.raises(PrivacyError, match="linear.weight.*engine='loop'"):
        engine.backward(sample_losses(model, torch.randn(3, 4, 8, 8), engine))


def test_what_has_no_rule():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.scale

    class OtherConv(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    for module in (
        Scale(),
        OtherConv(4, 4, 1),
        nn.BatchNorm2d(4),  # in train mode
        nn.Conv2d(4, 4, 3, padding_mode='reflect'),
        nn.Conv2d(4, 4, 3, padding='same'),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
    ):
        assert rule_for(module) is None
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Scale())
    params = list(model.parameters())
    for kind in ('auto', 'rules'):
        assert str(Engine(model, params, kind=kind)) == '1 layers by rule, 1 parameters by their operations, 0 looped'
    assert set(loop_engine(model, params).gradient_methods().values()) == {'loop'}
    with pytest.raises(PrivacyError, match="'auto', 'rules' or 'loop'"):
        Engine(model, params, kind='fast')
    with pytest.raises(PrivacyError, match='not the model'):
        Engine(model[:1], params)


def test_a_loss_that_learns_gets_one_backward_per_sample():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.loss_module = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.first(x)

    torch.manual_seed(0)
    model = Odd()
    params, x, samples = list(model.parameters()), torch.randn(3, 4, 8, 8), torch.arange(3)

    def losses(engine):
        with engine.capture():
            out = model(x)
            return torch.stack([model.loss_module(sample).square().mean() for sample in out.split(1)])

    rules, loop = Engine(model, params, [model.loss_module]), loop_engine(model, params)
    assert looped(rules) == ['loss_module.weight', 'loss_module.bias']
    ours, reference = (sample_gradients_of(e, losses(e)) for e in (rules, loop))
    for mine, theirs in zip(ours.per_sample(samples), reference.per_sample(samples)):
        assert mine.any()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    with pytest.raises(PrivacyError, match=r'loss_module.weight.*engine="auto".*freeze'):
        strict = Engine(model, params, [model.loss_module], 'rules')
        strict.backward(losses(strict))


def test_no_graph_is_refused():
    model = nn.Conv2d(4, 4, 1)
    engine = Engine(model, list(model.parameters()))
    with torch.no_grad(), pytest.raises(PrivacyError, match='with_cp'), engine.capture():
        model(torch.randn(2, 4, 8, 8))
