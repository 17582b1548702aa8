"""The mechanism of a clipping by its name, for tests without a wrapper."""

from mmpose_dp.extras.clipping_variants import mechanism_of


def mechanism(params, max_grad_norm, projector=None, clipping='flat', **settings):
    """What DPOptimWrapper builds for ``optim_wrapper.clipping``."""
    return mechanism_of(clipping)(params, max_grad_norm, projector=projector, **settings)
