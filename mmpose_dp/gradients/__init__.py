"""Per-sample gradients of any torch model: torch and nothing else. Must not clip, weigh or release anything.

Read in this order: engine (with capture, fused_batch_norm, layer_rules, recorded_ops), blocks, independence.
"""

from .engine import Engine
from .layer_rules import register_rule, rule_for

__all__ = ['Engine', 'register_rule', 'rule_for']
