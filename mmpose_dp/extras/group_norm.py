"""Replaces BatchNorm with GroupNorm, as an alternative to frozen statistics. Must not rename a layer."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def replace_batch_norm(model: nn.Module, max_groups: int = 32) -> int:
    """Replaces every BatchNorm with GroupNorm (Wu and He 2018), keeps its scale and shift, and returns how many there were.

    There are as many groups as ``max_groups`` and at least two channels per group allow. The changed model needs training, and
    the same call before its checkpoint is loaded.
    """
    count = 0
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, _BatchNorm):
                channels = module.num_features
                fitting = [g for g in range(1, min(max_groups, channels // 2) + 1) if channels % g == 0]
                norm = nn.GroupNorm(max(fitting, default=1), channels, module.eps, module.affine)
                if module.affine:
                    norm.weight, norm.bias = module.weight, module.bias
                setattr(parent, name, norm)
                count += 1
    return count
