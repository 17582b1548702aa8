"""Secret randomness: the only source of noise and of sampling decisions.

Everything is made from the operating system's entropy (``os.urandom``), so a config, a log or a checkpoint has no seed to reveal.
Must not read or change the generators of torch, numpy or ``random``: mmengine seeds those and stores the seed in every checkpoint.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import torch

from .validation import require

_CHUNK = 1 << 16  # normals made at a time, by one thread: what is made on the way stays in its cache


class RandomSource:
    """Uniform bits and Gaussian noise.

    Args:
        debug_seed: None (default) reads the system's entropy. A number makes the stream repeatable, for tests only: whoever knows
            it can subtract the noise, so the run is then NOT PRIVATE.
        secure_mode: makes each normal number from four (their sum, halved), so that the gaps between the floating-point numbers
            that one Box-Muller sample can take reveal nothing (Mironov 2012; Holohan and Braghin 2021, as Opacus' secure mode).
    """

    def __init__(self, debug_seed: int | None = None, secure_mode: bool = False) -> None:
        known = debug_seed is None or (type(debug_seed) is int and debug_seed >= 0)
        require(known, f'debug_seed={debug_seed!r} must be a whole number, 0 or above, or None for secret randomness')
        self._normals = 4 if secure_mode else 1  # of which each number is made
        self._debug = None if debug_seed is None else np.random.Generator(np.random.PCG64DXSM(debug_seed))

    @property
    def is_secret(self) -> bool:
        """Whether nobody can repeat the stream."""
        return self._debug is None

    def uint64(self, count: int) -> np.ndarray:
        """``count`` uniform 64-bit integers, shape (count,)."""
        return np.frombuffer(self._bytes(8 * count), dtype=np.uint64)

    def _bytes(self, count: int) -> bytes:
        return os.urandom(count) if self._debug is None else self._debug.bytes(count)

    def bernoulli(self, count: int, rate: Fraction) -> np.ndarray:
        """Indices in ``range(count)``, each kept independently with probability ``rate`` (Poisson sampling).

        A 64-bit integer is compared with ``floor(rate * 2**64)``, so the rate is never above what is accounted for and
        at most 2**-64 below it. ``rate`` 1 keeps all.
        """
        require(0 < rate <= 1, f'a sampling rate must be above 0 and at most 1, got {rate}')
        if rate == 1:
            return np.arange(count)
        return np.flatnonzero(self.uint64(count) < np.uint64(rate.numerator * 2**64 // rate.denominator))

    def choice(self, count: int, size: int) -> np.ndarray:
        """``size`` different indices of ``range(count)``, uniformly without replacement, shape (size,)."""
        require(size <= count, f'cannot take {size} of {count} without replacement')
        return np.argsort(self.uint64(count), kind='stable')[:size]

    def gaussian(self, count: int) -> torch.Tensor:
        """``count`` independent standard normal numbers (Box and Muller 1958), float32, shape (count,), on the CPU."""
        out = np.empty(count, dtype=np.float32)

        def fill(start: int) -> None:
            size = min(_CHUNK, count - start)
            total = sum(self._normal(size) for _ in range(self._normals))
            out[start : start + size] = total / np.float32(math.sqrt(self._normals))

        starts = range(0, count, _CHUNK)
        if self.is_secret and len(starts) > 1:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(fill, starts))
        else:  # a debug stream has an order to keep
            list(map(fill, starts))
        return torch.from_numpy(out)

    def add_gaussian(self, tensors: Sequence[torch.Tensor], deviation: float) -> None:
        """Adds N(0, deviation^2) to every entry of float32 tensors of one device, in place, all at once. Nothing for 0."""
        if not deviation:
            return
        sizes = [x.numel() for x in tensors]
        parts = self.gaussian(sum(sizes)).to(tensors[0].device).split(sizes)
        torch._foreach_add_(list(tensors), [part.view(x.shape) for x, part in zip(tensors, parts)], alpha=deviation)

    def _normal(self, size: int) -> np.ndarray:
        """``size`` normal numbers from 12 random bytes per pair: a radius and an angle (Box and Muller)."""
        pairs = (size + 1) // 2
        raw = self._bytes(12 * pairs)
        # 53 bits and a half step, so that u is strictly inside (0, 1) and the logarithm is finite
        u = (np.frombuffer(raw, np.uint64, pairs) >> np.uint64(11)).view(np.int64).astype(np.float64)
        radius = np.sqrt((-2.0 * np.log((u + 0.5) * 2.0**-53)).astype(np.float32))
        # the angle is as fine as float32 can represent
        turn = np.frombuffer(raw, np.uint32, pairs, offset=8 * pairs).astype(np.float32)
        angle = turn * np.float32(2 * math.pi * 2.0**-32)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
