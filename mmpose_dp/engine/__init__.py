"""Connects the privacy core to mmengine's runner. Must not hold a line of the guarantee itself."""

from .auditing import AuditedOptimWrapper, AuditHook
from .hooks import PrivacyBudgetHook, PublicDataHook, newest_checkpoint
from .loops import PrivateTrainLoop
from .optim_wrappers import DPOptimWrapper, DPOptimWrapperConstructor

__all__ = [
    'AuditHook',
    'AuditedOptimWrapper',
    'DPOptimWrapper',
    'DPOptimWrapperConstructor',
    'PrivacyBudgetHook',
    'PrivateTrainLoop',
    'PublicDataHook',
    'newest_checkpoint',
]
