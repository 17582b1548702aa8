"""Differentially private training for MMPose's top-down models: importing it fills the registries.

Must not hold logic. Configs name it in ``custom_imports``. The privacy core needs none of MMPose:
with the folder ``mmpose_dp`` on the path, ``import privacy`` works on torch, opacus and
dp-accounting alone.
"""

from . import compat
from .version import __version__

compat.apply()  # before anything imports mmpose

from . import datasets, engine, models, privacy  # noqa: E402

__all__ = ['__version__', 'datasets', 'engine', 'models', 'privacy']
