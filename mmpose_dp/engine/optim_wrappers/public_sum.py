"""The public gradients of a logical batch. Must not get one of a private sample: their sum has no noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpose_dp.processes import several_processes, sum_over_processes
from mmpose_dp.tensors import parts_of


class PublicSum:
    """Their sum, over the micro-batches of this process, and the mean over all processes.

    Attributes:
        total: the sum, one float32 tensor per parameter; None before the first micro-batch.
        count: how many samples it is of.
    """

    def __init__(self) -> None:
        self.total: list[Tensor] | None = None
        self.count = 0

    def add(self, gradients: list[Tensor], count: int) -> None:
        """Adds a micro-batch's sum, over ``count`` samples."""
        if self.total is None:
            self.total = gradients
        else:
            torch._foreach_add_(self.total, gradients)
        self.count += count

    def continued(self, total: list[Tensor], count: int) -> None:
        """Takes a sum in which ``count`` samples were added to ``total``."""
        self.total = total
        self.count += count

    def mean(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The mean over the samples of all processes, zero without a sample: one float32 tensor for each of ``params``."""
        total = self.total or [torch.zeros_like(p, dtype=torch.float32) for p in params]
        count = torch.tensor(float(self.count))
        if several_processes():
            flat = torch.cat([*(x.flatten() for x in total), count.to(total[0].device).view(1)])
            sum_over_processes(flat)
            *total, count = parts_of(flat, [*(x.shape for x in total), count.shape])
        torch._foreach_div_(total, count.clamp_min(1))
        return total
