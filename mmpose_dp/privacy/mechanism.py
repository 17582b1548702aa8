"""Which vector of a record is clipped and noised, by projector and clipping, and what the noised sum means for the parameters.

Every choice gives vectors of norm at most C, less the room for rounding.
Must not add noise, and must not look at the private sum but to map it back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmpose_dp.extras.adaptive_norm import shares
from mmpose_dp.extras.schedule import Schedule

from .clipping import ClippedCoordinates, ClippedParts, ClippedSum, LayerwiseClippedSum
from .errors import PrivacyError
from .projection import Projector
from .records import Rows
from .rounding import clipping_norm

CLIPPINGS = ('flat', 'automatic', 'adaptive', 'per-layer')

RecordCollector = ClippedSum | ClippedCoordinates | ClippedParts | LayerwiseClippedSum


def check_clipping(clipping: str, projector: Projector | None, schedule: Schedule | None = None) -> None:
    """Raises PrivacyError for a pair that has no meaning, with the key of ``optim_wrapper``."""
    if clipping not in CLIPPINGS:
        raise PrivacyError(f'optim_wrapper.clipping={clipping!r} must be one of {CLIPPINGS}')
    if clipping == 'per-layer' and in_coordinates(projector):
        raise PrivacyError(
            "optim_wrapper.clipping='per-layer' has no meaning with project-then-clip: write clipping='flat' or "
            "projector.order='noise-then-project'"
        )
    if clipping in ('automatic', 'adaptive') and projector is not None and projector.outside:
        raise PrivacyError(f"optim_wrapper.clipping='{clipping}' is not offered with projector.outside: write 'flat'")
    if clipping == 'adaptive' and schedule is not None and schedule.max_grad_norm != 1:
        raise PrivacyError(
            f"optim_wrapper.schedule.max_grad_norm={schedule.max_grad_norm} and clipping='adaptive' both move C: "
            "write clipping='flat', or take max_grad_norm out of the schedule"
        )


def in_coordinates(projector: Projector | None) -> bool:
    """Whether it is coordinates that are clipped."""
    return projector is not None and projector.order == 'project-then-clip'


def collector_for(
    params: Sequence[nn.Parameter],
    rows: Rows,
    max_grad_norm: float,
    projector: Projector | None = None,
    clipping: str = 'flat',
    scale: float = 1.0,
) -> RecordCollector:
    """What adds up the clipped vectors of one micro-batch's records, with room for rounding; see the collectors' arguments."""
    automatic, vote = clipping == 'automatic', 0.0
    if clipping == 'adaptive':
        max_grad_norm, vote = shares(max_grad_norm)
    max_grad_norm = clipping_norm(max_grad_norm)  # less than what the noise is for
    if projector is not None and in_coordinates(projector):
        if projector.outside:
            return ClippedParts(params, rows, max_grad_norm, projector, scale)
        return ClippedCoordinates(rows, max_grad_norm, projector, scale, automatic, vote)
    if clipping == 'per-layer':
        return LayerwiseClippedSum(params, rows, max_grad_norm, scale)
    return ClippedSum(params, rows, max_grad_norm, scale, automatic, vote)


def empty_sum(params: Sequence[nn.Parameter], projector: Projector | None, clipping: str = 'flat') -> list[Tensor]:
    """The collector's total where no record was drawn: zeros of the same shapes."""
    shapes: list[tuple[int, ...]] = [tuple(p.shape) for p in params]
    if projector is not None and in_coordinates(projector):
        shapes = [(projector.rank,), *(shapes if projector.outside else [])]
    if clipping == 'adaptive':
        shapes.append((1,))  # the votes
    return [torch.zeros(shape, dtype=torch.float32, device=params[0].device) for shape in shapes]


def gradient_of(total: list[Tensor], projector: Projector | None) -> list[Tensor]:
    """From a noised total to one float32 tensor a parameter: post-processing."""
    if projector is None:
        return total
    if not in_coordinates(projector):
        return projector.project(total)
    inside = projector.expand(total[0])
    return [x.add_(rest) for x, rest in zip(inside, total[1:])] if projector.outside else inside
