"""What a model needs to be trained privately. Must not import the engine."""

from .checkpoints import fit_joints
from .heads import FeatureMaskingHead, private_twin
from .lora import add_low_rank
from .norms import freeze_batch_norm, has_batch_statistics, public_statistics, replace_batch_norm
from .trainable import choose_trainable

__all__ = [
    'FeatureMaskingHead',
    'add_low_rank',
    'choose_trainable',
    'fit_joints',
    'freeze_batch_norm',
    'has_batch_statistics',
    'private_twin',
    'public_statistics',
    'replace_batch_norm',
]
