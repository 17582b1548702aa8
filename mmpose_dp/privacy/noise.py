"""Secret randomness: the only source of noise and of sampling decisions.

Everything is made from the operating system's entropy (``os.urandom``), so there is no seed that a config, a log or a
checkpoint could give away. Must not read or change the generators of torch, numpy or ``random``: mmengine seeds those
and writes the seed into every checkpoint.
"""

import math
import os
from fractions import Fraction

import numpy as np
import torch

from .errors import PrivacyError

_CHUNK = 1 << 20  # normals made at a time, so that a step's noise needs no second model-sized float64 buffer


class RandomSource:
    """Uniform bits and Gaussian noise.

    Args:
        debug_seed: None (default) draws from the system's entropy. A number makes the stream repeatable, for tests
            only: whoever knows it can subtract the noise, so the run is then NOT PRIVATE.
        secure_mode: makes each normal number from four (their sum, halved), so that the gaps between the floating-point
            numbers that one Box-Muller draw can reach give nothing away (Mironov 2012; Holohan and Braghin 2021, the
            remedy that Opacus' secure mode takes too). Four times the work.
    """

    def __init__(self, debug_seed: int | None = None, secure_mode: bool = False) -> None:
        if debug_seed is not None and (type(debug_seed) is not int or debug_seed < 0):
            raise PrivacyError(f'debug_seed={debug_seed!r} must be a whole number, or None for secret randomness')
        self.draws = 4 if secure_mode else 1
        self._debug = None if debug_seed is None else np.random.Generator(np.random.PCG64DXSM(debug_seed))

    @property
    def is_secret(self) -> bool:
        """Whether nobody can repeat the stream."""
        return self._debug is None

    def uint64(self, count: int) -> np.ndarray:
        """``count`` uniform 64-bit integers, shape (count,)."""
        raw = os.urandom(8 * count) if self._debug is None else self._debug.bytes(8 * count)
        return np.frombuffer(raw, dtype=np.uint64)

    def bernoulli(self, count: int, rate: Fraction) -> np.ndarray:
        """Indices in ``range(count)``, each kept independently with probability ``rate`` (Poisson sampling).

        A 64-bit integer is compared with ``floor(rate * 2**64)``, so the rate is never above what is accounted for and
        at most 2**-64 below it. ``rate`` 1 keeps all.
        """
        if not 0 < rate <= 1:
            raise ValueError(f'rate must lie in (0, 1], got {rate}')
        if rate == 1:
            return np.arange(count)
        return np.flatnonzero(self.uint64(count) < np.uint64(rate.numerator * 2**64 // rate.denominator))

    def choice(self, count: int, size: int) -> np.ndarray:
        """``size`` different indices of ``range(count)``, uniformly without replacement, shape (size,)."""
        if size > count:
            raise ValueError(f'cannot take {size} of {count} without replacement')
        return np.argsort(self.uint64(count), kind='stable')[:size]

    def gaussian(self, count: int) -> torch.Tensor:
        """``count`` independent standard normal numbers (Box and Muller 1958), float32, shape (count,), on the CPU."""
        out = np.empty(count, dtype=np.float32)
        for start in range(0, count, _CHUNK):
            size = min(_CHUNK, count - start)
            total = sum(self._normal(size) for _ in range(self.draws))
            out[start : start + size] = total / math.sqrt(self.draws)
        return torch.from_numpy(out)

    def _normal(self, size: int) -> np.ndarray:
        half = (size + 1) // 2
        # 53 bits and a half step, so that u lies strictly inside (0, 1) and the logarithm is finite
        u = ((self.uint64(2 * half) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        radius, angle = np.sqrt(-2.0 * np.log(u[:half])), 2.0 * math.pi * u[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
