"""Samplers whose sampling an accountant can rely on. Must not hold logic."""

from .poisson_batch_sampler import PoissonBatchSampler

__all__ = ['PoissonBatchSampler']
