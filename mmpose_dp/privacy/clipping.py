"""From per-row gradients to one clipped sum over records: where the sensitivity C comes from.

Every number that leaves this module is a sum over records of vectors whose norm is at most C. Must not add noise, average,
or look at how many records were drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .row_gradients import RowGradients
    from .subspace import Projector


@dataclass(frozen=True)
class Rows:
    """What each row of one forward pass is.

    Attributes:
        records: (rows,) int64, the record a row belongs to, 0..num_records-1, or -1 for a public row.
        num_records: how many private records the rows make up. Several rows may be one record (all the people of an
            image, say): their gradients are added before the norm is taken.
        keys: (num_records,), what each record is called outside this batch.
    """

    records: Tensor
    num_records: int
    keys: tuple[int, ...] = ()

    @classmethod
    def from_keys(cls, keys: Sequence[int | None]) -> 'Rows':
        """Rows from one key a row; equal keys are one record, None is public."""
        order: dict[int, int] = {}
        records = [-1 if key is None else order.setdefault(key, len(order)) for key in keys]
        return cls(torch.tensor(records, dtype=torch.int64), len(order), tuple(order))

    @property
    def private(self) -> Tensor:
        """(private rows,) int64, the indices of the private rows."""
        return (self.records >= 0).nonzero().flatten()

    def sum_by_record(self, values: Tensor) -> Tensor:
        """Adds (private rows, d) to (num_records, d)."""
        records = self.records[self.private].to(values.device)
        if self.num_records == len(records):
            return values  # every row is a record of its own, in order
        return values.new_zeros(self.num_records, values.shape[1]).index_add_(0, records, values)


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C / norm) for each record, (records,) float32; 0 for a norm that is not finite.

    A record with a NaN, infinite or overflowing gradient thus contributes nothing and leaves the others alone.
    """
    factors = (max_grad_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def clipped_sum(gradients: 'RowGradients', rows: Rows, max_grad_norm: float) -> list[Tensor]:
    """sum_i g_i * min(1, C / ||g_i||) over the private records (Abadi et al. 2016, algorithm 1).

    Returns one float32 tensor a parameter, in the order of ``gradients.params``. Norms are taken in float32 over all
    parameters together.
    """
    private = rows.private
    squares = torch.zeros(rows.num_records, device=gradients.device)
    for block in gradients.blocks():
        for grads in block.per_row(private):
            squares += rows.sum_by_record(grads.flatten(1)).square().sum(1)
    factors = clip_factors(squares.sqrt() / gradients.scale, max_grad_norm)
    weights = torch.zeros(gradients.num_rows, device=gradients.device)
    weights[private] = factors[rows.records[private].to(factors.device)]
    return gradients.weighted_sum(weights)


def clipped_coordinates(gradients: 'RowGradients', rows: Rows, max_grad_norm: float, projector: 'Projector') -> Tensor:
    """sum_i clip(V^T g_i, C) over the private records, (rank,) float32: ``project-then-clip``.

    The k coordinates themselves are clipped, so the sensitivity is C whatever V is; V need not even be orthonormal.
    Each layer adds its share and forgets its gradients: no whole per-sample gradient is ever held.
    """
    private = rows.private
    coordinates = torch.zeros(rows.num_records, projector.rank, device=gradients.device)
    for block in gradients.blocks():
        for index, grads in zip(block.indices, block.per_row(private)):
            coordinates += rows.sum_by_record(projector.coordinates(index, grads / gradients.scale))
    factors = clip_factors(coordinates.norm(dim=1), max_grad_norm)
    keep = factors > 0  # 0 * NaN is NaN: leave such a record out
    return (coordinates[keep] * factors[keep, None]).sum(0)
