"""The projector V: a low-dimensional subspace found on public gradients alone.

Must not see a private row: a basis made from private gradients is a leak that no noise pays for.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .errors import PrivacyError
from .records import as_vectors
from .validation import as_number, as_whole

ORDERS = ('project-then-clip', 'noise-then-project')


class Projector:
    """V in R^{p x k}, orthonormal by default: spans the top eigenspace of the public per-sample gradients' second moment.

    Args:
        rank: k, the most directions kept. Fewer are kept where the public gradients span fewer.
        order: 'project-then-clip' (default) clips and noises the k coordinates V^T g_i; 'noise-then-project' is the
            paper's (arXiv 2504.10190): DP-SGD first, then V V^T as post-processing.
        refresh_interval: private steps between two bases.
        outside: with 'project-then-clip', how long the part of a record's gradient outside the subspace may be, in units of what
            the part inside may (GEP, Yu et al. 2021). 0 leaves it out, and with it the noise of the full dimension.
        preconditioned: with 'project-then-clip', finds the subspace for gradients scaled by S = (v + 0.01)^(-1/4), v being each
            parameter's mean square among the public gradients in units of the average parameter's: columns S U instead of U,
            so that the update is S U U^T S g. At full rank that is g / sqrt(v), RMSprop's with public moments (AdaDPS, Li et
            al. 2022). The columns keep a mean square length of 1.
        dtype: of the p x k numbers kept, 'float32' or 'bfloat16' (half the memory, orthonormal to about 1e-2; the
            guarantee does not depend on it).

    Source: Yu et al. 2021 (GEP) and Zhou et al. 2021 (PDP-SGD, bypassing the ambient dimension), with one public
    gradient a record instead of one a batch.
    """

    def __init__(
        self,
        rank: int = 100,
        order: str = 'project-then-clip',
        refresh_interval: int = 50,
        outside: float = 0.0,
        preconditioned: bool = False,
        dtype: str = 'float32',
    ) -> None:
        if order not in ORDERS:
            raise PrivacyError(f'projector.order={order!r} is unknown; write one of {ORDERS}')
        rank, refresh_interval = (
            as_whole(rank, 'projector.rank'),
            as_whole(refresh_interval, 'projector.refresh_interval'),
        )
        outside = as_number(outside, 'projector.outside', 'a number, 0 or above')
        if dtype not in ('float32', 'bfloat16'):
            raise PrivacyError(f"projector.dtype={dtype!r} is unknown; write 'float32' or 'bfloat16'")
        if not outside >= 0 or (outside and order != 'project-then-clip'):
            raise PrivacyError(
                f"projector.outside={outside!r} must be 0 or above, and 0 without order='project-then-clip'"
            )
        if preconditioned and (outside or order != 'project-then-clip'):
            raise PrivacyError(
                "projector.preconditioned=True needs order='project-then-clip' and outside=0: write preconditioned=False"
            )
        self.max_rank = rank
        self.outside = outside
        self.preconditioned = preconditioned
        self.order = order
        self.refresh_interval = refresh_interval
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.basis: list[Tensor] = []  # V^T by parameter: (k, *parameter shape)

    @property
    def is_ready(self) -> bool:
        """Whether a basis has been fitted."""
        return bool(self.basis)

    @property
    def rank(self) -> int:
        """k, the columns of the current basis."""
        if not self.basis:
            raise PrivacyError('the projector has no basis yet: add PublicDataHook to default_hooks, or call fit()')
        return self.basis[0].shape[0]

    def fit(self, gradients: Iterable[Sequence[Tensor]], num_samples: int) -> None:
        """Makes V from public per-sample gradients.

        Args:
            gradients: batches of public rows; each is one tensor a parameter, (rows, *parameter shape).
            num_samples: m, their rows, or more.

        The m x m Gram matrix is decomposed instead of the p x p second moment, and each parameter's gradients are
        overwritten by its part of V, so that about m x p numbers are all that is held. Rows that are not finite are
        left out. Raises PrivacyError where nothing is left.
        """
        stacks = self._stack(gradients, num_samples)
        scales = _scales(stacks) if self.preconditioned else []
        for stack, scale in zip(stacks, scales):
            stack *= scale
        first = True
        for _ in range(2):  # the second pass repairs the rounding of the first (as in CholeskyQR2)
            gram = sum(_gram(stack) for stack in stacks)
            assert isinstance(gram, Tensor)
            values, vectors = torch.linalg.eigh(gram)
            if first:
                keep = values > values[-1] * 1e-6
                values, vectors = (
                    values[keep][-self.max_rank :],
                    vectors[:, keep][:, -self.max_rank :],
                )
            mix = (vectors / values.clamp_min(1e-30).sqrt()).T.float()
            for i, stack in enumerate(stacks):
                stacks[i] = _mix_rows(mix, stack)
            first = False
        for stack, scale in zip(stacks, scales):
            stack *= scale
        if scales:
            length = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(stack.float()) for stack in stacks])
            )
            for stack in stacks:
                stack *= len(stack) ** 0.5 / length
        self.basis = stacks

    def _stack(self, gradients: Iterable[Sequence[Tensor]], num_samples: int) -> list[Tensor]:
        stacks: list[Tensor] = []  # by parameter; all at once, since joining batches would hold them twice
        filled = 0
        for batch in gradients:
            finite = torch.stack([as_vectors(g).isfinite().all(1) for g in batch]).all(0)
            stacks = stacks or [g.new_empty((num_samples, *g.shape[1:]), dtype=self.dtype) for g in batch]
            end = filled + int(finite.sum())
            for stack, grads in zip(stacks, batch):
                stack[filled:end] = grads[finite]
            filled = end
        stacks = [stack[:filled] for stack in stacks]
        if not any(stack.any() for stack in stacks):
            raise PrivacyError(
                'the public data gave no usable gradient to build the projector from: check that the public half of '
                'the data set has annotated keypoints'
            )
        return stacks

    def no_coordinates(self, rows: int) -> Tensor:
        """Zeros to add coordinates to: (rows, k) float32."""
        return torch.zeros(rows, self.rank, dtype=torch.float32, device=self.basis[0].device)

    def coordinates(self, index: int, grads: Tensor) -> Tensor:
        """V_l^T g for the rows of one parameter: (rows, *shape) -> (rows, k) float32."""
        basis = as_vectors(self.basis[index])
        return (as_vectors(grads).to(basis.dtype) @ basis.T).float()

    def inside(self, index: int, coordinates: Tensor) -> Tensor:
        """V_l c for the rows of one parameter: (rows, k) -> (rows, its size) float32."""
        basis = as_vectors(self.basis[index])
        return (coordinates.to(basis.dtype) @ basis).float()

    def expand(self, coordinates: Tensor) -> list[Tensor]:
        """V c: (k,) -> one float32 tensor a parameter."""
        return [torch.tensordot(coordinates.to(b.dtype), b, dims=1).float() for b in self.basis]

    def project(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """V V^T g for one gradient given as a tensor a parameter."""
        parts = [self.coordinates(i, g[None])[0] for i, g in enumerate(gradient)]
        return self.expand(torch.stack(parts).sum(0))


def _scales(stacks: Sequence[Tensor]) -> list[Tensor]:
    """S of Projector.preconditioned, one tensor of the parameter's shape each, in the stacks' dtype."""
    moments = [stack.square().mean(0, dtype=torch.float32) for stack in stacks]
    average = sum(float(v.sum()) for v in moments) / sum(v.numel() for v in moments)
    return [(v / average + 0.01).pow(-0.25).to(stack.dtype) for v, stack in zip(moments, stacks)]


def _gram(stack: Tensor) -> Tensor:
    """G G^T in float64 from float32 products, (m, m), chunk by chunk so that half precision needs no full copy."""
    flat = as_vectors(stack)
    gram = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for chunk in flat.split(1 << 18, dim=1):
        chunk = chunk.float()
        gram += (chunk @ chunk.T).double()
    return gram


def _mix_rows(mix: Tensor, stack: Tensor) -> Tensor:
    """mix @ stack over the rows: (k, m) x (m, *shape) -> (k, *shape), in the stack's dtype."""
    flat = as_vectors(stack)
    out = flat.new_empty(len(mix), flat.shape[1])
    for start in range(0, flat.shape[1], 1 << 18):
        out[:, start : start + (1 << 18)] = mix @ flat[:, start : start + (1 << 18)].float()
    return out.view(len(mix), *stack.shape[1:])
