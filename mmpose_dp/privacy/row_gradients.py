"""The gradients of every row of one batch, held block by block and never, by themselves, written out whole.

A block is what one way of getting gradients serves: a layer (layer_rules), a parameter followed through operations
(operations), or a stack that a loop left behind. Must not clip, weigh or release anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .layer_rules import Rule, weighted_gradient


class Block(Protocol):
    """The gradients of some parameters; ``indices`` are their places in ``RowGradients.params``."""

    indices: list[int]

    def per_row(self, rows: Tensor) -> list[Tensor]:
        """Gradients of the given rows: one (rows, *parameter shape) float32 tensor a parameter."""

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> list[Tensor]:
        """sum of the given rows' gradients times ``weights`` (rows,): one float32 tensor a parameter."""


@dataclass
class LayerBlock:
    """One layer's parameters, by the layer's rule; ``names`` are theirs within the layer."""

    module: nn.Module
    rule: Rule
    names: list[str]
    indices: list[int]
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (input, output gradient), rows outermost

    @torch.no_grad()
    def per_row(self, rows: Tensor) -> list[Tensor]:
        """See Block.per_row."""
        total: list[Tensor] = []
        for a, b in self.calls:
            grads = self.rule(self.module, _float(a, rows), _float(b, rows))
            total = _plus(total, [_sum_merged(grads[name], len(rows)) for name in self.names])
        return [x.float() for x in total]

    @torch.no_grad()
    def weighted_sum(self, rows: Tensor, weights: Tensor) -> list[Tensor]:
        """See Block.weighted_sum."""
        total: list[Tensor] = []
        for a, b in self.calls:
            scaled = _float(b, rows)
            repeats = len(scaled) // len(rows)
            scaled = scaled * weights.repeat_interleave(repeats).view(-1, *[1] * (scaled.dim() - 1))
            grads = weighted_gradient(self.module, self.rule, _float(a, rows), scaled)
            total = _plus(total, [grads[name] for name in self.names])
        return [x.float() for x in total]


@dataclass
class StackBlock:
    """One parameter's gradients as a loop over rows left them, (rows, *parameter shape)."""

    indices: list[int]
    grads: Tensor

    def per_row(self, rows: Tensor) -> list[Tensor]:
        """See Block.per_row."""
        return [self.grads[rows]]

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> list[Tensor]:
        """See Block.weighted_sum."""
        return [torch.tensordot(weights, self.grads[rows], dims=1)]


class RowGradients:
    """The gradients of every row of one batch.

    Attributes:
        params: the trainable parameters, in the order of every list of gradients here.
        num_rows: rows of the batch.
        scale: what the losses were multiplied by (mixed precision); the blocks hold gradients of the scaled losses.
    """

    def __init__(self, params: Sequence[nn.Parameter], blocks: Sequence[Block], num_rows: int) -> None:
        self.params = list(params)
        self.num_rows = num_rows
        self.scale = 1.0
        self.device = params[0].device
        self._blocks = blocks

    def blocks(self) -> Sequence[Block]:
        """Every parameter lies in at most one block; one that lies in none has gradient zero for every row."""
        return self._blocks

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        """sum_r weights[r] * g_r, (rows,) -> one float32 tensor a parameter.

        Rows of weight 0 are left out rather than multiplied, so that a NaN in them does no harm.
        """
        rows = weights.nonzero().flatten()
        total = [torch.zeros_like(p, dtype=torch.float32) for p in self.params]
        if len(rows):
            for block in self._blocks:
                for index, grads in zip(block.indices, block.weighted_sum(rows, weights[rows] / self.scale)):
                    total[index] += grads
        return total

    def per_row(self, rows: Tensor) -> list[Tensor]:
        """All gradients of the given rows, (rows, *shape) float32 each: rows x p numbers, for public rows only."""
        total = [p.new_zeros((len(rows), *p.shape), dtype=torch.float32) for p in self.params]
        for block in self._blocks:
            for index, grads in zip(block.indices, block.per_row(rows)):
                total[index] += grads / self.scale
        return total


def _plus(total: list[Tensor], part: list[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(total, part)] if total else part


def _float(x: Tensor, rows: Tensor) -> Tensor:
    """The rows' part of a captured tensor, (rows * merged, ...), in float32 at least."""
    x = x if len(rows) == x.shape[0] else x[rows]
    return x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def _sum_merged(grads: Tensor, rows: int) -> Tensor:
    """Adds up what one row contributed through several leading entries (windows, say)."""
    return grads if len(grads) == rows else grads.view(rows, -1, *grads.shape[1:]).sum(1)
