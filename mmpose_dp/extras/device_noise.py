"""Noise that is made on the device of the gradients: ChaCha20 (RFC 8439) in torch operations, keyed by the operating system.

Copying some 30 million numbers from the host takes longer than a step on a GPU. Must not use torch's own generators, which are
not cryptographic and whose seed mmengine stores, and must not use a counter twice under one key.
"""

import math
import os
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.noise import RandomSource

_CONSTANTS = b'expand 32-byte k'
_WORDS = 16  # of 32 bits in a block of the stream
_BLOCKS = 3 << 17  # made at a time: 24 MB of stream, which stays in the cache of a large GPU


class ChaCha20:
    """The stream of one key and nonce, block by block, as int32 words on a device.

    Args:
        key: 32 bytes.
        device: where the stream is made.
        nonce: 12 bytes.
        counter: of the first block.
    """

    def __init__(self, key: bytes, device: torch.device, nonce: bytes = bytes(12), counter: int = 0) -> None:
        assert len(key) == 32 and len(nonce) == 12
        words = torch.frombuffer(bytearray(_CONSTANTS + key + bytes(4) + nonce), dtype=torch.int32)
        self._start, self._counter = words.to(device).view(4, 4, 1), counter

    def blocks(self, count: int) -> Tensor:
        """The next ``count`` blocks: (16, count) int32. Raises OverflowError where the counter of 32 bits would begin again."""
        first, self._counter = self._counter, self._counter + count
        if self._counter > 1 << 32:
            raise OverflowError('a key of ChaCha20 has 2**32 blocks: take another key')
        start = self._start.repeat(1, 1, count)
        start[3, 0] = torch.arange(first, first + count, device=start.device).to(torch.int32)  # wraps around
        a, b, c, d = (
            row.clone() for row in start
        )  # rows of the matrix of 4 x 4 words: a quarter round has four columns
        for _ in range(10):
            _quarter_rounds(a, b, c, d)
            b, c, d = b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0)  # its diagonals become columns
            _quarter_rounds(a, b, c, d)
            b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
        return torch.stack([a, b, c, d]).add_(start).view(_WORDS, count)


def _quarter_rounds(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> None:
    """RFC 8439, section 2.1, in place on four columns of every block at once: each (4, blocks) int32."""
    for sum_, added, turned, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        sum_.add_(added)  # modulo 2**32
        turned.bitwise_xor_(sum_)
        low = (turned >> (32 - bits)).bitwise_and_((1 << bits) - 1)  # a shift of int32 to the right repeats the sign
        turned.bitwise_left_shift_(bits).bitwise_or_(low)


class DeviceRandomSource(RandomSource):
    """A RandomSource whose noise for tensors of a GPU is made there. A debug stream, and all else, is made on the CPU."""

    def add_gaussian(self, tensors: Sequence[Tensor], deviation: float) -> None:
        """See RandomSource.add_gaussian. Each call has a key of its own, from the operating system."""
        if not self.is_secret or tensors[0].device.type != 'cuda':
            super().add_gaussian(tensors, deviation)
        elif deviation:
            sizes = [x.numel() for x in tensors]
            parts = self.gaussian_on(tensors[0].device, sum(sizes)).split(sizes)
            torch._foreach_add_(list(tensors), [x.view(y.shape) for x, y in zip(parts, tensors)], alpha=deviation)

    def gaussian_on(self, device: torch.device, count: int) -> Tensor:
        """``count`` independent standard normal numbers, float32, shape (count,), on ``device``: as RandomSource.gaussian's."""
        check_device(device)
        stream, out, at = ChaCha20(os.urandom(32), device), torch.empty(count, dtype=torch.float32, device=device), 0
        pairs = -(-count // 2)
        while at < count:
            blocks = min(_BLOCKS, -(-(pairs * 3 * self._normals) // _WORDS))
            each = blocks * _WORDS // (3 * self._normals)  # pairs that these blocks suffice for
            numbers = list(_normals(stream.blocks(blocks).view(-1), each, self._normals))
            total = torch.stack(numbers).sum(0).div_(math.sqrt(self._normals)) if len(numbers) > 1 else numbers[0]
            size = min(len(total), count - at)
            out[at : at + size] = total[:size]
            at, pairs = at + size, pairs - each
        return out


@cache
def check_device(device: torch.device) -> None:
    """Raises PrivacyError, before the first noise of a device, if it does not compute what a CPU does."""
    key = bytes(range(32))
    words, here = ChaCha20(key, torch.device('cpu')).blocks(64).view(-1), ChaCha20(key, device).blocks(64).view(-1)
    expected, made = (torch.cat([*_normals(x, len(x) // 3, 1)]).cpu() for x in (words, here))
    if not torch.equal(words, here.cpu()) or not torch.allclose(expected, made, rtol=1e-4, atol=1e-4):
        raise PrivacyError(f'{device} does not compute ChaCha20 and its normal numbers as a CPU does: train on another')


def _normals(words: Tensor, pairs: int, times: int) -> Iterator[Tensor]:
    """``times`` times 2 * ``pairs`` normal numbers, by Box and Muller, from three words of 32 bits for each pair.

    53 bits make the radius, in float64, and 32 others the angle, as on the CPU.
    """
    for high, low, angle in words[: 3 * pairs * times].view(times, 3, pairs):
        u = (high.double() + 2.0**31) * 2.0**21 + ((low >> 11) + 2**20).double()  # of 0 .. 2**53 - 1
        radius = torch.log_((u + 0.5) * 2.0**-53).mul_(-2).float().sqrt_()
        turn = angle.float() * (2 * math.pi * 2.0**-32)
        yield torch.cat([radius * turn.cos(), radius * turn.sin()])
