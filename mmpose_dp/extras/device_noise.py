"""Noise that is made on the device of the gradients: ChaCha20 (RFC 8439) in torch operations, keyed by the operating system.

Copying some 30 million numbers from the host takes longer than a step on a GPU. Must not use torch's own generators, which are
not cryptographic and whose seed mmengine stores, and must not use a counter twice under one key.
"""

import math
import os
from functools import cache

import torch
from torch import Tensor

from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.noise import RandomSource, grid_of

_CONSTANTS = b'expand 32-byte k'
_WORDS = 16  # of 32 bits in a block of the stream
_PAIRS = 1 << 20  # of numbers made at a time: 16 MB of stream, which stays in the cache of a large GPU


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
        # rows of the matrix of 4 x 4 words: a quarter round has four columns
        a, b, c, d = (row.clone() for row in start)
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
    """A RandomSource whose noise for vectors of a GPU is made there. A debug stream, and all else, is made on the CPU."""

    def add_gaussian(self, flat: Tensor, deviation: float) -> None:
        """See RandomSource.add_gaussian."""
        if deviation and self.is_secret and flat.device.type == 'cuda':
            self.add_on_device(flat, deviation)
        else:
            super().add_gaussian(flat, deviation)

    def add_on_device(self, flat: Tensor, deviation: float) -> None:
        """See RandomSource.add_gaussian, for a vector of a device. Each call has a new key from the operating system."""
        check_device(flat.device)
        stream, grid = ChaCha20(os.urandom(32), flat.device), grid_of(deviation)
        for part in flat.split(2 * _PAIRS):
            pairs = (len(part) + 1) // 2
            noise = _normals(stream.blocks(-(-4 * pairs // _WORDS)).view(-1), pairs)[: len(part)]
            part.copy_(part.double().add_(noise, alpha=deviation).div_(grid).round_().mul_(grid))


@cache
def check_device(device: torch.device) -> None:
    """Raises PrivacyError, before the first noise of a device, if it does not compute what a CPU does."""
    key = bytes(range(32))
    words, here = ChaCha20(key, torch.device('cpu')).blocks(64).view(-1), ChaCha20(key, device).blocks(64).view(-1)
    expected, made = _normals(words, 256), _normals(here, 256).cpu()
    if not torch.equal(words, here.cpu()) or not torch.allclose(expected, made, rtol=1e-9, atol=1e-9):
        raise PrivacyError(f'{device} does not compute ChaCha20 and its normal numbers as a CPU does: train on another')


def _normals(words: Tensor, pairs: int) -> Tensor:
    """2 * ``pairs`` normal numbers in float64, by Box and Muller, from four words of 32 bits for each pair: as on the CPU."""
    high, low = words[: 4 * pairs].double().add_(2.0**31).view(2, 2, pairs).unbind(1)
    radius, turn = high.mul_(2.0**32).add_(low).add_(0.5)  # of 64 bits each, and above 0
    radius = radius.mul(2.0**-64).log_().mul_(-2).sqrt_()
    turn = turn.mul(2 * math.pi * 2.0**-64)
    return torch.cat([radius * turn.cos(), radius * turn.sin()])
