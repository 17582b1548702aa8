"""Epsilon from a history of noisy steps.

The mechanism is the Poisson-subsampled Gaussian under add/remove adjacency. The curves come from
well-kept libraries: RDP and PRV from Opacus, PLD from dp-accounting. Must not round a rate or a
step count, and must not return less than an upper bound.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld_library
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.stats import binom

from .errors import PrivacyError
from .validation import as_number, as_whole

ACCOUNTANTS = ('pld', 'prv', 'rdp')
_PRV_ERRORS = (0.01, 1e-3)  # of epsilon, and of delta relative to it: what Opacus takes too
_PRV_POINTS = 1 << 23  # a longer grid takes gigabytes
_FEW_ORDERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256)  # of RDP, for a bound in a millisecond
_HIGH_ORDERS = (80, 100, 128, 180, 256, 360, 512, 720, 1000)  # beside Opacus' own: what a small epsilon wants
_PLD_STEPS = 10**7  # dp-accounting takes a whole number to this power
_LEAST_RATE = 1e-12  # smaller ones are accounted for as this: 1 - rate must differ from 1
_LEAST_WIDTH = 1e-12  # of the grid: losses are sums of numbers about 1
_ROUGH_ORDERS = (
    1.25,
    1.5,
    2.5,
    *_FEW_ORDERS,
    1000,
)  # with the low ones, which a large epsilon wants and which are dear


@dataclass(frozen=True)
class StepEvent:
    """One noisy step: a Gaussian on a Poisson sample.

    Attributes:
        noise_multiplier: sigma, the noise's standard deviation in units of the sensitivity.
        sample_rate: q = expected_batch_size / num_records, an exact fraction. With personal budgets, the highest.
        personal_rates: with personal budgets, the rate of each group of records, smallest budget first.
    """

    noise_multiplier: float
    sample_rate: Fraction
    personal_rates: tuple[Fraction, ...] = ()

    def __post_init__(self) -> None:
        sigma = as_number(self.noise_multiplier, 'noise_multiplier', 'a number, 0 or above')
        if sigma < 0:
            raise PrivacyError(f'noise_multiplier={self.noise_multiplier!r} must be a number, 0 or above')
        object.__setattr__(self, 'noise_multiplier', sigma)
        if not isinstance(self.sample_rate, Fraction):
            raise PrivacyError(
                f'sample_rate={self.sample_rate!r} must be exact: write Fraction(expected_batch_size, num_records)'
            )
        for rate in (self.sample_rate, *self.personal_rates):
            if not 0 < rate <= 1:
                raise PrivacyError(f'sample_rate={rate} must lie in (0, 1]')
        if self.personal_rates and max(self.personal_rates) != self.sample_rate:
            raise PrivacyError('sample_rate must be the highest of personal_rates')

    def of_group(self, group: int) -> 'StepEvent':
        """The step as the records of one budget group see it."""
        rate = self.personal_rates[group] if group < len(self.personal_rates) else self.sample_rate
        return StepEvent(self.noise_multiplier, rate)


History = Sequence[tuple[StepEvent, int]]


def epsilon(history: History, delta: float, accountant: str = 'pld') -> float:
    """Upper bound of epsilon at ``delta`` for the composition of ``history``, (event, steps) pairs.

    0 for no step, infinity where a step had no noise. Raises PrivacyError for an unknown
    accountant, and where PRV's or RDP's numerics fail (use 'pld' there).

    The Fourier transforms of 'pld' and 'prv' are exact to some 1e-16 a step. Where that is more than a tenth of ``delta``, and
    beyond 10^7 steps, 'pld' takes RDP's bound instead, and 'prv' is refused.

    Sources: 'pld' Doroshenko et al. 2022 (connect the dots, pessimistic), 'prv' Gopi et al. 2021
    (its upper bound, not its estimate), 'rdp' Mironov et al. 2019 with Balle et al. 2020.
    """
    if accountant not in ACCOUNTANTS:
        why = ' (GDP is a limit that under-estimates epsilon)' if accountant == 'gdp' else ''
        raise PrivacyError(f'accountant={accountant!r} is not offered{why}; write one of {ACCOUNTANTS}')
    delta = as_delta(delta)
    return _epsilon(_merge(history), delta, accountant)


def as_delta(delta: Any, name: str = 'target_delta') -> float:
    """Delta as a float. Raises PrivacyError, naming the key, for what cannot be one."""
    what = 'a number strictly between 0 and 1'
    number = as_number(delta, name, what)
    if not 0 < number < 1:
        raise PrivacyError(f'{name}={delta!r} must be {what}')
    return number


@lru_cache(maxsize=1024)  # a plan, its calibration, its budget and its statement ask for the same histories
def _epsilon(merged: tuple[tuple[StepEvent, int], ...], delta: float, accountant: str) -> float:
    if not merged:
        return 0.0
    if any(event.noise_multiplier == 0 for event, _ in merged):
        return math.inf
    return _pld_epsilon(merged, delta) if accountant == 'pld' else _opacus(merged, delta, accountant)


def rough_epsilon(history: History, delta: float) -> float:
    """As ``epsilon`` by RDP at few orders: an upper bound too, and where a search may begin. Takes some milliseconds."""
    delta, merged = as_delta(delta), _merge(history)
    if any(event.noise_multiplier == 0 for event, _ in merged):
        return math.inf
    return _opacus(merged, delta, 'rdp', _ROUGH_ORDERS) if merged else 0.0


def group_epsilon(history: History, delta: float, records: int) -> float:
    """Epsilon at ``delta`` for one person with ``records`` records, all of whose slots are filled or emptied.

    Exact up to the grid (PLD): each record joins a step on its own, so the clipped sum shifts by
    at most j * C with probability Binomial(records, q), a mixture of Gaussians (Choquette-Choo et
    al. 2024, corollary 4.7). Infinity where a step had no noise, and for several records where the grid cannot tell (see
    ``epsilon``).
    """
    records = as_whole(records, 'records')
    delta, merged = as_delta(delta), _merge(history)
    if not merged:
        return 0.0
    if any(event.noise_multiplier == 0 for event, _ in merged):
        return math.inf
    return _pld_epsilon(merged, delta, records)


def _merge(history: History) -> tuple[tuple[StepEvent, int], ...]:
    """Equal events added up, so that a resumed training spends to the last digit what one does."""
    total: dict[StepEvent, int] = {}
    for event, steps in history:
        steps = as_whole(steps, 'steps', 0)
        if steps:
            total[event] = total.get(event, 0) + steps
    return tuple(total.items())


def _opacus(history: History, delta: float, accountant: str, orders: Sequence[float] = ()) -> float:
    library = PRVAccountant() if accountant == 'prv' else RDPAccountant()
    library.history = [(e.noise_multiplier, _rate(e), n) for e, n in history]
    settings: dict[str, Any] = {'alphas': list(orders or (*RDPAccountant.DEFAULT_ALPHAS, *_HIGH_ORDERS))}
    try:
        with warnings.catch_warnings(), np.errstate(all='ignore'):
            # Opacus warns where the best RDP order is its first or last; the bound still holds
            warnings.simplefilter('ignore')
            if accountant == 'prv':
                if _noise(history) > delta / 10:
                    raise ValueError(f'delta {delta:.3g} is too small for its sums')
                eps_error, delta_error = _PRV_ERRORS[0], delta * _PRV_ERRORS[1]
                settings = dict(eps_error=eps_error, delta_error=delta_error)
                reach = 2 * (_opacus(history, delta_error / 4, 'rdp', _ROUGH_ORDERS) + 3)
                steps = sum(n for _, n in history)
                mesh = eps_error / math.sqrt(steps * math.log(12 / delta_error) / 2)
                if reach / mesh > _PRV_POINTS:
                    raise ValueError('epsilon is too large for its grid')
            try:
                spent = float(library.get_epsilon(delta, **settings))
            except ValueError:
                if accountant == 'prv':
                    raise
                # fractional orders fail where a step tells next to nothing
                settings['alphas'] = [order for order in settings['alphas'] if order == int(order)]
                spent = float(library.get_epsilon(delta, **settings))
        if not math.isfinite(spent) or (accountant == 'prv' and spent < 0):
            raise ValueError(f'the result was {spent}')
    except (ArithmeticError, RuntimeError, ValueError) as error:
        instead = "'pld' or 'rdp'" if accountant == 'prv' else "'pld'"
        raise PrivacyError(
            f'accountant={accountant!r} cannot evaluate this history: {error}. Write accountant={instead}'
        ) from error
    return max(spent, 0.0)


def _pld_epsilon(history: History, delta: float, records: int = 1) -> float:
    total, noise = None, _noise(history)
    if noise > delta / 10 or sum(steps for _, steps in history) > _PLD_STEPS:
        return _opacus(history, delta, 'rdp') if records == 1 else math.inf
    try:
        interval = _interval(history, records)
        with np.errstate(all='ignore'):
            for event, steps in history:
                part = _pld(event, records, interval).self_compose(steps)
                total = part if total is None else total.compose(part)
            assert total is not None
            return max(float(total.get_epsilon_for_delta(delta - noise)), 0.0)
    except OverflowError:  # a noise multiplier near 0: losses beyond what a float holds
        return math.inf


def _noise(history: History) -> float:
    """How much the rounding of Fourier transforms may have taken off a delta: each step multiplies numbers up to 1."""
    return 1e-14 + 2e-16 * sum(steps for _, steps in history)


def _rate(event: StepEvent) -> float:
    return max(float(event.sample_rate), _LEAST_RATE)


@lru_cache(maxsize=64)  # bisections and curves ask for the same step again and again
def _pld(event: StepEvent, records: int, interval: float) -> Any:
    """Privacy loss distribution of one step, both directions, rounded so that delta only grows."""
    q = _rate(event)
    if records == 1:
        return pld_library.from_gaussian_mechanism(
            event.noise_multiplier, sampling_prob=q, value_discretization_interval=interval
        )
    shifts = range(records + 1)
    return pld_library.from_mixture_gaussian_mechanism(
        event.noise_multiplier,
        list(shifts),
        [float(p) for p in binom.pmf(shifts, records, q)],
        value_discretization_interval=interval,
    )


def _interval(history: History, records: int) -> float:
    """Width of the grid of privacy losses, a power of two. One for the whole history: parts on
    different grids cannot be composed. Any width gives an upper bound; this one is well below the
    standard deviation of one step's loss, and what it costs, which grows with the steps and the square of
    the width, below what is printed. That makes it tight, unless the losses reach so far
    that the grid would not fit (2 million points in all, 50 000 a step; 20 000 for a group, whose points
    are dear; half when rounded).
    """
    spreads, reaches, total = [], [], 0.0
    cost, most = (1e-4, 5e4) if records == 1 else (1e-3, 2e4)
    for event, steps in history:
        q, sigma = _rate(event), event.noise_multiplier
        # sqrt of the chi-square divergence, about the loss's deviation; Gaussian tails end at 10
        spreads.append(records * q * math.sqrt(math.expm1(min(sigma**-2, 500.0))))
        exponent = (10 * sigma * records + records**2 / 2) / sigma**2
        joins = -math.expm1(records * math.log1p(-q)) if q < 1 else 1.0
        reach = exponent if joins == 1 else np.logaddexp(np.log1p(-joins), np.log(joins) + exponent)
        reaches.append(float(reach))
        total += steps * float(reach)
    try:
        total = min(total, records**2 * _opacus(history, 1e-15, 'rdp', _FEW_ORDERS))
    except PrivacyError:
        pass  # the sum of the reaches then
    ideal = min(spreads) / (10 if records == 1 else 4)  # a mixture takes seconds on a fine grid
    fine = max(1e-3, math.sqrt(cost / sum(steps for _, steps in history)))
    width = max(min(ideal, fine), max(reaches) / most, total / 2e6)
    return 2.0 ** math.floor(math.log2(max(width, _LEAST_WIDTH)))
