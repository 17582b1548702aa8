"""Hooks of private training. Must not hold logic."""

from .privacy_budget_hook import PrivacyBudgetHook
from .projector_refresh_hook import ProjectorRefreshHook
from .provenance import ProvenanceHook
from .resuming import checkpoint_settings, newest_checkpoint

__all__ = ['PrivacyBudgetHook', 'ProvenanceHook', 'ProjectorRefreshHook', 'checkpoint_settings', 'newest_checkpoint']
