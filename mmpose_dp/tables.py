"""Tensors as tables, a row per sample and a column per number of a parameter. Must not know what the numbers mean."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .devices import reading_waits


def as_vectors(x: Tensor) -> Tensor:
    """(samples, *parameter shape) -> (samples, its size), also where the parameter's shape is ()."""
    return x.flatten(1) if x.dim() > 1 else x[:, None]


def parts_of(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of (..., p) whose last dimension holds tensors of these shapes, one after the other: (..., *shape) each."""
    parts = flat.split([shape.numel() for shape in shapes], -1) if shapes else ()
    return [x.view((*flat.shape[:-1], *shape)) for x, shape in zip(parts, shapes)]


def as_range(samples: Sequence[int] | Tensor) -> Sequence[int]:
    """The samples as numbers, as a range if they are consecutive: such samples are taken without a copy."""
    numbers = samples.tolist() if isinstance(samples, Tensor) else [*samples]
    line = range(numbers[0], numbers[-1] + 1) if numbers else range(0)
    return line if numbers == list(line) else numbers


def of_samples(x: Tensor, samples: Sequence[int]) -> Tensor:
    """The given samples of (samples, ...), without a copy if they are a range."""
    return x[samples.start : samples.stop] if isinstance(samples, range) else x[samples]


def of_weight_0(weights: Tensor) -> Tensor | None:
    """Which samples have weight 0, (samples,) bool; None if none has, where that can be known without waiting for a device."""
    zero = weights == 0
    return zero if reading_waits(zero) or bool(zero.any()) else None


def without(x: Tensor, left_out: Tensor | None) -> Tensor:
    """(samples, ...) with zeros for the samples left out: 0 * NaN is NaN."""
    return x if left_out is None else x.masked_fill(left_out.view(-1, *[1] * (x.dim() - 1)), 0)


def as_one(tensors: Sequence[Tensor], change: Callable[[Tensor], object]) -> None:
    """Has tensors of one dtype and device changed in place as one vector."""
    flat = torch.cat([x.flatten() for x in tensors])
    change(flat)
    parts = flat.split([x.numel() for x in tensors])
    torch._foreach_copy_(list(tensors), [part.view(x.shape) for x, part in zip(tensors, parts)])


class SmallTogether:
    """Tables (rows, columns) with a number each, of which the narrow ones are joined: a GPU takes as long for one as for all."""

    _NARROW = 1 << 12

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Tensor]] = []

    def add(self, number: int, table: Tensor) -> list[tuple[list[int], Tensor]]:
        """The table with its number if it is wide; a narrow one waits for ``rest``."""
        if table.shape[1] >= self._NARROW:
            return [([number], table)]
        self._waiting.append((number, table))
        return []

    def rest(self) -> list[tuple[list[int], Tensor]]:
        """The tables that wait, side by side, with their numbers; nothing if there are none."""
        waiting, self._waiting = self._waiting, []
        numbers, tables = [number for number, _ in waiting], [table for _, table in waiting]
        return [(numbers, torch.cat(tables, 1))] if waiting else []
