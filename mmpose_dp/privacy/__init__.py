"""The lines on which the guarantee rests. Pure torch, numpy, opacus and dp-accounting: nothing of OpenMMLab.

Read in this order: plan, noise, per_sample (with capture, row_norm, layer_rules, operations, row_gradients, row_mixing,
loop_engine), replay, fingerprint, clipping, rounding, adaptive_norm, subspace, mechanism, accounting, calibration, schedule,
ledger, figures, statement, view_audit.
"""

from .accounting import (
    ACCOUNTANTS,
    StepEvent,
    as_delta,
    epsilon,
    group_epsilon,
)
from .adaptive_norm import AdaptiveNorm
from .calibration import as_epsilon, calibrate_noise_multiplier, calibrate_sample_rates, steps_within
from .clipping import ClippedCoordinates, ClippedParts, ClippedSum, LayerwiseClippedSum, Rows, clip_factors
from .errors import OneRecordAtATime, PrivacyError
from .figures import as_given, ceiling, rounded_up
from .fingerprint import Fingerprint
from .ledger import LEDGER_NAME, Ledger
from .loop_engine import LoopEngine
from .mechanism import check_clipping, collector_for, empty_sum, gradient_of
from .noise import RandomSource
from .per_sample import Engine, RuleEngine, build_engine
from .plan import PrivacyPlan
from .row_gradients import Block, Collector, RowGradients, RowSum
from .schedule import Budget, Schedule
from .statement import build_statement, epsilon_curve, statement_markdown, write_statement
from .subspace import Projector
from .view_audit import with_audit

__all__ = [
    'ACCOUNTANTS',
    'LEDGER_NAME',
    'AdaptiveNorm',
    'Block',
    'Budget',
    'ClippedCoordinates',
    'ClippedParts',
    'ClippedSum',
    'Collector',
    'LayerwiseClippedSum',
    'Ledger',
    'Engine',
    'Fingerprint',
    'LoopEngine',
    'OneRecordAtATime',
    'PrivacyError',
    'PrivacyPlan',
    'Projector',
    'RandomSource',
    'RowGradients',
    'RowSum',
    'Rows',
    'RuleEngine',
    'Schedule',
    'StepEvent',
    'as_given',
    'as_delta',
    'as_epsilon',
    'build_engine',
    'build_statement',
    'calibrate_noise_multiplier',
    'calibrate_sample_rates',
    'ceiling',
    'check_clipping',
    'clip_factors',
    'collector_for',
    'empty_sum',
    'epsilon',
    'epsilon_curve',
    'gradient_of',
    'with_audit',
    'group_epsilon',
    'rounded_up',
    'statement_markdown',
    'steps_within',
    'write_statement',
]
