"""Schedules: sigma and C change over a training as the settings say.

Must not depend on anything but the settings: a schedule that follows private data would be a release of its own.
"""

from dataclasses import dataclass

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
