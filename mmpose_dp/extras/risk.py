"""What a guarantee means for a person: how well somebody can guess whether a record was used, in numbers that people understand.

Computed from the privacy loss distribution of the whole training, not from one (epsilon, delta): that pair alone would say far
less. Needs no torch. Must not print a risk below the computed one.

Sources: trade-off curves, Dong et al. 2022; from a privacy loss distribution, Kulynych et al. 2024; mu and its regret, Gomez et
al. 2025.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache
from typing import Any

import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import privacy_loss_distribution as pld_library
from scipy.special import ndtr, ndtri

from mmpose_dp.privacy.accounting import History, StepEvent, added_up, epsilon, privacy_loss, rate_of
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.validation import rounded_up

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
PROFILE_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
_LEAST_RATE = 1e-10  # mu is compared where both error rates are above this, as gdpnum does
_POINTS = 2000  # of the curve; chords between them are pessimistic
_LEAST_DELTA = 1e-12


@dataclass(frozen=True)
class TradeOff:
    """The least rate of misses that any attack can have at each rate of false alarms, a lower bound: straight lines between points.

    ``false_alarms`` and ``misses`` are (points,), from (0, near 1) to (near 1, 0); the curve is symmetric. ``advantage`` is the
    largest gap between true and false positives.
    """

    false_alarms: np.ndarray
    misses: np.ndarray
    advantage: float

    @classmethod
    def of(cls, loss: Any) -> 'TradeOff':
        """The curve of a privacy loss distribution of dp_accounting, for both directions at once."""
        total = float(loss.get_epsilon_for_delta(_LEAST_DELTA))
        reach = min(total, 700.0) if math.isfinite(total) and total > 0 else 1.0
        epsilons = np.linspace(0, reach, _POINTS)
        deltas = np.clip(np.asarray(loss.get_delta_for_epsilon(epsilons), dtype=float), 0, 1)
        slopes = np.exp(epsilons)
        # each (epsilon, delta) bounds the curve by a line, misses = 1 - delta - exp(epsilon) * false alarms; here two meet
        alarms = np.clip(-np.diff(deltas) / np.diff(slopes), 0, 1)
        alarms = np.maximum.accumulate(alarms[::-1])  # rounding may break the order
        misses = np.clip((1 - deltas[:-1] - slopes[:-1] * alarms[::-1])[::-1], 0, 1)
        half = alarms <= misses  # below the diagonal; the other half is its mirror image
        alarms, misses = np.append(0.0, alarms[half]), np.append(1 - deltas[-1], misses[half])
        curve = np.append(alarms, misses[::-1]), np.append(misses, alarms[::-1])
        return cls(*curve, advantage=float(deltas[0]))

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """The most that any attack reaches at this rate of false positives."""
        return 1 - float(np.interp(false_positive_rate, self.false_alarms, self.misses))

    def gaussian(self) -> tuple[float, float]:
        """(mu, regret): the least mu of Gaussian DP that covers the curve, and how much that overstates any error rate."""
        alarms = np.sort(np.append(self.false_alarms, _LEAST_RATE))  # where mu is largest, if tails are heavy
        misses = np.interp(alarms, self.false_alarms, self.misses)
        inside = (alarms >= _LEAST_RATE) & (misses >= _LEAST_RATE) & (alarms + misses < 1 - _LEAST_RATE)
        if not inside.any():
            return 0.0, 0.0
        mu = -float(np.min(ndtri(alarms[inside]) + ndtri(misses[inside])))
        # how far each point of the curve is from that of mu, along the diagonal
        alarms = np.append(self.false_alarms, np.linspace(0, 1, _POINTS))
        misses = np.interp(alarms, self.false_alarms, self.misses)
        low, high = np.zeros_like(alarms), np.minimum(alarms, misses)
        for _ in range(40):
            middle = (low + high) / 2
            above = ndtr(-ndtri(alarms - middle) - mu) < misses - middle
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return mu, float(np.max(high))


def risk_of(history: History, delta: float) -> dict[str, Any] | None:
    """The risk figures of a history, plain JSON values, rounded up; None where no bound is known.

    ``add_or_remove`` is the guarantee's own relation, a record's slot filled or emptied; ``replace_one`` is one record in the
    place of another, which costs more and which some definitions mean. ``profile`` gives epsilon for several values of delta.
    """
    return _risk_of(added_up(history), delta)


@lru_cache(maxsize=256)  # each checkpoint of a training, and its statement, ask for the same
def _risk_of(history: tuple[tuple[StepEvent, int], ...], delta: float) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for name, replaced in (('add_or_remove', False), ('replace_one', True)):
        figures = _figures(history, delta, replaced)
        if figures is None and not replaced:
            return None
        found[name] = figures or 'not computed'
    profile = {f'{one:g}': _bounded(_epsilon(history, one)) for one in PROFILE_DELTAS}
    return {**found, 'profile': profile}


def _figures(history: tuple[tuple[StepEvent, int], ...], delta: float, replaced: bool) -> dict[str, Any] | None:
    if any(event.noise_multiplier == 0 for event, _ in history):
        return None
    if not history:
        return _as_figures(TradeOff(np.array([0.0, 1.0]), np.array([1.0, 0.0]), 0.0), 0.0)
    try:
        loss = privacy_loss(history, 2, _replacing) if replaced else privacy_loss(history)  # two records change
        return _as_figures(TradeOff.of(loss), float(loss.get_epsilon_for_delta(delta)))
    except (ArithmeticError, ValueError, MemoryError, NotImplementedError, TypeError):
        return None  # TypeError: a dp-accounting that cannot replace a record


def _as_figures(curve: TradeOff, spent: float) -> dict[str, Any]:
    mu, regret = curve.gaussian()
    return {
        'epsilon': _bounded(spent),
        'gdp_mu': _bounded(mu),
        'gdp_regret': _bounded(regret),
        'advantage': _probability(curve.advantage),
        'guess_right_at_most': _probability((1 + curve.advantage) / 2),
        'true_positive_rate_at': {
            f'{rate:g}': _probability(curve.true_positive_rate(rate)) for rate in FALSE_POSITIVE_RATES
        },
    }


@lru_cache(maxsize=8)
def _replacing(event: StepEvent, records: int, interval: float) -> Any:
    """The privacy loss of one step if another record takes one's place. Raises TypeError for a dp-accounting without it (0.4.4)."""
    return pld_library.from_gaussian_mechanism(
        event.noise_multiplier,
        sampling_prob=rate_of(event),
        value_discretization_interval=interval,
        neighboring_relation=NeighboringRelation.REPLACE_ONE,
    )


def _epsilon(history: History, delta: float) -> float:
    try:
        return epsilon(history, delta)
    except PrivacyError:
        return math.inf


def _bounded(value: float) -> float | str:
    """Four significant digits, rounded up."""
    value = max(value, 0.0)
    return float(rounded_up(value)) if math.isfinite(value) else 'not bounded'


def _probability(value: float) -> float:
    return min(ceiling(min(max(value, 0.0), 1.0), 6), 1.0)


def percent(probability: float) -> str:
    """A probability in percent, rounded up to a tenth, or to two digits if it is below 1 %."""
    return f'{rounded_up(100 * probability, 3) if probability < 0.1 else f"{ceiling(100 * probability, 1):g}"} %'


def risk_in_words(risk: dict[str, Any] | None, guessed: str = 'whether a given record was used') -> Sequence[str]:
    """Sentences for the page; empty where there are no figures."""
    if not risk or not isinstance(risk.get('add_or_remove'), dict):
        return ()
    figures = risk['add_or_remove']
    rates = ', '.join(
        f'{percent(found)} of the records used where it wrongly names {percent(float(wrong))} of the others'
        for wrong, found in figures['true_positive_rate_at'].items()
    )
    return (
        f'A 50:50 guess {guessed} becomes right at most {percent(figures["guess_right_at_most"])} of the time, with any attack on '
        'what was released. This is the figure to quote. It is for "add or remove", as the guarantee is; "replace one" answers '
        'another question: which of two given records was used.',
        f'An attack finds at most {rates}.',
        f'As a summary in one number: Gaussian DP with mu at most {figures["gdp_mu"]}. That mu lets the attacker err less '
        f'often than the exact curve does, by up to {figures["gdp_regret"]} (the gdp regret).',
    )


def ceiling(value: float, places: int = 4) -> float:
    """An epsilon for a log that prints ``places`` decimal places: the next number above that has no more."""
    if not math.isfinite(value) or value > 1e12:
        return value
    return float(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-places), rounding=ROUND_CEILING))
