"""A backbone of two convolutions, each followed by GroupNorm, which has no statistics that a private record could change."""

from mmpose.models.backbones.base_backbone import BaseBackbone
from mmpose.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class ExampleBackbone(BaseBackbone):
    """(samples, 3, height, width) to one feature map (samples, channels, height / 4, width / 4).

    Args:
        channels: of the features, a multiple of 4.
    """

    def __init__(self, channels: int, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        layers = []
        for before in (3, channels):
            layers += [nn.Conv2d(before, channels, 3, stride=2, padding=1), nn.GroupNorm(4, channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The feature map, in a tuple as MMPose's backbones give it."""
        return (self.layers(x),)
