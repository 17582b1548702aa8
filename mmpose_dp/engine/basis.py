"""Computes the projector's basis V from public per-sample gradients.

Must not see a private sample: a basis from private gradients would be a release without noise.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mmpose_dp.devices import allowing_tf32
from mmpose_dp.privacy.errors import DataError
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.tables import parts_of

_CHUNK = 1 << 18  # columns that are in float32 at a time


class GradientTable:
    """The gradients of public samples, one row each, in one tensor that is also where V is computed.

    Args:
        params: what the gradients are of.
        num_samples: at least the number of all samples.
        dtype: of the table.
    """

    def __init__(self, params: Sequence[Tensor], num_samples: int, dtype: torch.dtype) -> None:
        self.shapes = [p.shape for p in params]
        size, device = sum(p.numel() for p in params), params[0].device if params else None
        self._table = torch.zeros(num_samples, size, dtype=dtype, device=device)
        self._filled = 0

    def next_rows(self, count: int) -> list[Tensor]:
        """Zeros for the gradients of so many further samples, to be filled: (count, *parameter shape) each."""
        rows = self._table[self._filled : self._filled + count]
        self._filled += count
        return parts_of(rows, self.shapes)

    def taken(self) -> Tensor:
        """The filled rows, (samples, p), once: the table forgets them. Those that are not finite are zero.

        Raises DataError if nothing is left.
        """
        rows = self._table[: self._filled]
        del self._table
        unusable = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for chunk in _chunks(rows):
            unusable |= ~chunk.isfinite().all(1)
        rows.masked_fill_(unusable[:, None], 0)
        if not rows.any():
            raise DataError(
                'the public data gives no usable gradient for the projector: check that train_dataloader.dataset.public_view '
                'or public has annotated keypoints'
            )
        return rows


def table_of(gradients: Iterable[Sequence[Tensor]], num_samples: int, dtype: torch.dtype) -> GradientTable:
    """A table of batches of gradients that are there already: one tensor per parameter, (samples, *parameter shape)."""
    table = GradientTable([], 0, dtype)
    for batch in gradients:
        if not table.shapes:
            table = GradientTable([g[0] for g in batch], num_samples, dtype)
        for rows, grads in zip(table.next_rows(len(batch[0])), batch):
            rows.copy_(grads)
    return table


def fit_basis(projector: Projector, table: GradientTable) -> None:
    """Computes V from public per-sample gradients.

    Args:
        projector: gets V as its ``basis``.
        table: m gradients; it is used up.

    The m x m Gram matrix is decomposed instead of the p x p second moment, and the gradients are overwritten by V, chunk by chunk,
    so that memory holds the m x p numbers of the table and at last the k x p of V. Samples that are not finite are left out.
    Raises DataError if none is left.
    """
    rows = table.taken()
    scale = _scale(rows) if projector.preconditioned else None
    if scale is not None:
        rows *= scale
    basis = rows
    for first in (True, False):  # the second pass repairs the rounding of the first (as in CholeskyQR2)
        values, vectors = torch.linalg.eigh(_gram(basis))
        if first:
            keep = values > values[-1] * 1e-6
            values, vectors = values[keep][-projector.max_rank :], vectors[:, keep][:, -projector.max_rank :]
        basis = _mixed((vectors / values.clamp_min(1e-30).sqrt()).T.float(), basis)
    if scale is not None:
        basis *= scale
        basis *= len(basis) ** 0.5 / _gram(basis).trace().sqrt()
    projector.place(basis if len(basis) == len(rows) else basis.clone(), table.shapes)


def _chunks(rows: Tensor) -> Iterator[Tensor]:
    return iter(rows.split(_CHUNK, 1))


def _scale(rows: Tensor) -> Tensor:
    """S of Projector.preconditioned, (p,), in the dtype of the rows."""
    moments = torch.cat([chunk.float().square().mean(0) for chunk in _chunks(rows)])
    return (moments / moments.mean(dtype=torch.float64).float() + 0.01).pow_(-0.25).to(rows.dtype)


def _gram(rows: Tensor) -> Tensor:
    """G G^T in float64 from float32 products, (m, m)."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    with allowing_tf32(rows, matmul=False, convolutions=False):  # eigenvalues down to a millionth of the largest count
        for chunk in _chunks(rows):
            chunk = chunk.float()
            gram += (chunk @ chunk.T).double()
    return gram


def _mixed(mix: Tensor, rows: Tensor) -> Tensor:
    """Linear combinations (k, m) x (m, p) -> (k, p), which take the place of the first k rows."""
    with allowing_tf32(rows, matmul=False, convolutions=False):
        for chunk in _chunks(rows):
            chunk[: len(mix)] = mix @ chunk.float()
    return rows[: len(mix)]
