"""The one plan of a private training: everything the guarantee depends on, coupled, checked, and frozen.

It is made once before training; the wrapper, the hook and the statement read it. Must not be changed afterwards, and must not
come to life where two of its parts contradict each other.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from .accounting import (
    ACCOUNTANTS,
    History,
    StepEvent,
    calibrate_noise_multiplier,
    epsilon,
    steps_within,
)
from .errors import PrivacyError
from .ledger import Ledger

METHODS = {
    'dpsgd': 'DP-SGD',
    'projected': 'Projected DP-SGD',
    'feature': 'Feature DP',
    'hybrid': 'Hybrid (Feature DP with Projected DP-SGD)',
}
UNITS = {
    'instance': 'one annotated person instance',
    'image': 'one image with all its annotated people',
}


@dataclass(frozen=True)
class PrivacyPlan:
    """What is promised, to whom, and what it takes.

    Attributes:
        method: 'dpsgd', 'projected', 'feature' or 'hybrid'.
        privacy_unit: what counts as one record, 'instance' or 'image'.
        num_records: N.
        expected_batch_size: B; each record joins a batch independently with probability B / N.
        steps: T, private logical steps planned.
        max_grad_norm: C.
        noise_multiplier: sigma, the noise's standard deviation in units of the sensitivity.
        target_delta: delta.
        target_epsilon: the budget, or None where none was set.
        accountant: 'pld', 'prv' or 'rdp'.
        public_view: what phi keeps of a record, in words (feature and hybrid).
        public_data: the public data set, in words (projected).
        secret_randomness: False where a debug seed was set; the run is then NOT PRIVATE.

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
    public_view: str | None = None
    public_data: str | None = None
    secret_randomness: bool = True

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
        for name in ('num_records', 'expected_batch_size', 'steps'):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and value >= 1,
                f'{name}={value!r} must be a whole number above 0',
            )
        _require(
            self.expected_batch_size <= self.num_records,
            f'expected_batch_size={self.expected_batch_size} is more than the {self.num_records} private records',
        )
        _require(self.max_grad_norm > 0, f'max_grad_norm={self.max_grad_norm!r} must be above 0')
        _require(
            self.noise_multiplier >= 0,
            f'noise_multiplier={self.noise_multiplier!r} must be 0 or above',
        )
        # A mechanism that publishes whole records at random has delta about 1/N: far above it the promise is empty. The
        # paper's 1/22000 for N = 22246 lies on the line; it is let through with a warning.
        _require(
            0 < self.target_delta < 1.1 / self.num_records,
            f'target_delta={self.target_delta:.3g} is too large for {self.num_records} records: write at most '
            f'{0.5 / self.num_records:.1g}',
        )
        _require(
            (self.public_view is not None) == self.is_feature_dp,
            f'method={self.method!r} {"needs" if self.is_feature_dp else "must not have"} a public_view',
        )
        _require(
            (self.public_data is not None) == (self.method == 'projected'),
            f'method={self.method!r} {"needs" if self.method == "projected" else "must not have"} public_data',
        )
        if self.target_epsilon is not None:
            _require(self.target_epsilon > 0, f'target_epsilon={self.target_epsilon!r} must be above 0')
            spent = self.epsilon
            _require(
                spent <= self.target_epsilon,
                f'noise_multiplier={self.noise_multiplier} spends epsilon {spent:.3f} in {self.steps} steps, more than '
                f'target_epsilon={self.target_epsilon}: leave noise_multiplier out to have it calibrated',
            )

    @classmethod
    def calibrate(cls, *, target_epsilon: float, **settings: Any) -> 'PrivacyPlan':
        """The plan with the least noise that keeps ``steps`` steps within the budget."""
        # every field is checked before the search for sigma, which would fail less clearly
        draft = cls(noise_multiplier=0.0, **settings)
        sigma = calibrate_noise_multiplier(
            target_epsilon, draft.target_delta, draft.sample_rate, draft.steps, draft.accountant
        )
        return replace(draft, noise_multiplier=sigma, target_epsilon=target_epsilon)

    @property
    def sample_rate(self) -> Fraction:
        """q = B / N, exact."""
        return Fraction(self.expected_batch_size, self.num_records)

    @property
    def sensitivity(self) -> float:
        """L2: adding or removing one record moves the clipped sum by at most C."""
        return self.max_grad_norm

    @property
    def noise_stddev(self) -> float:
        """sigma * C, of each entry of the noise added to the clipped sum."""
        return self.noise_multiplier * self.sensitivity

    @property
    def event(self) -> StepEvent:
        """What one step puts into the ledger."""
        return StepEvent(self.noise_multiplier, self.sample_rate)

    @property
    def history(self) -> History:
        """All planned steps, for the accountant."""
        return ((self.event, self.steps),)

    @property
    def epsilon(self) -> float:
        """Epsilon of all planned steps."""
        return epsilon(self.history, self.target_delta, self.accountant)

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
        if self.is_feature_dp:
            return (
                f'two training sets of which one also holds the private part of one more record ({UNITS[self.privacy_unit]}): '
                'what the public view removes. The public view, keypoint labels, boxes and membership are the same in both'
            )
        return f'two training sets of which one holds one more record ({UNITS[self.privacy_unit]})'

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before training."""
        found = []
        if self.target_delta > 1 / self.num_records:
            found.append(f'target_delta={self.target_delta:.3g} is above 1/N = {1 / self.num_records:.3g}')
        if not self.is_private:
            found.append(
                'NOT PRIVATE: ' + ('a debug seed is set' if self.noise_multiplier else 'noise_multiplier is 0')
            )
        return tuple(found)

    def allowed_steps(self, ledger: Ledger) -> int:
        """Further steps that the plan and the budget leave after ``ledger``."""
        if self.target_epsilon is None:
            return self.steps
        return steps_within(
            self.target_epsilon,
            self.target_delta,
            self.event,
            self.accountant,
            ledger.history,
            self.steps,
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise PrivacyError(message)
