"""Schedules: sigma and C change over a training as the settings say.

Must not depend on anything but the settings: a schedule that follows private data would be another release.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mmpose_dp.privacy.accounting import History, StepEvent
from mmpose_dp.privacy.calibration import Factors
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.validation import as_positive, as_whole


@dataclass(frozen=True)
class Schedule:
    """How sigma and C change over the training: exponentially, in ``pieces`` equal parts (Du et al. 2021, Dynamic DP-SGD).

    Attributes:
        noise_multiplier: sigma of the last part, relative to the first part's.
        max_grad_norm: C of the last part, relative to the first part's. It needs no accounting, since the noise follows C.
        pieces: number of parts; each has its own accounting event.

    Raises ConfigError for values out of range.
    """

    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    pieces: int = 10

    def __post_init__(self) -> None:
        for name in ('noise_multiplier', 'max_grad_norm'):
            object.__setattr__(self, name, as_positive(getattr(self, name), f'schedule.{name}'))
        object.__setattr__(self, 'pieces', as_whole(self.pieces, 'schedule.pieces'))

    def parts(self, steps: int) -> list[tuple[float, float, int]]:
        """(noise factor, clipping factor, steps) of each part; the first factors are 1."""
        count = 1 if self.noise_multiplier == self.max_grad_norm == 1 else min(self.pieces, steps)
        edges = [steps * i // count for i in range(count + 1)]
        along = [i / max(count - 1, 1) for i in range(count)]
        return [
            (self.noise_multiplier**x, self.max_grad_norm**x, end - start)
            for x, start, end in zip(along, edges, edges[1:])
        ]


@dataclass(frozen=True)
class ScheduledPlan(PrivacyPlan):
    """A plan in which sigma and C follow ``schedule``; None: they do not change."""

    schedule: Schedule | None = None

    def _parts(self) -> Sequence[tuple[float, float, int]]:
        return self.schedule.parts(self.steps) if self.schedule else [(1.0, 1.0, self.steps)]

    def _factors_at(self, step: int) -> tuple[float, float]:
        """The schedule's factors; a training that goes on for longer than planned stays with the last ones."""
        parts = self._parts()
        ends = accumulate(steps for _, _, steps in parts)
        return next((part[:2] for part, end in zip(parts, ends) if step < end), parts[-1][:2])

    def event_at(self, step: int) -> StepEvent:
        """What private step number ``step`` of this training puts into the ledger."""
        return StepEvent(self.noise_multiplier * self._factors_at(step)[0], self.sample_rate)

    def max_grad_norm_at(self, step: int) -> float:
        """C of private step number ``step``."""
        return self.max_grad_norm * self._factors_at(step)[1]

    def planned(self, step: int = 0) -> History:
        """The planned steps from number ``step`` on."""
        lengths = [steps for _, _, steps in self._parts()]
        parts = zip(lengths, accumulate(lengths))
        return [(self.event_at(end - 1), min(end - step, steps)) for steps, end in parts if end > step]

    def noise_factors(self) -> Factors:
        """The noise of each part, in units of the first step's, and its steps."""
        return [(noise, steps) for noise, _, steps in self._parts()]

    def _calibrated(self, target_epsilon: float, factors: Factors = ()) -> dict[str, Any]:
        return super()._calibrated(target_epsilon, factors or self.noise_factors())
