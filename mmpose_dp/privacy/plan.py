"""The one plan of a private training: everything the guarantee depends on, checked together, and frozen.

It is made once before training; wrapper, hook and statement read it. Must not be changed afterwards, nor contradict itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from .accounting import ACCOUNTANTS, History, StepEvent, epsilon
from .calibration import Factors, calibrate_noise_multiplier, first_steps, steps_within
from .errors import BudgetError
from .ledger import NOISE, Ledger
from .validation import as_delta, as_given, as_noise_multiplier, as_positive, as_whole, require, rounded_up

METHODS = {
    'dpsgd': 'DP-SGD',
    'projected': 'Projected DP-SGD',
    'feature': 'Feature DP',
    'hybrid': 'Hybrid (Feature DP with Projected DP-SGD)',
}
UNITS = {
    'instance': 'one annotated person instance',
    'image': 'one image with all its annotated people',
    'subject': 'one subject with all annotations in the training set',
}
_NUMBERS: dict[str, Callable[[Any, str], float]] = dict(
    **dict.fromkeys(('num_records', 'expected_batch_size', 'steps'), as_whole),
    **dict.fromkeys(('max_grad_norm', 'target_epsilon'), as_positive),
    noise_multiplier=as_noise_multiplier,
    target_delta=as_delta,
)
ROUNDING_MARGIN = 1e-3  # of C; must not be smaller than what was measured (docs/guarantee.md, "Rounding")
_LEAST_NORM = 1e-10  # squares of entries below 1e-22 are 0 in float32


@dataclass(frozen=True)
class PrivacyPlan:
    """What is guaranteed, to whom, and what it takes.

    Raises ConfigError, naming the field, for values that are out of range or contradict each other, and BudgetError for noise
    that exceeds the budget. Plans whose noise changes, or whose records have personal budgets, are subclasses (extras/).
    """

    method: str  # 'dpsgd', 'projected', 'feature' or 'hybrid'
    privacy_unit: str  # what counts as one record: 'instance', 'image' or 'subject'
    num_records: int  # N
    expected_batch_size: int  # B; each record joins a batch independently with probability B / N
    steps: int  # T, private logical steps planned
    max_grad_norm: float  # C of the first step: emptying one record's slot moves the clipped sum by at most this (L2)
    noise_multiplier: float  # sigma of the first step: the noise's standard deviation in units of the sensitivity
    target_delta: float
    target_epsilon: float | None = None  # the budget, or None if there is none
    accountant: str = 'pld'  # or 'prv' or 'rdp'
    subjects: str | None = None  # with 'subject', what names each record's subject, in words
    subjects_digest: str | None = None  # of which records are one subject, for the ledger alone: must not be published
    public_view: str | None = None  # what phi keeps of a record, in words (feature and hybrid)
    public_data: str | None = None  # the public data set, in words (feature and hybrid: beside their views)
    secret_randomness: bool = True  # False if a debug seed was set; the run is then NOT PRIVATE
    arithmetic: str = 'float32 on a CPU'  # the number format and the device of the forwards
    expose_private_metrics: bool = False  # whether losses of private batches are logged, outside the guarantee
    adaptive_norm: bool = False  # whether C follows the records' noised votes
    earlier_history: History = ()  # the steps of earlier trainings on the same data, which count against the budget

    def __post_init__(self) -> None:
        for name, known in (('method', METHODS), ('privacy_unit', UNITS), ('accountant', ACCOUNTANTS)):
            value = getattr(self, name)
            require(value in known, f'{name}={value!r} is unknown; write one of {tuple(known)}')
        for name, convert in _NUMBERS.items():  # fractions and numpy's numbers become plain ones
            if name != 'target_epsilon' or self.target_epsilon is not None:
                object.__setattr__(self, name, convert(getattr(self, name), name))
        total, size, delta = self.num_records, self.expected_batch_size, self.target_delta
        require(size <= total, f'expected_batch_size={size} is more than the {total} private records')
        least = min(self.max_grad_norm, self.max_grad_norm_at(self.steps))
        small = f'max_grad_norm={least:.3g} is so small that float32 cannot compare gradients with it: write at least {_LEAST_NORM}'
        require(least >= _LEAST_NORM, f'{small}, here and at the end of the schedule')
        # A mechanism that publishes whole records at random has delta about 1/N: if delta is far above it, the guarantee is
        # empty. The paper's 1/22000 for N = 22246 is slightly above; it is allowed with a warning.
        large = f'target_delta={as_given(delta)} is too large for {total} records'
        require(delta < 1.1 / total, f'{large}: write at most {0.5 / total:.1g}')
        view, data = self.public_view is not None, self.public_data is not None and not self.is_feature_dp
        projected = self.method == 'projected'
        for found, wanted, name in ((view, self.is_feature_dp, 'a public_view'), (data, projected, 'public_data')):
            require(found == wanted, f'method={self.method!r} {"needs" if wanted else "must not have"} {name}')
        for target, spent in [] if self.target_epsilon is None else self._spending(self.target_epsilon):
            if spent > target:
                raise BudgetError(
                    f'noise_multiplier={self.noise_multiplier} spends epsilon {rounded_up(spent)} in {self.steps} steps, more '
                    f'than target_epsilon={target}: leave noise_multiplier out to have it calibrated'
                )

    def _spending(self, target_epsilon: float) -> list[tuple[float, float]]:
        """The budget and what the planned steps spend of it, for each group of records with a personal budget."""
        return [(target_epsilon, self.epsilon)]

    @classmethod
    def calibrate(cls, *, target_epsilon: float, **settings: Any) -> 'PrivacyPlan':
        """The plan with the least noise that keeps within the budget. Raises ConfigError, and BudgetError if no noise does."""
        # every field is checked before the search for sigma, whose errors would be less clear
        draft = cls(noise_multiplier=0.0, **settings)
        return replace(draft, target_epsilon=target_epsilon, **draft._calibrated(target_epsilon))

    def _calibrated(self, target_epsilon: float, factors: Factors = ()) -> dict[str, Any]:
        """The fields that follow from the budget."""
        settings = self.target_delta, self.sample_rate, self.steps, self.accountant, self.earlier_history
        return dict(noise_multiplier=calibrate_noise_multiplier(target_epsilon, *settings, factors))

    @property
    def run_metadata(self) -> dict[str, Any]:
        """What the ledger keeps of this training beside its steps, plain JSON values: a resume must not change or hide them."""
        names = 'method privacy_unit subjects subjects_digest num_records public_view public_data'.split()
        names += ['secret_randomness', 'expose_private_metrics', 'arithmetic']
        kept = {name: getattr(self, name) for name in names}
        return dict(kept, noise=NOISE, personal_budgets=[], personal_assignment=None)

    @property
    def sample_rate(self) -> Fraction:
        """q = B / N, exact."""
        return Fraction(self.expected_batch_size, self.num_records)

    @property
    def record_rates(self) -> tuple[Fraction, ...]:
        """The rate at which each record is sampled, in the order of the records; empty if it is ``sample_rate`` for all."""
        return ()

    @cached_property
    def _event(self) -> StepEvent:
        return StepEvent(self.noise_multiplier, self.sample_rate)

    @property
    def event(self) -> StepEvent:
        """What the first step puts into the ledger."""
        return self.event_at(0)

    def event_at(self, step: int) -> StepEvent:
        """What private step number ``step`` of this training puts into the ledger."""
        return self._event

    def max_grad_norm_at(self, step: int) -> float:
        """C of private step number ``step``; with ``adaptive_norm`` only the first step's is known beforehand, and this is it."""
        return self.max_grad_norm

    def planned(self, step: int = 0) -> History:
        """The planned steps from number ``step`` on."""
        return [(self.event, self.steps - step)] if step < self.steps else []

    @property
    def epsilon(self) -> float:
        """Epsilon of all planned steps, and of earlier trainings."""
        return self.epsilon_after(self.steps)

    def epsilon_after(self, steps: int) -> float:
        """Epsilon of the first ``steps`` planned steps, and of earlier trainings."""
        return epsilon([*self.earlier_history, *first_steps(self.planned(), steps)], self.target_delta, self.accountant)

    def personal_epsilon(self, ledger: Ledger) -> dict[str, float]:
        """Epsilon spent by each group of records that has a personal budget: here there is none."""
        return {}

    def allowed_steps(self, ledger: Ledger) -> int:
        """Further steps that the plan and the budget leave after ``ledger``, whose last run is this training."""
        if self.target_epsilon is None:
            return self.steps  # no limit
        planned = self.planned(ledger.run_steps)
        return steps_within(self.target_epsilon, self.target_delta, planned, self.accountant, ledger.history)

    @property
    def is_feature_dp(self) -> bool:
        """Whether only what the public view removes is protected."""
        return self.method in ('feature', 'hybrid')

    @property
    def is_private(self) -> bool:
        """False for a debug seed or zero noise."""
        return self.secret_randomness and self.noise_multiplier > 0
