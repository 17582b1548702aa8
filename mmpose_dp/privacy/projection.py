"""The projector V: a low-dimensional subspace found on public gradients alone.

Must not see a private sample: a basis made from private gradients is a leak that no noise pays for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpose_dp.tensors import as_vectors, parts_of

from .validation import as_whole, require

ORDERS, DTYPES = ('project-then-clip', 'noise-then-project'), ('float32', 'bfloat16')


class Projector:
    """V in R^{p x k}, orthonormal by default: spans the top eigenspace of the public per-sample gradients' second moment.

    Args:
        rank: k, the most directions kept. Fewer are kept where the public gradients span fewer.
        order: 'project-then-clip' (default) clips and noises the k coordinates V^T g_i; 'noise-then-project' is the
            paper's (arXiv 2504.10190): DP-SGD first, then V V^T as post-processing.
        refresh_interval: private steps between two bases.
        preconditioned: with 'project-then-clip', finds the subspace for gradients scaled by S = (v + 0.01)^(-1/4), v being each
            parameter's mean square among the public gradients in units of the average parameter's: columns S U instead of U,
            so that the update is S U U^T S g. At full rank that is g / sqrt(v), RMSprop's with public moments (AdaDPS, Li et
            al. 2022). The columns keep a mean square length of 1.
        dtype: of the p x k numbers kept, 'float32' or 'bfloat16' (half the memory, orthonormal to 1e-2; no guarantee needs that).

    Source: Yu et al. 2021 (GEP) and Zhou et al. 2021 (PDP-SGD, bypassing the ambient dimension), with one public gradient per
    record instead of one per batch. Raises ConfigError for settings that are unknown or out of range.
    """

    def __init__(
        self,
        rank: int = 100,
        order: str = 'project-then-clip',
        refresh_interval: int = 50,
        preconditioned: bool = False,
        dtype: str = 'float32',
    ) -> None:
        require(order in ORDERS, f'projector.order={order!r} is unknown; write one of {ORDERS}')
        require(dtype in DTYPES, f'projector.dtype={dtype!r} is unknown; write one of {DTYPES}')
        fits = not preconditioned or order == 'project-then-clip'
        require(fits, "projector.preconditioned=True needs order='project-then-clip': write preconditioned=False")
        self.max_rank = as_whole(rank, 'projector.rank')
        self.refresh_interval = as_whole(refresh_interval, 'projector.refresh_interval')
        self.order, self.preconditioned, self.dtype = order, preconditioned, getattr(torch, dtype)
        self.place(torch.zeros(0, 0), [])

    def place(self, flat: Tensor, shapes: Sequence[torch.Size]) -> None:
        """Takes V^T, (k, p), of parameters of these shapes; ``basis`` are its parts, (k, *parameter shape) each."""
        self.flat, self.basis = flat, parts_of(flat, shapes)

    @property
    def rank(self) -> int:
        """k, the columns of the current basis."""
        require(bool(self.basis), 'the projector has no basis yet: add ProjectorRefreshHook or call fit_basis')
        return len(self.flat)

    def no_coordinates(self, records: int) -> Tensor:
        """Zeros to add coordinates to: (records, k) float32."""
        return torch.zeros(records, self.rank, dtype=torch.float32, device=self.flat.device)

    def coordinates(self, indices: Sequence[int], grads: Tensor) -> Tensor:
        """V_l^T g for the gradients of some parameters: (samples, their sizes together) -> (samples, k) float32."""
        parts = [as_vectors(self.basis[index]) for index in indices]
        basis = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return (grads.to(basis.dtype) @ basis.T).float()

    def expand(self, coordinates: Tensor) -> list[Tensor]:
        """V c: (k,) -> one float32 tensor per parameter."""
        return parts_of((coordinates.to(self.flat.dtype) @ self.flat).float(), [b.shape[1:] for b in self.basis])

    def project(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """V V^T g for one gradient, given as one tensor per parameter."""
        return self.expand(self.coordinates_of(gradient))

    def coordinates_of(self, gradient: Sequence[Tensor]) -> Tensor:
        """V^T g: (k,) float32."""
        whole = torch.cat([g.flatten() for g in gradient]).to(self.flat.dtype)
        parts = zip(self.flat.split(1 << 15, 1), whole.split(1 << 15))  # one long sum would lose digits
        return torch.stack([v @ g for v, g in parts]).float().sum(0)
