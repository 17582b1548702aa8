"""Gives a record the random numbers of an earlier run: those of dropout and drop paths, of Python and of NumPy.

Must not change which numbers the other samples get, nor the state of any generator afterwards.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_GENERATORS = {
    *('bernoulli', 'bernoulli_', 'binomial', 'cauchy_', 'exponential_', 'geometric_', 'log_normal_', 'multinomial'),
    *('normal', 'normal_', 'poisson', 'rand', 'rand_like', 'randint', 'randint_like', 'randn', 'randn_like'),
    *('random', 'random_', 'randperm', 'uniform', 'uniform_'),
}


class RandomTape(TorchDispatchMode):
    """Gives a record, among others, the random numbers that dropout and drop paths took when it ran alone.

    Attributes:
        recorded: the operations that made random numbers, with these.
        fault: why the numbers could not be reused; empty if they could.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Any, Tensor]] = []
        self._samples: Sequence[int] | None = None  # None: recording
        self._position = self._total = 0
        self.fault = ''

    def play(self, samples: Sequence[int], total: int) -> 'RandomTape':
        """From now on the given samples, of ``total``, get what was recorded."""
        self._samples, self._total, self._position = samples, total, 0
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls an operation; one that makes random numbers is recorded, or its samples are overwritten."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return result
        name = func.overloadpacket.__name__
        if name == 'native_dropout':
            self._dropout(func, args, result)
        elif name in _GENERATORS:
            self._pass(func, result)
        elif _is_random(func, args, kwargs):
            self.fault = f'{name} makes random numbers inside: switch its dropout off'
        return result

    def _dropout(self, func: Any, args: tuple[Any, ...], result: tuple[Tensor, Tensor]) -> None:
        values, probability, train = args
        if train and probability:
            output, mask = result
            if self._pass(func, mask):
                output.copy_(values * mask / (1 - probability))

    def _pass(self, func: Any, numbers: Tensor) -> bool:
        """Records the numbers, or writes what was recorded over those of the samples; whether it wrote."""
        if self._samples is None:
            self.recorded.append((func, numbers.clone()))
            return False
        if self._position == len(self.recorded) or self.recorded[self._position][0] is not func:
            self.fault = self.fault or 'alone, the record ran through other random layers than among other records'
            return False
        alone = self.recorded[self._position][1]
        self._position += 1
        if not _write_samples(numbers, alone, self._samples, self._total):
            self.fault = self.fault or f'{func} makes random numbers whose shape does not follow the samples'
            return False
        return True


def _is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """False for an operation that could drop something, and is set not to."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args)), **kwargs}
    probability = next((given[name] for name in ('dropout_p', 'p', 'dropout') if name in given), None)
    if probability is None and any('dropout' in name for name in names):
        return False  # its default is 0
    return probability is None or float(probability) > 0


def _write_samples(numbers: Tensor, alone: Tensor, samples: Sequence[int], total: int) -> bool:
    """Writes (len(samples) * merged, ...) into the samples of (total * merged, ...), on whichever dimension has the samples."""
    if numbers.shape == alone.shape:  # the record is all there is, or all samples share the numbers
        numbers.copy_(alone)
        return True
    differ = [d for d in range(numbers.dim()) if alone.dim() == numbers.dim() and numbers.shape[d] != alone.shape[d]]
    if len(differ) != 1 or numbers.shape[differ[0]] * len(samples) != alone.shape[differ[0]] * total:
        return False
    axis = differ[0]
    merged = alone.shape[axis] // len(samples)
    for place, sample in enumerate(samples):
        numbers.narrow(axis, sample * merged, merged).copy_(alone.narrow(axis, place * merged, merged))
    return True


class States(NamedTuple):
    """Where the generators are: those of Python, of NumPy, of torch on the CPU, and of the GPU at work."""

    python: Any
    numpy: Any
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls) -> 'States':
        """Where they are now."""
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu)


@contextmanager
def numbers_from(states: Sequence[Any]) -> Iterator[None]:
    """Inside, the generators of Python and NumPy go on from the first two of ``states``; afterwards from where they were."""
    before = random.getstate(), np.random.get_state()
    random.setstate(states[0])
    np.random.set_state(states[1])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextmanager
def torch_numbers_from(states: States) -> Iterator[None]:
    """Inside, torch's generators go on from ``states``; afterwards from where they were."""
    with torch.random.fork_rng():
        torch.set_rng_state(states.cpu)
        if states.gpu is not None:
            torch.cuda.set_rng_state(states.gpu)
        yield
