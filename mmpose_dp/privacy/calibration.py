"""The noise and the number of steps that a budget allows.

Every answer is on the safe side: noise is rounded up, steps are rounded down. Must not compute an epsilon itself.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction

from scipy.optimize import brentq

from .accounting import History, StepEvent, epsilon, rough_epsilon
from .errors import BudgetError
from .validation import as_delta, as_given, as_positive, as_whole, rounded_up

_SIGMAS = (5e-3, 1e9)  # where calibration looks
_PRECISION = 1e-4  # relative, of a calibrated noise multiplier
_ALL_BUT_SPENT = 0.99  # of the budget: what a whole training leaves over is no budget for another

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

    With a schedule it is that of the first step; ``factors`` then say how the noise changes over the ``steps``. Rounded up, by a
    relative 1e-4 at most: epsilon of the result is at most ``target_epsilon``. Raises BudgetError if no noise is enough.
    """
    target_epsilon, target_delta = as_positive(target_epsilon, 'target_epsilon'), as_delta(target_delta, 'target_delta')
    steps = as_whole(steps, 'steps')
    spent = epsilon(history, target_delta, accountant)
    if spent >= _ALL_BUT_SPENT * target_epsilon:
        raise BudgetError(
            f'target_epsilon={target_epsilon} is already spent: the steps in the ledger cost {rounded_up(spent)}. Raise '
            'target_epsilon, or write another work_dir, which spends a second budget on the same people'
        )
    factors = factors or ((1.0, steps),)

    def after(sigma: float) -> History:
        return [*history, *scheduled_steps(sigma, sample_rate, factors)]

    # a quick bound, which is a little above what the accountants give
    start = smallest_sigma(lambda x: rough_epsilon(after(x), target_delta) / target_epsilon, 1.0, 0.01)
    if start is None:  # a small epsilon: by the Gaussian mechanism's formula (Dwork and Roth 2014, theorem 3.22)
        length = float(sample_rate) * math.sqrt(steps) * math.sqrt(2 * math.log(1.25 / target_delta))
        start = min(max(length / target_epsilon, 1.0), _SIGMAS[1])
    sigma = smallest_sigma(lambda x: epsilon(after(x), target_delta, accountant) / target_epsilon, start, _PRECISION)
    if sigma is not None:
        return sigma
    least, by_pld = (epsilon(after(_SIGMAS[1]), target_delta, name) for name in (accountant, 'pld'))
    instead = "write accountant='pld'" if by_pld <= target_epsilon else 'raise target_delta'
    raise BudgetError(
        f'target_epsilon={target_epsilon} at target_delta={as_given(target_delta)} cannot be met with any noise: with the '
        f'most that is tried, accountant={accountant!r} still gives {rounded_up(least)}. Raise target_epsilon above that, '
        f'or {instead}'
    )


def scheduled_steps(sigma: float, rate: Fraction, factors: Factors) -> History:
    """The steps of a schedule that begins with ``sigma``."""
    return [(StepEvent(sigma * factor, rate), steps) for factor, steps in factors]


def smallest_sigma(ratio: Callable[[float], float], start: float, precision: float) -> float | None:
    """The least sigma whose ``ratio``, which falls in sigma, is 1 or below, rounded up by ``precision``; None if there is none."""

    def excess(x: float) -> float:  # never 0: of several sigmas that just fit, the least is wanted
        at = ratio(math.exp(x))
        return math.log(min(at, 1e99)) if at > 1 else math.log(max(at, 1e-99)) - 1e-12

    low = high = math.log(start)
    while excess(high) > 0:  # longer and longer steps, since a ratio may take a second
        low, high = high, high + 2 * (high - low) + 0.1
        if high > math.log(_SIGMAS[1]):
            return None
    while excess(low) < 0:
        low, high = low - 0.1, low
        if low < math.log(_SIGMAS[0]):
            return math.exp(high)
    found = math.exp(brentq(excess, low, high, xtol=precision / 4)) * (1 + precision / 2)
    while ratio(found) > 1:  # accountants' grids change with sigma: a little more may be needed
        found *= 1 + precision / 4
    return found


def steps_within(
    target_epsilon: float, target_delta: float, planned: History, accountant: str, history: History
) -> int:
    """How many of the ``planned`` steps, in their order, keep the total with ``history`` within the budget."""

    def exceeds(steps: int) -> bool:
        return epsilon([*history, *first_steps(planned, steps)], target_delta, accountant) > target_epsilon

    total = sum(steps for _, steps in planned)
    return bisect_left(range(1, total), True, key=exceeds) if exceeds(total) else total


def first_steps(history: History, count: int) -> History:
    """The first ``count`` steps of a history."""
    taken = []
    for event, steps in history:
        taken.append((event, min(steps, count)))
        count -= taken[-1][1]
    return [pair for pair in taken if pair[1]]
