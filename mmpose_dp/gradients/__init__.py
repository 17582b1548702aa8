"""Per-sample gradients of any torch model: torch and nothing else. Must not clip, weigh or release anything.

Read in this order: engine (with capture, fused_batch_norm, layer_rules, recorded_ops), blocks, independence.
"""

from .engine import Engine, RuleEngine, build_engine
from .layer_rules import rule_for
from .loop_engine import LoopEngine

__all__ = ['Engine', 'LoopEngine', 'RuleEngine', 'build_engine', 'rule_for']
