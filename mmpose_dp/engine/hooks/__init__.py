"""Hooks of private training. Must not hold logic."""

from .privacy_budget_hook import PrivacyBudgetHook
from .provenance import ProvenanceHook
from .public_data_hook import PublicDataHook
from .resuming import newest_checkpoint

__all__ = ['PrivacyBudgetHook', 'ProvenanceHook', 'PublicDataHook', 'newest_checkpoint']
