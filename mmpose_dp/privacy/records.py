"""What the samples of one forward are, and what a backward hands over of them. Must not compute a gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Which record each sample of one forward belongs to.

    Several samples may be one record (all the people of an image, say): their gradients are added before the norm is taken.
    """

    records: Tensor  # (samples,) int64, the record a sample belongs to, 0..num_records-1, or -1 for a public sample
    num_records: int  # how many private records the samples make up
    keys: tuple[int, ...] = ()  # (num_records,), what each record is called outside this batch
    weights: tuple[float, ...] = ()  # (samples,), factors of the losses, before the norm is taken; empty: 1 each

    @classmethod
    def from_keys(cls, keys: Sequence[int | None], weights: Sequence[float] = ()) -> 'Samples':
        """From one key per sample; equal keys are one record, None is public."""
        order: dict[int, int] = {}
        records = [-1 if key is None else order.setdefault(key, len(order)) for key in keys]
        return cls(torch.tensor(records, dtype=torch.int64), len(order), tuple(order), tuple(weights))

    @property
    def private(self) -> Tensor:
        """(private samples,) int64, their indices."""
        return (self.records >= 0).nonzero().flatten()

    @property
    def public(self) -> Tensor:
        """(public samples,) int64, their indices."""
        return (self.records < 0).nonzero().flatten()

    def sum_by_record(self, values: Tensor) -> Tensor:
        """Adds (private samples, d) to (num_records, d)."""
        records = self.records[self.private].to(values.device)
        if self.num_records == len(records):
            return values  # every sample is a record of its own, in order
        return values.new_zeros(self.num_records, values.shape[1]).index_add_(0, records, values)


class Block(Protocol):
    """The gradients of some parameters; ``indices`` are their places in the list of parameters."""

    indices: list[int]

    def per_sample(self, samples: Sequence[int]) -> list[Tensor]:
        """Gradients of the given samples: one (samples, *parameter shape) float32 tensor per parameter."""

    def weighted_sum(self, samples: Sequence[int], weights: Tensor | None = None) -> list[Tensor]:
        """sum of the given samples' gradients, times ``weights`` (samples,): one float32 tensor per parameter."""
        grads = self.per_sample(samples)
        return [g.sum(0) if weights is None else torch.tensordot(weights, g, dims=1) for g in grads]

    def ghost_squares(self, samples: Sequence[int]) -> Tensor | None:
        """Squared norms (samples,) over all the block's parameters where they are cheaper than the gradients; else None."""
        return None


class Collector(Protocol):
    """What a backward gives its blocks to."""

    def add(self, block: Block) -> None:
        """Takes one block. Every parameter comes in at most one; in none, if its gradient is zero for every sample."""


def as_range(samples: Tensor) -> Sequence[int]:
    """The samples as numbers, as a range if they are consecutive: such samples are taken without a copy."""
    numbers = samples.tolist()
    line = range(numbers[0], numbers[-1] + 1) if numbers else range(0)
    return line if numbers == list(line) else numbers


def as_vectors(x: Tensor) -> Tensor:
    """(samples, *parameter shape) -> (samples, its size), also where the parameter's shape is ()."""
    return x.flatten(1) if x.dim() > 1 else x[:, None]
