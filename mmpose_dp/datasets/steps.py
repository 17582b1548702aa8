"""What travels with each micro-batch from the sampler to the train loop. Must not hold any data."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Step(NamedTuple):
    """A micro-batch's place in its logical batch.

    Attributes:
        is_last: whether it is the last of its logical batch.
        replayed: the randomly chosen private record that is to be replayed alone; None if it is in another micro-batch, or if
            the logical batch has no private record.
    """

    is_last: bool
    replayed: int | None = None


class OfStep(list[Any]):
    """The indices, or the packed samples, of one micro-batch, with its step: data loaders pass lists."""

    def __init__(self, items: Iterable[Any] = (), step: Step | None = None) -> None:
        super().__init__(items)
        self.step = step
