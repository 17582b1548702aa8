"""Per-sample gradients of any torch model, with torch alone. Must not clip, weigh or release anything. Read engine.py first."""

from .engine import Engine
from .layer_rules import register_rule, rule_for, runs_forward_of

__all__ = ['Engine', 'register_rule', 'rule_for', 'runs_forward_of']
