"""Checks the numbers of settings, and prints the figures of a guarantee.

A failed check raises ConfigError, which says what to write. Must not hold limits of a mechanism, nor print a smaller epsilon.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from decimal import ROUND_CEILING, Context
from functools import partial
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with ``message`` unless ``holds``."""
    if not holds:
        raise ConfigError(message)


def as_number(value: Any, name: str, what: str = 'a number', fits: Callable[[float], bool] = math.isfinite) -> float:
    """A float from any finite real number, also a fraction or numpy's. Raises ConfigError: ``name`` must be ``what``."""
    with suppress(OverflowError):  # of whole numbers and fractions that no float holds
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and fits(float(value)):
            return float(value)
    raise ConfigError(f'{name}={value!r} must be {what}')


def as_whole(value: Any, name: str, least: int = 1) -> int:
    """An int from any whole number, also numpy's. Raises ConfigError, naming ``name``."""
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least:
        return int(value)
    raise ConfigError(f'{name}={value!r} must be a whole number, {least} or above')


# each takes a value and the name of its setting
as_positive = partial(as_number, what='a number above 0', fits=lambda number: number > 0)
as_noise_multiplier = partial(as_number, what='a number, 0 or above', fits=lambda number: number >= 0)
as_delta = partial(as_number, what='a number strictly between 0 and 1', fits=lambda number: 0 < number < 1)


def rounded_up(value: float, digits: int = 4) -> str:
    """An epsilon with ``digits`` significant digits, never less than it is; 'not bounded' if it is not finite."""
    if not math.isfinite(value):
        return 'not bounded'
    rounded = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(float(value)))
    return f'{rounded.normalize():f}'


def as_given(value: float) -> str:
    """A number that somebody set, such as delta, exactly: what is read back is the same number."""
    short = f'{value:g}'
    return short if float(short) == value else repr(float(value))
