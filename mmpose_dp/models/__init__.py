"""What a model needs to be trained privately. Must not import the engine."""

from .heads import FeatureMaskingHead, PrivateHeatmapHead, PrivateRTMCCHead, PrivateSimCCHead
from .norms import freeze_batch_norm, has_batch_statistics

__all__ = [
    'FeatureMaskingHead',
    'PrivateHeatmapHead',
    'PrivateRTMCCHead',
    'PrivateSimCCHead',
    'freeze_batch_norm',
    'has_batch_statistics',
]
