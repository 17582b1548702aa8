"""Mixing weights of experts: for each layer, a few privately trained numbers say how much of each public model is in it.

The experts are models of one architecture, each trained on public data in another way: on other pictures, or on turned ones.
Must not train the experts. They must not have seen private records, which nothing here can check.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmpose_dp.gradients import register_rule, rule_for, runs_forward_of
from mmpose_dp.privacy.errors import ConfigError

from .lora import inside_attention

_MIXED = ('weight', 'bias', 'running_mean', 'running_var')
_OWN, WEIGHTS = 'expert_own_', 'expert_weights'


class Mixed:
    """Mixed into a layer's class: it computes with W + sum_k a_k (E_k - W), for its own tensors W and those of each expert E_k.

    A state dict holds the mixture under the layer's own names, so that a checkpoint runs in plain MMPose. W and the a_k are beside
    it.

    Attributes:
        expert_weights: the a_k, shape (experts,), or (experts, channels) if each output channel has its own. They begin at
            1 / (experts + 1), the mean of all with the layer's own W, or at 0, which is W alone.
        experts: the tensors of each expert by name, {} for one that has none of the layer's shapes.
    """

    expert_weights: nn.Parameter
    experts: list[dict[str, Tensor]]

    def differences(self, expert: int) -> dict[str, Tensor]:
        """E_k - W of one expert, by name; empty for an expert without this layer."""
        return {name: value - getattr(self, name) for name, value in self.experts[expert].items()}

    def mixed(self, weights: Tensor) -> dict[str, Tensor]:
        """The layer's tensors for mixing weights of the shape of ``expert_weights``, by name."""
        found = {name: getattr(self, name) for name in _MIXED if getattr(self, name, None) is not None}
        for expert, weight in enumerate(weights):
            for name, difference in self.differences(expert).items():
                found[name] = found[name] + _over_channels(self, weight, difference) * difference
        return found

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer with its mixed tensors."""
        return _run(self, x, self.mixed(self.expert_weights))

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Moves or casts the experts too."""
        self.experts = [{name: fn(value) for name, value in expert.items()} for expert in self.experts]
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def train(self, mode: bool = True) -> nn.Module:
        """As the layer's; the statistics of a BatchNorm are mixed, and never learned."""
        return super().train(mode and not isinstance(self, _BatchNorm))  # type: ignore[misc]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        self.put_whole(destination, prefix)

    @torch.no_grad()
    def whole(self) -> dict[str, Tensor]:
        """The mixture as plain MMPose computes with it, where the root of a variance below 0 would be NaN, by name."""
        found = self.mixed(self.expert_weights)
        if 'running_var' in found:
            found['running_var'] = found['running_var'].clamp_min(0)
        return found

    def put_whole(self, destination: dict, prefix: str) -> None:
        """Puts the mixture in the place of the layer's own tensors, and these beside it."""
        for name, value in self.whole().items():
            destination[f'{prefix}{_OWN}{name}'], destination[prefix + name] = destination[prefix + name], value

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + WEIGHTS, self.expert_weights.detach())  # a start has none
        mixtures = {name: state_dict.get(prefix + name) for name in _MIXED if f'{prefix}{_OWN}{name}' in state_dict}
        for name in mixtures:
            state_dict[prefix + name] = state_dict.pop(f'{prefix}{_OWN}{name}')
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        again = self.whole()
        for name, saved in mixtures.items():
            if saved is not None and not torch.allclose(saved.to(again[name]), again[name], rtol=1e-3, atol=1e-4):
                raise ConfigError(
                    f'optim_wrapper.experts are not those of the checkpoint: {prefix}{name} would be another mixture. Write the '
                    'same files in the same order. To start from the mixture itself, with other experts, set load_from to what '
                    'tools/publish_model.py writes of the checkpoint'
                )


def _over_channels(module: Any, weight: Tensor, tensor: Tensor) -> Tensor:
    """An expert's weight, () or (channels,), in a shape that multiplies one of the layer's tensors."""
    if not weight.dim():
        return weight
    if isinstance(module, nn.ConvTranspose2d) and tensor.dim() > 1:  # (inputs, outputs / groups, height, width)
        per_group = weight.view(module.groups, 1, -1).expand(-1, len(tensor) // module.groups, -1)
        return per_group.reshape(*tensor.shape[:2], 1, 1)
    return weight.view(-1, *[1] * (tensor.dim() - 1))


def _by_channel(module: Any, x: Tensor) -> Tensor:
    """The sum of x, which has the shape of a layer's output, over all but samples and channels: (samples, channels)."""
    linear, norm = isinstance(module, nn.Linear), isinstance(module, nn.LayerNorm)
    x = x.movedim(-1 if linear else -len(module.normalized_shape) if norm else 1, 1)
    return x.reshape(*x.shape[:2], -1).sum(2)


def _run(module: Any, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The output of a layer with other tensors in place of its own. But for BatchNorm's, it is linear in them."""
    weight, bias = (tensors.get(name) for name in ('weight', 'bias'))
    if isinstance(module, nn.Conv2d):
        return module._conv_forward(x, weight, bias)  # type: ignore[arg-type]
    if isinstance(module, nn.ConvTranspose2d):
        settings = module.stride, module.padding, module.output_padding, module.groups, module.dilation
        return F.conv_transpose2d(x, weight, bias, *settings)  # type: ignore[arg-type]
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)  # type: ignore[arg-type]
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    scale, shift = (value.view(-1, *[1] * (x.dim() - 2)) for value in _affine(module, tensors))
    return (x * scale + shift).to(x.dtype)  # mixed precision stays as it is


def _affine(module: _BatchNorm, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and shift of a BatchNorm with fixed statistics, (channels,) each. A mixed variance may be below 0: it counts as 0."""
    scale = tensors['weight'] * (tensors['running_var'].clamp_min(0) + module.eps).rsqrt()
    return scale, tensors['bias'] - tensors['running_mean'] * scale


def _affine_along(
    module: _BatchNorm, tensors: Mapping[str, Tensor], along: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The derivatives of :func:`_affine`'s scale and shift along a change of its tensors, (channels,) each."""
    variance = tensors['running_var']
    inverse = (variance.clamp_min(0) + module.eps).rsqrt()
    of_inverse = torch.where(variance < 0, 0.0, -0.5 * inverse**3 * along['running_var'])
    scale, of_scale = tensors['weight'] * inverse, along['weight'] * inverse + tensors['weight'] * of_inverse
    return of_scale, along['bias'] - along['running_mean'] * scale - tensors['running_mean'] * of_scale


def _rule(module: Any, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The mixing weights' gradients: <b, d output / d a_k> for each sample, (samples, experts) or (samples, experts, channels)."""
    along = _along_norm(module, a, b) if isinstance(module, _BatchNorm) else partial(_along, module, a, b)
    by_channel, found = module.expert_weights.dim() > 1, []
    for expert in range(len(module.experts)):
        difference = module.differences(expert)
        channels = along(difference) if difference else a.new_zeros(len(a), _channels(module))
        found.append(channels if by_channel else channels.sum(1))
    return {WEIGHTS: torch.stack(found, 1)}


def _along(module: Any, a: Tensor, b: Tensor, difference: Mapping[str, Tensor]) -> Tensor:
    """The gradient along an expert's difference, (samples, channels), of a layer that is linear in its tensors."""
    return _by_channel(module, _run(module, a, {name: value.to(a.dtype) for name, value in difference.items()}) * b)


def _along_norm(module: Any, a: Tensor, b: Tensor) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The same of a BatchNorm, for any difference: what all have in common is computed once."""
    tensors = module.mixed(module.expert_weights.detach())
    over_image, alone = _by_channel(module, a * b), _by_channel(module, b)

    def along(difference: Mapping[str, Tensor]) -> Tensor:
        scale, shift = _affine_along(module, tensors, difference)
        return over_image * scale.to(a.dtype) + alone * shift.to(a.dtype)

    return along


register_rule(Mixed, _rule)  # type: ignore[arg-type]


def digest_of(expert: Mapping[str, Tensor]) -> str:
    """SHA-256 of an expert's names, shapes and numbers: a resume must have the same ones, and a statement must name them."""
    digest = hashlib.sha256()
    for name, value in sorted(expert.items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def add_experts(
    model: nn.Module, experts: Sequence[Mapping[str, Tensor]], by_channel: bool = False, from_mean: bool = True
) -> None:
    """Gives every layer with a built-in rule mixing weights of these experts' state dicts.

    A layer whose tensors have other shapes in all experts (an output layer for other joints) stays as it is. So does one with a
    forward of its own, which mixing would replace, and one that shares a tensor, which can hold one mixture alone.

    Args:
        model: changed in place.
        experts: state dicts of models of the same architecture.
        by_channel: every output channel gets mixing weights of its own, and not only every layer.
        from_mean: the mixture begins at the mean of the model and the experts, and not at the model alone.
    """
    inside = inside_attention(model)
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    layers: list[tuple[str, Any]] = [
        (name, m)
        for name, m in model.named_modules()
        if m not in inside and _takes_experts(m) and all(owners[id(p)] == 1 for p in m.parameters(recurse=False))
    ]
    for name, layer in layers:
        found = [_tensors_of(layer, f'{name}.', expert) for expert in experts]
        if any(found):
            shape = (len(experts), *([_channels(layer)] if by_channel else []))
            start = layer.weight.new_full(shape, 1 / (len(experts) + 1) if from_mean else 0.0)
            layer.experts = found
            layer.expert_weights = nn.Parameter(start)
            layer.__class__ = type(f'Mixed{type(layer).__name__}', (Mixed, type(layer)), {})


def mixed_in(model: nn.Module, expert: int) -> dict[str, torch.Size]:
    """The shapes of what the model mixes in of one expert, by name."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, Mixed)]
    return {f'{name}.{key}': x.shape for name, m in layers for key, x in m.experts[expert].items()}


def _channels(layer: Any) -> int:
    """The number of output channels of a layer; of a LayerNorm over several axes, the length of the first."""
    return layer.out_channels if isinstance(layer, nn.ConvTranspose2d) else len(layer.weight)


def _takes_experts(module: nn.Module) -> bool:
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, _BatchNorm)
    if hasattr(module, WEIGHTS) or not isinstance(getattr(module, 'weight', None), nn.Parameter):
        return False
    known = any(isinstance(module, kind) and runs_forward_of(module, kind) for kind in kinds)
    return known and rule_for(module) is not None


def _tensors_of(layer: nn.Module, prefix: str, expert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An expert's tensors of a layer; none if one of them is missing or of another shape."""
    own = {name: value for name in _MIXED if isinstance(value := getattr(layer, name, None), Tensor)}
    found = {name: expert[prefix + name] for name in own if prefix + name in expert}
    fits = len(found) == len(own) and all(found[name].shape == value.shape for name, value in own.items())
    return {name: value.detach().to(own[name], copy=True) for name, value in found.items()} if fits else {}
