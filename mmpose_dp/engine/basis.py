"""Computes the projector's basis V from public per-sample gradients.

Must not see a private sample: a basis from private gradients would be a release without noise.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mmpose_dp.privacy.errors import DataError
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.tensors import parts_of, without_tf32

_CHUNK = 1 << 18  # columns that are in float32 at a time
_GROUP = 1 << 22  # columns that are freed together, at least


class GradientTable:
    """The gradients of public samples, one row each, in memory that is also where V is computed.

    Args:
        params: what the gradients are of.
        num_samples: at least the number of all samples.
        dtype: of the numbers.
    """

    def __init__(self, params: Sequence[Tensor], num_samples: int, dtype: torch.dtype) -> None:
        self.shapes = [p.shape for p in params]
        self._groups = _grouped(self.shapes)
        sizes = [sum(shape.numel() for shape in group) for group in self._groups]
        self._tables = [torch.zeros(num_samples, size, dtype=dtype, device=params[0].device) for size in sizes]
        self._filled = 0

    def next_rows(self, count: int) -> list[Tensor]:
        """Zeros for the gradients of so many further samples, to be filled: (count, *parameter shape) each."""
        start, self._filled = self._filled, self._filled + count
        tables = [table[start : self._filled] for table in self._tables]
        return [part for table, shapes in zip(tables, self._groups) for part in parts_of(table, shapes)]

    def taken(self) -> list[Tensor]:
        """The filled rows, (samples, columns of a group) each, once. Samples that are not finite are zero.

        Raises DataError if nothing is left.
        """
        tables, self._tables = [table[: self._filled] for table in self._tables], []
        finite = [chunk.isfinite().all(1) for chunk in _chunks(tables)]
        for table in tables:
            table.masked_fill_(~torch.stack(finite).all(0)[:, None], 0)
        if not any(table.any() for table in tables):
            raise DataError(
                'the public data gives no usable gradient for the projector: check that train_dataloader.dataset.public_view '
                'or public has annotated keypoints'
            )
        return tables


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
    and freed, group by group: memory holds the m x p numbers of the table and at last the k x p of V. Samples that are not finite
    are left out. Raises DataError if none is left.
    """
    tables = table.taken()
    scales = _scales(tables) if projector.preconditioned else []
    _scale_by(tables, scales)
    for first in (True, False):  # the second pass repairs the rounding of the first (as in CholeskyQR2)
        values, vectors = torch.linalg.eigh(_gram(tables))
        if first:
            keep = values > values[-1] * 1e-6
            values, vectors = values[keep][-projector.max_rank :], vectors[:, keep][:, -projector.max_rank :]
        tables = _mixed((vectors / values.clamp_min(1e-30).sqrt()).T.float(), tables)
    if scales:
        _scale_by(tables, scales)
        squares = torch.stack([chunk.float().square().sum(dtype=torch.float64) for chunk in _chunks(tables)]).sum()
        _scale_by(tables, [(len(tables[0]) / squares).sqrt()] * len(tables))
    projector.place(_joined(tables), table.shapes)


def _grouped(shapes: Sequence[torch.Size]) -> list[list[torch.Size]]:
    """Consecutive shapes, of _GROUP numbers together or a little more."""
    groups: list[list[torch.Size]] = []
    for shape in shapes:
        if not groups or sum(one.numel() for one in groups[-1]) >= _GROUP:
            groups.append([])
        groups[-1].append(shape)
    return groups


def _chunks(tables: Sequence[Tensor]) -> Iterator[Tensor]:
    return (chunk for table in tables for chunk in table.split(_CHUNK, 1))


def _scales(tables: Sequence[Tensor]) -> list[Tensor]:
    """S of Projector.preconditioned, one vector per table, in its dtype."""
    moments = torch.cat([chunk.float().square().mean(0) for chunk in _chunks(tables)])
    scale = (moments / moments.mean(dtype=torch.float64).float() + 0.01).pow_(-0.25).to(tables[0].dtype)
    return [*scale.split([table.shape[1] for table in tables])]


def _scale_by(tables: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    for table, scale in zip(tables, scales):
        table *= scale


def _gram(tables: Sequence[Tensor]) -> Tensor:
    """G G^T in float64 from float32 products, (m, m)."""
    gram = torch.zeros(len(tables[0]), len(tables[0]), dtype=torch.float64, device=tables[0].device)
    with without_tf32(gram):  # eigenvalues down to a millionth of the largest count
        for chunk in _chunks(tables):
            chunk = chunk.float()
            gram += (chunk @ chunk.T).double()
    return gram


def _mixed(mix: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """Linear combinations (k, m) x (m, p) -> (k, p), which take the place of the first k rows."""
    with without_tf32(mix):
        for chunk in _chunks(tables):
            chunk[: len(mix)] = mix @ chunk.float()
    return [table[: len(mix)] for table in tables]


def _joined(tables: list[Tensor]) -> Tensor:
    """The tables side by side; each is freed when it is copied."""
    flat, start = tables[0].new_empty(len(tables[0]), sum(table.shape[1] for table in tables)), 0
    while tables:
        table = tables.pop(0)
        flat[:, start : start + table.shape[1]] = table
        start += table.shape[1]
    return flat
