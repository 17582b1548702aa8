"""Finds the model that training is about. Must not change it."""

from typing import Any

from mmengine.model import is_model_wrapper


def unwrapped(model: Any) -> Any:
    """The model inside a wrapper for several processes; any other model is itself."""
    return model.module if is_model_wrapper(model) else model
