"""Numbers from settings, or a PrivacyError that says what to write. Must not know what a setting is for."""

import math
from numbers import Integral, Real
from typing import Any

from .errors import PrivacyError


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_number(value: Any, name: str, what: str = 'a number') -> float:
    """A float from any real number, also a fraction or numpy's. Raises PrivacyError that says what ``name`` must be."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise PrivacyError(f'{name}={value!r} must be {what}')


def as_whole(value: Any, name: str, least: int = 1) -> int:
    """An int from any whole number, also numpy's. Raises PrivacyError that says what ``name`` must be."""
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least:
        return int(value)
    raise PrivacyError(f'{name}={value!r} must be a whole number, {least} or above')
