"""Batch normalisation that cannot mix records: statistics stay as loaded, scale and shift stay trainable.

Must not rename anything: a frozen layer keeps its name, parameters and buffers, so model-zoo checkpoints load into it and
what is trained loads in plain MMPose.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class FrozenStatistics:
    """Mixed into a BatchNorm class: ``train()`` leaves it in eval mode, for good."""

    def train(self, mode: bool = True) -> nn.Module:
        """Stays in eval mode whatever ``mode`` says."""
        return super().train(False)  # type: ignore[misc]


def has_batch_statistics(module: nn.Module) -> bool:
    """Whether a forward in train mode would use, or change, statistics over the batch."""
    return isinstance(module, _BatchNorm) or (
        isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
    )


def freeze_batch_norm(model: nn.Module) -> int:
    """Freezes the statistics of every BatchNorm (SyncBatchNorm included) in place; returns how many there are."""
    count = 0
    for module in model.modules():
        if has_batch_statistics(module):
            if not isinstance(module, FrozenStatistics):
                cls = type(module)
                module.__class__ = type(f'Frozen{cls.__name__}', (FrozenStatistics, cls), {})
            module.eval()
            count += 1
    return count
