"""From per-sample gradients to one clipped sum over records: where the sensitivity C comes from.

Every number that leaves this module is a sum over records of vectors whose norm is at most C, but for ``norms``, which adaptive
clipping turns into votes that are noised. Must not add noise, average, or look at how many records were sampled.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .projection import Projector
from .records import Block, Samples, as_range, as_vectors

STABILITY = 0.01  # Bu et al. 2023, section 4.1: keeps short gradients shorter than long ones


def clip_factors(norms: Tensor, max_grad_norm: float, automatic: bool = False) -> Tensor:
    """min(1, C / norm) for each record, or C / (norm + 0.01) if ``automatic``: (records,) float32; 0 for a norm that is not finite.

    Automatic clipping (Bu et al. 2023) makes every record weigh about C, so that C is no longer to be tuned beside the
    learning rate. A record with a NaN, infinite or overflowing gradient contributes nothing and leaves the others alone.
    """
    if automatic:
        factors = max_grad_norm / (norms + STABILITY)
    else:
        factors = (max_grad_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


class ClippedSum:
    """Collects sum_i g_i * min(1, C / ||g_i||) over the private records (Abadi et al. 2016, algorithm 1).

    One pass for both factors of the book-keeping method (Bu et al. 2023): a block of few positions and many weights gives
    its norms at once and is kept for the weighted sum; any other gives its gradients once, and they are kept instead.

    Args:
        params: the trainable parameters.
        rows: which record each sample belongs to.
        max_grad_norm: C.
        scale: what the losses were multiplied by (mixed precision).
        automatic: see clip_factors.
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        rows: Samples,
        max_grad_norm: float,
        scale: float = 1.0,
        automatic: bool = False,
    ) -> None:
        self._params, self._rows, self._max_grad_norm, self._scale = params, rows, max_grad_norm, scale
        self._automatic = automatic
        self.norms = torch.zeros(0)
        self._private = as_range(rows.private)
        self._squares = torch.zeros(rows.num_records, dtype=torch.float32, device=params[0].device)
        self._whole: list[Block] = []
        self._stacks: list[tuple[int, Tensor]] = []  # (parameter, (records, its size))

    def add(self, block: Block) -> None:
        """See Collector.add. Norms are taken in float32 over all parameters together."""
        squares = block.ghost_squares(self._private) if self._rows.num_records == len(self._private) else None
        if squares is not None:
            self._squares += squares
            self._whole.append(block)
            return
        for index, grads in zip(block.indices, block.per_sample(self._private)):
            stack = self._rows.sum_by_record(as_vectors(grads))
            self._squares += torch.linalg.vecdot(stack, stack)
            self._stacks.append((index, stack))

    def total(self) -> list[Tensor]:
        """The sum, one float32 tensor per parameter. Records that are not finite are left out: 0 * NaN is NaN."""
        self.norms = self._squares.sqrt() / self._scale
        factors = clip_factors(self.norms, self._max_grad_norm, self._automatic) / self._scale
        total: list[Tensor | None] = [None] * len(self._params)
        keep = factors.nonzero().flatten()
        weights = factors[keep]
        rows = as_range(self._rows.private[keep.cpu()]) if self._whole else []
        for block in self._whole if len(keep) else []:
            for index, grads in zip(block.indices, block.weighted_sum(rows, weights)):
                total[index] = grads
        all_kept = len(keep) == len(factors)
        for index, stack in self._stacks:
            total[index] = (weights @ (stack if all_kept else stack[keep])).view_as(self._params[index])
        return [torch.zeros_like(p, dtype=torch.float32) if x is None else x for p, x in zip(self._params, total)]


class PerParameterClippedSum:
    """Collects the sum of gradients clipped parameter by parameter, each of P to C / sqrt(P) (McMahan et al. 2018).

    Together a record weighs at most C. No layer waits for the norm of another: nothing is held but the sum. A layer in which
    a record's gradient is not finite does without that record.

    Args: as of ClippedSum.
    """

    def __init__(self, params: Sequence[nn.Parameter], rows: Samples, max_grad_norm: float, scale: float = 1.0) -> None:
        self._rows, self._scale = rows, scale
        self._share = max_grad_norm / math.sqrt(len(params))
        self._private = as_range(rows.private)
        self._total = [torch.zeros_like(p, dtype=torch.float32) for p in params]

    def add(self, block: Block) -> None:
        """See Collector.add."""
        for index, grads in zip(block.indices, block.per_sample(self._private)):
            stack = self._rows.sum_by_record(as_vectors(grads))
            norms = torch.linalg.vecdot(stack, stack).sqrt() / self._scale
            factors = clip_factors(norms, self._share) / self._scale
            keep = factors > 0  # 0 * NaN is NaN
            self._total[index] = (factors[keep] @ stack[keep]).view_as(self._total[index])

    def total(self) -> list[Tensor]:
        """The sum, one float32 tensor per parameter."""
        return self._total


class ClippedCoordinates:
    """Collects sum_i clip(V^T g_i, C) over the private records: ``project-then-clip``.

    The k coordinates themselves are clipped, so the sensitivity is C whatever V is; V need not even be orthonormal.
    Each block adds its share and is forgotten: no whole per-sample gradient is ever held.

    Args: as of ClippedSum, and the projector.
    """

    def __init__(
        self,
        rows: Samples,
        max_grad_norm: float,
        projector: Projector,
        scale: float = 1.0,
        automatic: bool = False,
    ) -> None:
        self._rows, self._max_grad_norm, self._projector, self._scale = rows, max_grad_norm, projector, scale
        self._automatic = automatic
        self.norms = torch.zeros(0)
        self._private = as_range(rows.private)
        self._coordinates = projector.no_coordinates(rows.num_records)

    def add(self, block: Block) -> None:
        """See Collector.add."""
        for index, grads in zip(block.indices, block.per_sample(self._private)):
            self._coordinates += self._rows.sum_by_record(self._projector.coordinates(index, grads))

    def total(self) -> list[Tensor]:
        """The sum: one tensor of shape (rank,), float32."""
        coordinates = self._coordinates / self._scale
        self.norms = coordinates.norm(dim=1)
        factors = clip_factors(self.norms, self._max_grad_norm, self._automatic)
        keep = factors > 0  # 0 * NaN is NaN: leave such a record out
        return [(coordinates[keep] * factors[keep, None]).sum(0)]
