"""Secret randomness: the only source of sampling decisions and noise (on a GPU its subclass in extras/device_noise.py).

Sampling reads the operating system's entropy. Noise comes from OpenSSL's generator (NIST SP 800-90A, by default AES-256-CTR), which
is seeded with it and gets more at every call. So no config, log or checkpoint has a seed to reveal. Must not read or change the
generators of torch, numpy or ``random``: mmengine seeds those and stores the seed in every checkpoint.
"""

import math
import os
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import torch

from .validation import require

_CHUNK = 1 << 15  # numbers made at a time, by one thread: intermediate results stay in its cache
_FINER = 11  # by how many bits the grid is finer than the noise


def grid_of(deviation: float) -> float:
    """The grid of which noised numbers are multiples: a power of two, 2^-12 to 2^-11 of the noise's standard deviation."""
    return math.ldexp(1.0, math.frexp(deviation)[1] - 1 - _FINER)


class RandomSource:
    """Uniform bits and Gaussian noise, of the system's entropy. A ``debug_seed`` makes the stream repeatable, for tests only:
    whoever knows it can subtract the noise, so the run is then NOT PRIVATE.
    """

    def __init__(self, debug_seed: int | None = None) -> None:
        known = debug_seed is None or (type(debug_seed) is int and debug_seed >= 0)
        require(known, f'debug_seed={debug_seed!r} must be a whole number, 0 or above, or None for secret randomness')
        self._debug = None if debug_seed is None else np.random.Generator(np.random.PCG64DXSM(debug_seed))

    @property
    def is_secret(self) -> bool:
        """Whether nobody can repeat the stream."""
        return self._debug is None

    def uint64(self, count: int, read: Callable[[int], bytes] = os.urandom) -> np.ndarray:
        """``count`` uniform 64-bit integers, shape (count,), of the bytes that ``read`` gives."""
        return np.frombuffer((read if self._debug is None else self._debug.bytes)(8 * count), dtype=np.uint64)

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

    def add_gaussian(self, flat: torch.Tensor, deviation: float) -> None:
        """Adds N(0, deviation^2) to every entry of a vector, in place. Nothing for 0.

        Floating-point noise has gaps: from the last bits of ``sum + noise``, somebody who knows the rest of the sum can tell which
        sums are possible (Mironov 2012; Haney et al. 2022, arXiv 2207.13793). So the addition is in float64, and its result is
        rounded to a multiple of ``grid_of(deviation)``: some 2^40 noises lead to each, whatever the sum is.
        """
        if not deviation:
            return
        host, grid = flat.cpu(), grid_of(deviation)
        values = host.numpy()

        def add(start: int) -> None:
            part = values[start : start + _CHUNK]
            noised = part.astype(np.float64) + deviation * self._normal(len(part))
            part[:] = np.rint(noised / grid) * grid

        ssl.RAND_add(os.urandom(32), 32.0)  # so that copies of this process, a machine's snapshot, differ
        with ThreadPoolExecutor(1 if self._debug else torch.get_num_threads()) as pool:  # a debug stream has an order
            list(pool.map(add, range(0, len(values), _CHUNK)))
        flat.copy_(host)  # which does nothing if it is the same tensor

    def _normal(self, size: int) -> np.ndarray:
        """``size`` standard normal numbers in float64, 16 random bytes per pair: a radius and an angle (Box and Muller 1958)."""
        words = self.uint64(size + size % 2, ssl.RAND_bytes).astype(np.float64) + 0.5  # or the logarithm is infinite
        radius, angle = np.split(words * 2.0**-64, 2)
        radius, turn = np.sqrt(-2.0 * np.log(radius)), torch.from_numpy(angle * (2 * math.pi))  # torch's cos is fast
        return np.concatenate([radius * turn.cos().numpy(), radius * turn.sin().numpy()])[:size]
