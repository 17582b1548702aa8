"""Per-sample gradients of any torch model, which needs torch alone. Must not clip, weigh or release anything.

Read in this order: engine, layer_rules, blocks, capture, recorded_ops, independence. To serve a layer of your own, see
``register_rule`` in layer_rules.
"""

from .engine import Engine
from .layer_rules import register_rule, rule_for

__all__ = ['Engine', 'register_rule', 'rule_for']
