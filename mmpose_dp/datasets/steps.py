"""What travels with each micro-batch from the sampler to the train loop. Must not hold anything of the data."""

from collections.abc import Iterable
from typing import Any, NamedTuple


class Step(NamedTuple):
    """A micro-batch's place in its logical batch.

    Attributes:
        is_last: whether it ends its logical batch.
        replayed: a sample of the private record, chosen at random in the logical batch, that is to be replayed alone; None if it
            is in another micro-batch, or if there is none.
    """

    is_last: bool
    replayed: int | None = None


class OfStep(list[Any]):
    """The indices, or the packed samples, of one micro-batch, with its step: data loaders hand over lists."""

    def __init__(self, items: Iterable[Any] = (), step: Step | None = None) -> None:
        super().__init__(items)
        self.step = step
