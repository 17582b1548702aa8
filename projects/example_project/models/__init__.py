"""The models of this project: importing it registers them."""

from .example_backbone import ExampleBackbone
from .example_head import ExampleHead
from .example_loss import VisibleJointsLoss

__all__ = ['ExampleBackbone', 'ExampleHead', 'VisibleJointsLoss']
