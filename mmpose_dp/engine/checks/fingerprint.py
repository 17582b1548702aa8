"""Finds a change of parameters or buffers: nothing but the counted, noised step may change any of them.

A buffer that a private batch writes, or a weight that something else changes, would be in the next checkpoint without noise. Sums
of bit patterns are compared. Each number is multiplied by one that belongs to its place, since an order can hold information too.
Must not keep copies of the tensors.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from mmpose_dp import tensors

# numbers of 8 bytes are taken as two: times any number below 2^64, a difference of 32 bits is never 0 in 64 bits
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
Row = tuple[str, int, tuple]  # a tensor's name, how many rows it has, and its form, which a checkpoint holds too
Sums = tuple[list[Row], Tensor]
_TOGETHER = 1 << 20  # numbers that are joined, so that a GPU sums up many small tensors in one go
_ROW = 512  # numbers of one sum; each tensor begins a new row
# rows whose products are made at a time, so that a CPU keeps them near; a GPU takes more, in fewer operations
_PIECE = 256


class Fingerprint:
    """The bit sums of a model's parameters and buffers at one moment.

    It holds one number for each row of 512 numbers. docs/performance.md says how long it takes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen = bit_sums((*model.named_parameters(), *model.named_buffers()))

    def is_that_of(self, model: nn.Module) -> Tensor:
        """Whether the model still has these bit sums: a bool, shape (), on its device."""
        (old_rows, old), (rows, sums) = self._seen, bit_sums((*model.named_parameters(), *model.named_buffers()))
        return (sums == old).all() if rows == old_rows else torch.zeros_like(sums[:1], dtype=torch.bool).view(())

    def changed(self, model: nn.Module) -> str:
        """The name of the first parameter or buffer that is not what it was, or that is new or gone; empty if there is none."""
        return first_changed(self._seen, bit_sums((*model.named_parameters(), *model.named_buffers())))


def first_changed(before: Sums, after: Sums) -> str:
    """The name of the first tensor whose ``bit_sums`` are others, or that is new or gone; empty if there is none."""
    (old_rows, old), (rows, sums) = before, after
    if rows != old_rows:
        return min((row[0] for row in {*rows} ^ {*old_rows}), default='the order of tensors')
    if not rows or torch.equal(sums, old):  # one read from the device, if there is a tensor
        return ''
    first = int((sums != old).nonzero()[0])
    return next(name for name, count, _ in rows if (first := first - count) < 0)


@torch.no_grad()
def bit_sums(named: Iterable[tuple[str, Tensor]]) -> Sums:
    """The rows of each tensor, and the sum of each row: (rows,) int64, on the device of the first."""
    groups: dict[tuple, list[tuple[str, tuple, Tensor]]] = {}
    for name, whole in named:
        for x in _written_out(whole):
            form = (*x.shape, *x.stride(), str(x.dtype))
            x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
            bits = x.detach().resolve_neg().contiguous().view(-1).view(_BITS[x.element_size()])
            groups.setdefault((bits.dtype, bits.device), []).append((name, form, bits))
    rows: list[Row] = []
    sums: list[Tensor] = []
    for (_, device), group in groups.items():
        rows += [(name, -(-len(bits) // _ROW), form) for name, form, bits in group]
        for part in _parts([bits for _, _, bits in group]):
            pieces = _joined(part).split(8 * _PIECE if tensors.reading_waits(part[0]) else _PIECE)
            sums += [(piece * _places(device)).sum(1) for piece in pieces]  # wraps around
    device = sums[0].device if sums else torch.device('cpu')
    return rows, torch.cat([x.to(device) for x in sums]) if sums else torch.zeros(0, dtype=torch.int64)


def _written_out(x: Tensor) -> Sequence[Tensor]:
    """The numbers that a tensor holds, as tensors of rows; none of one that holds none (``meta``)."""
    if x.layout == torch.sparse_coo:
        return x._indices(), x._values()
    if x.layout in (torch.sparse_csr, torch.sparse_bsr):
        return x.crow_indices(), x.col_indices(), x.values()
    if x.layout in (torch.sparse_csc, torch.sparse_bsc):
        return x.ccol_indices(), x.row_indices(), x.values()
    if x.layout != torch.strided:
        return (x.to_dense(),)
    if x.device.type == 'meta':
        return ()
    return (x.int_repr() if x.is_quantized else x,)


@cache
def _places(device: torch.device) -> Tensor:
    """What the numbers of a row are multiplied by, (_ROW,) odd int64: without a pattern that an order could follow."""
    source = torch.Generator().manual_seed(0)
    return (torch.randint(-(1 << 63), (1 << 63) - 1, (_ROW,), generator=source) | 1).to(device)


def _parts(numbers: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of _TOGETHER numbers at most; a larger one is alone."""
    part: list[Tensor] = []
    held = 0
    for x in numbers:
        if part and held + len(x) > _TOGETHER:
            yield part
            part, held = [], 0
        part.append(x)
        held += len(x)
    if part:
        yield part


def _joined(part: Sequence[Tensor]) -> Tensor:
    """The numbers, each tensor filled up with zeros to whole rows: (rows, _ROW)."""
    zeros = part[0].new_zeros(_ROW)
    pieces = [piece for x in part for piece in (x, zeros[: -len(x) % _ROW]) if len(piece)]
    if len(pieces) == 1:
        return pieces[0].view(-1, _ROW)
    return torch.cat(pieces).view(-1, _ROW) if pieces else zeros[:0].view(0, _ROW)
