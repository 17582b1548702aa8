"""The one plan of a private training: everything the guarantee depends on, coupled, checked, and frozen.

It is made once before training; the wrapper, the hook and the statement read it. Must not be changed afterwards, and must not
come to life where two of its parts contradict each other.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from mmpose_dp.extras.personal_budgets import Budget
from mmpose_dp.extras.schedule import Schedule

from .accounting import ACCOUNTANTS, History, StepEvent, epsilon
from .calibration import as_epsilon, calibrate_noise_multiplier, calibrate_sample_rates, first_steps, steps_within
from .errors import PrivacyError
from .figures import as_given, rounded_up
from .ledger import Ledger
from .validation import as_number, as_whole

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

_WHOLE = ('num_records', 'expected_batch_size', 'steps')
_LEAST_NORM = 1e-10  # squares of entries below 1e-22 are 0 in float32


@dataclass(frozen=True)
class PrivacyPlan:
    """What is promised, to whom, and what it takes.

    Attributes:
        method: 'dpsgd', 'projected', 'feature' or 'hybrid'.
        privacy_unit: what counts as one record, 'instance', 'image' or 'subject'.
        num_records: N.
        expected_batch_size: B; each record joins a batch independently with probability B / N.
        steps: T, private logical steps planned.
        max_grad_norm: C, of the first step.
        noise_multiplier: sigma of the first step, the noise's standard deviation in units of the sensitivity.
        target_delta: delta.
        target_epsilon: the budget, or None where none was set.
        accountant: 'pld', 'prv' or 'rdp'.
        subjects: with 'subject', what names each record's subject, in words.
        subjects_digest: a digest of which records are one subject, for the ledger to compare and never to be published.
        public_view: what phi keeps of a record, in words (feature and hybrid).
        public_data: the public data set, in words (projected; feature and hybrid may have one beside their views).
        secret_randomness: False where a debug seed was set; the run is then NOT PRIVATE.
        arithmetic: the numbers of the forwards and where they are computed, such as 'bfloat16 on a CPU'.
        secure_mode: whether the noise is hardened against attacks on floating-point numbers.
        expose_private_metrics: whether losses of private batches are logged, outside the guarantee.
        schedule: how sigma and C go on from their first values.
        adaptive_norm: whether C goes on by the records' noised votes instead.
        budgets: personal budgets, smallest first; empty where one epsilon holds for all.
        assignment: which of the ``budgets`` each record has, by number, in the order of the records.
        prior: what earlier trainings on the same data have spent of the budget.

    Raises PrivacyError, naming the field, for values that are out of range or contradict each other.
    """

    method: str
    privacy_unit: str
    num_records: int
    expected_batch_size: int
    steps: int
    max_grad_norm: float
    noise_multiplier: float
    target_delta: float
    target_epsilon: float | None = None
    accountant: str = 'pld'
    subjects: str | None = None
    subjects_digest: str | None = None
    public_view: str | None = None
    public_data: str | None = None
    secret_randomness: bool = True
    arithmetic: str = 'float32 on a CPU'
    secure_mode: bool = False
    expose_private_metrics: bool = False
    schedule: Schedule = Schedule()
    adaptive_norm: bool = False
    budgets: tuple[Budget, ...] = ()
    assignment: tuple[int, ...] = ()
    prior: History = ()

    def __post_init__(self) -> None:
        _require(
            self.method in METHODS,
            f'method={self.method!r} is unknown; write one of {tuple(METHODS)}',
        )
        _require(
            self.privacy_unit in UNITS,
            f'privacy_unit={self.privacy_unit!r} is unknown; write one of {tuple(UNITS)}',
        )
        _require(
            self.accountant in ACCOUNTANTS,
            f'accountant={self.accountant!r} is not offered; write one of {ACCOUNTANTS}',
        )
        self._take_numbers()
        _require(
            self.expected_batch_size <= self.num_records,
            f'expected_batch_size={self.expected_batch_size} is more than the {self.num_records} private records',
        )
        least = self.max_grad_norm * min(1.0, self.schedule.max_grad_norm)
        _require(
            least >= _LEAST_NORM,
            f'max_grad_norm={least:.3g} is so small that float32 does not tell longer gradients from none: write at least '
            f'{_LEAST_NORM}, here and at the end of the schedule',
        )
        # A mechanism that publishes whole records at random has delta about 1/N: far above it the promise is empty. The
        # paper's 1/22000 for N = 22246 lies on the line; it is let through with a warning.
        _require(
            0 < self.target_delta < 1.1 / self.num_records,
            f'target_delta={as_given(self.target_delta)} is too large for {self.num_records} records: write at most '
            f'{0.5 / self.num_records:.1g}',
        )
        _require(
            (self.public_view is not None) == self.is_feature_dp,
            f'method={self.method!r} {"needs" if self.is_feature_dp else "must not have"} a public_view',
        )
        _require(
            self.is_feature_dp or (self.public_data is not None) == (self.method == 'projected'),
            f'method={self.method!r} {"needs" if self.method == "projected" else "must not have"} public_data',
        )
        for spent, target in zip(self.epsilons, self._targets):
            _require(
                spent <= target,
                f'noise_multiplier={self.noise_multiplier} spends epsilon {rounded_up(spent)} in {self.steps} steps, more than '
                f'target_epsilon={target}: leave noise_multiplier out to have it calibrated',
            )

    def _take_numbers(self) -> None:
        """Plain ints and floats in place of other numbers (fractions, numpy's). Raises PrivacyError for what is none."""
        found: dict[str, Any] = {name: as_whole(getattr(self, name), name) for name in _WHOLE}
        for name, low in (('max_grad_norm', 'above 0'), ('noise_multiplier', '0 or above')):
            found[name] = as_number(getattr(self, name), name, f'a number {low}')
            fits = found[name] > 0 if low == 'above 0' else found[name] >= 0
            _require(fits, f'{name}={getattr(self, name)!r} must be a number {low}')
        found['target_delta'] = as_number(self.target_delta, 'target_delta')
        if self.target_epsilon is not None:
            found['target_epsilon'] = as_epsilon(self.target_epsilon)
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @classmethod
    def calibrate(cls, *, target_epsilon: float, budgets: tuple[Budget, ...] = (), **settings: Any) -> 'PrivacyPlan':
        """The plan with the least noise that keeps ``steps`` steps, and what was spent before, within the budget.

        With personal ``budgets`` (their sample_rate is found here) ``target_epsilon`` is the largest of them.
        """
        # every field is checked before the search for sigma, which would fail less clearly
        draft = cls(noise_multiplier=0.0, **settings)
        target_epsilon = as_epsilon(target_epsilon)
        factors = [(noise, steps) for noise, _, steps in draft.schedule.parts(draft.steps)]
        # earlier trainings may have had other groups: what they spent counts for all at their highest rate
        shared: dict[str, Any] = dict(accountant=draft.accountant, history=draft.prior, factors=factors)
        if not budgets:
            sigma = calibrate_noise_multiplier(
                target_epsilon, draft.target_delta, draft.sample_rate, draft.steps, **shared
            )
            return replace(draft, noise_multiplier=sigma, target_epsilon=target_epsilon)
        sigma, rates = calibrate_sample_rates(
            [(b.epsilon, b.num_records) for b in budgets],
            draft.target_delta,
            draft.expected_batch_size,
            draft.steps,
            **shared,
        )
        found = tuple(replace(b, sample_rate=rate) for b, rate in zip(budgets, rates))
        return replace(draft, noise_multiplier=sigma, target_epsilon=target_epsilon, budgets=found)

    @property
    def facts(self) -> dict[str, Any]:
        """What the ledger keeps of this training beside its steps, plain JSON values: what a resume must not change or hide."""
        return dict(
            method=self.method,
            privacy_unit=self.privacy_unit,
            subjects=self.subjects,
            subjects_digest=self.subjects_digest,
            num_records=self.num_records,
            personal_budgets=[[budget.epsilon, budget.num_records] for budget in self.budgets],
            personal_assignment=list(self.assignment) or None,  # who has which is public
            public_view=self.public_view,
            public_data=self.public_data,
            secret_randomness=self.secret_randomness,
            secure_mode=self.secure_mode,
            expose_private_metrics=self.expose_private_metrics,
        )

    @property
    def sample_rate(self) -> Fraction:
        """q = B / N, exact."""
        return Fraction(self.expected_batch_size, self.num_records)

    @property
    def event(self) -> StepEvent:
        """What the first step puts into the ledger."""
        return self.event_at(0)

    def event_at(self, step: int) -> StepEvent:
        """What private step number ``step`` of this training puts into the ledger."""
        rates = tuple(budget.sample_rate for budget in self.budgets)
        return StepEvent(self.noise_multiplier * self._part_at(step)[0], max(rates, default=self.sample_rate), rates)

    def max_grad_norm_at(self, step: int) -> float:
        """C of private step number ``step``: emptying one record's slot moves the clipped sum by at most this (L2).

        With ``adaptive_norm`` it is the first step's, and where C goes from there nobody knows beforehand.
        """
        return self.max_grad_norm * self._part_at(step)[1]

    def _part_at(self, step: int) -> tuple[float, float]:
        """The schedule's factors; a training that goes on for longer than planned stays with the last ones."""
        parts = self.schedule.parts(self.steps)
        for noise, clip, steps in parts:
            if step < steps:
                return noise, clip
            step -= steps
        return parts[-1][:2]

    def ahead(self, step: int = 0) -> History:
        """The planned steps from number ``step`` on."""
        found, start = [], 0
        for _, _, steps in self.schedule.parts(self.steps):
            left = min(start + steps - step, steps)
            if left > 0:
                found.append((self.event_at(start), left))
            start += steps
        return found

    @property
    def epsilon(self) -> float:
        """Epsilon of all planned steps, and of what was spent before."""
        return epsilon([*self.prior, *self.ahead()], self.target_delta, self.accountant)

    @property
    def epsilons(self) -> tuple[float, ...]:
        """The same for each group of records with a budget of its own."""
        return self.epsilons_of(self.prior, self.ahead()) if self._targets else ()

    def epsilons_of(self, prior: History, run: History) -> tuple[float, ...]:
        """Epsilon for each group of records with a budget of its own, or for all, of this training's steps after others.

        Only in its own training is a group's rate its own: the groups of ``prior`` may have been others, so what was spent
        there counts at its highest rate.
        """
        return tuple(
            epsilon([*prior, *_of_group(run, g)], self.target_delta, self.accountant)
            for g in range(max(len(self.budgets), 1))
        )

    @property
    def _targets(self) -> tuple[float, ...]:
        if self.target_epsilon is None:
            return ()
        return tuple(budget.epsilon for budget in self.budgets) or (self.target_epsilon,)

    @property
    def is_feature_dp(self) -> bool:
        """Whether only what the public view removes is protected."""
        return self.method in ('feature', 'hybrid')

    @property
    def is_private(self) -> bool:
        """False for a debug seed or zero noise."""
        return self.secret_randomness and self.noise_multiplier > 0

    @property
    def adjacency(self) -> str:
        """Which neighbouring data sets are made indistinguishable."""
        slots = f'two training sets of {self.num_records} slots each; N, the number of slots, is public'
        record = f'a record ({UNITS[self.privacy_unit]})'
        if self.is_feature_dp:
            return (
                f"{slots}. They differ in one slot: the private part of {record} is in one set, and in the other the slot's "
                'private part is empty. The private part is what the public view removes. The public view, keypoint labels, '
                'boxes and membership are the same in both'
            )
        return f'{slots}. They differ in one slot, which holds {record} in one set and is empty in the other'

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before training."""
        found = []
        if self.target_delta > 1 / self.num_records:
            found.append(f'target_delta={as_given(self.target_delta)} is above 1/N = {1 / self.num_records:.3g}')
        if not self.is_private:
            found.append(
                'NOT PRIVATE: ' + ('a debug seed is set' if self.noise_multiplier else 'noise_multiplier is 0')
            )
        return tuple(found)

    def allowed_steps(self, ledger: Ledger) -> int:
        """Further steps that the plan and the budget leave after ``ledger``, whose last run is this training."""
        if self.target_epsilon is None:
            return self.steps  # nothing to keep within
        ahead = self.ahead(ledger.run_steps)
        for group, target in enumerate(self._targets):
            spent = [*ledger.prior, *_of_group(ledger.run_history, group)]
            fits = steps_within(target, self.target_delta, _of_group(ahead, group), self.accountant, spent)
            ahead = first_steps(ahead, fits)
        return sum(steps for _, steps in ahead)


def _of_group(history: History, group: int) -> History:
    return [(event.of_group(group), steps) for event, steps in history]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise PrivacyError(message)
