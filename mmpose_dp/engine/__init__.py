"""Connects the privacy core to mmengine's runner. Must not hold a line of the guarantee itself."""

from .hooks import PrivacyBudgetHook, ProvenanceHook, PublicDataHook, newest_checkpoint
from .leftovers import without_leftovers
from .loops import PrivateTrainLoop
from .optim_wrappers import DPOptimWrapper, DPOptimWrapperConstructor
from .optimizers import DPAdamBC

__all__ = [
    'DPAdamBC',
    'DPOptimWrapper',
    'DPOptimWrapperConstructor',
    'PrivacyBudgetHook',
    'PrivateTrainLoop',
    'ProvenanceHook',
    'PublicDataHook',
    'newest_checkpoint',
    'without_leftovers',
]
