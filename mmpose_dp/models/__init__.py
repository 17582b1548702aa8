"""What a model needs to be trained privately. Must not import the engine."""

from .heads import FeatureMaskingHead, private_twin
from .norms import freeze_batch_norm, has_batch_statistics

__all__ = ['FeatureMaskingHead', 'freeze_batch_norm', 'has_batch_statistics', 'private_twin']
