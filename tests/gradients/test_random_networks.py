"""Networks put together at random from supported layers agree with the loop over single records."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmpose_dp.gradients.engine import Engine
from tests.support.core import loop_engine, looped, sample_gradients_of

C, SIDE, SAMPLES = 4, 6, 3


class Last(nn.Module):
    """A layer on the last dimension."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if (
            x.requires_grad
        ):  # torch 2.13's own backward of an instance norm misreads other strides where there is one sample
            x.register_hook(lambda grad: grad.contiguous())
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


class Folded(nn.Module):
    """Samples split into windows within the leading dimension."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        x = x.unflatten(2, (2, SIDE // 2)).transpose(1, 2).flatten(0, 1)
        return self.layer(x).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)


class Loose(nn.Module):
    """A parameter of no layer, used in place or not."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.value = nn.Parameter(torch.randn((1, C, SIDE, SIDE) if kind == 'position' else (C, 1, 1)))

    def forward(self, x):
        if self.kind == 'position':
            return x + self.value
        if self.kind == 'in place':
            return (x + 1).mul_(self.value)
        return x * F.softplus(self.value)


def frozen(norm):
    norm.eval()
    nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm


LAYERS = {
    'conv': lambda: nn.Conv2d(C, C, 3, padding=1),
    'dilated': lambda: nn.Conv2d(C, C, 3, padding=2, dilation=2, bias=False),
    'grouped': lambda: nn.Conv2d(C, C, 3, padding=1, groups=2),
    'depthwise': lambda: nn.Conv2d(C, C, 5, padding=2, groups=C),
    'pointwise': lambda: nn.Conv2d(C, C, 1),
    'reflected': lambda: nn.Conv2d(C, C, 3, padding=1, padding_mode='reflect'),
    'deconv': lambda: nn.ConvTranspose2d(C, C, 3, padding=1),
    'batch norm': lambda: frozen(nn.BatchNorm2d(C)),
    'group norm': lambda: nn.GroupNorm(2, C),
    'instance norm': lambda: nn.InstanceNorm2d(C, affine=True),
    'layer norm': lambda: Last(nn.LayerNorm(C)),
    'linear': lambda: Last(nn.Linear(C, C)),
    'windows': lambda: Folded(nn.Conv2d(C, C, 3, padding=1)),
    'position': lambda: Loose('position'),
    'scale': lambda: Loose('scale'),
    'scale in place': lambda: Loose('in place'),
    'prelu': lambda: nn.PReLU(C),
}
# what is done with a layer's output: nothing, an in-place activation, an in-place residual
AFTER = ('', 'relu_', 'silu_', 'residual_')


class Network(nn.Module):
    """``steps``: (layer, how often it is called, what follows)."""

    def __init__(self, steps):
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[name]() for name, _, _ in steps)
        self.steps = steps

    def forward(self, x):
        for layer, (_, calls, after) in zip(self.layers, self.steps):
            for _ in range(calls):
                y = layer(x)
                if after == 'relu_':
                    y = F.relu(y, inplace=True)
                elif after == 'silu_':
                    y = F.silu(y, inplace=True)
                elif after == 'residual_':
                    y += x
                x = y
        return x


STEPS = st.tuples(st.sampled_from(sorted(LAYERS)), st.integers(1, 2), st.sampled_from(AFTER))


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=6), st.integers(0, 2**16))
def test_a_random_network_agrees_with_the_loop(steps, seed):
    torch.manual_seed(seed)
    model = Network(steps).double()
    params, x = list(model.parameters()), torch.randn(SAMPLES, C, SIDE, SIDE, dtype=torch.float64)

    def gradients(engine):
        with engine.capture():
            out = model(x).flatten(1)
        return sample_gradients_of(engine, torch.tanh(out).square().mean(1) + out[:, 0])

    rules, loop = Engine(model, params), loop_engine(model, params)
    ours, reference = gradients(rules), gradients(loop)
    assert not looped(rules)
    samples, weights = torch.tensor([1, 2]), torch.tensor([0.5, 0.0, 2.0])
    for mine, theirs in (
        *zip(ours.per_sample(samples), reference.per_sample(samples)),
        *zip(ours.weighted_sum(weights), reference.weighted_sum(weights)),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * max(1.0, float(theirs.abs().max())))
