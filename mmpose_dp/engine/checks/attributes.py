"""What a model remembers outside of its parameters and buffers: tensors and arrays in plain attributes.

If a model normalises by what it saw at an earlier step, a record changes the gradients of others, and no replay within one step
shows it. Must not keep a tensor alive, and must not reveal what one holds: it reports only that one was replaced or written to.
"""

import weakref
import zlib
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Set
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from .fingerprint import Sums, bit_sums, first_changed

_OF_TORCH = frozenset(vars(nn.Module()))
_PLAIN = {int, bool, type(None), FunctionType, MethodType, ModuleType, type}
_LEAVES = Tensor, np.ndarray, np.generic, bytearray, array, float, complex, str, bytes
_DEPTH = 2  # containers and objects inside one another


class Attributes:
    """The tensors and arrays in a model's attributes at one moment.

    Args:
        model: any module.
        numbers: whether floating-point numbers, texts and bytes count as well.
    """

    def __init__(self, model: nn.Module, numbers: bool = False) -> None:
        self._numbers = numbers
        self._marks, self._sums = _seen_in(model, numbers)

    def changed(self, model: nn.Module) -> str:
        """The name of the first that is new, gone, another or written to, as ``head.bank``; empty if there is none."""
        marks, sums = _seen_in(model, self._numbers)
        names = [name for name, mark in marks.items() if mark != self._marks.get(name)]
        names += self._marks.keys() - marks.keys()
        # the sums find what torch does not count: writing by .data, by .numpy() or into a storage
        return names[0] if names else first_changed(self._sums, sums)


def _seen_in(model: nn.Module, numbers: bool) -> tuple[dict[str, Any], Sums]:
    """By name, something that is equal as long as it is the same; and the bit sums of the tensors, see ``bit_sums``."""
    marks: dict[str, Any] = {}
    held: list[tuple[str, Tensor]] = []
    for name, value in _found_in(model, set()):
        if isinstance(value, Tensor):
            marks[name] = weakref.ref(value), 0 if value.is_inference() else value._version
            held.append((name, value))
        elif isinstance(value, np.ndarray):
            marks[name] = value.shape, value.dtype.str, zlib.crc32(value.tobytes())
        elif isinstance(value, (bytearray, array)):
            marks[name] = len(value), zlib.crc32(value)
        elif numbers and isinstance(value, (float, complex, np.inexact, str, bytes)):
            marks[name] = hash(value)
    return marks, bit_sums(held)


def _found_in(model: nn.Module, known: set[int]) -> Iterator[tuple[str, Any]]:
    """The attributes of each of the model's modules and tensors, by name, with what is in their containers.

    ``known``: the modules seen, by id.
    """
    known.update(id(module) for module in model.modules())
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in _OF_TORCH:
                yield from _inside(value, f'{prefix}.{key}' if prefix else key, _DEPTH, known)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        for key, value in vars(x).items():
            yield from _inside(value, f'{name}.{key}', _DEPTH, known)


def _inside(value: Any, name: str, depth: int, known: set[int]) -> Iterator[tuple[str, Any]]:
    """The value if it is no container, or what is in it; a module that is no part of the model is taken with all that it has."""
    if type(value) in _PLAIN or id(value) in known:
        return
    if isinstance(value, nn.Module):
        own = *value.named_parameters(), *value.named_buffers(), *_found_in(value, known)
        yield from ((f'{name}.{key}', one) for key, one in own)
    elif isinstance(value, _LEAVES):
        yield name, value
    elif depth:
        for key, one in _parts(value):
            yield from _inside(one, f'{name}{key}', depth - 1, known)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container or an object holds. A key that is no name and no number stays unnamed: it may come from a sample."""
    if isinstance(value, Mapping):
        for place, (key, one) in enumerate(value.items()):
            yield f'[{key!r}]' if isinstance(key, (str, int)) else f'[key {place}]', one
    elif isinstance(value, (list, tuple, deque, Set)):
        yield from ((f'[{i}]', one) for i, one in enumerate(value))
    else:
        slots = [vars(kind).get('__slots__', ()) for kind in type(value).__mro__]
        names = [name for one in slots for name in ((one,) if isinstance(one, str) else one)]
        own = {**{name: getattr(value, name, None) for name in names}, **getattr(value, '__dict__', {})}
        yield from ((f'.{key}', one) for key, one in own.items())
