"""For tests of privacy/ and gradients/: all gradients of a batch at once, a tied layer, mechanisms and a small plan."""

from functools import partial

import torch
from torch import nn

from mmpose_dp.extras.clipping_variants import mechanism_of
from mmpose_dp.gradients import Engine
from mmpose_dp.tensors import as_range, as_vectors

loop_engine = partial(Engine, kind='loop')
PLAN_SETTINGS = dict(
    method='dpsgd',
    privacy_unit='instance',
    num_records=1000,
    expected_batch_size=50,
    steps=40,
    max_grad_norm=0.1,
    target_delta=5e-4,
)


def looped(engine):
    """Names of the parameters that get one backward per sample."""
    return [name for name, method in engine.gradient_methods().items() if method == 'loop']


def place(projector, parts):
    """Gives a projector its basis, (k, *parameter shape) for each parameter."""
    projector.place(torch.cat([as_vectors(x) for x in parts], 1), [x.shape[1:] for x in parts])


class Collected:
    """A collector that keeps every block of gradients."""

    def __init__(self, params):
        self.params, self.blocks = params, []

    def add(self, block):
        self.blocks.append(block)

    def per_sample(self, samples):
        """The gradients of the given samples: one (samples, *parameter shape) tensor per parameter."""
        total = [p.new_zeros((len(samples), *p.shape), dtype=torch.float32) for p in self.params]
        return self._added(total, lambda block: block.per_sample(as_range(samples)))

    def weighted_sum(self, weights):
        """sum_i weights[i] * g_i; samples of weight 0 are left out."""
        samples = weights.nonzero().flatten()
        total = [torch.zeros_like(p, dtype=torch.float32) for p in self.params]
        return self._added(total, lambda block: block.weighted_sum(as_range(samples), weights[samples]))

    def _added(self, total, of):
        for block in self.blocks:
            for index, grads in zip(block.indices, of(block)):
                total[index] += grads
        return total


def sample_gradients_of(engine, losses):
    """What the engine hands over for the (samples,) losses, collected."""
    gradients = Collected(engine.params)
    engine.backward(losses, gradients)
    return gradients


class Tied(nn.Module):
    """Uses the weight of a layer once more, outside the layer's forward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) @ self.linear.weight


def mechanism(params, max_grad_norm, projector=None, clipping='flat', **settings):
    """The mechanism that DPOptimWrapper builds for ``optim_wrapper.clipping``."""
    return mechanism_of(clipping)(params, max_grad_norm, projector=projector, **settings)
