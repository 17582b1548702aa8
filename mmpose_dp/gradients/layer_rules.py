"""Per-sample gradient rules: for each known layer, the gradient of every sample from the layer's input and output gradient.

Must not guess: a layer whose forward is not exactly the one that a rule was written for has no rule. To serve a layer of your
own, see ``register_rule``. Sources: Goodfellow 2015 (arXiv 1510.01799); for convolutions Rochette et al. 2019.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from mmpose_dp.privacy.errors import ConfigError
from mmpose_dp.tensors import allowing_tf32, windows

# (module, input, output gradient), samples outermost, float32 or more -> {parameter name: (samples, *parameter shape)}
Rule = Callable[[Any, Tensor, Tensor], dict[str, Tensor]]
Convolution = nn.Conv2d | nn.ConvTranspose2d

_TRAFFIC = 60  # multiplications that cost as much as one weight of a per-sample gradient to write, read and keep
_BLOCK, _ROUNDING = 256, 1e-6  # of ghost norms: products summed at once in float32; room for the gradient's own
_TRANSPARENT = ('mmcv.cnn.bricks.wrappers',)  # forwards that only add a special case for empty inputs


class Layer(NamedTuple):
    """A layer with a rule: its name, the names of the trainable parameters that the rule serves, and their indices."""

    name: str
    rule: Rule
    param_names: list[str]
    indices: list[int]

    def own(self, grads: Mapping[str, Tensor]) -> list[Tensor]:
        """The trainable parameters' gradients. Raises ConfigError if the rule left one out."""
        if missing := [name for name in self.param_names if name not in grads]:
            raise ConfigError(f'the rule of {self.name} returns no gradient for its parameters {missing}: add them')
        return [grads[name] for name in self.param_names]


def outer_product(module: nn.Linear | Convolution, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The rule of linear layers and convolutions: of these, also by one whose groups are samples, one sample per thread."""
    step = torch.get_num_threads()
    if isinstance(module, Convolution) and groups_are_faster(module, b):
        parts = [(x.flatten(0, 1)[None], y.flatten(0, 1)[None]) for x, y in zip(a.split(step), b.split(step))]
        weight = torch.cat([_convolution_backward(module, x, y, x.shape[1] // a.shape[1]) for x, y in parts])
    else:
        left, right = _factors(module, a, b)
        cudnn, matmul = (flag.allow_tf32 for flag in (torch.backends.cudnn, torch.backends.cuda.matmul))
        # as precise as the layer's forward
        with allowing_tf32(left, cudnn if isinstance(module, Convolution) else matmul, cudnn):
            weight = torch.bmm(left, right.transpose(1, 2))
    return {'weight': weight.view(len(a), *module.weight.shape), **_bias(module, b)}


def batch_norm(module: _BatchNorm, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The rule of a BatchNorm with fixed statistics."""
    return dict(zip(('weight', 'bias'), batch_norm_backward(module, module.weight, a, b, input_too=False)[1:]))


def _layer_norm(module: nn.LayerNorm, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    shape = module.normalized_shape
    scaled = F.layer_norm(a, shape, eps=module.eps) * b
    return {name: x.reshape(len(a), -1, *shape).sum(1) for name, x in (('weight', scaled), ('bias', b))}


def _channel_affine(normed: Tensor, b: Tensor) -> dict[str, Tensor]:
    normed, b = (x.reshape(*x.shape[:2], -1) if x.numel() else x.new_zeros(*x.shape[:2], 0) for x in (normed, b))
    return {'weight': torch.linalg.vecdot(normed, b), 'bias': b.sum(2)}


def batch_norm_backward(module: _BatchNorm, weight: Tensor, a: Tensor, b: Tensor, input_too: bool) -> tuple[Any, ...]:
    """The input's gradient if wanted, and each entry's of weight and bias, (entries, channels), with fixed statistics."""
    assert module.running_mean is not None and module.running_var is not None
    # the statistics are constants, so each channel of each entry is taken as a channel: one pass for all samples
    fixed = torch.stack((weight.detach(), module.running_mean, module.running_var)).to(a.dtype).repeat(1, len(a))
    every = [x.flatten(0, 1)[None].contiguous() for x in (b, a)]  # other strides are misread (torch 2.13)
    none = a.new_empty(0), a.new_empty(0)  # no statistics of the batch; CUDA asserts that there are tensors
    found, *own = torch.ops.aten.native_batch_norm_backward(
        *every, *fixed, *none, False, module.eps, [input_too, True, True]
    )
    return found.view_as(a) if input_too else None, *(x.view(len(a), -1) for x in own)


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: outer_product,
    nn.Conv2d: outer_product,
    nn.ConvTranspose2d: outer_product,
    _BatchNorm: batch_norm,
    _InstanceNorm: lambda module, a, b: _channel_affine(F.instance_norm(a, eps=module.eps), b),
    nn.GroupNorm: lambda module, a, b: _channel_affine(F.group_norm(a, module.num_groups, eps=module.eps), b),
    nn.LayerNorm: _layer_norm,
}
_BUILT_IN = tuple(_RULES)


def register_rule(module_type: type[nn.Module], rule: Rule) -> None:
    """Adds the rule of a layer of your own, for all engines that are built afterwards.

    Args:
        module_type: the class, whose forward takes one tensor and returns one, both with the samples in the first dimension.
            A subclass with its own forward is not served.
        rule: a pure function of the module, the input and the output's gradient, both (samples, ...) and float32 or more. It
            returns each parameter's gradient, (samples, *parameter shape), by name. The first batch shows whether the sum is
            autograd's; that each sample's gradient comes from that sample alone is for the rule to see to.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.ones(channels))
        ...     def forward(self, x):  # (samples, channels, height, width)
        ...         return x * self.gain[:, None, None]
        >>> register_rule(Scale, lambda module, x, grad: {'gain': (x * grad).sum((2, 3))})
    """
    _RULES[module_type] = rule


def rule_for(module: nn.Module) -> Rule | None:
    """The rule that serves ``module``; None if its forward, or a setting of it, is not known here."""
    for base, rule in reversed(_RULES.items()):
        if isinstance(module, base) and runs_forward_of(module, base):
            return rule if base not in _BUILT_IN or _is_plain(module) else None
    return None


def find_layers(model: nn.Module, place: Mapping[int, int]) -> dict[nn.Module, Layer]:
    """The layers with a rule for parameters that are theirs alone; ``place``: by id, where in the list these are."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    # an attention reads its children's weights without calling the children
    inside = {child for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
    layers = {}
    for name, module in model.named_modules():
        own = {n: id(p) for n, p in module.named_parameters(recurse=False)}
        own = {n: place[key] for n, key in own.items() if key in place and owners[key] == 1}
        if own and module not in inside and (rule := rule_for(module)):
            layers[module] = Layer(name, rule, list(own), list(own.values()))
    return layers


def runs_forward_of(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether the module computes what ``base`` computes."""
    for cls in type(module).__mro__:
        own = {'forward', '_conv_forward'} & set(vars(cls))
        if own and cls.__module__ not in _TRANSPARENT:
            return issubclass(base, cls) or (issubclass(cls, base) and cls.__module__.startswith('torch.nn.modules'))
    return False


def _is_plain(module: nn.Module) -> bool:
    """Whether the settings of one of torch's layers are those that its rule was written for."""
    if not isinstance(module._parameters.get('weight'), nn.Parameter):
        return False
    if isinstance(module, _BatchNorm):
        return module.track_running_stats and not module.training
    if isinstance(module, _InstanceNorm):
        return not module.track_running_stats
    if isinstance(module, nn.ConvTranspose2d) and any(x >= s for x, s in zip(module.output_padding, module.stride)):
        return False  # read backwards, it has windows behind the last input
    return getattr(module, 'padding_mode', 'zeros') == 'zeros' and not isinstance(getattr(module, 'padding', 0), str)


def _factors(module: nn.Linear | Convolution, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the weights' gradients: (samples * groups, outputs or inputs * kernel area, positions), outputs first."""
    if isinstance(module, nn.Linear):
        a, b = a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), -1, b.shape[-1])
        return b.transpose(1, 2), a.transpose(1, 2)
    # a transposed convolution is the convolution read backwards: input and output gradient change places
    whole, x = (b, a) if isinstance(module, nn.Conv2d) else (a, b)
    if module.kernel_size == (1, 1) and not any(module.padding):
        patches = x[..., :: module.stride[0], :: module.stride[1]].flatten(2)
    else:
        patches = windows(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    blocks = len(a) * module.groups
    return whole.reshape(blocks, -1, patches.shape[-1]), patches.reshape(blocks, -1, patches.shape[-1])


def _bias(module: nn.Linear | Convolution, b: Tensor) -> dict[str, Tensor]:
    if module.bias is None:
        return {}
    return {'bias': b.reshape(len(b), -1, b.shape[-1]).sum(1) if isinstance(module, nn.Linear) else b.flatten(2).sum(2)}


def _convolution_backward(module: Convolution, a: Tensor, b: Tensor, groups: int) -> Tensor:
    """The weight's gradient, summed over the samples; with ``groups`` times the layer's groups, one per group."""
    whole, windowed = (b, a) if isinstance(module, nn.Conv2d) else (a, b)
    weight = a.new_empty((groups * module.weight.shape[0], *module.weight.shape[1:]))  # its values do not matter here
    window = module.stride, module.padding, module.dilation, False, [0, 0], groups * module.groups
    return torch.ops.aten.convolution_backward(whole, windowed, weight, None, *window, [False, True, False])[1]


def groups_are_faster(module: Convolution, b: Tensor) -> bool:
    """Whether samples as groups beat writing all windows out: on a CPU, if a weight has fewer outputs than there are windows."""
    outputs = module.weight.shape[0] // (module.groups if isinstance(module, nn.Conv2d) else 1)
    return b.device.type == 'cpu' and module.weight[0, 0].numel() > 1 and b[0, 0].numel() > outputs


def summed_gradient(module: nn.Module, rule: Rule, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The rule's gradients summed over the samples, without holding one per sample where the layer has a summed form."""
    if rule is not outer_product:
        return {name: grads.sum(0) for name, grads in rule(module, a, b).items()}
    if isinstance(module, nn.Linear):
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        return {'weight': b.T @ a, 'bias': b.sum(0)}
    bias = {name: x.sum(0) for name, x in _bias(module, b).items()}  # type: ignore[arg-type]
    return {'weight': _convolution_backward(module, a, b, 1), **bias}  # type: ignore[arg-type]


def ghost_is_cheaper(module: nn.Linear | Convolution, a: Tensor, b: Tensor) -> bool:
    """Whether a sample's norm takes less time without its gradient: few positions, many weights (Bu et al. 2023, section 3)."""
    groups = getattr(module, 'groups', 1)
    whole = a if isinstance(module, nn.ConvTranspose2d) else b
    positions = whole[0].numel() // whole.shape[-1 if isinstance(module, nn.Linear) else 1]
    weights = module.weight.numel()
    width = module.weight.shape[0] // groups + weights // module.weight.shape[0]  # of the two factors, about
    return positions**2 * groups * width < _TRAFFIC * weights


def ghost_squares(module: nn.Linear | Convolution, a: Tensor, b: Tensor, names: Sequence[str]) -> Tensor:
    """Squared norm of each sample's gradient for the parameters ``names`` of one call, (samples,) float64, without the gradient.

    ||L R^T||^2 = sum of (L^T L) * (R^T R) (Goodfellow 2015; Li et al. 2022). If the terms cancel, rounding could make that
    too small, and the record too heavy. So a part of tr(L^T L) tr(R^T R), which the sizes of all terms do not exceed, is added:
    n 2^-24 for each sum of n products in float32 (Higham 2002, section 3.1), and _ROUNDING for the gradient itself.
    """
    total = a.new_zeros(len(a), dtype=torch.float64)
    if 'weight' in names:
        lost, sizes, products = _ROUNDING, [], []
        for x in _factors(module, a, b):
            # or else the square of a very small factor would be 0, also beside a very large one
            sizes.append(x.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny))
            count = -(-x.shape[1] // _BLOCK)
            x = F.pad(x / sizes[-1], (0, 0, 0, -x.shape[1] % count)) if x.shape[1] % count else x / sizes[-1]
            blocks = x.reshape(len(x) * count, -1, x.shape[2])
            products.append(torch.bmm(blocks.mT, blocks).view(len(x), count, -1).sum(1, dtype=torch.float64))
            lost += blocks.shape[1] * 2.0**-24
        left, right = (found[:, :: x.shape[2] + 1].sum(1) for found in products)  # the traces
        squares = torch.addcmul(torch.linalg.vecdot(*products).clamp_min(0), left, right, value=lost)
        total += (squares * (sizes[0] * sizes[1]).flatten().double().square()).view(len(a), -1).sum(1)
    if 'bias' in names:
        each, bias = b.flatten(1), _bias(module, b)['bias']
        most = _ROUNDING * (each.shape[1] // bias.shape[1])
        total += torch.add(torch.linalg.vecdot(bias, bias), torch.linalg.vecdot(each, each), alpha=most)
    return total
