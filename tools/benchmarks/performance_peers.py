"""Opacus on an MMPose model, for performance.py: its hooks and its ghost clipping, used as in its tutorials.

In-place flags are off and BatchNorm is replaced by Opacus' own validator. Must not help Opacus further: the benchmark would then
measure our code.
"""

from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from opacus.validators import ModuleValidator
from torch import nn
from torch.optim import SGD

from mmpose_dp.models import make_private

SETTINGS = dict(noise_multiplier=1.0, max_grad_norm=0.1, loss_reduction='sum')


def _prepared(model: nn.Module) -> nn.Module:
    model = ModuleValidator.fix(model)
    make_private(model.head)  # it gives each sample's loss, which Opacus cannot find
    for module in model.modules():
        if hasattr(module, 'inplace'):
            module.inplace = False
    return model.train()


def _losses(model: nn.Module, batch: dict) -> torch.Tensor:
    inner = model._module
    model(**inner.data_preprocessor(batch, True), mode='loss')
    return torch.stack(inner.head.take().losses)


def hooks(model: nn.Module, batch: dict, micro_batches: int) -> Callable[[], Any]:
    """DP-SGD by GradSampleModule and DPOptimizer."""
    wrapped = GradSampleModule(_prepared(model), loss_reduction='sum')
    expected = len(batch['inputs']) * micro_batches
    optimizer = DPOptimizer(SGD(wrapped.parameters(), lr=1e-4), expected_batch_size=expected, **SETTINGS)

    def step() -> None:
        for left in reversed(range(micro_batches)):
            optimizer.signal_skip_step(left > 0)
            _losses(wrapped, batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def ghost(model: nn.Module, batch: dict, micro_batches: int) -> Callable[[], Any]:
    """DP-SGD by fast gradient clipping, ghost norms where Opacus has them."""
    wrapped = GradSampleModuleFastGradientClipping(
        _prepared(model), loss_reduction='sum', max_grad_norm=SETTINGS['max_grad_norm'], use_ghost_clipping=True
    )
    expected = len(batch['inputs']) * micro_batches
    optimizer = DPOptimizerFastGradientClipping(
        SGD(wrapped.parameters(), lr=1e-4), expected_batch_size=expected, **SETTINGS
    )

    def step() -> None:
        for left in reversed(range(micro_batches)):
            optimizer.signal_skip_step(left > 0)
            DPTensorFastGradientClipping(wrapped, optimizer, _losses(wrapped, batch), 'sum').backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


PEERS = {'opacus, hooks': hooks, 'opacus, ghost clipping': ghost}
