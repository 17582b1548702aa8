"""Adaptive clipping: C follows the norms of the records' gradients, by votes that are noised with everything else.

Must not read a record's norm: C follows from the noised sum of the votes alone, which is post-processing.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mmpose_dp.privacy.clipping import clipping_norm
from mmpose_dp.privacy.mechanism import GaussianMechanism
from mmpose_dp.privacy.records import Block, Samples

_QUANTILE = 0.5  # the share of records whose norm should be within C
_RATE = 0.2  # how fast the logarithm of C follows (both: Andrew et al. 2021, section 3)
_SHARE = 0.1  # the length of a vote in units of that of the clipped vector
_REACH = 1e3  # by what factor C may change
LEAST_NORM = 1e-12  # of any C: the squares of what a thousandth of it is made of must not vanish in float32


def shares(max_grad_norm: float) -> tuple[float, float]:
    """The norm to which a record's vector is clipped and the length of its vote: together their norm is at most C."""
    inside = max_grad_norm / math.sqrt(1 + _SHARE**2)
    return inside, _SHARE * inside


class AdaptiveNorm:
    """A C that moves until half of the records are clipped (Andrew et al. 2021, algorithm 1).

    The paper counts the records within C by a second query, and raises the noise of both so that together they cost what one
    did. Here a record's vote is one more entry of its clipped vector, which is equivalent: a vector of norm C under noise of
    deviation ``noise_multiplier`` * C, so the ledger has nothing to add. The vector itself is clipped to 0.995 C.

    C stays between a thousandth and a thousand times its first value. If all records agreed, it would otherwise leave the range
    in which float32 can compare norms.

    Args:
        first: C of the first step.

    Attributes:
        max_grad_norm: C of the current step.
    """

    def __init__(self, first: float) -> None:
        self._limits = max(first / _REACH, LEAST_NORM), first * _REACH
        self.max_grad_norm = first

    def follow(self, mean_vote: float) -> None:
        """Updates C from the noised sum of one step's votes, divided by the expected batch size. An overflow changes nothing."""
        if not math.isfinite(mean_vote):
            return
        within = 0.5 + mean_vote / (2 * shares(self.max_grad_norm)[1])
        self.go_on_from(self.max_grad_norm * math.exp(min(max(-_RATE * (within - _QUANTILE), -1.0), 1.0)))

    def go_on_from(self, max_grad_norm: float) -> None:
        """Sets C, within its limits."""
        low, high = self._limits
        self.max_grad_norm = min(max(max_grad_norm, low), high)


class VotingSum:
    """A collector whose total has one more entry: plus ``vote`` for each record within ``max_grad_norm``, minus it for others.

    A record whose gradient is not finite has no vote. With its vote, a record's norm is at most hypot(max_grad_norm, vote).
    """

    def __init__(self, collector: Any, max_grad_norm: float, vote: float) -> None:
        self._collector, self._max_grad_norm, self._vote = collector, max_grad_norm, vote

    def add(self, block: Block) -> None:
        """See Collector.add."""
        self._collector.add(block)

    def total(self) -> list[Tensor]:
        """The total of the collector, then the sum of the votes, shape (1,)."""
        total, norms = self._collector.total(), self._collector.norms
        signs = ((norms <= self._max_grad_norm).float() * 2 - 1) * torch.isfinite(norms)
        return [*total, self._vote * signs.sum().view(1)]


class AdaptiveMechanism(GaussianMechanism):
    """The Gaussian mechanism with ``AdaptiveNorm`` as its C."""

    def __init__(self, params: Any, max_grad_norm: float, *args: Any, **settings: Any) -> None:
        super().__init__(params, max_grad_norm, *args, **settings)
        self.adaptive_norm = AdaptiveNorm(self.max_grad_norm)

    def noise_and_norm(self) -> tuple[float | None, float]:
        """The plan's sigma, and C as the votes have set it."""
        return super().noise_and_norm()[0], self.adaptive_norm.max_grad_norm

    def collector(self, samples: Samples) -> VotingSum:  # type: ignore[override]
        """A collector whose vectors and votes together have norm C at most."""
        inside, vote = shares(self.noise_and_norm()[1])
        inside = clipping_norm(inside)
        return VotingSum(self.collector_of_norm(samples, inside), inside, vote)

    def map_back(self, total: list[Tensor]) -> list[Tensor]:
        """Removes the noised votes, which set the next C, and maps the rest back."""
        self.adaptive_norm.follow(float(total.pop()))
        return super().map_back(total)
