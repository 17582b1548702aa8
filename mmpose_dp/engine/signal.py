"""Measures how far clipped gradients point the same way: the r of :mod:`mmpose_dp.extras.forecast`, on public samples.

Must not see a private sample: r of private records would be a release without noise.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mmpose_dp.gradients.blocks import StackBlock
from mmpose_dp.privacy.clipping import clipping_norm
from mmpose_dp.privacy.errors import DataError
from mmpose_dp.privacy.mechanism import GaussianMechanism
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.records import Samples

_LEAST_BATCHES = 2


class MeanLength:
    """Estimates the length of the mean clipped gradient, in units of C, from the clipped sums of several batches.

    The length of a mean of n vectors is too large by their own spread, which a private training would average away. So only
    products of different batches are taken: for sums t_j over n_j samples, r^2 = sum_{j != k} <t_j, t_k> / sum_{j != k} n_j n_k
    has the right mean whatever the spread. It may come out below 0, and r is 0 then.
    """

    def __init__(self, mechanism: GaussianMechanism, indices: Sequence[int]) -> None:
        self._mechanism, self._indices = mechanism, list(indices)
        self._total: Tensor | None = None
        self._squares, self._counts = 0.0, list[int]()

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Adds one batch of per-sample gradients, one (samples, *shape) tensor per parameter of the model."""
        count = len(gradients[0])
        samples = Samples.from_keys(range(count))
        collector = self._mechanism.collector_of_norm(samples, clipping_norm(self._mechanism.max_grad_norm))
        for place, index in enumerate(self._indices):
            collector.add(StackBlock([place], gradients[index]))
        total = self._in_subspace(collector.total())
        self._total = total if self._total is None else self._total + total
        self._squares += float(total @ total)
        self._counts.append(count)

    def _in_subspace(self, total: list[Tensor]) -> Tensor:
        """The part of a sum that the update keeps, as one vector in float64."""
        projector = self._mechanism.projector
        if projector is not None and self._mechanism.coordinates_of is None:  # noise-then-project
            total = [projector.coordinates_of(total)]
        return torch.cat([part.flatten() for part in total]).double()

    @property
    def r(self) -> float:
        """The estimate. Raises DataError for a single batch, or one without a finite gradient."""
        pairs = sum(self._counts) ** 2 - sum(count**2 for count in self._counts)
        if len(self._counts) < _LEAST_BATCHES or self._total is None or not pairs:
            raise DataError(
                'r needs public samples in two batches at least: add public data, lower train_dataloader.batch_size, or give --r'
            )
        square = (float(self._total @ self._total) - self._squares) / pairs
        return math.sqrt(max(square, 0.0)) / self._mechanism.max_grad_norm


def measure(
    mechanism: GaussianMechanism,
    gradients: Iterable[Sequence[Tensor]],
    parts: Mapping[str, tuple[Sequence[int], Projector | None]],
) -> dict[str, float]:
    """r of several subsets of the parameters at once.

    Args:
        mechanism: what clips, and to which C; that of a training of all these parameters.
        gradients: batches of per-sample gradients of public samples (DPOptimWrapper.public_gradients), none of them twice.
        parts: by a name, the places of a subset's parameters among ``mechanism.params``, and None or a projector whose basis
            is of these parameters: r is then that of the subspace.

    Raises DataError if there are too few samples.
    """
    lengths = {}
    for name, (indices, projector) in parts.items():
        params = [mechanism.params[index] for index in indices]
        own = type(mechanism)(params, mechanism.max_grad_norm, projector=projector)
        lengths[name] = MeanLength(own, indices)
    for batch in gradients:
        for length in lengths.values():
            length.add(batch)
    return {name: length.r for name, length in lengths.items()}
