"""The gradients of every row of one batch, block by block and never, by themselves, written out whole.

A block is what one way of getting gradients serves: a layer (layer_rules), a parameter followed through operations
(operations), or a stack that a loop left behind. The engine (per_sample) hands each block to collectors as soon as the
backward has come that far, and forgets it. Must not clip, weigh or release anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmpose_dp.privacy.records import Block, in_line

from .layer_rules import Rule, ghost_is_cheaper, ghost_squares, groups_are_faster, rows_as_groups, summed_gradient


@dataclass
class LayerBlock:
    """One layer's parameters, by the layer's rule; ``names`` are theirs within the layer."""

    module: nn.Module
    rule: Rule
    names: list[str]
    indices: list[int]
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (input, output gradient), rows outermost

    @torch.no_grad()
    def per_row(self, rows: Sequence[int]) -> list[Tensor]:
        """See Block.per_row."""
        total: list[Tensor] = []
        for a, b in self._calls(rows):
            grads = (
                rows_as_groups(self.module, a, b) if groups_are_faster(self.module, b) else self.rule(self.module, a, b)
            )
            total = _plus(total, [_sum_merged(grads[name], len(rows)) for name in self.names])
        return [x.float() for x in total]

    @torch.no_grad()
    def weighted_sum(self, rows: Sequence[int], weights: Tensor | None = None) -> list[Tensor]:
        """See Block.weighted_sum."""
        total: list[Tensor] = []
        for a, b in self._calls(rows):
            if weights is not None:
                repeats = len(b) // len(rows)
                b = b * weights.repeat_interleave(repeats).view(-1, *[1] * (b.dim() - 1))
            grads = summed_gradient(self.module, self.rule, a, b)
            total = _plus(total, [grads[name] for name in self.names])
        return [x.float() for x in total]

    @torch.no_grad()
    def ghost_squares(self, rows: Sequence[int]) -> Tensor | None:
        """See Block.ghost_squares."""
        calls = self._calls(rows)
        if len(calls) > 1 or len(calls[0][0]) != len(rows) or not ghost_is_cheaper(self.module, *calls[0]):
            return None
        return ghost_squares(self.module, *calls[0], self.names)

    def _calls(self, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        return [(_float(a, rows), _float(b, rows)) for a, b in self.calls]


@dataclass
class StackBlock:
    """One parameter's gradients as a loop over rows left them, (rows, *parameter shape)."""

    indices: list[int]
    grads: Tensor

    def per_row(self, rows: Sequence[int]) -> list[Tensor]:
        """See Block.per_row."""
        return [_rows(self.grads, rows)]

    def weighted_sum(self, rows: Sequence[int], weights: Tensor | None = None) -> list[Tensor]:
        """See Block.weighted_sum."""
        grads = _rows(self.grads, rows)
        return [grads.sum(0) if weights is None else torch.tensordot(weights, grads, dims=1)]

    def ghost_squares(self, rows: Sequence[int]) -> Tensor | None:
        """See Block.ghost_squares: the gradients are there already."""
        return None


class RowGradients:
    """Collects everything, for what is small or public.

    Attributes:
        params: the trainable parameters, in the order of every list of gradients here.
        scale: what the losses were multiplied by (mixed precision); the blocks hold gradients of the scaled losses.
        blocks: what was collected.
    """

    def __init__(self, params: Sequence[nn.Parameter], scale: float = 1.0) -> None:
        self.params = list(params)
        self.scale = scale
        self.blocks: list[Block] = []

    def add(self, block: Block) -> None:
        """See Collector.add."""
        self.blocks.append(block)

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        """sum_r weights[r] * g_r, (rows,) -> one float32 tensor a parameter.

        Rows of weight 0 are left out rather than multiplied, so that a NaN in them does no harm.
        """
        rows = weights.nonzero().flatten()
        total = [torch.zeros_like(p, dtype=torch.float32) for p in self.params]
        for block in self.blocks if len(rows) else []:
            for index, grads in zip(block.indices, block.weighted_sum(in_line(rows), weights[rows] / self.scale)):
                total[index] += grads
        return total

    def per_row(self, rows: Tensor) -> list[Tensor]:
        """All gradients of the given rows, (rows, *shape) float32 each: rows x p numbers, for public rows only."""
        total = [p.new_zeros((len(rows), *p.shape), dtype=torch.float32) for p in self.params]
        for block in self.blocks:
            for index, grads in zip(block.indices, block.per_row(in_line(rows))):
                total[index] += grads / self.scale
        return total


class RowSum:
    """Collects the sum of the given rows' gradients and holds nothing else.

    Args:
        params: the trainable parameters.
        rows: indices of the rows to add up.
        scale: what the losses were multiplied by (mixed precision).
        total: a sum to go on with, which is changed; by default from zero.

    Attributes:
        total: the sum, one float32 tensor a parameter.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], rows: Tensor, scale: float = 1.0, total: list[Tensor] | None = None
    ) -> None:
        self.total = total or [torch.zeros_like(p, dtype=torch.float32) for p in params]
        self._rows, self._scale = in_line(rows), scale

    def add(self, block: Block) -> None:
        """See Collector.add."""
        for index, grads in zip(block.indices, block.weighted_sum(self._rows) if len(self._rows) else []):
            self.total[index].add_(grads, alpha=1 / self._scale)


def _plus(total: list[Tensor], part: list[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(total, part)] if total else part


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    return x[rows.start : rows.stop] if isinstance(rows, range) else x[rows]


def _float(x: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows' part of a captured tensor, (rows * merged, ...), in float32 at least."""
    return _rows(x, rows).flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def _sum_merged(grads: Tensor, rows: int) -> Tensor:
    """Adds up what one row contributed through several leading entries (windows, say)."""
    return grads if len(grads) == rows else grads.view(rows, -1, *grads.shape[1:]).sum(1)
