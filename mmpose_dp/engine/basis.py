"""Makes the projector's basis V from public per-sample gradients.

Must not see a private sample: a basis made from private gradients is a leak that no noise pays for.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.records import as_vectors


def fit_basis(projector: Projector, gradients: Iterable[Sequence[Tensor]], num_samples: int) -> None:
    """Makes V from public per-sample gradients.

    Args:
        gradients: batches of public rows; each is one tensor per parameter, (rows, *parameter shape).
        num_samples: m, their rows, or more.

    The m x m Gram matrix is decomposed instead of the p x p second moment, and each parameter's gradients are
    overwritten by its part of V, so that about m x p numbers are all that is held. Samples that are not finite are
    left out. Raises PrivacyError where nothing is left.
    """
    stacks = _stack(gradients, num_samples, projector.dtype)
    scales = _scales(stacks) if projector.preconditioned else []
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
                values[keep][-projector.max_rank :],
                vectors[:, keep][:, -projector.max_rank :],
            )
        mix = (vectors / values.clamp_min(1e-30).sqrt()).T.float()
        for i, stack in enumerate(stacks):
            stacks[i] = _mix_rows(mix, stack)
        first = False
    for stack, scale in zip(stacks, scales):
        stack *= scale
    if scales:
        length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(stack.float()) for stack in stacks]))
        for stack in stacks:
            stack *= len(stack) ** 0.5 / length
    projector.basis = stacks


def _stack(gradients: Iterable[Sequence[Tensor]], num_samples: int, dtype: torch.dtype) -> list[Tensor]:
    stacks: list[Tensor] = []  # by parameter; all at once, since joining batches would hold them twice
    filled = 0
    for batch in gradients:
        finite = torch.stack([as_vectors(g).isfinite().all(1) for g in batch]).all(0)
        stacks = stacks or [g.new_empty((num_samples, *g.shape[1:]), dtype=dtype) for g in batch]
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
