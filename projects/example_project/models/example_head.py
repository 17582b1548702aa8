"""A head of one convolution. It knows nothing of privacy."""

import torch
from mmengine.structures import InstanceData
from mmpose.models.heads.base_head import BaseHead
from mmpose.registry import KEYPOINT_CODECS, MODELS
from torch import Tensor, nn


@MODELS.register_module()
class ExampleHead(BaseHead):
    """Features to one heatmap per joint.

    Args:
        in_channels: of the last feature map.
        out_channels: the number of joints.
        loss: the config of the loss.
        decoder: the config of the codec that turns heatmaps into joints.
    """

    def __init__(
        self, in_channels: int, out_channels: int, loss: dict, decoder: dict, init_cfg: dict | None = None
    ) -> None:
        super().__init__(init_cfg)
        self.layer = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.loss_module = MODELS.build(loss)
        self.decoder = KEYPOINT_CODECS.build(decoder)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """(samples, joints, height, width) heatmaps."""
        return self.layer(feats[-1])

    def loss(self, feats: tuple[Tensor, ...], batch_data_samples: list, train_cfg: dict | None = None) -> dict:
        """The loss of a batch. It calls ``self.forward``, so private training can take it person by person."""
        heatmaps = self.forward(feats)
        wanted = torch.stack([sample.gt_fields.heatmaps for sample in batch_data_samples])
        weights = torch.cat([sample.gt_instance_labels.keypoint_weights for sample in batch_data_samples])
        return dict(loss_kpt=self.loss_module(heatmaps, wanted, weights))

    def predict(
        self, feats: tuple[Tensor, ...], batch_data_samples: list, test_cfg: dict | None = None
    ) -> list[InstanceData]:
        """The joints of each sample."""
        return self.decode(self.forward(feats))
