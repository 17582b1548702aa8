"""Feature-masking heads. Must not hold logic."""

from .private_head import FeatureMaskingHead, PrivateHeatmapHead, PrivateRTMCCHead, PrivateSimCCHead

__all__ = ['FeatureMaskingHead', 'PrivateHeatmapHead', 'PrivateRTMCCHead', 'PrivateSimCCHead']
