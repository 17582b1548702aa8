"""Feature-masking heads. Must not hold logic."""

from .private_head import KNOWN, FeatureMaskingHead, check_head, make_private, private_twin

__all__ = ['KNOWN', 'FeatureMaskingHead', 'check_head', 'make_private', 'private_twin']
