"""The lines on which the guarantee rests. Pure torch, numpy, opacus and dp-accounting: nothing of OpenMMLab.

Read in this order: plan, noise, per_sample (with layer_rules, operations, row_gradients), clipping, subspace, accounting,
ledger, statement.
"""

from .accounting import (
    ACCOUNTANTS,
    StepEvent,
    calibrate_noise_multiplier,
    epsilon,
    group_epsilon,
    steps_within,
)
from .clipping import Rows, clip_factors, clipped_coordinates, clipped_sum
from .errors import PrivacyError
from .ledger import Ledger
from .noise import RandomSource
from .per_sample import LoopEngine, RuleEngine, build_engine
from .plan import PrivacyPlan
from .row_gradients import RowGradients
from .statement import build_statement, epsilon_curve, statement_markdown, write_statement
from .subspace import Projector

__all__ = [
    'ACCOUNTANTS',
    'Ledger',
    'LoopEngine',
    'PrivacyError',
    'PrivacyPlan',
    'Projector',
    'RandomSource',
    'RowGradients',
    'Rows',
    'RuleEngine',
    'StepEvent',
    'build_engine',
    'build_statement',
    'calibrate_noise_multiplier',
    'clip_factors',
    'clipped_coordinates',
    'clipped_sum',
    'epsilon',
    'epsilon_curve',
    'group_epsilon',
    'statement_markdown',
    'steps_within',
    'write_statement',
]
