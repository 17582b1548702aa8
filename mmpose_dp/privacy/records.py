"""Which record each sample of a forward belongs to, and how a backward passes their gradients on. Must not compute a gradient."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from mmpose_dp.tensors import as_range, summed

PADDING = 'padding'  # the key of a blank sample: it fills a forward up, belongs to no record, and contributes nothing


@dataclass(frozen=True)
class Samples:
    """Which record each sample of one forward belongs to. Several may be one record (all the people of an image, say): their
    gradients are added before the norm is taken."""

    records: tuple[int, ...]  # (samples,), the record a sample belongs to, 0..num_records-1; -1: public; -2: padding
    num_records: int  # how many private records the samples make up
    keys: tuple[int, ...] = ()  # (num_records,), what each record is called outside this batch
    weights: tuple[float, ...] = ()  # (samples,), factors of the losses, before the norm is taken; empty: 1 each
    _placed: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)  # see record_of

    @classmethod
    def from_keys(cls, keys: Sequence[Any], weights: Sequence[float] = ()) -> 'Samples':
        """From one key per sample; equal keys are one record, None is public, PADDING belongs to no record."""
        order: dict[int, int] = {}
        others = {None: -1, PADDING: -2}
        records = tuple(others[key] if key in others else order.setdefault(key, len(order)) for key in keys)
        return cls(records, len(order), tuple(order), tuple(weights))

    @cached_property
    def private(self) -> Sequence[int]:
        """The indices of the private samples."""
        return as_range([i for i, record in enumerate(self.records) if record >= 0])

    @cached_property
    def public(self) -> Sequence[int]:
        """The indices of the public samples."""
        return as_range([i for i, record in enumerate(self.records) if record == -1])

    @cached_property
    def apart(self) -> tuple[Sequence[int], Sequence[int]]:
        """The private samples that are a record by themselves, and those that share one."""
        count, own = Counter(self.records), [i for i, record in enumerate(self.records) if record >= 0]
        alone = [i for i in own if count[self.records[i]] == 1]
        return as_range(alone), as_range([i for i in own if count[self.records[i]] > 1])

    def record_of(self, samples: Sequence[int], device: torch.device) -> Tensor:
        """The record of each of ``samples``, which are ``private`` or a part of ``apart``."""
        key = device, id(samples)
        if key not in self._placed:
            self._placed[key] = torch.tensor([self.records[i] for i in samples], dtype=torch.int64, device=device)
        return self._placed[key]

    def sum_by_record(self, values: Tensor, samples: Sequence[int]) -> Tensor:
        """Adds (samples, d) to (num_records, d)."""
        if not self.apart[1]:
            return values  # every sample is a separate record, in order
        records = self.record_of(samples, values.device)
        return values.new_zeros(self.num_records, values.shape[1]).index_add_(0, records, values)


class Block(Protocol):
    """The gradients of some parameters; ``indices`` are their places in the list of parameters."""

    indices: list[int]

    def per_sample(self, samples: Sequence[int]) -> list[Tensor]:
        """Gradients of the given samples: one (samples, *parameter shape) float32 tensor per parameter."""

    def weighted_sum(self, samples: Sequence[int], weights: Tensor | None = None) -> list[Tensor]:
        """sum of the samples' gradients, times ``weights`` (samples,), one float32 tensor per parameter; without weight 0."""
        return [summed(grads, weights) for grads in self.per_sample(samples)]

    def ghost_squares(self, samples: Sequence[int]) -> Tensor | None:
        """Squared norms (samples,) over all the block's parameters where they are cheaper than the gradients; else None."""
        return None


class Collector(Protocol):
    """What a backward gives its blocks to."""

    def add(self, block: Block) -> None:
        """Takes one block. Every parameter comes in at most one; in none, if its gradient is zero for every sample."""
