"""BatchNorm with fixed statistics whose backward finds each row's gradients together with the input's, in one pass.

A rule would read both activations a second time, for every norm of the model. Must not be used where statistics move.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .layer_rules import batch_norm_backward


class _RowBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Module, take: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.take, ctx.has_bias = module, take, bias is not None
        statistics = module.running_mean, module.running_var
        return torch.ops.aten.native_batch_norm(x, weight, bias, *statistics, False, 0.0, module.eps)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        grad, *own = batch_norm_backward(ctx.module, weight, x, grads[0], ctx.needs_input_grad[0])
        rows = torch.stack(own, 1)
        ctx.take(rows)
        total = rows.sum(0)
        return grad, total[0], total[1] if ctx.has_bias else None, None, None


def can_fold(module: nn.Module) -> bool:
    """Whether the module is a BatchNorm that ``row_batch_norm`` serves."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and 'forward' not in vars(module)


def row_batch_norm(module: nn.Module, x: Tensor, take: Callable[[Tensor], None]) -> Tensor:
    """What the module's forward gives for (entries, channels, ...).

    On the way back ``take`` is given the gradients of weight and bias, (entries, 2, channels).
    """
    return _RowBatchNorm.apply(x, module.weight, module.bias, module, take)
