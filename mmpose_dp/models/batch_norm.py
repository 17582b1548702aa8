"""Freezes the statistics of BatchNorm, which would mix the records of a batch.

Must not rename anything: a layer keeps its name and its scale and shift, so that model-zoo checkpoints load into it and plain
MMPose loads what is trained.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmpose_dp.privacy.errors import PrivacyError


class FrozenStatistics:
    """Mixed into a BatchNorm class: ``train()`` leaves it in eval mode, except in epochs on public samples only.

    Attributes:
        public_only: see ``public_statistics``.
    """

    public_only = False

    def train(self, mode: bool = True) -> nn.Module:
        """Stays in eval mode for any ``mode``, unless ``public_only``."""
        return super().train(mode and self.public_only)  # type: ignore[misc]


class _OfOneProcess(_BatchNorm):
    """SyncBatchNorm without its exchange: a process with fewer forwards of public samples would let the others wait for ever."""

    _check_input_dim = nn.SyncBatchNorm._check_input_dim


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether a forward in train mode would use or change statistics over the batch."""
    return isinstance(module, _BatchNorm) or (
        isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
    )


def refuse_batch_statistics(norms: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises PrivacyError for a norm layer, by name, that a training forward would let mix records."""
    for name, module in norms:
        if module.training or getattr(module, 'running_mean', None) is None:
            raise PrivacyError(
                f'{name} ({type(module).__name__}) uses batch statistics, which mix records: it is in train mode, where its '
                "running statistics leak as well, or keeps none. Write optim_wrapper.constructor='DPOptimWrapperConstructor', "
                "which freezes it, or call mmpose_dp.models.freeze_batch_norm(model); one without statistics needs norm='group'"
            )


def freeze_batch_norm(model: nn.Module) -> int:
    """Freezes the statistics of every BatchNorm (SyncBatchNorm included) in place and returns the number of these layers."""
    count = 0
    for module in model.modules():
        if has_batch_statistics(module):
            if not isinstance(module, FrozenStatistics):
                cls = type(module)
                kind = _OfOneProcess if isinstance(module, nn.SyncBatchNorm) else cls
                module.__class__ = type(f'Frozen{cls.__name__}', (FrozenStatistics, kind), {})
                module.register_forward_pre_hook(_plain_input)
                module.register_forward_hook(_plain_gradient)
            module.eval()
            count += 1
    return count


# If a dimension has size 1, strides do not tell channels-first from channels-last. If input and gradient then differ in layout,
# PyTorch's gradient of a frozen BatchNorm is wrong on CPUs (seen in 2.13). A batch of one sample behind a LayerNorm is such a case.
def _is_ambiguous(x: Tensor) -> bool:
    return 1 in x.shape and x.device.type == 'cpu'


def _plain_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.contiguous() if _is_ambiguous(x) else x for x in args)


def _plain_gradient(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    if output.requires_grad and _is_ambiguous(output):
        output.register_hook(Tensor.contiguous)


def public_statistics(model: nn.Module, public_only: bool) -> None:
    """Sets whether frozen layers learn statistics from the next ``model.train()`` on: for epochs on public samples only."""
    for module in model.modules():
        if isinstance(module, FrozenStatistics):
            module.public_only = public_only
