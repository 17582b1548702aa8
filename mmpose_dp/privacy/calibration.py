"""The noise, the sampling rates and the number of steps that a budget allows.

Every answer is on the safe side: noise is rounded up, rates and steps are rounded down. Must not compute an epsilon itself.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from scipy.optimize import brentq

from .accounting import History, StepEvent, as_delta, epsilon, rough_epsilon
from .errors import PrivacyError
from .figures import as_given, rounded_up
from .validation import as_number, as_whole

_SIGMAS = (1e-2, 1e9)  # where calibration looks
_PRECISION = 1e-4  # relative, of a calibrated noise multiplier
_PERSONAL_PRECISION = 1e-2  # the same where every try is a search by itself; the rates are exact all the same
_ALL_BUT_SPENT = 0.99  # of the budget: what a whole training leaves over is no budget for another
_RATE_BITS = 32  # a calibrated sampling rate is a whole multiple of 2**-32

Spent = Callable[[History], float]  # epsilon of a history
Factors = Sequence[tuple[float, int]]  # of a schedule: (noise in units of the first step's, steps)


def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sample_rate: Fraction,
    steps: int,
    accountant: str = 'pld',
    history: History = (),
    factors: Factors = (),
) -> float:
    """The smallest noise multiplier that keeps ``history`` and ``steps`` more within the budget.

    With a schedule it is that of the first step; ``factors`` then say how the noise goes on over the ``steps``. Rounded up,
    by a relative 1e-4 at most: epsilon of the result is at most ``target_epsilon``. Raises PrivacyError where no noise is
    enough.
    """
    target_epsilon, target_delta = as_epsilon(target_epsilon), as_delta(target_delta)
    steps = as_whole(steps, 'steps')
    spent = epsilon(history, target_delta, accountant)
    if spent >= _ALL_BUT_SPENT * target_epsilon:
        raise PrivacyError(
            f'target_epsilon={target_epsilon} is already spent: the steps in the ledger cost {rounded_up(spent)}. Raise '
            'target_epsilon; or, if earlier trainings on this data need not count, give another work_dir'
        )
    factors = factors or ((1.0, steps),)

    def taken(sigma: float) -> History:
        return [*history, *planned(sigma, sample_rate, factors)]

    # a quick bound; the accountants lie a little below
    start = _smallest(lambda sigma: rough_epsilon(taken(sigma), target_delta) / target_epsilon, 1.0, 2.0, 0.01)
    steps_apart = 1.1
    if start is None:  # a small epsilon: by the Gaussian mechanism's formula (Dwork and Roth 2014, theorem 3.22)
        length = float(sample_rate) * math.sqrt(steps) * math.sqrt(2 * math.log(1.25 / target_delta))
        start, steps_apart = min(max(length / target_epsilon, 1.0), _SIGMAS[1]), 2.0
    sigma = _smallest(
        lambda sigma: epsilon(taken(sigma), target_delta, accountant) / target_epsilon, start, steps_apart, _PRECISION
    )
    if sigma is None:
        raise PrivacyError(_out_of_reach(target_epsilon, target_delta, taken(_SIGMAS[1]), accountant))
    return sigma


def _out_of_reach(target_epsilon: float, target_delta: float, most_noise: History, accountant: str) -> str:
    """What to write instead of a budget that no noise meets."""
    least = epsilon(most_noise, target_delta, accountant)
    better = epsilon(most_noise, target_delta, 'pld') <= target_epsilon
    return (
        f'target_epsilon={target_epsilon} at target_delta={as_given(target_delta)} cannot be met with any noise: with the '
        f'most that is tried, accountant={accountant!r} still gives {rounded_up(least)}. Raise target_epsilon above that'
        + (", or write accountant='pld'" if better else ', or raise target_delta')
    )


def as_epsilon(target_epsilon: Any, name: str = 'target_epsilon') -> float:
    """A budget as a float. Raises PrivacyError, naming the key, for what cannot be one."""
    number = as_number(target_epsilon, name, 'a number above 0')
    if number <= 0:
        raise PrivacyError(f'{name}={target_epsilon!r} must be a number above 0')
    return number


def calibrate_sample_rates(
    budgets: Sequence[tuple[float, int]],
    target_delta: float,
    expected_batch_size: int,
    steps: int,
    accountant: str = 'pld',
    history: History = (),
    factors: Factors = (),
) -> tuple[float, tuple[Fraction, ...]]:
    """One noise multiplier for all, and for each budget the rate at which its records may be drawn.

    Args:
        budgets: (epsilon, number of records) of each group, smallest epsilon first.
        expected_batch_size: B; the rates times the numbers of records add up to it.

    Every group keeps within its own epsilon. Raises PrivacyError where no noise is enough. Source: Boenisch et al. 2023
    (individualized DP-SGD, "Sample").
    """
    factors = factors or ((1.0, steps),)

    def rates_at(sigma: float, spent: Spent) -> list[Fraction]:
        return [_highest_rate(target, sigma, spent, history, factors) for target, _ in budgets]

    def over(spent: Spent) -> Callable[[float], float]:
        def ratio(sigma: float) -> float:
            drawn = sum(q * n for q, (_, n) in zip(rates_at(sigma, spent), budgets))
            return float(expected_batch_size / drawn) if drawn else math.inf

        return ratio

    def exactly(history: History) -> float:
        return epsilon(history, target_delta, accountant)

    sigma = _smallest(over(lambda history: rough_epsilon(history, target_delta)), 1.0, 2.0, _PERSONAL_PRECISION)
    if sigma is not None:
        sigma = _smallest(over(exactly), sigma, 1.05, _PERSONAL_PRECISION)
    if sigma is None:
        raise PrivacyError(
            f'the personal budgets {[target for target, _ in budgets]} cannot be met in {steps} steps of '
            f'expected_batch_size {expected_batch_size}: raise them, or lower max_epochs or expected_batch_size'
        )
    rates = rates_at(sigma, exactly)
    if not all(rates):
        raise PrivacyError(
            f'a personal budget of {budgets[0][0]} is too small to be drawn at all, or earlier '
            'trainings have spent it: raise it'
        )
    drawn = sum((q * n for q, (_, n) in zip(rates, budgets)), Fraction(0))
    shrink = min(expected_batch_size / drawn, Fraction(1))  # exact
    return sigma, tuple(q * shrink for q in rates)


def _highest_rate(target: float, sigma: float, spent: Spent, history: History, factors: Factors) -> Fraction:
    """The highest sampling rate that keeps the budget, rounded down by one percent; 0 where none does."""

    def fits(rate: Fraction) -> bool:
        return spent([*history, *planned(sigma, rate, factors)]) <= target

    low, high = Fraction(1, 1 << _RATE_BITS), Fraction(1)
    if fits(high):
        return high
    if not fits(low):
        return Fraction(0)
    while high / low > Fraction(101, 100):
        middle = Fraction(int(math.sqrt(low * high) * 2**_RATE_BITS), 1 << _RATE_BITS)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def planned(sigma: float, rate: Fraction, factors: Factors) -> History:
    """The steps of a schedule that begins with ``sigma``."""
    return [(StepEvent(sigma * factor, rate), steps) for factor, steps in factors]


def _smallest(ratio: Callable[[float], float], start: float, factor: float, precision: float) -> float | None:
    """The least sigma whose ``ratio``, which falls in sigma, is 1 or below, rounded up by ``precision``; None where none is.

    Steps of ``factor`` first, from ``start``. Each ratio may take a second.
    """
    high = start
    while ratio(high) > 1:
        high *= factor
        if high > _SIGMAS[1]:
            return None
    low = high / factor
    while ratio(low) <= 1:
        if low < _SIGMAS[0]:
            return low
        high, low = low, low / factor

    ends = {math.log(low): 1.0, math.log(high): -1.0}  # known; and a ratio of 1 at the upper end is no crossing

    def excess(log_sigma: float) -> float:
        if log_sigma in ends:
            return ends[log_sigma]
        found = math.log(min(max(ratio(math.exp(log_sigma)), 1e-9), 1e9))
        return found or -precision  # where all ratios above the crossing are 1, it lies below

    root = brentq(excess, *ends, xtol=precision / 2)
    sigma = min(math.exp(root + precision / 2), high)
    while ratio(sigma) > 1:  # grids make small steps in the curve
        sigma *= 1 + precision / 2
    return sigma


def steps_within(target_epsilon: float, target_delta: float, ahead: History, accountant: str, history: History) -> int:
    """How many of the steps ``ahead``, in their order, keep the total with ``history`` within the budget."""
    total = sum(steps for _, steps in ahead)

    def fits(steps: int) -> bool:
        return epsilon([*history, *first_steps(ahead, steps)], target_delta, accountant) <= target_epsilon

    if fits(total):
        return total
    low, high = 0, total  # 0 steps spend nothing more, all of them are too many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def first_steps(history: History, count: int) -> History:
    """The first ``count`` steps of a history."""
    taken = []
    for event, steps in history:
        taken.append((event, min(steps, count)))
        count -= taken[-1][1]
    return [pair for pair in taken if pair[1]]
