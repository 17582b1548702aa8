"""How the figures of a guarantee are printed: an epsilon is rounded up, what somebody set is printed as it was set.

Must not print an epsilon below the one that was computed.
"""

import math
from decimal import ROUND_CEILING, Context, Decimal


def rounded_up(value: float, digits: int = 4) -> str:
    """An epsilon with ``digits`` significant digits, never less than it is; 'not bounded' if it is not finite.

    Examples:
        >>> rounded_up(0.519519)
        '0.5196'
    """
    if not math.isfinite(value):
        return 'not bounded'
    rounded = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(float(value)))
    return f'{rounded.normalize():f}'


def ceiling(value: float, places: int = 4) -> float:
    """An epsilon for a log that prints ``places`` decimal places: the next number above that has no more."""
    if not math.isfinite(value) or value > 1e12:
        return value
    return float(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-places), rounding=ROUND_CEILING))


def as_given(value: float) -> str:
    """A number that somebody set, such as delta, exactly: what is read back is the same number."""
    short = f'{value:g}'
    return short if float(short) == value else repr(float(value))
