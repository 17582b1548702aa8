"""Adam whose second moments are freed of the noise that was added to the gradients.

All it sees is the noised gradient and the noise's public deviation: post-processing. Must not see anything else of a record.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from mmpose.registry import OPTIMIZERS
from torch import Tensor
from torch.optim import Optimizer


@OPTIMIZERS.register_module()
class DPAdamBC(Optimizer):
    """Adam with bias correction for the noise of DP-SGD (Tang and Lecuyer 2023, "DP-AdamBC", algorithm 1).

    The noise of each step adds its variance to Adam's second moments, where it drowns the gradient's own: Adam then moves
    every parameter by the same length, as SGD with momentum would. Here it is taken off again. Without noise it is
    :class:`torch.optim.AdamW`.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the first and of the second moments.
        floor: the least second moment, in units of the noise's variance: what is left of a small one is chance. The paper's
            gamma' is the same, in absolute units.
        eps: added to the root of the second moments, as in Adam.
        weight_decay: as in AdamW, apart from the gradient.

    Attributes:
        noise_std: deviation of the noise in each entry of the gradient at hand; DPOptimWrapper sets it before each step.

    Examples:
        >>> optim_wrapper = dict(optimizer=dict(_delete_=True, type='DPAdamBC', lr=1e-3))
    """

    noise_std: float = 0.0

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        floor: float = 0.1,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if not floor > 0:
            raise ValueError(f'optimizer.floor={floor!r} must be above 0: a second moment may come out below 0')
        super().__init__(params, dict(lr=lr, betas=tuple(betas), floor=floor, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure`` returned."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for param in group['params']:
                if param.grad is not None:
                    self._move(param, param.grad, group)
        return loss

    def _move(self, param: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[param], group['betas']
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param), noise_avg_sq=0.0)
        state['step'] += 1
        state['exp_avg'].lerp_(gradient, 1 - first)
        state['exp_avg_sq'].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        # a schedule may change the noise: its variance is averaged as the squares are
        state['noise_avg_sq'] = second * state['noise_avg_sq'] + (1 - second) * self.noise_std**2
        unbiased = 1 - second ** state['step']
        noise = state['noise_avg_sq'] / unbiased
        root = (state['exp_avg_sq'] / unbiased - noise).clamp_min_(group['floor'] * noise).sqrt_().add_(group['eps'])
        param.mul_(1 - group['lr'] * group['weight_decay'])
        param.addcdiv_(state['exp_avg'], root, value=-group['lr'] / (1 - first ** state['step']))
