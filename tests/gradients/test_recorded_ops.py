"""Parameters of no known layer, followed through the operations that use them, against the loop over single records."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmpose_dp.gradients.engine import Engine
from tests.support.core import loop_engine, looped, sample_gradients_of

SAMPLES = 3


def table(*shape):
    return nn.Parameter(torch.randn(*shape))


class Positions(nn.Module):
    """A class token and position embeddings, as in ViT."""

    def __init__(self):
        super().__init__()
        self.token, self.positions, self.linear = table(1, 1, 8), table(1, 33, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x.flatten(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), dim=1)
        return self.linear(torch.tanh(x + self.positions[:, :33]))


class Attention(nn.Module):
    """Windows folded into the leading dimension and a relative position table, as in Swin; an in-place layer scale."""

    def __init__(self):
        super().__init__()
        self.qkv, self.table, self.gamma = nn.Linear(8, 24), table(9, 2), table(8)
        self.register_buffer('index', torch.arange(16) % 9)

    def forward(self, x):
        x = x.flatten(1, 2).unflatten(1, (8, 4)).flatten(0, 1)  # (8 n, 4, 8)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].view(4, 4, -1).permute(2, 0, 1).contiguous()
        attention = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        return (attention @ v).transpose(1, 2).flatten(2).mul_(self.gamma).unflatten(0, (-1, 8))


class Tied(nn.Module):
    """One weight in two layers, and a scale used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), table(1)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.second(torch.tanh(self.first(x)) * self.scale)
        x += self.scale
        return x


class Gated(nn.Module):
    """einsum with a parameter, as in RTMPose's gated attention unit."""

    def __init__(self):
        super().__init__()
        self.gamma, self.beta, self.w = table(2, 8), table(2, 8), table(65)

    def forward(self, x):
        x = x.flatten(1, 2)
        q, k = torch.unbind(torch.einsum('...r,hr->...hr', x, self.gamma) + self.beta, dim=-2)
        bias = F.pad(self.w, [0, 32]).repeat(32)[..., :-32].reshape(-1, 32, 96)[..., :32]
        return torch.bmm(torch.square(F.relu(q @ k.transpose(1, 2) / 32 + bias)), x)


class Multihead(nn.Module):
    """torch's attention, samples in the second dimension inside."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        x = x.flatten(1, 2).transpose(0, 1)
        return self.attention(x, x, x)[0].transpose(0, 1)


MODULES = {
    'positions': (Positions, 0),
    'attention': (Attention, 0),
    'tied': (Tied, 0),
    'gated': (Gated, 0),
    'multihead': (Multihead, 0),
    'weight norm': (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), 0),
    'reflected padding': (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), 0),
    'same padding': (lambda: nn.Conv2d(4, 4, 3, padding='same'), 0),
    'prelu': (nn.PReLU, 0),
    # what is not followed is found to be so, and looped over
    'random': (lambda: Random(), 1),
    'written': (lambda: Written(), 1),
    'innermost': (lambda: Innermost(), 1),
}


class Random(nn.Module):
    """A function that is not the same when run again."""

    def __init__(self):
        super().__init__()
        self.table = table(4, 8, 8)

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.table, dropout_p=0.5)


class Written(nn.Module):
    """A parameter written into a tensor of samples by an assignment."""

    def __init__(self):
        super().__init__()
        self.token = table(8)

    def forward(self, x):
        x = x * 2
        x[:, :, 0] = self.token
        return torch.tanh(x)


class Innermost(nn.Module):
    """Samples in the third dimension."""

    def __init__(self):
        super().__init__()
        self.scale = table(4, 8, 1, 1)

    def forward(self, x):
        return torch.tanh(x.permute(1, 2, 0, 3) * self.scale).permute(2, 0, 1, 3)


@pytest.mark.parametrize('name', MODULES)
def test_agrees_with_the_loop(name):
    make, by_loop = MODULES[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), make())
    params, x = list(model.parameters()), torch.randn(SAMPLES, 4, 8, 8)
    rules, loop = Engine(model, params), loop_engine(model, params)

    def losses(engine):
        torch.manual_seed(1)
        with engine.capture():
            out = model(x).flatten(1)
        return out.square().mean(1) + out[:, 0]

    for _ in range(2):  # the second forward finds nothing left over from the first
        torch.manual_seed(1)
        ours, reference = (sample_gradients_of(e, losses(e)) for e in (rules, loop))
        if name != 'random':  # the engines do not sample the same dropout
            for mine, theirs in zip(ours.per_sample(torch.tensor([2, 0])), reference.per_sample(torch.tensor([2, 0]))):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
            weights = torch.tensor([0.5, 0.0, 2.0])
            for mine, theirs in zip(ours.weighted_sum(weights), reference.weighted_sum(weights)):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert len(looped(rules)) == by_loop
    assert not rules._recorder.uses  # nothing of a batch is held when it is done
    assert f'{by_loop} looped' in str(rules)


def test_one_sample_alone_and_frozen_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Positions())
    model[1].token.requires_grad_(False)
    params, x = [p for p in model.parameters() if p.requires_grad], torch.randn(1, 4, 8, 8)
    for samples in (1, 2):
        ours, reference = (
            sample_gradients_of(engine, _losses(model, x.repeat(samples, 1, 1, 1), engine))
            for engine in (Engine(model, params), loop_engine(model, params))
        )
        for mine, theirs in zip(ours.per_sample(torch.arange(samples)), reference.per_sample(torch.arange(samples))):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def _losses(model, x, engine):
    with engine.capture():
        return model(x).flatten(1).square().mean(1)
