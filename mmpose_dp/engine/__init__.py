"""Connects privacy/ and gradients/ to mmengine's runner. Must not hold a line of the guarantee."""

from .hooks import PrivacyBudgetHook, ProjectorRefreshHook, ProvenanceHook, checkpoint_settings, newest_checkpoint
from .leftovers import without_leftovers
from .loops import PrivateTrainLoop
from .optim_wrappers import DPOptimWrapper, DPOptimWrapperConstructor
from .spelling import refuse_misspelled, refuse_unknown_top

__all__ = [
    'DPOptimWrapper',
    'DPOptimWrapperConstructor',
    'PrivacyBudgetHook',
    'PrivateTrainLoop',
    'ProvenanceHook',
    'ProjectorRefreshHook',
    'checkpoint_settings',
    'newest_checkpoint',
    'refuse_misspelled',
    'refuse_unknown_top',
    'without_leftovers',
]
