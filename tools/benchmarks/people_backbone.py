"""A backbone whose network is in a Python file beside the project, such as MoveNet's. Must not hold a copy of a network."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.model import BaseModule
from mmpose.registry import MODELS


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
        self.net = getattr(module, network)()
        self.net.load_state_dict(torch.load(checkpoint, map_location='cpu', weights_only=True))
        for name in unused:
            delattr(self.net, name)
        self.net.requires_grad_(not frozen)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The features, in a tuple as MMPose's heads take them."""
        # on a CPU, depthwise convolutions in this layout take two thirds of the time
        return (self.net.features(images.contiguous(memory_format=torch.channels_last)),)
