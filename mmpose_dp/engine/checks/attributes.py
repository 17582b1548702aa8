"""What a model remembers outside of its parameters and buffers: tensors and arrays in plain attributes.

A model that normalises by what it saw at the step before lets a record reach the gradients of others, and no replay within one step
shows it. Must not read what a tensor holds, nor keep one alive: that it is another, or was written to, is enough.
"""

import weakref
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

_OF_TORCH = frozenset(vars(nn.Module()))
_PLAIN = {int, bool, str, type(None), FunctionType, MethodType, ModuleType, type}
_DEPTH = 2  # containers and objects inside one another


class Attributes:
    """The tensors and arrays in a model's attributes at one moment.

    Args:
        model: any module.
        numbers: whether floating-point numbers count as well.
    """

    def __init__(self, model: nn.Module, numbers: bool = False) -> None:
        self._numbers, self._marks = numbers, dict(_marks(model, numbers))

    def changed(self, model: nn.Module) -> str:
        """The name of the first that is new, gone, another or written to, as ``head.bank``; empty if there is none."""
        marks = dict(_marks(model, self._numbers))
        names = [name for name, mark in marks.items() if mark != self._marks.get(name)]
        return next(iter([*names, *(self._marks.keys() - marks.keys())]), '')


def _marks(model: nn.Module, numbers: bool) -> Iterator[tuple[str, Any]]:
    """The name of each, and something that is equal as long as it is the same and unchanged."""
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in _OF_TORCH and type(value) not in _PLAIN:
                yield from _inside(value, f'{prefix}.{key}' if prefix else key, numbers, _DEPTH)


def _inside(value: Any, name: str, numbers: bool, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield name, (weakref.ref(value), value._version, value.data_ptr())
    elif isinstance(value, np.ndarray):
        yield name, (value.shape, value.dtype.str, zlib.crc32(value.tobytes()))
    elif isinstance(value, (float, np.floating)):
        if numbers:
            yield name, float(value)
    elif depth:
        for key, one in _parts(value):
            if type(one) not in _PLAIN:
                yield from _inside(one, f'{name}{key}', numbers, depth - 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f'[{key!r}]', one) for key, one in value.items() if isinstance(key, (str, int)))
    elif isinstance(value, (list, tuple, deque)):
        yield from ((f'[{i}]', one) for i, one in enumerate(value))
    elif not isinstance(value, nn.Module):
        yield from ((f'.{key}', one) for key, one in getattr(value, '__dict__', {}).items())
