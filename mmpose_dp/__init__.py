"""Differentially private training for MMPose's top-down models. Importing it fills MMPose's registries."""

from . import compat
from .version import __version__

compat.apply()

from . import datasets, engine, models  # noqa: E402  (compat first)

__all__ = ['__version__', 'datasets', 'engine', 'models']
