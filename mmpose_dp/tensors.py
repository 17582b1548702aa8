"""Tensor operations that privacy/ and gradients/ share: tables with one row per sample, and what differs on a GPU.

Needs torch only. Must not know what a tensor means.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


# ---- tables ----------------------------------------------------------------------------------------------------
def as_vectors(x: Tensor) -> Tensor:
    """(samples, *parameter shape) -> (samples, its size), also where the parameter's shape is ()."""
    return x.flatten(1) if x.dim() > 1 else x[:, None]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; integers stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


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


def summed(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of (samples, ...) over the samples, times ``weights`` (samples,); one of weight 0 adds nothing, NaN or not."""
    return x.sum(0) if weights is None else torch.tensordot(weights, without(x, of_weight_0(weights)), dims=1)


# ---- on a GPU --------------------------------------------------------------------------------------------------
def reading_waits(x: Tensor) -> bool:
    """Whether reading a number of ``x`` waits for a device."""
    return x.device.type != 'cpu'


@contextmanager
def allowing_tf32(x: Tensor, matmul: bool, convolutions: bool) -> Iterator[None]:
    """Inside, says whether a GPU may round the factors of such products to 10 bits; does nothing for a tensor ``x`` on a CPU."""
    if not reading_waits(x):
        yield
        return
    flags: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag, allowed in zip(flags, (matmul, convolutions)):
            flag.allow_tf32 = allowed
        yield
    finally:
        for flag, allowed in zip(flags, before):
            flag.allow_tf32 = allowed


_WHOLE = 'none', 'ieee'  # of torch's settings fp32_precision, those that round no factor


@contextmanager
def without_tf32(x: Tensor) -> Iterator[None]:
    """Inside, a product of matrices rounds no factor: neither to TF32 on a GPU, nor to bfloat16 on a CPU that has AMX, nor in the
    mixed precision of an ``autocast`` around the whole step."""
    # what torch.set_float32_matmul_precision and torch.backends.fp32_precision set; older torch has none
    products = [getattr(torch.backends.mkldnn, name, None) for name in ('matmul', 'conv')]
    narrow = {part: before for part in products if (before := getattr(part, 'fp32_precision', 'none')) not in _WHOLE}
    for part in narrow:
        part.fp32_precision = 'ieee'  # type: ignore[union-attr]
    try:
        with torch.autocast(x.device.type, enabled=False), allowing_tf32(x, matmul=False, convolutions=False):
            yield
    finally:
        for part, before in narrow.items():
            part.fp32_precision = before  # type: ignore[union-attr]


Pair = Sequence[int]


def windows(x: Tensor, kernel_size: Pair, dilation: Pair, padding: Pair, stride: Pair) -> Tensor:
    """As torch's F.unfold, (samples, channels * kernel area, positions), which launches a kernel per sample on a GPU."""
    if not reading_waits(x):
        return F.unfold(x, tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride))
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))  # from here on one copy of a view
    for axis, size, step, apart in zip((2, 3), kernel_size, stride, dilation):
        x = x.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
    return x.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)
