"""Builds DPOptimWrapper for a model: freezes batch statistics first, then checks the model. Must not train anything."""

from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor
from mmpose.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from mmpose_dp.models import freeze_batch_norm

from .dp_optim_wrapper import DPOptimWrapper


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DPOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor for private training.

    Every BatchNorm keeps the statistics it was loaded with (scale and shift stay trainable), and a model that cannot be
    made private is refused here, before any data is read.
    """

    def __call__(self, model: nn.Module) -> DPOptimWrapper:
        """Returns the wrapper, prepared for the model. Raises PrivacyError."""
        core = model.module if is_model_wrapper(model) else model
        freeze_batch_norm(core)
        wrapper = super().__call__(model)
        wrapper.prepare(core)
        return wrapper
