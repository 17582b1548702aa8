"""What is done otherwise on a GPU than on a CPU, with torch alone. Must not know what a tensor means."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def reading_waits(x: Tensor) -> bool:
    """Whether to read a number of it is to wait for a device."""
    return x.device.type != 'cpu'


@contextmanager
def allowing_tf32(x: Tensor, matmul: bool, convolutions: bool) -> Iterator[None]:
    """Inside, a GPU may round the factors of such products to 10 bits, or not; nothing changes for a tensor ``x`` of a CPU."""
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


def without_tf32(x: Tensor) -> AbstractContextManager[None]:
    """Inside, no factor of a product is rounded to 10 bits."""
    return allowing_tf32(x, matmul=False, convolutions=False)


Pair = Sequence[int]


def windows(x: Tensor, kernel_size: Pair, dilation: Pair, padding: Pair, stride: Pair) -> Tensor:
    """As torch's F.unfold, (samples, channels * kernel area, positions), which launches a kernel per sample on a GPU."""
    if not reading_waits(x):
        return F.unfold(x, tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride))
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))  # from here on one copy of a view
    for axis, size, step, apart in zip((2, 3), kernel_size, stride, dilation):
        x = x.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
    return x.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)
