"""Low-rank updates (LoRA, Hu et al. 2021; under differential privacy Yu et al. 2022) of linear layers and 1x1 convolutions.

The layers keep their names, and a state dict holds their weights with the update added: a checkpoint runs in plain MMPose,
which ignores the ``lora_`` keys beside them. Must not change the original weights.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


# a class between torch's and the factors', since MMPose initialises layers by the name of their class and its direct bases
class _Linear(nn.Linear):
    pass


class _Conv2d(nn.Conv2d):
    pass


class LowRankLinear(_Linear):
    """One factor of the update of a linear layer."""


class LowRankConv2d(_Conv2d):
    """One factor of the update of a 1x1 convolution."""


class LowRank:
    """Mixed into a layer's class: adds ``lora_up(lora_down(x))`` to the layer's output."""

    weight: nn.Parameter
    lora_down: nn.Module
    lora_up: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer with its update."""
        return super().forward(x) + self.lora_up(self.lora_down(x))  # type: ignore[misc]

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        self.put_whole(destination, prefix)

    def put_whole(self, destination: dict, prefix: str) -> None:
        """Puts the weight with its update in the place of the weight."""
        update = _product(self.lora_up.weight, self.lora_down.weight)  # type: ignore[arg-type]
        destination[f'{prefix}weight'] = self.weight.detach() + update.view_as(self.weight)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        up, down = (state_dict.get(f'{prefix}lora_{name}.weight') for name in ('up', 'down'))
        if up is not None and down is not None:
            weight = state_dict[f'{prefix}weight']
            state_dict[f'{prefix}weight'] = weight - _product(up, down).view_as(weight).to(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


@torch.no_grad()
def _product(up: Tensor, down: Tensor) -> Tensor:
    return up.flatten(1) @ down.flatten(1)


def add_low_rank(model: nn.Module, rank: int) -> int:
    """Gives every linear layer and 1x1 convolution an update of the given rank, which starts at zero.

    Returns the number of these layers. torch's own attention gets no update, since it reads its weights without a call.
    """
    inside = inside_attention(model)
    layers: list[Any] = [m for m in model.modules() if m not in inside and _takes_update(m)]
    for layer in layers:
        up, down = _factors(layer, min(rank, *layer.weight.shape[:2]))
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        layer.lora_down, layer.lora_up = down.to(layer.weight), up.to(layer.weight)
        layer.__class__ = type(f'LowRank{type(layer).__name__}', (LowRank, type(layer)), {})
    return len(layers)


def inside_attention(model: nn.Module) -> set[nn.Module]:
    """torch's own attentions and all that is in them: they read their layers' weights without a call of the layers."""
    return {child for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.modules()}


def _takes_update(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1 and module.padding == (0, 0)
    return isinstance(module, nn.Linear)


def _factors(layer: nn.Linear | nn.Conv2d, rank: int) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """The up and the down factor of a layer's update."""
    if isinstance(layer, nn.Conv2d):
        stride: Any = layer.stride
        down = LowRankConv2d(layer.in_channels, rank, 1, stride=stride, bias=False)
        return LowRankConv2d(rank, layer.out_channels, 1, bias=False), down
    return LowRankLinear(rank, layer.out_features, bias=False), LowRankLinear(layer.in_features, rank, bias=False)
