"""A backbone whose network is in a Python file beside the project, such as MoveNet's. Must not hold a copy of a network."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmpose.registry import MODELS
from torch import Tensor


def quick_conv(self: Any, x: Tensor) -> Tensor:
    """What MoveNet's ``Conv`` computes, in a little over half the time on a CPU.

    ``clamp`` has a slow backward pass and ``pad`` copies: ReLU6 and the convolution's own padding take their place. Only where
    both sides need different padding (stride 2) does the copy stay. At exactly 0 and 6 the gradient here is 0, and there it is not.
    """
    total = [max((-(-n // self.s) - 1) * self.s + self.k - n, 0) for n in x.shape[:1:-1]]
    left, right = [n // 2 for n in total], [n - n // 2 for n in total]
    if left == right:
        self.conv.padding = tuple(left[::-1])
    else:
        self.conv.padding = (0, 0)
        x = F.pad(x, [n for pair in zip(left, right) for n in pair])
    x = self.conv(x)
    return F.relu6(x, inplace=True) if self.act == 'relu6' else F.relu(x, inplace=True) if self.act == 'relu' else x


@MODELS.register_module()
class FeaturesFromFile(BaseModule):
    """The ``features`` of a network: images (n, 3, H, W) -> a tuple of one feature map.

    Args:
        file: Python file with the network's class.
        network: name of that class.
        checkpoint: its state dict, loaded when the backbone is built.
        unused: its children that ``features`` does not use, which are removed.
        frozen: computes no gradients of it: only the head is trained.
    """

    def __init__(
        self, file: str, network: str, checkpoint: str, unused: Sequence[str] = (), frozen: bool = False
    ) -> None:
        super().__init__()
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        if spec is None or spec.loader is None:
            raise ImportError(f'{file} is no Python file')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if hasattr(module, 'Conv'):
            module.Conv.forward = quick_conv
        self.net = getattr(module, network)()
        self.net.load_state_dict(torch.load(checkpoint, map_location='cpu', weights_only=True))
        for name in unused:
            delattr(self.net, name)
        self.net.requires_grad_(not frozen)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The features, in a tuple as MMPose's heads take them."""
        # on a CPU, depthwise convolutions in this layout take two thirds of the time
        return (self.net.features(images.contiguous(memory_format=torch.channels_last)),)
