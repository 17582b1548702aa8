"""Feature-masking heads. Must not hold logic."""

from .private_head import FeatureMaskingHead, private_twin

__all__ = ['FeatureMaskingHead', 'private_twin']
