"""A subspace of thousands of directions in little memory: products of the rows and columns where public gradients are large.

Must not see a private sample: a basis made from private gradients is a leak that no noise pays for.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmpose_dp.privacy.errors import ConfigError, DataError
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.validation import as_whole
from mmpose_dp.tensors import without_tf32

DAMPING = 0.1  # of the chosen coordinates' average mean square
SAMPLES = 768  # public samples for a basis, unless num_samples says otherwise
PASSES = 3  # over public samples: two find the bases, and one chooses the coordinates


class KroneckerProjector(Projector):
    """V of Projector as products: coordinates of A^T G B for the gradient G (r x c) of each parameter, seen as a matrix.

    1. A (r x a) and B (c x b) span the leading eigenspaces of the sums of G G^T and G^T G over public per-sample gradients (the
       factors of Shampoo, Gupta et al. 2018). Two steps of subspace iteration from random matrices find them.
    2. On further public samples, v is the mean square of each coordinate. Of all parameters' coordinates, the ``rank`` with the
       largest v are kept (as in EKFAC, George et al. 2018).
    3. Each is scaled by (v + 0.1 v_mean)^(-1/2), before it is clipped and again when the update is mapped back, so that the update
       is a natural gradient's (SOAP, Vyas et al. 2024, has the same basis). The columns of V keep a mean square length of 1.

    The k clipped coordinates have the sensitivity C whatever V is, as with ``order='project-then-clip'`` of Projector.

    Args:
        rank: k, the most coordinates kept, of all parameters together.
        width: the most columns of A and B.
        refresh_interval: private steps between two bases.

    Raises ConfigError for settings that are out of range.
    """

    basis: Any  # list[Factors], one per parameter

    def __init__(self, rank: int = 2000, width: int = 32, refresh_interval: int = 16) -> None:
        super().__init__(rank, refresh_interval=refresh_interval, preconditioned=True)
        self.width = as_whole(width, 'projector.width')

    @property
    def rank(self) -> int:
        """k, the columns of the current basis."""
        return self.basis[-1].stop if self.basis else super().rank

    def no_coordinates(self, records: int) -> Tensor:
        """Zeros to add coordinates to: (records, k) float32."""
        rank = self.rank
        return self.basis[0].left.new_zeros(records, rank)

    def coordinates(self, indices: Sequence[int], grads: Tensor) -> Tensor:
        """V_l^T g for the gradients of some parameters: (samples, their sizes together) -> (samples, k) float32."""
        found, factors = self.no_coordinates(len(grads)), [self.basis[index] for index in indices]
        for own, part in zip(factors, grads.split([own.shape.numel() for own in factors], 1)):
            if len(own.places):
                found[:, own.start : own.stop] = own.chosen(part)
        return found

    def expand(self, coordinates: Tensor) -> list[Tensor]:
        """V c: (k,) -> one float32 tensor per parameter."""
        return [own.expand(coordinates[own.start : own.stop]) for own in self.basis]

    def coordinates_of(self, gradient: Sequence[Tensor]) -> Tensor:
        """V^T g: (k,) float32."""
        return self.coordinates(range(len(gradient)), torch.cat([g.flatten() for g in gradient])[None])[0]

    def fit(self, params: Sequence[Tensor], passes: Sequence[Iterable[Sequence[Tensor]]]) -> None:
        """Computes V from public per-sample gradients.

        Args:
            params: what the gradients are of.
            passes: PASSES times batches of gradients, best of other samples each: one tensor per parameter, (samples, *shape).

        Gradients that are not finite are left out. Raises DataError if no gradient is left.
        """
        numbers = torch.Generator().manual_seed(0)
        basis = [Factors.random(param, self.width, numbers) for param in params]
        for batches in passes[:-1]:
            basis = _sharper(basis, batches)
        self._choose(basis, _mean_squares(basis, passes[-1]))

    def _choose(self, basis: list['Factors'], squares: list[Tensor]) -> None:
        """Takes the coordinates with the largest mean squares."""
        flat = torch.cat(squares)
        number = min(self.max_rank, int((flat > 0).sum()))
        if not number:
            raise DataError(
                'the public data gives no usable gradient for the projector: check that train_dataloader.dataset.public_view '
                'or public has annotated keypoints'
            )
        taken = torch.zeros_like(flat, dtype=torch.bool)
        taken[flat.topk(number).indices] = True
        scale = (flat + DAMPING * flat[taken].mean()).rsqrt()
        scale /= scale[taken].square().mean().sqrt()
        start, sizes = 0, [len(own) for own in squares]
        for factors, own, scales in zip(basis, taken.split(sizes), scale.split(sizes)):
            factors.choose(own.nonzero()[:, 0], scales[own], start)
            start = factors.stop
        self.basis = basis


class Factors:
    """The part of V that belongs to one parameter: columns are scaled products of a column of A and one of B.

    Args:
        shape: of the parameter.
        left: A, (r, a).
        right: B, (c, b).
    """

    def __init__(self, shape: torch.Size, left: Tensor, right: Tensor) -> None:
        self.shape, self.left, self.right = shape, left, right
        self.choose(torch.zeros(0, dtype=torch.long, device=left.device), left.new_zeros(0), 0)

    @classmethod
    def random(cls, param: Tensor, width: int, numbers: torch.Generator) -> 'Factors':
        """Random matrices of at most ``width`` columns, to begin with."""
        sides = [torch.randn(side, min(width, side), generator=numbers) for side in matrix_shape(param.shape)]
        return cls(param.shape, *(side.to(param.device) for side in sides))

    def choose(self, places: Tensor, scale: Tensor, start: int) -> None:
        """Takes the coordinates at ``places`` of a flat A^T G B, which become the coordinates from ``start`` on."""
        self.places, self.scale, self.start, self.stop = places, scale, start, start + len(places)

    def to(self, device: torch.device | str) -> 'Factors':
        """The same on another device."""
        moved = Factors(self.shape, self.left.to(device), self.right.to(device))
        moved.choose(self.places.to(device), self.scale.to(device), self.start)
        return moved

    def matrices(self, grads: Tensor) -> Tensor:
        """(samples, size or *shape) -> (samples, r, c) float32."""
        return grads.reshape(len(grads), len(self.left), len(self.right)).float()

    def finite(self, grads: Tensor) -> Tensor:
        """The same, with zeros for samples that are not finite."""
        found = self.matrices(grads)
        return found.masked_fill(~found.isfinite().flatten(1).all(1)[:, None, None], 0)

    def turned(self, matrices: Tensor) -> Tensor:
        """A^T G B: (samples, r, c) -> (samples, a * b)."""
        with without_tf32(matrices):
            return (self.left.T @ (matrices @ self.right)).flatten(1)

    def chosen(self, grads: Tensor) -> Tensor:
        """The coordinates of gradients, (samples, size) -> (samples, stop - start), not finite where a gradient is not."""
        return self.turned(self.matrices(grads))[:, self.places] * self.scale

    def expand(self, coordinates: Tensor) -> Tensor:
        """This parameter's part of V c: (stop - start,) -> (*shape)."""
        middle = self.left.new_zeros(self.left.shape[1] * self.right.shape[1])
        middle[self.places] = coordinates * self.scale
        return (self.left @ middle.view(-1, self.right.shape[1]) @ self.right.T).view(self.shape)

    def __getitem__(self, column: int) -> Tensor:
        """This parameter's part of a column of V, (*shape)."""
        return self.expand((torch.arange(self.start, self.stop, device=self.left.device) == column).float())


def samples_for(projector: Projector) -> int:
    """How many public samples a basis is found on: one per direction, or SAMPLES for a KroneckerProjector."""
    return SAMPLES if isinstance(projector, KroneckerProjector) else projector.max_rank


def in_passes(chosen: Sequence[int]) -> list[Sequence[int]]:
    """A third of the chosen public samples for each pass of KroneckerProjector.fit."""
    return [chosen[number::PASSES] for number in range(PASSES)]


def basis_bytes(projector: Projector, params: Sequence[Tensor]) -> int:
    """The memory of a basis of these parameters."""
    if not isinstance(projector, KroneckerProjector):
        return projector.max_rank * sum(param.numel() for param in params) * projector.dtype.itemsize
    sides = [side for param in params for side in matrix_shape(param.shape)]
    return 4 * sum(side * min(side, projector.width) for side in sides) + 12 * projector.max_rank


PROJECTORS: dict[str, type[Projector]] = {kind.__name__: kind for kind in (Projector, KroneckerProjector)}


def projector_class(settings: Mapping[str, Any]) -> type[Projector]:
    """The class that ``optim_wrapper.projector`` names, Projector by default. Raises ConfigError for an unknown name."""
    name = settings.get('type', 'Projector')
    if name not in PROJECTORS:
        raise ConfigError(f'optim_wrapper.projector.type={name!r} is unknown; write one of {tuple(PROJECTORS)}')
    return PROJECTORS[name]


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix: a layer's output or first dimension, and all others."""
    sizes = [*shape]
    while sizes[:1] == [1]:  # of position embeddings, say
        sizes.pop(0)
    return (sizes[0], math.prod(sizes[1:])) if sizes else (1, 1)


def _sharper(basis: Sequence[Factors], batches: Iterable[Sequence[Tensor]]) -> list[Factors]:
    """One step of subspace iteration with the sums of G G^T and G^T G, orthonormal."""
    sums = [(torch.zeros_like(own.left), torch.zeros_like(own.right)) for own in basis]
    for batch in batches:
        for own, grads, (left, right) in zip(basis, batch, sums):
            matrices = own.finite(grads)
            rows, columns = matrices.flatten(0, 1), matrices.transpose(0, 1).flatten(1)
            with without_tf32(matrices):
                right += rows.T @ (rows @ own.right)
                left += columns @ (columns.T @ own.left)
    return [Factors(own.shape, *map(_orthonormal, pair)) for own, pair in zip(basis, sums)]


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span, the largest first."""
    return torch.linalg.svd(columns, full_matrices=False).U


def _mean_squares(basis: Sequence[Factors], batches: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """The mean square of each coordinate, (a * b,) per parameter."""
    sums, count = [own.left.new_zeros(own.left.shape[1] * own.right.shape[1]) for own in basis], 0
    for batch in batches:
        count += len(batch[0])
        for own, grads, total in zip(basis, batch, sums):
            total += own.turned(own.finite(grads)).square().sum(0)
    return [total / max(count, 1) for total in sums]
