"""Optimizers made for noised gradients. Must not add or remove noise from a gradient."""

from .dp_adam_bc import DPAdamBC

__all__ = ['DPAdamBC']
