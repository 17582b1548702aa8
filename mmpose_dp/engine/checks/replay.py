"""One record of a batch is run again alone: its gradient must be the one that it has among the other records.

That the loss of a record depends on that record alone is what per-record sensitivity rests on, and no look at the code of a
model proves it. So every private step tests it on one record at random. Must not clip, weigh or release anything, and must not
judge by anything but the two gradients of the record.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmpose_dp.privacy.records import Block

# How far the two gradients may be apart, relative to the longer one. Rounding moves a few ReLUs over their kinks, so the gaps of
# correct models are larger than the precision: tests/test_zoo.py measures them (0.02 % in float32, 0.2 % in bfloat16).
_LIMITS = {torch.float64: 1e-3, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.1}
_TF32_LIMIT = 0.1
# a gradient shorter than this share of C moves the clipped sum by less than the share, whatever its direction
_SHORT = 1e-3

_GENERATORS = {
    *('bernoulli', 'bernoulli_', 'binomial', 'cauchy_', 'exponential_', 'geometric_', 'log_normal_', 'multinomial'),
    *('normal', 'normal_', 'poisson', 'rand', 'rand_like', 'randint', 'randint_like', 'randn', 'randn_like'),
    *('random', 'random_', 'randperm', 'uniform', 'uniform_'),
}


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative gap between the two gradients of a record that rounding explains.

    Args:
        dtype: of the forward, the lower of the parameters' and mixed precision's.
        device: where it runs; convolutions on a GPU are in TF32 unless PyTorch is set otherwise.
    """
    limit = _LIMITS.get(dtype, _LIMITS[torch.float32])
    if device.type == 'cuda' and torch.backends.cudnn.allow_tf32:
        limit = max(limit, _TF32_LIMIT)
    return limit


class RandomTape(TorchDispatchMode):
    """Gives a record, among others, the random numbers that dropout and drop paths took when it ran alone.

    Attributes:
        fault: why the numbers could not be handed over; empty if they could.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tape: list[tuple[Any, Tensor]] = []
        self._samples: Sequence[int] | None = None  # None: recording
        self._position = self._total = 0
        self.fault = ''

    @property
    def is_empty(self) -> bool:
        """Whether the record took no random number."""
        return not self._tape

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
            self._tape.append((func, numbers.clone()))
            return False
        if self._position == len(self._tape) or self._tape[self._position][0] is not func:
            self.fault = self.fault or 'alone, the record met other random layers than among other records'
            return False
        alone = self._tape[self._position][1]
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


class Halved(NamedTuple):
    """A tensor as float16 in units of its largest entry: half of the memory, off by 2^-12 of each entry that counts."""

    largest: Tensor
    values: Tensor

    @classmethod
    def of(cls, x: Tensor) -> 'Halved':
        """The tensor, halved."""
        largest = x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny)
        return cls(largest, (x / largest).half())

    def float(self) -> Tensor:
        """The tensor in float32; not finite if an entry was not."""
        return self.values.float() * self.largest.float()


class ReplayCheck:
    """Collects how far one record's gradient among others is from the one that it has alone. See Collector.

    Args:
        alone: the gradient of the record's loss alone, one per parameter or None for zero.
        samples: the record's samples in the batch.
        scale: the length, in units of the losses as they are scaled, to which clipping brings a long gradient: C, or less where
            short gradients are lengthened (automatic clipping).
    """

    def __init__(self, alone: Sequence[Halved | Tensor | None], samples: Sequence[int], scale: float) -> None:
        self._alone = {i: x for i, x in enumerate(alone) if x is not None}
        self._samples, self.scale = samples, scale
        self._norms: dict[
            int, list[Tensor]
        ] = {}  # by parameter: among others, alone, apart, by sample; read once at the end
        self._squares: dict[int, list[float]] = {}

    def add(self, block: Block) -> None:
        """See Collector.add. Reads nothing from the device."""
        for index, grads in zip(block.indices, block.per_sample(self._samples)):
            among, halved = grads.sum(0) if len(grads) > 1 else grads[0], self._alone.pop(index, None)
            alone = torch.zeros_like(among) if halved is None else halved.float()
            lengths = [torch.linalg.vector_norm(x) for x in (among, alone)]
            apart = torch.linalg.vector_norm(alone.sub_(among))  # in place: a step has many parameters
            self._norms[index] = [*lengths, apart, torch.linalg.vector_norm(grads) if len(grads) > 1 else lengths[0]]

    @property
    def alone_is_finite(self) -> bool:
        """Whether the gradient alone is; known after ``gap``."""
        return math.isfinite(self._sums()[1])

    def gap(self, rounding: float = 0.0) -> float:
        """The distance of the two gradients, relative to the longer one; 0 where neither is finite, infinity where one is not.

        Args:
            rounding: the relative rounding of a sample's gradient, which is taken off the distance: where the samples of a record
                all but cancel (a residual on a flat picture), nothing else is left.
        """
        for index, halved in self._alone.items():  # no block had these: the gradient among others is zero
            alone = torch.linalg.vector_norm(halved.float())
            self._norms[index] = [torch.zeros_like(alone), alone, alone, torch.zeros_like(alone)]
        self._alone = {}
        if self._norms:
            table = torch.stack([torch.stack(norms) for norms in self._norms.values()]).tolist()
            self._squares = {index: [x * x for x in norms] for index, norms in zip(self._norms, table)}
        among, lone, apart, by_sample = self._sums()
        finite = [math.isfinite(x) for x in (among, lone)]
        if not all(finite):
            return float('inf') if any(finite) else 0.0
        longer = max(among, lone, (_SHORT * self.scale) ** 2) ** 0.5
        return max(apart**0.5 - rounding * by_sample**0.5, 0.0) / longer

    def _sums(self) -> tuple[float, float, float, float]:
        """The squares of the four lengths over all parameters."""
        columns = [*zip(*self._squares.values())] or [()] * 4
        among, lone, apart, by_sample = (float(sum(column)) for column in columns)
        return among, lone, apart, by_sample

    def worst(self) -> int | None:
        """The parameter, by number, in which the two are farthest apart; known after ``gap``."""
        return max(self._squares, key=lambda index: self._squares[index][2]) if self._squares else None


def first_difference(
    model: nn.Module, alone: Callable[[], object], among: Callable[[], object], samples: Sequence[int], limit: float
) -> str | None:
    """The first module whose output for the record is not the same alone and among others, by name; None if none is found.

    Args:
        model: its modules without children are watched.
        alone: runs the forward on the record alone.
        among: runs it on the batch.
        samples: the record's samples in the batch.
        limit: the relative difference that counts.
    """
    with _watched(model, lambda output, call: output.clone()) as seen_alone:
        alone()

    def of_record(output: Tensor, call: int) -> Tensor | None:
        want = seen_alone[call][1] if call < len(seen_alone) else None
        return None if want is None else _samples_like(output, samples, want)

    with _watched(model, of_record) as seen_among:
        among()
    for (name, want), (_, got) in zip(seen_alone, seen_among):
        if want is None or got is None:
            continue
        scale = float(want.double().norm())
        if not float((got.double() - want.double()).norm()) <= limit * scale + 1e-30:
            return name
    return None


Seen = list[tuple[str, Tensor | None]]


@contextmanager
def _watched(model: nn.Module, kept: Callable[[Tensor, int], Tensor | None]) -> Iterator[Seen]:
    """What is ``kept`` of the outputs of the modules without children, in the order of their calls."""
    seen: Seen = []

    def hook(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            usable = isinstance(output, Tensor) and output.dim() > 0
            seen.append((name, kept(output.detach(), len(seen)) if usable else None))

        return watch

    leaves = [(name, module) for name, module in model.named_modules() if not [*module.children()]]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _samples_like(output: Tensor, samples: Sequence[int], want: Tensor) -> Tensor | None:
    """The samples of a batch's output that belong to the record, by the shape that the same call had alone."""
    if want.shape[1:] != output.shape[1:] or len(want) % len(samples):
        return None
    merged = len(want) // len(samples)
    if any((sample + 1) * merged > len(output) for sample in samples):
        return None
    return torch.cat([output[sample * merged : (sample + 1) * merged] for sample in samples]).clone()
