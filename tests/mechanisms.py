"""The mechanism of a clipping by its name, for tests without a wrapper."""

from mmpose_dp.extras.adaptive_norm import AdaptiveMechanism
from mmpose_dp.privacy.mechanism import GaussianMechanism


def mechanism(params, max_grad_norm, projector=None, clipping='flat', **settings):
    """What DPOptimWrapper builds for ``optim_wrapper.clipping``."""
    if clipping == 'adaptive':
        return AdaptiveMechanism(params, max_grad_norm, projector=projector, **settings)
    return GaussianMechanism(params, max_grad_norm, projector=projector, clipping=clipping, **settings)
