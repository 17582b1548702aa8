"""What training has spent: the ledger of noisy steps, and epsilon from it.

The mechanism is the Poisson-subsampled Gaussian under add/remove adjacency. The curves come from well-kept libraries: RDP and
PRV from Opacus, PLD from dp-accounting. Must not round a rate or a step count, and must not return less than an upper bound.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Sequence

from dp_accounting.pld import privacy_loss_distribution as pld_library
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.stats import binom

from .errors import PrivacyError

ACCOUNTANTS = ('pld', 'prv', 'rdp')
_FORMAT = 1
_MAX_SIGMA = 1e4


@dataclass(frozen=True)
class StepEvent:
    """One noisy step: a Gaussian of ``noise_multiplier`` times the sensitivity on a Poisson sample of rate ``sample_rate``.

    ``sample_rate`` is an exact fraction, expected_batch_size / num_records.
    """

    noise_multiplier: float
    sample_rate: Fraction

    def __post_init__(self) -> None:
        if not self.noise_multiplier >= 0:
            raise PrivacyError(f'noise_multiplier={self.noise_multiplier!r} must be 0 or above')
        if not 0 < self.sample_rate <= 1:
            raise PrivacyError(f'sample_rate={self.sample_rate} must lie in (0, 1]')


History = Sequence[tuple[StepEvent, int]]


def epsilon(history: History, delta: float, accountant: str = 'pld') -> float:
    """Upper bound of epsilon at ``delta`` for the composition of ``history``, (event, steps) pairs.

    0 for no step, infinity where a step had no noise. Raises PrivacyError for an unknown accountant, and where PRV's
    discretisation fails (use 'pld' there).
    """
    if accountant not in ACCOUNTANTS:
        more = ': GDP is a central-limit approximation and can under-estimate' if accountant == 'gdp' else ''
        raise PrivacyError(f'accountant={accountant!r} is not offered{more}; write one of {ACCOUNTANTS}')
    if not 0 < delta < 1:
        raise PrivacyError(f'target_delta={delta!r} must lie strictly between 0 and 1')
    history = [(event, steps) for event, steps in history if steps]
    if not history:
        return 0.0
    if any(event.noise_multiplier == 0 for event, _ in history):
        return float('inf')
    if accountant == 'pld':
        return float(_compose([(_pld(event), steps) for event, steps in history]).get_epsilon_for_delta(delta))
    library = PRVAccountant() if accountant == 'prv' else RDPAccountant()
    library.history = [(event.noise_multiplier, float(event.sample_rate), steps) for event, steps in history]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # Opacus warns where the best RDP order is its largest; the bound still holds
            return float(library.get_epsilon(delta))
    except (RuntimeError, ValueError, MemoryError) as error:
        raise PrivacyError(f"accountant={accountant!r} cannot evaluate this history ({error}); write accountant='pld'")


def _interval(event: StepEvent) -> float:
    """Width of the grid of privacy losses: fine enough to be tight over tens of thousands of steps, coarse where the loss
    is so large that a fine grid would be slow. Any width gives an upper bound (pessimistic estimate)."""
    return 1e-4 if event.noise_multiplier >= 0.5 else 1e-3


def _pld(event: StepEvent, records: int = 1) -> Any:
    """Privacy loss distribution of one step for a person with ``records`` records.

    Each record joins on its own, so the sum shifts by j * C with probability Binomial(records, q).
    """
    q, interval = float(event.sample_rate), _interval(event)
    if records == 1:
        return pld_library.from_gaussian_mechanism(
            event.noise_multiplier, sampling_prob=q, value_discretization_interval=interval, use_connect_dots=True
        )
    shifts = range(records + 1)
    return pld_library.from_mixture_gaussian_mechanism(
        event.noise_multiplier,
        list(shifts),
        [float(p) for p in binom.pmf(shifts, records, q)],
        value_discretization_interval=interval,
        use_connect_dots=True,
    )


def _compose(parts: Sequence[tuple[Any, int]]) -> Any:
    # one grid for all: composition needs equal widths
    total = None
    for part, steps in parts:
        composed = part.self_compose(steps)
        total = composed if total is None else total.compose(composed)
    return total


def group_epsilon(history: History, delta: float, records: int) -> float:
    """Epsilon at ``delta`` for one person with ``records`` records, all of them added or removed (PLD).

    Infinity where a step had no noise, or where ``records`` is so large that the loss cannot be bounded numerically.
    """
    history = [(event, steps) for event, steps in history if steps]
    if any(event.noise_multiplier == 0 for event, _ in history):
        return float('inf')
    if not history:
        return 0.0
    composed = _compose([(_pld(event, records), steps) for event, steps in history])
    return float(composed.get_epsilon_for_delta(delta))


def calibrate_noise_multiplier(
    target_epsilon: float,
    target_delta: float,
    sample_rate: Fraction,
    steps: int,
    accountant: str = 'pld',
    history: History = (),
) -> float:
    """The smallest noise multiplier, to a relative 1e-4 and rounded up, that keeps ``history`` and ``steps`` further steps
    within (target_epsilon, target_delta).

    Raises PrivacyError where no noise is enough.
    """
    if not target_epsilon > 0:
        raise PrivacyError(f'target_epsilon={target_epsilon!r} must be above 0')
    if epsilon(history, target_delta, accountant) >= target_epsilon:
        raise PrivacyError(f'target_epsilon={target_epsilon} is already spent by the steps in the ledger')

    def spent(sigma: float, kind: str = accountant) -> float:
        return epsilon([*history, (StepEvent(sigma, sample_rate), steps)], target_delta, kind)

    high = 1.0
    while spent(high, 'rdp') > target_epsilon:  # cheap; the chosen accountant is tried only near the answer
        high *= 2
        if high > _MAX_SIGMA:
            break
    while spent(high) > target_epsilon:
        high *= 2
        if high > _MAX_SIGMA:
            raise PrivacyError(
                f'target_epsilon={target_epsilon} at delta {target_delta:.3g} cannot be met in {steps} steps of sample_rate '
                f'{sample_rate}: raise target_epsilon, or lower max_epochs or expected_batch_size'
            )
    low = high / 2
    while low > 1e-2 and spent(low) <= target_epsilon:
        high, low = low, low / 2
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= target_epsilon else (middle, high)
    return high


def steps_within(
    target_epsilon: float, target_delta: float, event: StepEvent, accountant: str, history: History, at_most: int
) -> int:
    """How many further steps of ``event``, up to ``at_most``, keep the total within the budget."""

    def fits(steps: int) -> bool:
        return epsilon([*history, (event, steps)], target_delta, accountant) <= target_epsilon

    if fits(at_most):
        return at_most
    low, high = 0, at_most  # 0 steps spend nothing more, at_most is too many
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Ledger:
    """Append-only list of the noisy steps taken, run-length encoded."""

    def __init__(self) -> None:
        self._entries: list[tuple[StepEvent, int]] = []

    @property
    def history(self) -> History:
        """(event, steps) pairs, oldest first."""
        return tuple(self._entries)

    @property
    def steps(self) -> int:
        """All steps counted."""
        return sum(steps for _, steps in self._entries)

    def count(self, event: StepEvent, steps: int = 1) -> None:
        """Adds steps. There is no way to take one back."""
        if steps < 1:
            raise PrivacyError(f'a ledger can only grow, got {steps} steps')
        if self._entries and self._entries[-1][0] == event:
            steps += self._entries.pop()[1]
        self._entries.append((event, steps))

    def epsilon(self, delta: float, accountant: str = 'pld') -> float:
        """Epsilon spent so far."""
        return epsilon(self.history, delta, accountant)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for torch.save, weights_only loading and JSON.

        The checksum notices accidental damage. It is no protection against somebody who edits the file on purpose.
        """
        entries = [
            [event.noise_multiplier, event.sample_rate.numerator, event.sample_rate.denominator, steps]
            for event, steps in self._entries
        ]
        return {'format': _FORMAT, 'entries': entries, 'checksum': _checksum(entries)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a ledger back. Raises PrivacyError where it is damaged or of a format not known here."""
        try:
            if state['format'] != _FORMAT:
                raise PrivacyError(f'the privacy ledger has format {state["format"]}, this version reads {_FORMAT}')
            if state['checksum'] != _checksum(state['entries']):
                raise PrivacyError('the privacy ledger does not match its checksum')
            loaded = Ledger()
            for sigma, numerator, denominator, steps in state['entries']:
                if not all(isinstance(x, int) for x in (numerator, denominator, steps)):
                    raise TypeError('counts must be integers')
                loaded.count(StepEvent(float(sigma), Fraction(numerator, denominator)), steps)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise PrivacyError(f'the privacy ledger is damaged ({error}): restore an intact checkpoint') from error
        self._entries = loaded._entries


def _checksum(entries: Any) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
