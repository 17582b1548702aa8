"""Hooks of private training. Must not hold logic."""

from .privacy_budget_hook import PrivacyBudgetHook
from .public_data_hook import PublicDataHook

__all__ = ['PrivacyBudgetHook', 'PublicDataHook']
