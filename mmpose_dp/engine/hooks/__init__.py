"""Hooks of private training. Must not hold logic."""

from .privacy_budget_hook import PrivacyBudgetHook
from .public_data_hook import PublicDataHook
from .resuming import newest_checkpoint

__all__ = ['PrivacyBudgetHook', 'PublicDataHook', 'newest_checkpoint']
