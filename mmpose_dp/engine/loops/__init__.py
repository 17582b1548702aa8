"""Train loops. Must not hold logic."""

from .private_train_loop import PrivateTrainLoop

__all__ = ['PrivateTrainLoop']
