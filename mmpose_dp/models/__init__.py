"""Changes that a model needs before private training. Must not import the engine."""

from mmpose_dp.extras.group_norm import replace_batch_norm
from mmpose_dp.extras.lora import add_low_rank

from .batch_norm import freeze_batch_norm, has_batch_statistics, public_statistics, refuse_batch_statistics
from .heads import FeatureMaskingHead, check_head, make_private, private_twin
from .joint_remap import (
    LoadWatch,
    explain_misfit,
    fit_checkpoint,
    fit_joints,
    is_within,
    moved_joints,
    read_checkpoint,
    weights_of,
)
from .trainable_subset import choose_trainable
from .unwrapping import unwrapped

__all__ = [
    'FeatureMaskingHead',
    'LoadWatch',
    'add_low_rank',
    'check_head',
    'choose_trainable',
    'explain_misfit',
    'fit_checkpoint',
    'fit_joints',
    'freeze_batch_norm',
    'has_batch_statistics',
    'is_within',
    'make_private',
    'moved_joints',
    'private_twin',
    'public_statistics',
    'read_checkpoint',
    'refuse_batch_statistics',
    'replace_batch_norm',
    'unwrapped',
    'weights_of',
]
