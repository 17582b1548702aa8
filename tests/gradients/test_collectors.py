"""What the collectors make of a batch, whichever way each block is computed, against single records clipped by hand."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmpose_dp import tensors
from mmpose_dp.gradients import layer_rules
from mmpose_dp.gradients.blocks import LayerBlock, SampleSum, StackBlock
from mmpose_dp.gradients.engine import Engine
from mmpose_dp.privacy.clipping import ClippedCoordinates, ClippedSum
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.records import Samples
from tests.gradients.test_engine import LAYERS
from tests.gradients.test_random_networks import SIDE, STEPS, Network
from tests.support.core import loop_engine, looped, place, sample_gradients_of

# records of their own, several samples per record, public samples between, one sample alone, public samples alone
BATCHES = ([0, 1, 2], [None, 5, 7, 5, None, 8], [1, 1, 2], [3], [None, 4], [None, None], [0, 1, 2, 3])
# (_TRAFFIC: no ghost norms, as shipped, all; samples as groups for every convolution or as shipped; scale of the losses)
NO_GHOST, ALL_GHOST, SHIPPED = 0, 1e9, (layer_rules._TRAFFIC, False)
METHODS = (
    (NO_GHOST, True, 1.0),
    (NO_GHOST, SHIPPED[1], 8.0),
    (SHIPPED[0], True, 1024.0),
    (*SHIPPED, 1.0),
    (ALL_GHOST, True, 0.25),
    (ALL_GHOST, SHIPPED[1], 1.0),
)


class Unreached(nn.Module):
    """A layer called twice, once for nothing, and a layer called for nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        self.conv(self.other(y))
        return torch.tanh(y)


class Channels(nn.Module):
    """The gradient comes back with the channels innermost in memory, as from tokens."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = copy.deepcopy(LAYERS['batch norm']), nn.LayerNorm(4)

    def forward(self, x):
        return self.last(self.norm(x).movedim(1, -1))


def frozen(layer, name):
    getattr(layer, name).requires_grad_(False)
    return layer


MODELS = {
    **LAYERS,
    'unreached': Unreached(),
    'channels': Channels(),
    'frozen bias': nn.Sequential(frozen(nn.Conv2d(4, 6, 3), 'bias'), frozen(nn.Linear(6, 5), 'bias')),
    'frozen weight': nn.Sequential(frozen(nn.Conv2d(4, 6, 3), 'weight'), frozen(nn.Linear(6, 5), 'weight')),
}


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors]).double()


def clip(g, c):
    return g * (c / g.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1)


def losses_of(model, x):
    out = model(x).flatten(1)
    return torch.tanh(out).square().mean(1) + out[:, 0]


def one_after_the_other(model, x):
    """(samples, p) in float64: a backward for each sample alone."""
    model = copy.deepcopy(model).double()
    params = [p for p in model.parameters() if p.requires_grad]
    found = []
    for sample in x.double().split(1):
        # twice: for a batch of one whose strides are those of channels last, torch's own BatchNorm gradient is wrong
        twice = torch.cat([sample, sample])
        grads = torch.autograd.grad(losses_of(model, twice)[0], params, allow_unused=True)
        found.append(flat(torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)))
    return torch.stack(found)


def check(engine, model, x, keys, scale, near=1e-3):
    """Compares all collectors on one batch; what is clipped may differ by a part of C."""
    params, samples = engine.params, Samples.from_keys(keys)
    singles = one_after_the_other(model, x)
    with engine.capture():
        losses = losses_of(model, x) * scale
    collectors, wanted = [], []
    if samples.num_records:
        records = torch.stack(
            [singles[[record == i for record in samples.records]].sum(0) for i in range(samples.num_records)]
        )
        c = max(0.9 * float(records.norm(dim=1).median()), 1e-3)  # some are clipped, some are not
        projector = Projector(rank=3)
        place(projector, [torch.randn(3, *p.shape) for p in params])
        coordinates = records @ torch.cat([b.flatten(1) for b in projector.basis], 1).double().T
        collectors += [ClippedSum(params, samples, c, scale), ClippedCoordinates(samples, c, projector, scale)]
        wanted += [(clip(records, c).sum(0), c), (clip(coordinates, c).sum(0), c)]
    if len(samples.public):
        collectors.append(SampleSum(params, samples.public, scale))
        want = singles[samples.public].sum(0)
        wanted.append((want, max(float(want.norm()), 1e-3)))
    engine.backward(losses, *collectors)
    for collector, (want, size) in zip(collectors, wanted):
        total = collector.total if isinstance(collector, SampleSum) else collector.total()
        assert (flat(total) - want).norm() <= near * size


def choose(monkeypatch, traffic, grouped):
    monkeypatch.setattr(layer_rules, '_TRAFFIC', traffic)
    if grouped:
        convolutions = (nn.Conv2d, nn.ConvTranspose2d)
        monkeypatch.setattr(layer_rules, 'groups_are_faster', lambda module, b: isinstance(module, convolutions))


@pytest.mark.parametrize('method', [None, *METHODS], ids=str)
@pytest.mark.parametrize('name', MODELS)
def test_every_method_is_the_reference(name, method, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), copy.deepcopy(MODELS[name]))
    params = [p for p in model.parameters() if p.requires_grad]
    traffic, big_sample, scale = method or (*SHIPPED, 8.0)
    choose(monkeypatch, traffic, big_sample)
    ghosts, ghost_squares = [], layer_rules.ghost_squares
    monkeypatch.setattr(layer_rules, 'ghost_squares', lambda *args: ghosts.append(args) or ghost_squares(*args))
    engine = Engine(model, params) if method else loop_engine(model, params)
    for keys in BATCHES:
        x = torch.randn(len(keys), 4, 8, 8) * torch.logspace(-0.5, 0.5, len(keys)).view(-1, 1, 1, 1)
        check(engine, model, x, keys, scale)
    if traffic != SHIPPED[0]:
        assert bool(ghosts) == (traffic == ALL_GHOST)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(STEPS, min_size=1, max_size=5), st.sampled_from(METHODS), st.sampled_from(BATCHES), st.integers(0, 2**16)
)
def test_every_method_is_the_reference_on_a_random_network(steps, method, keys, seed):
    torch.manual_seed(seed)
    model = Network(steps).double()
    with pytest.MonkeyPatch.context() as monkeypatch:
        choose(monkeypatch, *method[:2])
        engine = Engine(model, list(model.parameters()))
        for _ in range(2):
            check(engine, model, torch.randn(len(keys), 4, SIDE, SIDE).double(), keys, method[2], 3e-3)


def test_a_ghost_norm_is_never_too_small(monkeypatch):
    """The positions of a sample cancel, but for less than rounding tells: each record still weighs at most C."""
    choose(monkeypatch, ALL_GHOST, SHIPPED[1])
    torch.manual_seed(0)
    model, count = nn.Linear(16, 16, bias=False), 64
    half = torch.randn(count, 3, 16)
    x = torch.cat([half, -half + 1e-4 * torch.randn_like(half)], 1)
    engine = Engine(model, [model.weight])
    with engine.capture():
        losses = (model(x) @ torch.randn(16)).sum(1)
    c = 1e-4
    alone = [ClippedSum([model.weight], Samples(tuple(-(i != j) for j in range(count)), 1), c) for i in range(count)]
    every = SampleSum([model.weight], torch.arange(count))
    engine.backward(losses, every, *alone)
    assert every.total[0].norm() > 10 * c
    assert max(one.total()[0].norm() for one in alone) <= c * (1 + 1e-4)


@pytest.mark.parametrize('inputs, outputs, positions', [(64, 8192, 2), (2048, 512, 4)])
def test_a_ghost_norm_of_equal_numbers_is_not_too_small(inputs, outputs, positions):
    """In float32, rounding goes one way in a long sum of equal numbers. The positions cancel, but for about as much as it makes."""
    torch.manual_seed(1)
    count, c = 200, 0.1
    module = nn.Linear(inputs, outputs, bias=False)
    sign = torch.tensor([1.0, -1.0]).repeat(positions // 2).view(positions, 1)
    size = 10 ** torch.linspace(-4.5, -2, count).view(count, 1, 1)

    def near(number):
        return number * (1 + torch.rand(count, 1, 1)) * (1 + size * torch.randn(count, positions, 1))

    factors = zip(near(0.1).expand(-1, -1, inputs), (near(3000.0) * sign).expand(-1, -1, outputs))
    for a, b in factors:
        block = LayerBlock(module, layer_rules.Layer('', layer_rules.outer_product, ['weight'], [0]))
        block.calls.append((a[None, None], b[None, None]))
        assert block.ghost_squares(range(1)) is not None
        collector = ClippedSum([module.weight], Samples.from_keys([0]), c)
        collector.add(block)
        assert collector.total()[0].norm() <= c * (1 + 1e-4)


def test_a_bias_whose_positions_cancel_weighs_at_most_c(monkeypatch):
    """As they are, they cancel to nothing; times the factor that clips another gradient, rounding is left of large numbers."""
    choose(monkeypatch, ALL_GHOST, SHIPPED[1])
    torch.manual_seed(0)
    module, other, c = nn.Linear(16, 256), torch.zeros(16), 0.1
    x, y = 1e6 * torch.randn(2, 256)
    b = torch.stack([x, y, -(x + y)])
    block = LayerBlock(module, layer_rules.Layer('', layer_rules.outer_product, ['bias'], [0]))
    block.calls.append((torch.randn(1, 1, 3, 16), b[None, None]))
    collector = ClippedSum([module.bias, other], Samples.from_keys([0]), c)
    collector.add(block)
    collector.add(StackBlock([1], torch.ones(1, 16)))
    assert flat(collector.total()).norm() <= c * (1 + 1e-4)


class Product(nn.Module):
    """A parameter of no known layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.table


class Changing(nn.Module):
    """What ``last`` read is changed afterwards. Autograd, which kept a copy in bfloat16, does not notice."""

    def __init__(self, last):
        super().__init__()
        self.first, self.second, self.last, self.change = nn.Linear(8, 8), nn.Linear(8, 8), last, False

    def forward(self, x):
        with torch.autocast('cpu', torch.bfloat16):
            read = x * 1
            out = self.second(self.first(x)) + self.last(read)
            if self.change:
                read.mul_(3)
        return out.float()


@pytest.mark.parametrize('first_batch', [True, False])
def test_an_input_changed_after_it_was_read_is_refused(first_batch):
    torch.manual_seed(0)
    model, x = Changing(nn.Linear(8, 8)), torch.randn(3, 4, 8)
    engine = Engine(model, list(model.parameters()))
    if not first_batch:
        backward(engine, model, x)
    model.change = True
    with pytest.raises(PrivacyError, match='input of last was changed in place'):
        backward(engine, model, x)


def test_an_operand_changed_after_it_was_read_is_looped_over():
    torch.manual_seed(0)
    model, x = Changing(Product()), torch.randn(3, 4, 8)
    params = list(model.parameters())
    rules, loop = Engine(model, params), loop_engine(model, params)
    backward(rules, model, x)
    model.change = True
    with pytest.raises(PrivacyError, match='last.table.*otherwise than in the first batch'):
        backward(rules, model, x)
    rules = Engine(model, params)
    ours, reference = (backward(engine, model, x).per_sample(torch.arange(3))[-1] for engine in (rules, loop))
    assert looped(rules) == ['last.table']
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def backward(engine, model, x):
    with engine.capture():
        losses = losses_of(model, x)
    return sample_gradients_of(engine, losses)


class Turning(nn.Module):
    """Uses its weight outside its layer, or mixes its samples, for some numbers of samples only."""

    def __init__(self, what, samples):
        super().__init__()
        self.linear, self.what, self.samples = nn.Linear(8, 8), what, samples

    def forward(self, x):
        y = self.linear(x)
        if len(x) != self.samples:
            return y
        return y @ self.linear.weight if self.what == 'weight' else y + y.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ('what', 'samples', 'message'),
    [
        ('weight', 1, 'linear.weight is not what autograd finds'),
        ('weight', 3, 'linear.weight is not what autograd finds'),
        ('mix', 3, 'the samples of another'),
    ],
)
def test_one_sample_and_several_are_checked_apart(what, samples, message):
    """Neither a first batch of one sample nor one of several vouches for the other."""
    torch.manual_seed(0)
    model = Turning(what, samples)
    engine = Engine(model, list(model.parameters()))
    for _ in range(2):
        backward(engine, model, torch.randn(4 - samples, 4, 8))
    with pytest.raises(PrivacyError, match=message):
        backward(engine, model, torch.randn(samples, 4, 8))


def test_a_call_that_only_a_later_loss_does_not_reach():
    """The check of the first batch is over by then: the collectors must come to the right sum by themselves."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.twice = nn.Conv2d(4, 4, 1), True

        def forward(self, x):
            y, z = self.conv(x), self.conv(2 * x)
            return y * z if self.twice else y

    torch.manual_seed(0)
    model, x = Sometimes(), torch.randn(3, 4, 8, 8)
    engine = Engine(model, list(model.parameters()))
    for model.twice in (True, False):
        check(engine, model, x, [0, 1, None], 1.0)


@pytest.mark.parametrize('traffic', [0, 1e9])  # gradients of each sample, or ghost norms
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), 1e30])
def test_a_record_that_is_not_finite_is_left_out_without_a_look(traffic, bad, monkeypatch):
    """As on a GPU, where nothing is read: also its input is not finite, so that a weight of 0 is not enough."""
    monkeypatch.setattr(tensors, 'reading_waits', lambda x: True)
    monkeypatch.setattr(layer_rules, '_TRAFFIC', traffic)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 2, stride=2), nn.Flatten(), nn.Linear(16, 4))
    params, x = list(model.parameters()), torch.randn(4, 2, 4, 4)

    def clipped(x):
        engine, found = Engine(model, params), ClippedSum(params, Samples.from_keys(range(len(x))), 0.1)
        with engine.capture():
            losses = losses_of(model, x)
        engine.backward(losses, found)
        return flat(found.total())

    want = clipped(x[[0, 1, 3]])
    x[2] = bad
    torch.testing.assert_close(clipped(x), want, rtol=1e-4, atol=1e-6)
