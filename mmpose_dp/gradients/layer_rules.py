"""Per-sample gradient rules: for each known layer, the gradient of every row from its input and output gradient.

A rule is a pure function of (module, input, output gradient), both given in float32 or more with the rows outermost. Must not
guess: a layer whose forward is not exactly the one written here has no rule and is left to the single-record loop.
Source of the outer-product form: Goodfellow 2015 (arXiv 1510.01799); for convolutions Rochette et al. 2019.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# (module, input, output gradient) -> {parameter name: (rows, *parameter shape)}
Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]

# multiplications that cost what one weight of a per-row gradient costs to write, read and keep
_TRAFFIC = 60
# float32 has 24 bits; sums of products are better than that by far, cancelled ones worse
_ROUNDING = 1e-6

# subclasses whose forward only adds a special case for empty inputs (mmcv's wrappers of torch layers)
_TRANSPARENT = ('mmcv.cnn.bricks.wrappers',)


def _factors(module: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """What the weight's gradient of a row is the product of, summed over positions.

    Returns (rows * groups, outputs, positions) and (rows * groups, inputs * kernel area, positions).
    """
    if isinstance(module, nn.Linear):
        a, b = a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), -1, b.shape[-1])
        return b.transpose(1, 2), a.transpose(1, 2)
    assert isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
    # a transposed convolution is the convolution read backwards: input and output gradient change places
    whole, windowed = (b, a) if isinstance(module, nn.Conv2d) else (a, b)
    patches = _patches(module, windowed)
    if patches.shape[-1] != whole[0, 0].numel():  # output padding of a stride or more: windows behind the last input
        sizes = [_windows(module, windowed.shape[2 + i], i) for i in (0, 1)]
        patches = patches.unflatten(-1, sizes)[..., : whole.shape[2], : whole.shape[3]].flatten(2)
    blocks = len(a) * module.groups
    return whole.reshape(blocks, -1, patches.shape[-1]), patches.reshape(blocks, -1, patches.shape[-1])


def _patches(module: nn.Conv2d | nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """(rows, channels, H, W) -> (rows, channels * kernel area, positions)."""
    if module.kernel_size == (1, 1) and not any(module.padding):
        return x[..., :: module.stride[0], :: module.stride[1]].flatten(2)
    return F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]


def _windows(module: nn.Conv2d | nn.ConvTranspose2d, size: int, i: int) -> int:
    """How many windows there are along spatial dimension ``i``."""
    padding, kernel = int(module.padding[i]), module.dilation[i] * (module.kernel_size[i] - 1) + 1
    return (size + 2 * padding - kernel) // module.stride[i] + 1


def _outer(module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    assert isinstance(module.weight, Tensor)
    left, right = _factors(module, a, b)
    weight = torch.bmm(left, right.transpose(1, 2)).view(len(a), *module.weight.shape)
    return {'weight': weight, **_bias(module, b)}


def _bias(module: nn.Module, b: Tensor) -> dict[str, Tensor]:
    if module.bias is None:
        return {}
    return {'bias': b.reshape(len(b), -1, b.shape[-1]).sum(1) if isinstance(module, nn.Linear) else b.flatten(2).sum(2)}


def _channel_affine(normed: Tensor, b: Tensor) -> dict[str, Tensor]:
    normed, b = (x.reshape(*x.shape[:2], -1) if x.numel() else x.new_zeros(*x.shape[:2], 0) for x in (normed, b))
    return {'weight': torch.linalg.vecdot(normed, b), 'bias': b.sum(2)}


def batch_norm_backward(
    module: nn.Module, weight: Tensor, a: Tensor, b: Tensor, input_too: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of a BatchNorm with fixed statistics: the input's gradient if wanted, and weight's and bias's, (entries, channels).

    The statistics are constants, so a channel of a row is as good as a channel: one pass for all rows.
    """
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert module.running_mean is not None and module.running_var is not None
    fixed = [x.to(a.dtype).repeat(len(a)) for x in (weight, module.running_mean, module.running_var)]
    every = [x.flatten(0, 1)[None].contiguous() for x in (b, a)]  # other strides are misread (torch 2.13)
    found, *own = torch.ops.aten.native_batch_norm_backward(
        *every, *fixed, None, None, False, module.eps, [input_too, True, True]
    )
    return (found.view_as(a) if input_too else None, own[0].view(len(a), -1), own[1].view(len(a), -1))


def _batch_norm(module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    assert isinstance(module.weight, Tensor)
    _, weight, bias = batch_norm_backward(module, module.weight, a, b, input_too=False)
    return {'weight': weight, 'bias': bias}


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
    (nn.Linear, _outer),
    (nn.Conv2d, _outer),
    (nn.ConvTranspose2d, _outer),
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

    None for a weight made from other parameters, padding by reflection or by name, batch statistics, and any forward not
    known here.
    """
    if not isinstance(module._parameters.get('weight'), nn.Parameter):
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


def _transposed_size(module: nn.Module, size: int, i: int) -> int:
    """What a transposed convolution makes of ``size``, without output padding."""
    assert isinstance(module, nn.ConvTranspose2d)
    kernel = module.dilation[i] * (module.kernel_size[i] - 1) + 1
    return (size - 1) * module.stride[i] - 2 * int(module.padding[i]) + kernel


def _convolution_backward(module: nn.Conv2d | nn.ConvTranspose2d, a: Tensor, b: Tensor, groups: int) -> Tensor:
    """The weight's gradient, summed over the rows; with ``groups`` times the layer's groups, one a group."""
    shape = (groups * module.weight.shape[0], *module.weight.shape[1:])
    transposed = isinstance(module, nn.ConvTranspose2d)
    # not the module's own: a call may ask for an output_size
    extra = [b.shape[2 + i] - _transposed_size(module, a.shape[2 + i], i) for i in (0, 1)] if transposed else [0, 0]
    return torch.ops.aten.convolution_backward(
        b,
        a,
        a.new_empty(shape),  # the weight itself does not matter here
        None,
        module.stride,
        module.padding,
        module.dilation,
        transposed,
        extra,
        groups * module.groups,
        [False, True, False],
    )[1]


def groups_are_faster(module: nn.Module, b: Tensor) -> bool:
    """Whether ``rows_as_groups`` beats the layer's rule: for wide windows over large maps, on a CPU.

    The rule writes every window out; that is worth it where a weight has more outputs than there are windows.
    """
    if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) or b.device.type != 'cpu':
        return False
    outputs = module.weight.shape[0] // (module.groups if isinstance(module, nn.Conv2d) else 1)
    return module.weight[0, 0].numel() > 1 and b[0, 0].numel() > outputs


def rows_as_groups(module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """A convolution's per-row gradients by one whose groups are rows (Rochette et al. 2019), one row a thread."""
    assert isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
    weights, step = [], torch.get_num_threads()
    for start in range(0, len(a), step):
        x, grad = (t[start : start + step] for t in (a, b))
        found = _convolution_backward(module, x.flatten(0, 1)[None], grad.flatten(0, 1)[None], len(x))
        weights.append(found.view(len(x), *module.weight.shape))
    return {'weight': torch.cat(weights), **_bias(module, b)}


def summed_gradient(module: nn.Module, rule: Rule, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """sum_rows of the rule's gradients, without holding one a row where the layer has a summed form."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        weight = _convolution_backward(module, a, b, 1)
        return {'weight': weight, **{name: grads.sum(0) for name, grads in _bias(module, b).items()}}
    if isinstance(module, nn.Linear):
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        return {'weight': b.T @ a, 'bias': b.sum(0)}
    return {name: grads.sum(0) for name, grads in rule(module, a, b).items()}


def ghost_is_cheaper(module: nn.Module, a: Tensor, b: Tensor) -> bool:
    """Whether a row's norm costs less without its gradient: few positions and many weights (Bu et al. 2023, section 3).

    The rule there, 2 T^2 < weights, counts memory; this counts time. A weight written and read costs as much as some
    ``_TRAFFIC`` multiplications (measured on CPUs; about the same on a GPU, where both are faster).
    """
    if not isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        return False
    groups = getattr(module, 'groups', 1)
    if isinstance(module, nn.Linear):
        positions = a[0].numel() // a.shape[-1]
    else:
        positions = (b if isinstance(module, nn.Conv2d) else a)[0, 0].numel()
    weights = module.weight.numel()
    width = module.weight.shape[0] // groups + weights // module.weight.shape[0]  # of the two factors, about
    return positions**2 * groups * width < _TRAFFIC * weights


def ghost_squares(module: nn.Module, a: Tensor, b: Tensor, names: Sequence[str]) -> Tensor:
    """Squared norm of each row's gradient for the parameters ``names`` of one call, (rows,), without the gradient.

    ||L R^T||^2 = sum of (L^T L) * (R^T R) (Goodfellow 2015; Li et al. 2022, ghost clipping). Where the terms cancel,
    rounding could make that too small and the record too heavy. So it is rounded up, by _ROUNDING of tr(L^T L) tr(R^T R),
    which no term exceeds: a norm may be too large by that little, never too small.
    """
    total = a.new_zeros(len(a))
    if 'weight' in names:
        factors = _factors(module, a, b)
        # or else the square of a very small factor would be 0, also beside a very large one
        size_left, size_right = (x.abs().amax((1, 2)).clamp_min(torch.finfo(x.dtype).tiny) for x in factors)
        left, right = factors[0] / size_left[:, None, None], factors[1] / size_right[:, None, None]
        left, right = torch.bmm(left.transpose(1, 2), left), torch.bmm(right.transpose(1, 2), right)
        most = left.diagonal(dim1=1, dim2=2).sum(1) * right.diagonal(dim1=1, dim2=2).sum(1)
        squares = torch.linalg.vecdot(left.flatten(1), right.flatten(1)).clamp_min(0) + _ROUNDING * most
        squares = squares * (size_left * size_right).square()
        total += squares.view(len(a), -1).sum(1)
    if 'bias' in names:
        total += _bias(module, b)['bias'].square().sum(1)
    return total
