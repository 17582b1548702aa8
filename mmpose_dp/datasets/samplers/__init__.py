"""Samplers whose sampling an accountant can rely on. Must not hold logic."""

from .poisson_batch_sampler import PoissonBatchSampler, check_batch_size

__all__ = ['PoissonBatchSampler', 'check_batch_size']
