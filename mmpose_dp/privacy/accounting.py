"""Epsilon from a history of noisy steps.

The mechanism is the Poisson-subsampled Gaussian under add/remove adjacency. The curves come from libraries: RDP and PRV from
Opacus (RDP without it from dp-accounting), PLD from dp-accounting. Must not round rates or steps, or return less than a bound.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial, reduce
from typing import Any

import numpy as np
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, rdp
from dp_accounting.pld import privacy_loss_distribution as pld_library
from scipy.stats import binom

from .errors import ConfigError, PrivacyError
from .validation import as_delta, as_noise_multiplier, as_whole, require

_PRV_ERROR, _PRV_DELTA_ERROR = 0.01, 1e-3  # of epsilon, and of delta relative to it: Opacus' own
_PRV_POINTS = 1 << 23  # a longer grid takes gigabytes
_FEW_ORDERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256)  # of RDP, for a bound in a millisecond
_ROUGH_ORDERS = (1.25, 1.5, 2.5, *_FEW_ORDERS, 1000)  # with low ones, which a large epsilon needs and which are slow
_ALL_ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64), 80, 100, 128, 180, 256, 360, 512, 720, 1000)
_PLD_STEPS = 10**7  # the largest power to which 'pld' raises Fourier coefficients; beyond it, RDP's bound
_LEAST = 1e-12  # a smaller rate, or width, is taken as this: 1 - rate must differ from 1, and losses are about 1


@dataclass(frozen=True)
class StepEvent:
    """One noisy step: a Gaussian on a Poisson sample."""

    noise_multiplier: float  # sigma, the noise's standard deviation in units of the sensitivity
    sample_rate: Fraction  # q = expected_batch_size / num_records, exact. With personal budgets, the highest
    personal_rates: tuple[Fraction, ...] = ()  # with personal budgets, of each group of records, smallest budget first

    def __post_init__(self) -> None:
        object.__setattr__(self, 'noise_multiplier', as_noise_multiplier(self.noise_multiplier, 'noise_multiplier'))
        q, rates = self.sample_rate, self.personal_rates
        exact = f'sample_rate={q!r} must be exact: write Fraction(expected_batch_size, num_records)'
        require(isinstance(q, Fraction), exact)
        for rate in (q, *rates):
            require(0 < rate <= 1, f'sample_rate={rate} must be above 0 and at most 1')
        require(max(rates, default=q) == q, 'sample_rate must be the highest of personal_rates')


History = Sequence[tuple[StepEvent, int]]
OfOne = Callable[[StepEvent, int, float], Any]  # a step's privacy loss, for some records, on a grid of a width


def epsilon(history: History, delta: float, accountant: str = 'pld') -> float:
    """Upper bound of epsilon at ``delta`` for the composition of ``history``, (event, steps) pairs.

    0 for no step, infinity if a step had no noise. Raises ConfigError for an unknown accountant, and where PRV's or RDP's
    numerics fail (use 'pld' there).

    The Fourier transforms of 'pld' and 'prv' are exact to about 1e-16 per step. If that is more than a tenth of ``delta``, and
    beyond 10^7 steps, 'pld' uses RDP's bound instead, and 'prv' is refused.

    Sources: 'pld' Doroshenko et al. 2022 (connect the dots, pessimistic), 'prv' Gopi et al. 2021 (its upper bound, not its
    estimate), 'rdp' Mironov et al. 2019 with Balle et al. 2020.
    """
    why = ' (GDP is a limit that under-estimates epsilon)' if accountant == 'gdp' else ''
    require(accountant in ACCOUNTANTS, f'accountant={accountant!r} is not offered{why}; write one of {[*ACCOUNTANTS]}')
    return _by_accountant(added_up(history), as_delta(delta, 'target_delta'), accountant, 1)


def rough_epsilon(history: History, delta: float) -> float:
    """As ``epsilon`` by RDP at few orders: an upper bound too, and the start of a search. Takes milliseconds."""
    return _by_accountant(added_up(history), as_delta(delta, 'target_delta'), 'rough', 1)


def group_epsilon(history: History, delta: float, records: int) -> float:
    """Epsilon at ``delta`` for one person with ``records`` records, all of whose slots are filled or emptied.

    Exact up to the grid (PLD): each record joins a step independently, so the clipped sum shifts by at most j * C with
    probability Binomial(records, q), a mixture of Gaussians (Choquette-Choo et al. 2024, corollary 4.7). Infinity if a step had
    no noise, and for several records if the grid is not exact enough (see ``epsilon``).
    """
    return _by_accountant(added_up(history), as_delta(delta, 'target_delta'), 'pld', as_whole(records, 'records'))


def added_up(history: History) -> tuple[tuple[StepEvent, int], ...]:
    """Each event once, with all its steps, so that a resume spends exactly what no interruption would."""
    total: dict[StepEvent, int] = {}
    for event, steps in history:
        total[event] = total.get(event, 0) + as_whole(steps, 'steps', 0)
    return tuple((event, steps) for event, steps in total.items() if steps)


@lru_cache(maxsize=4096)  # a plan, its calibration, its budget and its statement need the same histories
def _by_accountant(history: tuple[tuple[StepEvent, int], ...], delta: float, accountant: str, records: int) -> float:
    if not history:
        return 0.0
    if any(event.noise_multiplier == 0 for event, _ in history):
        return math.inf
    if accountant == 'rough':
        return _opacus(history, delta, 'rdp', _ROUGH_ORDERS)
    return _pld(history, delta, records) if records > 1 else ACCOUNTANTS[accountant](history, delta)


def _opacus(history: History, delta: float, accountant: str, orders: Sequence[float] = _ALL_ORDERS) -> float:
    """Epsilon by Opacus, 'rdp' or 'prv'. Raises ConfigError where its numerics fail."""
    try:
        with warnings.catch_warnings(), np.errstate(all='ignore'):
            warnings.simplefilter('ignore')  # the best RDP order is the first or last one; the bound still holds
            spent = _prv(history, delta) if accountant == 'prv' else _rdp(history, delta, orders)
        if not math.isfinite(spent) or (accountant == 'prv' and spent < 0):
            raise ValueError(f'the result was {spent}')
    except (ArithmeticError, ImportError, RuntimeError, ValueError) as error:
        instead = "'pld' or 'rdp'" if accountant == 'prv' else "'pld'"
        failed = f'accountant={accountant!r} cannot evaluate this history: {error}'
        raise ConfigError(f'{failed}. Write accountant={instead}') from error
    return max(spent, 0.0)


def _rdp(history: History, delta: float, orders: Sequence[float]) -> float:
    try:
        from opacus.accountants import RDPAccountant  # here, since it needs torch, which a verifier does without
    except ImportError:
        alone = rdp.RdpAccountant(list(orders))
        for event, steps in history:
            alone.compose(PoissonSampledDpEvent(rate_of(event), GaussianDpEvent(event.noise_multiplier)), steps)
        return float(alone.get_epsilon(delta))
    library = RDPAccountant()
    library.history = [(event.noise_multiplier, rate_of(event), steps) for event, steps in history]
    with suppress(ValueError):  # fractional orders fail if a step has almost no effect
        return float(library.get_epsilon(delta, alphas=list(orders)))
    return float(library.get_epsilon(delta, alphas=[order for order in orders if order == int(order)]))


def _prv(history: History, delta: float) -> float:
    from opacus.accountants import PRVAccountant

    if _error(history) > delta / 10:
        raise ValueError(f'delta {delta:.3g} is too small for its sums')
    delta_error = delta * _PRV_DELTA_ERROR
    reach = 2 * (_opacus(history, delta_error / 4, 'rdp', _ROUGH_ORDERS) + 3)
    mesh = _PRV_ERROR / math.sqrt(sum(steps for _, steps in history) * math.log(12 / delta_error) / 2)
    if reach / mesh > _PRV_POINTS:
        raise ValueError('epsilon is too large for its grid')
    library = PRVAccountant()
    library.history = [(event.noise_multiplier, rate_of(event), steps) for event, steps in history]
    return float(library.get_epsilon(delta, eps_error=_PRV_ERROR, delta_error=delta_error))


def _pld(history: History, delta: float, records: int = 1) -> float:
    error = _error(history)
    if error > delta / 10 or sum(steps for _, steps in history) > _PLD_STEPS:
        return _opacus(history, delta, 'rdp') if records == 1 else math.inf
    try:
        with np.errstate(all='ignore'):
            return max(float(privacy_loss(history, records).get_epsilon_for_delta(delta - error)), 0.0)
    except OverflowError:  # a noise multiplier near 0: losses beyond what a float holds
        return math.inf


@lru_cache(maxsize=2)
def privacy_loss(history: tuple[tuple[StepEvent, int], ...], records: int = 1, of_one: OfOne | None = None) -> Any:
    """dp_accounting's distribution, pessimistic. ``of_one``: of a step, where it is another relation's. Raises OverflowError."""
    interval, of_one = _interval(history, records), of_one or _pld_of_one
    with np.errstate(all='ignore'):
        parts = (of_one(event, records, interval).self_compose(steps) for event, steps in history)
        return reduce(lambda one, other: one.compose(other), parts)


def _error(history: History) -> float:
    """By how much the rounding of Fourier transforms may lower a delta: each step multiplies numbers up to 1."""
    return 1e-14 + 2e-16 * sum(steps for _, steps in history)


def rate_of(event: StepEvent) -> float:
    """The sampling rate as the libraries take it."""
    return max(float(event.sample_rate), _LEAST)


@lru_cache(maxsize=64)  # bisections and curves need the same step again and again
def _pld_of_one(event: StepEvent, records: int, interval: float) -> Any:
    """Privacy loss distribution of one step, both directions, rounded so that delta only grows."""
    sigma, q, grid = event.noise_multiplier, rate_of(event), dict(value_discretization_interval=interval)
    if records == 1:
        return pld_library.from_gaussian_mechanism(sigma, sampling_prob=q, **grid)
    shifts = list(range(records + 1))
    joining = [float(p) for p in binom.pmf(shifts, records, q)]
    return pld_library.from_mixture_gaussian_mechanism(sigma, shifts, joining, **grid)


def _interval(history: History, records: int) -> float:
    """Width of the grid of privacy losses, a power of two; one for the whole history, since parts on two grids do not compose.

    Any width gives an upper bound. This one is well below the standard deviation of one step's loss, and its cost, which grows
    with the steps and the square of the width, is below what is printed: the bound is tight. It is wider only if the losses
    reach too far for the grid (2 million points in all, 50,000 per step; 20,000 for a group, whose points are slow).
    """
    spreads, reaches = [], []
    cost, most, finest = (1e-4, 5e4, 10) if records == 1 else (1e-3, 2e4, 4)  # a mixture takes seconds on a fine grid
    for event, _ in history:
        q, sigma = rate_of(event), event.noise_multiplier
        # sqrt of the chi-square divergence, about the loss's deviation; Gaussian tails end at 10
        spreads.append(records * q * math.sqrt(math.expm1(min(sigma**-2, 500.0))))
        exponent = (10 * sigma * records + records**2 / 2) / sigma**2
        joins = -math.expm1(records * math.log1p(-q)) if q < 1 else 1.0
        reaches.append(float(exponent if joins == 1 else np.logaddexp(np.log1p(-joins), np.log(joins) + exponent)))
    total = sum(steps * reach for (_, steps), reach in zip(history, reaches))
    with suppress(PrivacyError):  # the sum of the reaches then
        total = min(total, records**2 * _opacus(history, 1e-15, 'rdp', _FEW_ORDERS))
    fine = max(1e-3, math.sqrt(cost / sum(steps for _, steps in history)))
    width = max(min(min(spreads) / finest, fine), max(reaches) / most, total / 2e6)
    return 2.0 ** math.floor(math.log2(max(width, _LEAST)))


# each gives an upper bound of epsilon, which falls with sigma and grows with the steps; one of your own: CONTRIBUTING.md
ACCOUNTANTS: dict[str, Callable[[History, float], float]] = {
    'pld': _pld,
    'prv': partial(_opacus, accountant='prv'),
    'rdp': partial(_opacus, accountant='rdp'),
}
