"""What training has spent: the noisy steps taken, as every checkpoint keeps them.

Must not forget a step, and must not take over a damaged record of them.
"""

import hashlib
import json
from fractions import Fraction
from typing import Any

from .accounting import History, StepEvent, epsilon
from .errors import PrivacyError

_FORMAT = 1


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
        if type(steps) is not int or steps < 1:
            raise PrivacyError(f'a ledger only grows by whole steps, got {steps!r}')
        if self._entries and self._entries[-1][0] == event:
            steps += self._entries.pop()[1]
        self._entries.append((event, steps))

    def epsilon(self, delta: float, accountant: str = 'pld') -> float:
        """Epsilon spent so far."""
        return epsilon(self.history, delta, accountant)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for torch.save, weights_only loading and JSON.

        The checksum notices accidental damage. It is no protection against somebody who edits the
        file on purpose.
        """
        entries = [
            [float(e.noise_multiplier), e.sample_rate.numerator, e.sample_rate.denominator, steps]
            for e, steps in self._entries
        ]
        return {'format': _FORMAT, 'entries': entries, 'checksum': _checksum(entries)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a ledger back. Raises PrivacyError where it is damaged or of an unknown format;
        this ledger then stays as it was."""
        where = "the checkpoint's privacy ledger"
        missing = {'format', 'entries', 'checksum'} - set(state if isinstance(state, dict) else ())
        if missing:
            raise PrivacyError(f'{where} lacks {", ".join(sorted(missing))}: resume from an intact checkpoint')
        if state['format'] != _FORMAT:
            raise PrivacyError(
                f'{where} has format {state["format"]!r} and this version reads {_FORMAT}: '
                'resume with the mmpose_dp version that wrote it'
            )
        loaded = Ledger()
        try:
            if state['checksum'] != _checksum(state['entries']):
                raise ValueError('its checksum does not match')
            for sigma, numerator, denominator, steps in state['entries']:
                if type(sigma) is not float or {type(numerator), type(denominator)} != {int}:
                    raise TypeError('an entry is not [float, int, int, int]')
                loaded.count(StepEvent(sigma, Fraction(numerator, denominator)), steps)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise PrivacyError(f'{where} is damaged: {error}. Resume from an intact checkpoint') from error
        self._entries = loaded._entries


def _checksum(entries: Any) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
