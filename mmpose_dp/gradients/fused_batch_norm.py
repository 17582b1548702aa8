"""BatchNorm with fixed statistics whose backward finds each sample's gradients together with the input's, in one pass.

A rule would read both activations a second time, for every norm of the model. Must not be used where statistics move.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .layer_rules import batch_norm_backward


class _FusedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Module, take: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.take = module, take
        statistics = module.running_mean, module.running_var
        return torch.ops.aten.native_batch_norm(x, weight, bias, *statistics, False, 0.0, module.eps)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        grad, *own = batch_norm_backward(ctx.module, weight, x, grads[0], ctx.needs_input_grad[0])
        entries = torch.stack(own, 1)
        ctx.take(entries)
        weight_grad, bias_grad = entries.sum(0)
        return grad, weight_grad, bias_grad if ctx.needs_input_grad[2] else None, None, None


def fused_batch_norm(module: nn.Module, x: Tensor, take: Callable[[Tensor], None]) -> Tensor:
    """What the module's forward gives for (entries, channels, ...).

    On the way back ``take`` is given the gradients of weight and bias, (entries, 2, channels).
    """
    return _FusedBatchNorm.apply(x, module.weight, module.bias, module, take)
