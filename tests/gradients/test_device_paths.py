"""What runs otherwise on a GPU than on a CPU, forced here on the CPU and compared with autograd."""

from itertools import product

import pytest
import torch
from torch import nn

from mmpose_dp import tensors
from mmpose_dp.extras.clipping_variants import PerParameterClippedSum
from mmpose_dp.gradients import Engine, layer_rules
from mmpose_dp.gradients.blocks import StackBlock
from mmpose_dp.privacy.clipping import ClippedSum, clip_factors
from mmpose_dp.privacy.records import Block, Samples
from tests.support.core import mechanism


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tensors, 'reading_waits', lambda x: True)
    monkeypatch.setattr(layer_rules, 'groups_are_faster', lambda *args: False)


def by_autograd(layer, x, grad):
    """The gradients of each sample, by name, and the input's."""
    found = []
    for one, its in zip(x.split(1), grad.split(1)):
        one = one.clone().requires_grad_()
        found.append(torch.autograd.grad(layer(one), [one, *layer.parameters()], its))
    names = [name for name, _ in layer.named_parameters()]
    return torch.cat([f[0] for f in found]), {n: torch.stack([f[i] for f in found]) for i, n in enumerate(names, 1)}


@pytest.mark.parametrize('kind', [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize('kernel', [(1, 1), (3, 3), (2, 4)])
def test_windows_as_a_view_are_those_of_the_convolution(kind, kernel, as_on_a_gpu):
    torch.manual_seed(0)
    for stride, padding, dilation, groups in product([1, 2, (3, 2)], [0, 1, (2, 0)], [1, (2, 3)], [1, 2]):
        layer = kind(4, 6, kernel, stride, padding, dilation=dilation, groups=groups).double()
        x = torch.randn(3, 4, 11, 13, dtype=torch.float64)
        grad = torch.randn_like(layer(x))
        _, want = by_autograd(layer, x, grad)
        ours = layer_rules.outer_product(layer, x, grad)
        for name in want:
            torch.testing.assert_close(ours[name], want[name])
        squares = layer_rules.ghost_squares(layer, x, grad, list(want))
        exact = sum(g.flatten(1).square().sum(1) for g in want.values())
        assert (squares >= exact * (1 - 1e-12)).all()


@pytest.mark.parametrize('input_too', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_a_frozen_batch_norm_is_autograd_in_every_precision(dtype, input_too):
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(5).eval().double()
    for x in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
        x.copy_(torch.rand(5).bfloat16() + 0.5)
    x, grad = (torch.randn(3, 5, 4, 6, dtype=torch.bfloat16) for _ in range(2))
    want_input, want = by_autograd(layer, x.double(), grad.double())
    found, weight, bias = layer_rules.batch_norm_backward(layer, layer.weight, x.to(dtype), grad.to(dtype), input_too)
    near = dict(rtol=0.05, atol=0.1) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.double(), want['weight'], **near)
    torch.testing.assert_close(bias.double(), want['bias'], **near)
    assert (found is not None) == input_too
    if input_too:
        torch.testing.assert_close(found.double(), want_input, **near)


class Watching(Block):
    """Notes whether products may be in TF32 when its norms and its sum are wanted."""

    indices = [0]

    def __init__(self):
        self.seen = []

    def _flags(self):
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def ghost_squares(self, samples):
        self.seen.append(('norm', *self._flags()))
        return torch.ones(len(samples))

    def weighted_sum(self, samples, weights=None):
        self.seen.append(('sum', *self._flags()))
        return [weights]


def test_a_norm_and_what_it_is_the_norm_of_are_in_full_precision(as_on_a_gpu):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    block, collector = Watching(), ClippedSum([torch.zeros(2)], Samples.from_keys([0, 1]), 1.0)
    collector.add(block)
    collector.total()
    assert block.seen == [('norm', False, False), ('sum', False, False)]
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


def test_a_norm_is_in_full_precision_on_a_cpu_that_may_round_factors(monkeypatch):
    """float32_matmul_precision 'medium' makes products bfloat16 on a CPU with AMX, beyond the room that ghost norms have."""
    monkeypatch.setattr(Watching, '_flags', lambda self: (torch.backends.mkldnn.matmul.fp32_precision,))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('medium')
    try:
        block, collector = Watching(), ClippedSum([torch.zeros(2)], Samples.from_keys([0, 1]), 1.0)
        collector.add(block)
        collector.total()
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert block.seen == [('norm', 'ieee'), ('sum', 'ieee')] and after == 'medium'


def test_a_convolution_in_a_clipped_sum_is_in_full_precision_too(monkeypatch):
    setting = getattr(torch.backends.mkldnn, 'conv', None)
    if not hasattr(setting, 'fp32_precision'):
        pytest.skip('this torch has no such setting')
    monkeypatch.setattr(Watching, '_flags', lambda self: (setting.fp32_precision,))
    before, setting.fp32_precision = setting.fp32_precision, 'bf16'
    try:
        block, collector = Watching(), ClippedSum([torch.zeros(2)], Samples.from_keys([0, 1]), 1.0)
        collector.add(block)
        collector.total()
        after = setting.fp32_precision
    finally:
        setting.fp32_precision = before
    assert block.seen == [('norm', 'ieee'), ('sum', 'ieee')] and after == 'bf16'


class Narrow(nn.Module):
    """Layers whose gradients come by ghost norms, by their sums, and by the operations that use a parameter."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 64, 3), nn.Linear(64 * 4, 256), nn.Linear(256, 300)
        self.scale = nn.Parameter(torch.rand(300))

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)).flatten(1)))) * self.scale


@pytest.mark.parametrize('clipping', ['flat', 'automatic', 'adaptive', 'per-parameter'])
def test_a_record_weighs_at_most_c_in_a_step_under_autocast(clipping):
    """A train_step may have autocast around all it does: in bfloat16 the clipped sum would move by up to 1.004 C."""
    longest = 0.0
    for seed in range(6):
        torch.manual_seed(seed)
        model, x = Narrow(), torch.randn(1, 3, 4, 4)
        params = list(model.parameters())
        clipped = mechanism(params, 0.1, clipping=clipping, noise_multiplier=0.0, expected_batch_size=1)
        engine, collector = Engine(model, params), clipped.collector(Samples.from_keys([0]))
        with torch.autocast('cpu', torch.bfloat16):
            with engine.capture():
                losses = (model(x).float() - 10).square().sum(1)
            engine.backward(losses, collector)
            clipped.add(collector)
            released = clipped.release()
        longest = max(longest, float(torch.cat([one.flatten().double() for one in released]).norm()))
    assert 0.098 < longest < 0.0999 + 1e-6


def test_per_parameter_clipping_is_in_full_precision_too(as_on_a_gpu, monkeypatch):
    seen, dot = [], torch.linalg.vecdot

    def factors(norms, max_grad_norm):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return clip_factors(norms, max_grad_norm)

    monkeypatch.setattr(
        torch.linalg, 'vecdot', lambda *a: seen.append(torch.backends.cuda.matmul.allow_tf32) or dot(*a)
    )
    monkeypatch.setattr(PerParameterClippedSum, 'factors', staticmethod(factors))
    with tensors.allowing_tf32(torch.zeros(1), matmul=True, convolutions=True):
        collector = PerParameterClippedSum([torch.zeros(2)], Samples.from_keys([0, 1]), 1.0)
        collector.add(StackBlock([0], torch.ones(2, 2)))
    assert seen == [False, False]


@pytest.mark.parametrize('layer', [nn.Conv2d(2, 3, 3), nn.Linear(4, 3)], ids=['convolution', 'linear'])
def test_the_gradient_of_a_layer_is_as_precise_as_its_forward(layer, as_on_a_gpu, monkeypatch):
    seen, product = [], torch.bmm
    monkeypatch.setattr(torch, 'bmm', lambda *a: seen.append(torch.backends.cuda.matmul.allow_tf32) or product(*a))
    x = torch.randn(2, 2, 4, 4)
    for cudnn, matmul in ((True, False), (False, True)):
        with tensors.allowing_tf32(x, matmul, cudnn):
            layer_rules.outer_product(layer, x, torch.ones_like(layer(x)))
        assert seen.pop() == (cudnn if isinstance(layer, nn.Conv2d) else matmul)
