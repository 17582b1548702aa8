"""Computes the projector's basis V from public per-sample gradients.

Must not see a private sample: a basis from private gradients would be a release without noise.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmpose_dp.privacy.errors import DataError
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.records import as_vectors


def fit_basis(projector: Projector, gradients: Iterable[Sequence[Tensor]], num_samples: int) -> None:
    """Computes V from public per-sample gradients.

    Args:
        projector: gets V as its ``basis``.
        gradients: batches of public samples; each is one tensor per parameter, (samples, *parameter shape).
        num_samples: m, at least the number of all samples.

    The m x m Gram matrix is decomposed instead of the p x p second moment, and each parameter's gradients are overwritten by its
    part of V, so that memory holds only about m x p numbers. Samples that are not finite are left out. Raises DataError if
    none is left.
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
            stacks[i] = _mixed(mix, stack)
        first = False
    for stack, scale in zip(stacks, scales):
        stack *= scale
    if scales:
        length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(stack.float()) for stack in stacks]))
        for stack in stacks:
            stack *= len(stack) ** 0.5 / length
    projector.basis = stacks


def _stack(gradients: Iterable[Sequence[Tensor]], num_samples: int, dtype: torch.dtype) -> list[Tensor]:
    """The finite samples of all batches, one tensor per parameter, (samples, *parameter shape)."""
    stacks: list[Tensor] = []  # by parameter, allocated at once, since joining batches would need twice the memory
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
        raise DataError(
            'the public data gives no usable gradient for the projector: check that train_dataloader.dataset.public_view or '
            'public has annotated keypoints'
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


def _mixed(mix: Tensor, stack: Tensor) -> Tensor:
    """Linear combinations of a stack's samples: (k, m) x (m, *shape) -> (k, *shape), in the stack's dtype."""
    flat = as_vectors(stack)
    out = flat.new_empty(len(mix), flat.shape[1])
    for start in range(0, flat.shape[1], 1 << 18):
        out[:, start : start + (1 << 18)] = mix @ flat[:, start : start + (1 << 18)].float()
    return out.view(len(mix), *stack.shape[1:])
