"""Bare modules over odd shapes, as Opacus' own tests have them: each engine gives what single records give, or refuses."""

import copy

import pytest
import torch
from torch import nn

from mmpose_dp.gradients.blocks import PerSampleGradients
from mmpose_dp.gradients.engine import Engine
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.records import Samples
from tests.support.core import loop_engine, mechanism, place

CLIPPINGS = ('flat', 'automatic', 'adaptive', 'per-parameter', 'project-then-clip')
C = 0.5


class Around(nn.Module):
    """A module called in its own way."""

    def __init__(self, module, call):
        super().__init__()
        self.m, self._call = module, call

    def forward(self, x):
        return self._call(self.m, x)


class Scalars(nn.Module):
    """Parameters of shape (), alone, in a list and in a dict."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.tensor(2.0))
        self.many = nn.ParameterList([nn.Parameter(torch.randn(5)), nn.Parameter(torch.tensor(0.3))])
        self.named = nn.ParameterDict({'a': nn.Parameter(torch.tensor(0.7))})

    def forward(self, x):
        return torch.tanh(x * self.one + self.many[1]) * self.many[0] - self.named['a']


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def pictures(*shape):
    return torch.randn(3, *shape)


def indices(*shape):
    return torch.randint(0, 7, (3, *shape))


def first(module, x):
    return module(x)[0]


def samples_second(module, x):
    out = module(x.transpose(0, 1))
    return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)


def itself(module, x):
    return module(x, x, x)[0]


def bag(**settings):
    return nn.EmbeddingBag(7, 5, **settings)


# name: (module, input of 3 samples); made where they are used, each by the same seed
SERVED = {
    'scalars': lambda: (Scalars(), pictures(5)),
    'samples of numbers': lambda: (nn.PReLU(), pictures()),
    'conv 1d': lambda: (nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=1), pictures(4, 9)),
    'conv 1d same': lambda: (nn.Conv1d(4, 6, 4, padding='same'), pictures(4, 8)),
    'conv 1d circular': lambda: (nn.Conv1d(4, 6, 3, padding=2, padding_mode='circular'), pictures(4, 8)),
    'conv 3d': lambda: (nn.Conv3d(2, 4, (3, 2, 1), padding=(1, 0, 0)), pictures(2, 4, 5, 3)),
    'conv 3d depthwise': lambda: (nn.Conv3d(2, 4, 2, groups=2, stride=2), pictures(2, 4, 5, 4)),
    'conv valid': lambda: (nn.Conv2d(3, 4, 3, padding='valid'), pictures(3, 6, 6)),
    'conv replicate': lambda: (nn.Conv2d(3, 4, 3, padding=1, padding_mode='replicate'), pictures(3, 6, 6)),
    'conv reflect': lambda: (nn.Conv2d(3, 4, 1, padding_mode='reflect'), pictures(3, 6, 6)),
    'conv 1x1 padded': lambda: (nn.Conv2d(3, 4, 1, padding=1), pictures(3, 6, 6)),
    'conv wide stride': lambda: (nn.Conv2d(3, 4, 2, stride=5), pictures(3, 9, 8)),
    'conv channels last': lambda: (
        Around(nn.Conv2d(4, 6, 3), lambda m, x: m(x.to(memory_format=torch.channels_last))),
        pictures(4, 5, 5),
    ),
    'deconv 1d': lambda: (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), pictures(4, 5)),
    'deconv 3d': lambda: (nn.ConvTranspose3d(2, 4, 3, stride=2, groups=2, bias=False), pictures(2, 3, 2, 3)),
    'deconv': lambda: (
        nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=2, padding=1, output_padding=1, groups=2),
        pictures(4, 5, 4),
    ),
    'deconv wide output padding': lambda: (
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 2), dilation=3, output_padding=2, padding=2),
        pictures(4, 9, 8),
    ),
    'deconv output size': lambda: (
        Around(nn.ConvTranspose2d(4, 6, 3, stride=3), lambda m, x: m(x, output_size=[17, 16])),
        pictures(4, 5, 5),
    ),
    'layer norm': lambda: (nn.LayerNorm((4, 5)), pictures(2, 4, 5)),
    'layer norm 1d': lambda: (nn.LayerNorm(5, bias=False), pictures(5)),
    'rms norm': lambda: (nn.RMSNorm(5), pictures(3, 5)),
    'group norm': lambda: (nn.GroupNorm(2, 4), pictures(4, 7)),
    'group norm no places': lambda: (nn.GroupNorm(2, 4), pictures(4)),
    'group norm 3d': lambda: (nn.GroupNorm(2, 4), pictures(4, 2, 3, 2)),
    'instance norm 1d': lambda: (nn.InstanceNorm1d(4, affine=True), pictures(4, 7)),
    'instance norm 3d': lambda: (nn.InstanceNorm3d(4, affine=True), pictures(4, 2, 3, 2)),
    'instance norm tracked': lambda: (
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
        pictures(4, 5, 5),
    ),
    'batch norm no places': lambda: (nn.BatchNorm1d(4).eval(), pictures(4)),
    'batch norm 1d': lambda: (nn.BatchNorm1d(4).eval(), pictures(4, 6)),
    'batch norm 3d': lambda: (nn.BatchNorm3d(4).eval(), pictures(4, 2, 2, 3)),
    'batch norm by keyword': lambda: (Around(nn.BatchNorm2d(4).eval(), lambda m, x: m(input=x)), pictures(4, 5, 5)),
    'linear by keyword': lambda: (Around(nn.Linear(5, 7), lambda m, x: m(input=x)), pictures(5)),
    'embedding': lambda: (nn.Embedding(7, 5, padding_idx=2), indices(6)),
    'embedding 1d': lambda: (nn.Embedding(7, 5), indices()),
    'embedding sparse': lambda: (nn.Embedding(7, 5, sparse=True), indices(4)),
    'bag': lambda: (bag(padding_idx=2), indices(4)),
    'bag sum': lambda: (bag(mode='sum', sparse=True), indices(4)),
    'bag max': lambda: (bag(mode='max'), indices(4)),
    'bag offsets': lambda: (Around(bag(), lambda m, x: m(x.flatten(), torch.arange(len(x)) * x.shape[1])), indices(4)),
    'bag weights': lambda: (
        Around(bag(mode='sum'), lambda m, x: m(x, per_sample_weights=torch.cos(x.to(m.weight.dtype)))),
        indices(4),
    ),
    'bilinear': lambda: (Around(nn.Bilinear(5, 5, 3), lambda m, x: m(x, x.cos())), pictures(2, 5)),
    'lstm': lambda: (Around(nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True), first), pictures(4, 5)),
    'lstm cell': lambda: (Around(nn.LSTMCell(5, 4), first), pictures(5)),
    'attention': lambda: (Around(nn.MultiheadAttention(6, 2, batch_first=True), itself), pictures(4, 6)),
    'attention samples second': lambda: (
        Around(nn.MultiheadAttention(6, 2), lambda m, x: itself(m, x.transpose(0, 1)).transpose(0, 1)),
        pictures(4, 6),
    ),
    'attention of three sizes': lambda: (
        Around(
            nn.MultiheadAttention(6, 2, kdim=3, vdim=3, batch_first=True, add_bias_kv=True),
            lambda m, x: m(x, x[..., :3], x[..., 3:])[0],
        ),
        pictures(4, 6),
    ),
    'encoder': lambda: (nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), pictures(4, 6)),
    'prelu': lambda: (nn.PReLU(4), pictures(4, 5)),
    'weight norm': lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), pictures(5)),
    'spectral norm': lambda: (nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)).eval(), pictures(5)),
    'spectral norm by hooks': lambda: (nn.utils.spectral_norm(nn.Linear(5, 4)).eval(), pictures(5)),
    'tied': lambda: (Tied(), indices(4)),
}
# the fast engine says which one serves them
BY_LOOP = {
    'rnn': lambda: (Around(nn.RNN(5, 4, batch_first=True), first), pictures(6, 5)),
    'gru': lambda: (Around(nn.GRU(5, 4, batch_first=True), first), pictures(6, 5)),
    'lstm samples second': lambda: (Around(nn.LSTM(5, 4, proj_size=2), samples_second), pictures(6, 5)),
    'encoder samples second': lambda: (
        Around(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0), samples_second),
        pictures(4, 6),
    ),
    'linear samples second': lambda: (Around(nn.Linear(5, 7), samples_second), pictures(4, 5)),
    'linear samples third': lambda: (
        Around(nn.Linear(5, 7), lambda m, x: m(x.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)),
        pictures(4, 2, 5),
    ),
    'linear, as many places as samples': lambda: (Around(nn.Linear(5, 7), samples_second), pictures(3, 5)),
    'linear samples innermost': lambda: (
        Around(nn.Linear(5, 7), lambda m, x: m(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (4, -1)).transpose(0, 1)),
        pictures(4, 5),
    ),
    'sample by sample': lambda: (
        Around(nn.Linear(5, 7), lambda m, x: torch.stack([m(sample) for sample in x])),
        pictures(5),
    ),
}
REFUSED = {
    'batch norm': (lambda: (nn.BatchNorm2d(4), pictures(4, 3, 3)), 'No engine'),
    'batch norm without statistics': (
        lambda: (nn.BatchNorm2d(4, track_running_stats=False).eval(), pictures(4, 3, 3)),
        'No engine',
    ),
    'sum': (
        lambda: (Around(nn.Linear(5, 7), lambda m, x: m(x) + m(x).sum((0, 1))), pictures(3, 5)),
        'from m on.*No engine',
    ),
    'cumulative': (lambda: (Around(nn.Linear(5, 7), lambda m, x: m(x).cumsum(0)), pictures(3, 5)), 'No engine'),
    'swapped': (lambda: (Around(nn.Linear(5, 7), lambda m, x: m(x).flip(0)), pictures(5)), 'No engine'),
    'counts': (lambda: (nn.Embedding(7, 5, scale_grad_by_freq=True), indices(6)), 'scale_grad_by_freq=False'),
    'rescaled': (lambda: (bag(max_norm=1.0), indices(6)), 'max_norm=None'),
    'changed weight': (
        lambda: (Around(nn.Linear(5, 7), lambda m, x: (m.weight.detach().mul_(0.9), m(x))[1]), pictures(5)),
        'changed the parameter m.weight',
    ),
}


def losses_of(model, x):
    out = model(x)
    if not len(x):
        return torch.zeros(0)
    out = out.reshape(len(x), -1)
    return torch.tanh(out).square().mean(1) + out[:, 0]


def alone(model, x):
    """By parameter, (samples, *shape), from a forward and a backward for each record by itself, in float64."""
    model = copy.deepcopy(model).double()
    params, samples = list(model.parameters()), []
    for sample in x.split(1):
        sample = sample.double() if sample.is_floating_point() else sample
        grads = torch.autograd.grad(losses_of(model, sample).sum(), params, allow_unused=True)
        samples.append([torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(params, grads)])
    return [torch.stack(column) for column in zip(*samples)]


def projector_for(params, name):
    if name != 'project-then-clip':
        return None
    projector = Projector(rank=2)
    place(projector, [torch.randn(2, *p.shape, dtype=torch.float32) for p in params])
    return projector


def gradients(engine, model, x):
    """All that a batch gives: per sample, and the update under each clipping."""
    params, samples = engine.params, Samples.from_keys(range(len(x)))
    each, projectors = (
        PerSampleGradients(params, torch.arange(len(x))),
        [projector_for(params, name) for name in CLIPPINGS],
    )
    mechanisms = [mechanism(params, C, p, 'flat' if p else name) for name, p in zip(CLIPPINGS, projectors)]
    collectors = [one.collector(samples) for one in mechanisms]
    with engine.capture():
        losses = losses_of(model, x)
    engine.backward(list(losses), each, *collectors)
    totals = [collector.total() for collector in collectors]
    assert all(part.dtype == torch.float32 for total in totals for part in total)
    updates = [one.map_back(total) for one, total in zip(mechanisms, totals)]
    assert all(u.shape == p.shape for update in updates for u, p in zip(update, params))
    return each.total, updates[0]


def check(kind, make):
    torch.manual_seed(0)
    model, x = make()
    wanted = alone(model, x)
    flat = torch.cat([g.reshape(len(x), -1) for g in wanted], 1)
    clipped = (flat * (C / flat.norm(dim=1, keepdim=True)).clamp_max(1)).sum(0)
    engine = kind(model, list(model.parameters()))
    for _ in range(2):
        each, update = gradients(engine, model, x)
        for mine, single in zip(each, wanted):
            torch.testing.assert_close(mine.double(), single.double(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(
            torch.cat([u.flatten() for u in update]).double(), clipped.double(), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize('name', SERVED)
def test_both_engines_serve(name):
    for kind in (Engine, loop_engine):
        check(kind, SERVED[name])


@pytest.mark.parametrize('name', BY_LOOP)
def test_the_loop_serves_what_the_fast_engine_sends_to_it(name):
    check(loop_engine, BY_LOOP[name])
    with pytest.raises(PrivacyError, match="optim_wrapper.engine='loop'"):
        check(Engine, BY_LOOP[name])


@pytest.mark.parametrize('name', REFUSED)
def test_what_mixes_records_is_refused_without_vain_advice(name):
    make, message = REFUSED[name]
    for kind in (Engine, loop_engine):
        torch.manual_seed(0)
        model, x = make()
        with pytest.raises(PrivacyError, match=message) as error:
            gradients(kind(model, list(model.parameters())), model, x)
        assert kind is Engine or 'engine=' not in str(error.value)


def test_an_empty_batch_adds_nothing_and_spoils_nothing():
    for name, make in SERVED.items():
        for kind in (Engine, loop_engine):
            torch.manual_seed(0)
            model, x = make()
            try:
                model(x[:0])
            except (IndexError, RuntimeError, ValueError):
                continue  # torch has no empty batch of these
            before, after = (kind(model, list(model.parameters())) for _ in range(2))
            for engine, batches in ((before, (x, x[:0])), (after, (x[:0], x))):
                for batch in batches:
                    each, update = gradients(engine, model, batch)
                    assert len(batch) or not any(part.any() for part in update), name
                assert all(len(part) == len(batch) for part in each)
            assert before.gradient_methods() == after.gradient_methods(), name


def test_float64_as_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        for name in ('scalars', 'conv 3d', 'deconv', 'batch norm 1d', 'embedding', 'bag', 'encoder'):
            for kind in (Engine, loop_engine):
                check(kind, SERVED[name])
    finally:
        torch.set_default_dtype(torch.float32)


def test_parameters_frozen_too_late_are_named():
    for kind in (Engine, loop_engine):
        model = nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Linear(4, 2))
        engine = kind(model, list(model.parameters()))
        model[0].requires_grad_(False)
        with pytest.raises(PrivacyError, match=r'2 parameters were frozen after .*0.weight, 0.bias'):
            gradients(engine, model, torch.randn(3, 4))
