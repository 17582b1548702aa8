"""Differentially private training for MMPose's top-down models: importing it fills MMPose's registries.

Configs name it in ``custom_imports``. Where MMPose is not installed nothing is registered, and ``mmpose_dp.privacy`` (the
accountants, the ledger, the mechanism) and ``mmpose_dp.gradients`` work by themselves. Must not hold logic.
"""

import sys
from importlib.util import find_spec

from .version import __version__

_VERIFIES = bool({'mmpose_dp.verify', 'mmpose_dp.privacy.verify'} & set(sys.orig_argv))  # python -m

if find_spec('mmengine') is not None and not _VERIFIES:  # a verifier needs neither MMPose nor torch
    from . import compat

    compat.apply()  # before anything imports mmpose

    from . import datasets, engine, models  # noqa: F401

__all__ = ['__version__']
