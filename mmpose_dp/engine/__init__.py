"""Connects privacy/ and gradients/ to mmengine's runner, and checks what the guarantee supposes of model, data and checkpoints.

Must not sample records, clip, add noise, count a step or compute epsilon by itself: privacy/ does.
"""

from .hooks import PrivacyBudgetHook, ProjectorRefreshHook, ProvenanceHook, checkpoint_settings, newest_checkpoint
from .leftovers import without_leftovers
from .loops import PrivateTrainLoop
from .optim_wrappers import DPOptimWrapper, DPOptimWrapperConstructor
from .spelling import refuse_misspelled, refuse_unknown_top
from .training_settings import REPLACED, left_random, mostly_random, settings_in_words
from .unread import config_warnings

__all__ = [
    'REPLACED',
    'DPOptimWrapper',
    'DPOptimWrapperConstructor',
    'PrivacyBudgetHook',
    'PrivateTrainLoop',
    'ProvenanceHook',
    'ProjectorRefreshHook',
    'checkpoint_settings',
    'config_warnings',
    'left_random',
    'mostly_random',
    'newest_checkpoint',
    'refuse_misspelled',
    'refuse_unknown_top',
    'settings_in_words',
    'without_leftovers',
]
