"""The data set of this project: importing it registers the class."""

from .five_joints_dataset import FiveJointsDataset

__all__ = ['FiveJointsDataset']
