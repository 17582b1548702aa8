"""All gradients of a batch at once, for comparing engines."""

from functools import partial

import torch

from mmpose_dp.gradients import Engine
from mmpose_dp.gradients.blocks import PerSampleGradients
from mmpose_dp.privacy.records import as_range

loop_engine = partial(Engine, kind='loop')


class Collected(PerSampleGradients):
    """With the weighted sum of each block as well."""

    def weighted_sum(self, weights):
        """sum_i weights[i] * g_i; samples of weight 0 are left out."""
        samples = weights.nonzero().flatten()
        total = [torch.zeros_like(p) for p in self.params]
        for block in self.blocks:
            for index, grads in zip(block.indices, block.weighted_sum(as_range(samples), weights[samples])):
                total[index] += grads
        return total


def sample_gradients_of(engine, losses):
    """What the engine hands over for the (samples,) losses, collected."""
    gradients = Collected(engine.params)
    engine.backward(losses, gradients)
    return gradients
