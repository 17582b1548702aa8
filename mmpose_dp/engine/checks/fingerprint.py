"""Whether parameters and buffers are what they were: nothing but the counted, noised step may move any of them.

A buffer that a private batch writes, or a weight that something else moves, would be in the next checkpoint without noise. Must
not keep copies: sums of bit patterns are compared.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TOGETHER = 1 << 20  # numbers that are joined, so that a GPU sums up many small tensors in one go
_ROW = 512  # numbers of one sum; a tensor begins a row of its own


class Fingerprint:
    """The bit sums of a model's parameters and buffers at one moment.

    Takes some 16 ms for 28 million parameters on two cores, and a few megabytes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rows, self._sums = _sums_of(model)

    def is_that_of(self, model: nn.Module) -> Tensor:
        """Whether the model still has it: a bool, shape (), on its device."""
        rows, sums = _sums_of(model)
        return (
            (sums == self._sums).all() if rows == self._rows else torch.zeros_like(sums[:1], dtype=torch.bool).view(())
        )

    def changed(self, model: nn.Module) -> str:
        """The name of the first parameter or buffer that is not what it was, or that is new or gone; empty if there is none."""
        rows, sums = _sums_of(model)
        if rows != self._rows:
            return next(iter(sorted({*rows} ^ {*self._rows})))[0]
        if torch.equal(sums, self._sums):  # one read from the device
            return ''
        first = int((sums != self._sums).nonzero()[0])
        for name, count in rows:
            first -= count
            if first < 0:
                return name
        return ''


@torch.no_grad()
def _sums_of(model: nn.Module) -> tuple[list[tuple[str, int]], Tensor]:
    """The rows of each tensor, by name, and the sum of each row: (rows,) int64."""
    groups: dict[tuple, list[tuple[str, Tensor]]] = {}
    for ordered, tensors in ((False, model.named_parameters()), (True, model.named_buffers())):
        for name, x in tensors:
            x = torch.view_as_real(x) if x.is_complex() else x
            bits = x.detach().contiguous().view(-1).view(_BITS[x.element_size()])
            groups.setdefault((ordered, bits.dtype, bits.device), []).append((name, bits))
    rows, sums = [], []
    for (ordered, _, _), named in groups.items():
        rows += [(name, -(-len(bits) // _ROW)) for name, bits in named]
        for part in _parts([bits for _, bits in named]):
            table = _joined(part)
            if ordered:  # each number times its place, so that their order counts
                table = table * torch.arange(1, 2 * _ROW, 2, device=table.device)
            sums.append(table.sum(1, dtype=torch.int64))  # wraps around
    device = sums[0].device if sums else torch.device('cpu')
    return rows, torch.cat([x.to(device) for x in sums]) if sums else torch.zeros(0, dtype=torch.int64)


def _parts(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of _TOGETHER numbers at most; a larger one is alone."""
    part: list[Tensor] = []
    for x in tensors:
        if part and sum(map(len, part)) + len(x) > _TOGETHER:
            yield part
            part = []
        part.append(x)
    if part:
        yield part


def _joined(part: Sequence[Tensor]) -> Tensor:
    """The numbers, each tensor filled up with zeros to whole rows: (rows, _ROW)."""
    zeros = part[0].new_zeros(_ROW)
    pieces = [piece for x in part for piece in (x, zeros[: -len(x) % _ROW]) if len(piece)]
    if len(pieces) == 1:
        return pieces[0].view(-1, _ROW)
    return torch.cat(pieces).view(-1, _ROW) if pieces else zeros[:0].view(0, _ROW)
