"""Per-sample gradient rules: for each known layer, the gradient of every row from its input and output gradient.

A rule is a pure function of (module, input, output gradient), both given in float32 or more with the rows outermost. Must not
guess: a layer whose forward is not exactly the one written here has no rule and is left to the single-record loop.
Source of the outer-product form: Goodfellow 2015 (arXiv 1510.01799); for convolutions Rochette et al. 2019.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (module, input, output gradient) -> {parameter name: (rows, *parameter shape)}
Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]

# subclasses whose forward only adds a special case for empty inputs (mmcv's wrappers of torch layers)
_TRANSPARENT = ('mmcv.cnn.bricks.wrappers',)


def _linear(module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    a, b = a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), -1, b.shape[-1])
    return {'weight': torch.bmm(b.transpose(1, 2), a), 'bias': b.sum(1)}


def _patches(module: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """(rows, channels, H, W) -> (rows, channels * kernel area, positions)."""
    if module.kernel_size == (1, 1) and module.stride == (1, 1) and not any(module.padding):
        return x.flatten(2)
    return F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]


def _conv(module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    assert isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
    # a transposed convolution is the convolution read backwards: input and output gradient change places
    whole, windowed = (b, a) if isinstance(module, nn.Conv2d) else (a, b)
    rows, groups = len(a), module.groups
    patches = _patches(module, windowed)
    left = whole.reshape(rows * groups, -1, patches.shape[-1])
    right = patches.reshape(rows * groups, -1, patches.shape[-1])
    weight = torch.bmm(left, right.transpose(1, 2)).view(rows, *module.weight.shape)
    return {'weight': weight, 'bias': b.flatten(2).sum(2)}


def _channel_affine(normed: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {'weight': (normed * b).flatten(2).sum(2), 'bias': b.flatten(2).sum(2)}


def _batch_norm(module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    mean, var = module.running_mean, module.running_var
    assert mean is not None and var is not None
    return _channel_affine(F.batch_norm(a, mean.to(a.dtype), var.to(a.dtype), eps=module.eps), b)


def _group_norm(module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    assert isinstance(module, nn.GroupNorm)
    return _channel_affine(F.group_norm(a, module.num_groups, eps=module.eps), b)


def _instance_norm(module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return _channel_affine(F.instance_norm(a, eps=module.eps), b)


def _layer_norm(module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    assert isinstance(module, nn.LayerNorm)
    shape = module.normalized_shape
    scaled = F.layer_norm(a, shape, eps=module.eps) * b
    return {
        'weight': scaled.reshape(len(a), -1, *shape).sum(1),
        'bias': b.reshape(len(b), -1, *shape).sum(1),
    }


_RULES: tuple[tuple[type[nn.Module], Rule], ...] = (
    (nn.Linear, _linear),
    (nn.Conv2d, _conv),
    (nn.ConvTranspose2d, _conv),
    (nn.modules.batchnorm._BatchNorm, _batch_norm),
    (nn.modules.instancenorm._InstanceNorm, _instance_norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _layer_norm),
)


def _runs_forward_of(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether the module computes what ``base`` computes."""
    for cls in type(module).__mro__:
        own = {'forward', '_conv_forward'} & set(vars(cls))
        if own and cls.__module__ not in _TRANSPARENT:
            return issubclass(base, cls) or (issubclass(cls, base) and cls.__module__.startswith('torch.nn.modules'))
    return False


def rule_for(module: nn.Module) -> Rule | None:
    """The rule that serves ``module``, or None.

    None for a parametrized weight, padding by reflection or by name, batch statistics, and any forward not known here.
    """
    if hasattr(module, 'parametrizations'):
        return None
    for base, rule in _RULES:
        if isinstance(module, base) and _runs_forward_of(module, base):
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                plain = module.padding_mode == 'zeros' and not isinstance(module.padding, str)
                return rule if plain else None
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                return rule if module.track_running_stats and not module.training else None
            if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
                return None
            return rule
    return None


def weighted_gradient(module: nn.Module, rule: Rule, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """sum_rows of the rule's gradients, without holding one a row where the layer has a summed form.

    Args:
        b: output gradient with each row already multiplied by its weight.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        transposed = isinstance(module, nn.ConvTranspose2d)
        weight = torch.ops.aten.convolution_backward(
            b,
            a,
            module.weight.to(a.dtype),
            None,
            module.stride,
            module.padding,
            module.dilation,
            transposed,
            module.output_padding,
            module.groups,
            [False, True, False],
        )[1]
        return {'weight': weight, 'bias': b.sum((0, 2, 3))}
    if isinstance(module, nn.Linear):
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        return {'weight': b.T @ a, 'bias': b.sum(0)}
    return {name: grads.sum(0) for name, grads in rule(module, a, b).items()}
