"""Private optimizer wrappers. Must not hold logic."""

from .constructor import DPOptimWrapperConstructor
from .dp_optim_wrapper import DPOptimWrapper

__all__ = ['DPOptimWrapper', 'DPOptimWrapperConstructor']
