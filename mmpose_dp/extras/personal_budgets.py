"""Personal budgets: records whose owners allow a smaller epsilon are sampled less often.

Source: Boenisch et al. 2023 (individualized DP-SGD, "Sample"). Must not let a group of records exceed its own epsilon.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from mmpose_dp.privacy.accounting import History, StepEvent, epsilon, rough_epsilon
from mmpose_dp.privacy.calibration import Factors, scheduled_steps, smallest_sigma, steps_within
from mmpose_dp.privacy.errors import BudgetError
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.validation import as_given

from .schedule import ScheduledPlan

_PRECISION = 1e-2  # relative, of the noise multiplier, since every try is a search; the rates are exact nevertheless
_RATE_BITS = 32  # a calibrated sampling rate is a whole multiple of 2**-32

Spent = Callable[[History], float]  # epsilon of a history


@dataclass(frozen=True)
class Budget:
    """The records that have one personal epsilon, and the rate at which each of them is sampled."""

    epsilon: float
    num_records: int
    sample_rate: Fraction = Fraction(0)


@dataclass(frozen=True)
class PersonalPlan(ScheduledPlan):
    """A plan in which groups of records have personal budgets; ``target_epsilon`` is the largest.

    Attributes:
        budgets: smallest first; ``calibrate`` sets their sample_rate.
        assignment: for each record, the number of its budget in ``budgets``.

    Steps of earlier trainings count for every group at their highest rate, since the groups there may have been others.
    """

    budgets: tuple[Budget, ...] = ()
    assignment: tuple[int, ...] = ()

    def _calibrated(self, target_epsilon: float, factors: Factors = ()) -> dict[str, Any]:
        sigma, rates = calibrate_sample_rates(
            [(budget.epsilon, budget.num_records) for budget in self.budgets],
            self.target_delta,
            self.expected_batch_size,
            self.steps,
            self.accountant,
            self.earlier_history,
            factors or self.noise_factors(),
        )
        budgets = tuple(replace(budget, sample_rate=rate) for budget, rate in zip(self.budgets, rates))
        return dict(noise_multiplier=sigma, budgets=budgets)

    @property
    def run_metadata(self) -> dict[str, Any]:
        """Those of any training, with the budgets and which of them each record has: both are public."""
        return {
            **super().run_metadata,
            'personal_budgets': [[budget.epsilon, budget.num_records] for budget in self.budgets],
            'personal_assignment': list(self.assignment) or None,
        }

    @property
    def record_rates(self) -> tuple[Fraction, ...]:
        """The rate at which each record is sampled, in the order of the records."""
        return tuple(self.budgets[number].sample_rate for number in self.assignment)

    def event_at(self, step: int) -> StepEvent:
        """The ledger's entry for private step number ``step``: the highest rate, and the rate of each group."""
        rates = tuple(budget.sample_rate for budget in self.budgets)
        return StepEvent(super().event_at(step).noise_multiplier, max(rates), rates)

    def allowed_steps(self, ledger: Ledger) -> int:
        """Further steps that the plan and every budget leave after ``ledger``, whose last run is this training."""
        if self.target_epsilon is None:
            return self.steps  # no limit
        taken, planned = self.by_budget(ledger.run_history), self.by_budget(self.planned(ledger.run_steps))
        return min(
            steps_within(target, self.target_delta, ahead, self.accountant, [*ledger.earlier_history, *spent])
            for (target, ahead), (_, spent) in zip(planned, taken)
        )

    def by_budget(self, history: History) -> list[tuple[float, History]]:
        """Each budget, and this training's steps ``history`` as the records with that budget see them."""
        return [
            (budget.epsilon, [(of_group(event, group), steps) for event, steps in history])
            for group, budget in enumerate(self.budgets)
        ]

    def _spending(self, target_epsilon: float) -> list[tuple[float, float]]:
        return [(budget.epsilon, spent) for budget, spent in zip(self.budgets, self.epsilons)]

    @property
    def epsilons(self) -> tuple[float, ...]:
        """Epsilon of each group after all planned steps, earlier trainings included."""
        return self._epsilons(self.earlier_history, self.planned())

    def personal_epsilon(self, ledger: Ledger) -> dict[str, float]:
        """Epsilon that each group has spent, by a description of the group."""
        spent = self._epsilons(ledger.earlier_history, ledger.run_history)
        names = (budget_in_words(budget.epsilon, budget.num_records) for budget in self.budgets)
        return dict(zip(names, spent))

    def _epsilons(self, earlier: History, run: History) -> tuple[float, ...]:
        return epsilon_by_group(earlier, run, len(self.budgets), self.target_delta, self.accountant)


def budget_in_words(target: float, count: int) -> str:
    """A group of records, by the budget that each of them has; the name of its epsilon in a statement."""
    return f'{count} records with budget {as_given(target)}'


def epsilon_by_group(earlier: History, run: History, groups: int, delta: float, accountant: str) -> tuple[float, ...]:
    """Epsilon of each group after a training's steps ``run``, and those before it, which count at their highest rate."""
    own = ([(of_group(event, group), steps) for event, steps in run] for group in range(groups))
    return tuple(epsilon([*earlier, *seen], delta, accountant) for seen in own)


def of_group(event: StepEvent, group: int) -> StepEvent:
    """A step at the sampling rate of one group."""
    rate = event.personal_rates[group] if event.personal_rates else event.sample_rate
    return StepEvent(event.noise_multiplier, rate)


def calibrate_sample_rates(
    budgets: Sequence[tuple[float, int]],
    target_delta: float,
    expected_batch_size: int,
    steps: int,
    accountant: str = 'pld',
    history: History = (),
    factors: Factors = (),
) -> tuple[float, tuple[Fraction, ...]]:
    """One noise multiplier for all groups, and for each budget the rate at which its records may be sampled.

    Args:
        budgets: (epsilon, number of records) of each group, smallest epsilon first.
        expected_batch_size: B; the rates times the numbers of records add up to it.
        factors: (noise factor, steps) of each part of a schedule.
        history: steps of earlier trainings.

    No group exceeds its own epsilon. Raises BudgetError if no noise is enough.
    """
    factors = factors or ((1.0, steps),)

    def rates_at(sigma: float, spent: Spent) -> list[Fraction]:
        return [_highest_rate(target, sigma, spent, history, factors) for target, _ in budgets]

    def over(spent: Spent) -> Callable[[float], float]:
        def ratio(sigma: float) -> float:
            sampled = sum(q * n for q, (_, n) in zip(rates_at(sigma, spent), budgets))
            return float(expected_batch_size / sampled) if sampled else math.inf

        return ratio

    def exactly(history: History) -> float:
        return epsilon(history, target_delta, accountant)

    sigma = smallest_sigma(over(lambda history: rough_epsilon(history, target_delta)), 1.0, _PRECISION)
    if sigma is not None:
        sigma = smallest_sigma(over(exactly), sigma, _PRECISION)
    if sigma is None:
        raise BudgetError(
            f'the personal budgets {[target for target, _ in budgets]} cannot be met in {steps} steps of '
            f'expected_batch_size {expected_batch_size}: raise them, or lower max_epochs or expected_batch_size'
        )
    rates = rates_at(sigma, exactly)
    if not all(rates):
        raise BudgetError(
            f'a personal budget of {budgets[0][0]} is so small that its records would never be sampled, or earlier '
            'trainings have spent it: raise it'
        )
    sampled = sum((q * n for q, (_, n) in zip(rates, budgets)), Fraction(0))
    shrink = min(expected_batch_size / sampled, Fraction(1))  # exact
    return sigma, tuple(q * shrink for q in rates)


def _highest_rate(target: float, sigma: float, spent: Spent, history: History, factors: Factors) -> Fraction:
    """The highest sampling rate within the budget, at most one percent too low; 0 if there is none."""
    unit = Fraction(1, 1 << _RATE_BITS)

    def fits(units: int) -> bool:
        return spent([*history, *scheduled_steps(sigma, units * unit, factors)]) <= target

    low, high = 1, 1 << _RATE_BITS
    if fits(high):
        return Fraction(1)
    if not fits(low):
        return Fraction(0)
    while high > max(1.01 * low, low + 1):
        middle = max(math.isqrt(low * high), low + 1)  # below high, which is two units above low, or more
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit
