"""A loss that normalises over its batch, as many do."""

from mmpose.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class VisibleJointsLoss(nn.Module):
    """The squared error of a heatmap, averaged over the visible joints of the batch."""

    def forward(self, heatmaps: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
        """A number, from heatmaps (samples, joints, height, width), those wanted, and weights (samples, joints)."""
        errors = (heatmaps - wanted).square().mean((2, 3))
        return (errors * weights).sum() / weights.sum().clamp_min(1)
