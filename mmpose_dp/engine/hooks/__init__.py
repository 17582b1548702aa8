"""Hooks of private training. Must not hold logic."""

from .privacy_budget_hook import PrivacyBudgetHook
from .projector_refresh_hook import PublicDataHook
from .provenance import ProvenanceHook
from .resuming import newest_checkpoint

__all__ = ['PrivacyBudgetHook', 'ProvenanceHook', 'PublicDataHook', 'newest_checkpoint']
