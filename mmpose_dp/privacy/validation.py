"""Checks of settings. A check that fails raises ConfigError, which says what to write. Must not hold limits of a mechanism."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with ``message`` unless ``holds``."""
    if not holds:
        raise ConfigError(message)


def as_number(value: Any, name: str, what: str = 'a number', fits: Callable[[float], bool] = math.isfinite) -> float:
    """A float from any finite real number, also a fraction or numpy's. Raises ConfigError: ``name`` must be ``what``."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and fits(number):
            return number
    raise ConfigError(f'{name}={value!r} must be {what}')


def as_whole(value: Any, name: str, least: int = 1) -> int:
    """An int from any whole number, also numpy's. Raises ConfigError, naming ``name``."""
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least:
        return int(value)
    raise ConfigError(f'{name}={value!r} must be a whole number, {least} or above')


def as_positive(value: Any, name: str) -> float:
    """A number above 0, such as a budget epsilon. Raises ConfigError, naming ``name``."""
    return as_number(value, name, 'a number above 0', lambda number: number > 0)


def as_noise_multiplier(value: Any, name: str = 'noise_multiplier') -> float:
    """Sigma as a float. Raises ConfigError."""
    return as_number(value, name, 'a number, 0 or above', lambda number: number >= 0)


def as_delta(value: Any, name: str = 'target_delta') -> float:
    """Delta as a float. Raises ConfigError, naming ``name``."""
    return as_number(value, name, 'a number strictly between 0 and 1', lambda number: 0 < number < 1)
