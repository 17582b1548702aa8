"""From per-sample gradients to one clipped sum over records: where the sensitivity C comes from.

What leaves this module is a sum over records of vectors whose norm is at most C. The one exception is ``norms``, which adaptive
clipping turns into votes that are noised. Must not add noise, average, or use how many records were sampled.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmpose_dp.tensors import as_vectors, of_weight_0, parts_of, without, without_tf32

from .plan import ROUNDING_MARGIN
from .projection import Projector
from .records import Block, Samples


def clipping_norm(max_grad_norm: float) -> float:
    """The norm to which records are clipped, so that one of them moves the sum by at most ``max_grad_norm``, rounding included.

    One record more or less changes the order in which the others are added, and with it the last bits of the clipped sum: it
    moves by a little more than the one record's own vector. So records are clipped to slightly less than C, and the noise is
    that of C. The others' own vectors stay as they are, since forwards have one shape (engine/padding.py).
    """
    return max_grad_norm * (1 - ROUNDING_MARGIN)


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C / norm) for each record, (records,) float32; 0 for a norm that is not finite.

    A record with a NaN, infinite or overflowing gradient contributes nothing and leaves the others alone.
    """
    factors = (max_grad_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


class ClippedSum:
    """Collects sum_i g_i * min(1, C / ||g_i||) over the private records (Abadi et al. 2016, algorithm 1).

    One pass for both factors of the book-keeping method (Bu et al. 2023): a block of few positions and many weights gives its norms
    at once and is kept for the weighted sum; any other gives its gradients once, and they are kept instead.

    Args: the trainable parameters, which record each sample belongs to, C, and what the losses were multiplied by.
    """

    _NARROW = 1 << 12  # a parameter with fewer numbers waits for the others
    factors = staticmethod(clip_factors)  # other kinds of clipping set another one, as safe, here

    def __init__(self, params: Sequence[Tensor], samples: Samples, max_grad_norm: float, scale: float = 1.0) -> None:
        self._params, self._samples, self._max_grad_norm, self._scale = params, samples, max_grad_norm, scale
        self._alone, self._together = samples.apart
        self._private, self.norms = samples.private if self._together else self._alone, torch.zeros(0)
        self._squares = [torch.zeros(samples.num_records, dtype=torch.float32, device=params[0].device)]
        self._whole: list[Block] = []
        self._narrow: list[tuple[int, Tensor]] = []  # (parameter, (samples, its size)): joined, for a GPU's sake
        self._stacks: list[tuple[list[int], Tensor]] = []  # (parameters, (records, their sizes together))

    def add(self, block: Block) -> None:
        """See Collector.add. A record of one sample has ghost norms, whatever the others have. TF32 could find norms too short."""
        with without_tf32(self._squares[0]):
            squares = block.ghost_squares(self._alone) if self._alone else None
        if squares is None:
            return self._take(block, self._private)
        self._squares.append(self._samples.sum_by_record(squares.float()[:, None], self._alone)[:, 0])
        self._whole.append(block)
        if self._together:
            self._take(block, self._together)

    def _take(self, block: Block, samples: Sequence[int]) -> None:
        for index, grads in zip(block.indices, block.per_sample(samples)):
            vectors = as_vectors(grads)
            if vectors.shape[1] < self._NARROW and samples is self._private:
                self._narrow.append((index, vectors))
            else:
                self._keep([index], vectors, samples)

    def _keep(self, indices: list[int], vectors: Tensor, samples: Sequence[int]) -> None:
        stack = self._samples.sum_by_record(vectors, samples)
        with without_tf32(self._squares[0]):
            self._squares.append(torch.linalg.vecdot(stack, stack))
        self._stacks.append((indices, stack))

    def _norms(self) -> Tensor:
        return torch.stack(self._squares).sum(0).sqrt()

    def total(self) -> list[Tensor]:
        """The sum, one float32 tensor per parameter. Records whose norm is not finite are left out: 0 * NaN is NaN."""
        narrow, self._narrow = self._narrow, []
        if narrow:
            self._keep([index for index, _ in narrow], torch.cat([vectors for _, vectors in narrow], 1), self._private)
        self.norms = self._norms() / self._scale
        weights = self.factors(self.norms, self._max_grad_norm) / self._scale
        total: list[Any] = [None] * len(self._params)
        left_out = of_weight_0(weights)
        alone = weights[self._samples.record_of(self._alone, weights.device)] if self._together else weights
        with without_tf32(self._squares[0]):
            for block in self._whole:
                for index, grads in zip(block.indices, block.weighted_sum(self._alone, alone)):
                    total[index] = grads
            for indices, stack in self._stacks:
                parts = parts_of(weights @ without(stack, left_out), [self._params[index].shape for index in indices])
                for index, part in zip(indices, parts):
                    total[index] = part if total[index] is None else total[index] + part
        return [torch.zeros_like(p, dtype=torch.float32) if x is None else x for p, x in zip(self._params, total)]


class ClippedCoordinates(ClippedSum):
    """Collects sum_i clip(V^T g_i, C) over the private records: ``project-then-clip``.

    The k coordinates themselves are clipped, so the sensitivity is C whatever V is; V need not even be orthonormal. Each block
    adds its share and is forgotten: no whole per-sample gradient is ever held. Args: as of ClippedSum, and the projector.
    """

    def __init__(self, samples: Samples, max_grad_norm: float, projector: Projector, scale: float = 1.0) -> None:
        super().__init__([projector.no_coordinates(1)[0]], samples, max_grad_norm, scale)  # one parameter of k entries
        self._projector, self._coordinates = projector, projector.no_coordinates(samples.num_records)
        self._stacks = [([0], self._coordinates)]

    def add(self, block: Block) -> None:
        """See Collector.add."""
        self._take(block, self._private)

    def _keep(self, indices: list[int], vectors: Tensor, samples: Sequence[int]) -> None:
        self._coordinates += self._samples.sum_by_record(self._projector.coordinates(indices, vectors), samples)

    def _norms(self) -> Tensor:
        return self._coordinates.norm(dim=1)
