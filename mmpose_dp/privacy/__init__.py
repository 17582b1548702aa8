"""The private mechanism. It needs torch, numpy, scipy, opacus and dp-accounting, and nothing of OpenMMLab.

What model and data must be like is checked elsewhere (docs/guarantee.md). Read in this order: plan, sampling, records, clipping,
projection, mechanism, noise, accounting, calibration, ledger, statement. Names are imported when they are first used, so that
``mmpose_dp.gradients``, which needs ``records`` and ``errors``, works with torch alone. This file must not hold logic.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    'accounting': 'ACCOUNTANTS StepEvent epsilon group_epsilon',
    'calibration': 'calibrate_noise_multiplier steps_within',
    'clipping': 'ClippedCoordinates ClippedSum clip_factors',
    'errors': 'BudgetError ConfigError DataError LedgerError PrivacyError UnsupportedModelError',
    'ledger': 'LEDGER_NAME Ledger',
    'mechanism': 'GaussianMechanism',
    'noise': 'RandomSource',
    'plan': 'PrivacyPlan',
    'projection': 'Projector',
    'records': 'Block Collector Samples',
    'sampling': 'PoissonSampling',
    'statement': 'build_statement',
    'validation': 'as_given rounded_up',
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """A public name of one of the modules."""
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_HOME[name]}', __name__), name)
