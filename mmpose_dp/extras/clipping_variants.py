"""The kinds of clipping that ``optim_wrapper.clipping`` names beside 'flat', each as a subclass of GaussianMechanism.

Must not let a record weigh more than C: whatever the kind, the noise is that of ``max_grad_norm``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mmpose_dp.privacy.clipping import ClippedSum
from mmpose_dp.privacy.errors import ConfigError
from mmpose_dp.privacy.mechanism import GaussianMechanism
from mmpose_dp.privacy.records import Block, Samples
from mmpose_dp.tensors import as_vectors, of_weight_0, without, without_tf32

from .adaptive_norm import AdaptiveMechanism

STABILITY = 0.01  # Bu et al. 2023, section 4.1: keeps short gradients shorter than long ones


def automatic_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """C / (norm + 0.01) for each record, (records,) float32; 0 for a norm that is not finite.

    Automatic clipping (Bu et al. 2023) makes every record weigh about C, so that C is no longer to be tuned beside the
    learning rate.
    """
    factors = max_grad_norm / (norms + STABILITY)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


class AutomaticMechanism(GaussianMechanism):
    """The Gaussian mechanism with automatic clipping, of gradients or of their coordinates."""

    def collector_of_norm(self, samples: Samples, max_grad_norm: float) -> ClippedSum:
        """A collector of vectors of norm ``max_grad_norm`` at most."""
        collector = super().collector_of_norm(samples, max_grad_norm)
        collector.factors = automatic_factors
        return collector


class PerParameterClippedSum(ClippedSum):
    """Collects the sum of gradients clipped parameter by parameter, each of P to C / sqrt(P) (McMahan et al. 2018).

    Together a record weighs at most C. No layer waits for the norm of another: nothing is held but the sum. A layer in which
    a record's gradient is not finite does without that record.

    Args: as of ClippedSum.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._total = [torch.zeros_like(p, dtype=torch.float32) for p in self._params]

    def add(self, block: Block) -> None:
        """See Collector.add. In float32: TF32 could find norms too short."""
        share = self._max_grad_norm / math.sqrt(len(self._params))
        for index, grads in zip(block.indices, block.per_sample(self._private)):
            stack = self._samples.sum_by_record(as_vectors(grads), self._private)
            with without_tf32(stack):
                norms = torch.linalg.vecdot(stack, stack).sqrt() / self._scale
                factors = self.factors(norms, share) / self._scale
                self._total[index] = (factors @ without(stack, of_weight_0(factors))).view_as(self._total[index])

    def total(self) -> list[Tensor]:
        """The sum, one float32 tensor per parameter."""
        return self._total


class PerParameterMechanism(GaussianMechanism):
    """The Gaussian mechanism on gradients clipped per parameter. Raises ConfigError for a projector that clips coordinates."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.coordinates_of is not None:
            raise ConfigError(
                "optim_wrapper.clipping='per-parameter' has no meaning with project-then-clip: write clipping='flat' or, "
                "for a projector without a type, projector.order='noise-then-project'"
            )

    def collector_of_norm(self, samples: Samples, max_grad_norm: float) -> ClippedSum:
        """A collector of vectors of norm ``max_grad_norm`` at most."""
        return PerParameterClippedSum(self.params, samples, max_grad_norm, self.loss_scale)


MECHANISMS: dict[str, type[GaussianMechanism]] = {
    'flat': GaussianMechanism,
    'automatic': AutomaticMechanism,
    'adaptive': AdaptiveMechanism,
    'per-parameter': PerParameterMechanism,
}


def mechanism_of(clipping: str) -> type[GaussianMechanism]:
    """The mechanism that ``optim_wrapper.clipping`` names. Raises ConfigError for an unknown name."""
    if not isinstance(clipping, str) or clipping not in MECHANISMS:
        raise ConfigError(f'optim_wrapper.clipping={clipping!r} must be one of {tuple(MECHANISMS)}')
    return MECHANISMS[clipping]
