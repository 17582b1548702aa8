"""One record of a batch is run again alone: its gradient must be the one that it has among the other records.

The sensitivity of a record rests on this: its loss depends on that record alone. The code of a model cannot prove it. So every
private step tests it on one record, chosen at random, from the data preprocessor on. In the order of a step:
``Replay.expect`` says where the record is, ``Replay.armed`` runs it alone before the batch, ``ReplayCheck`` sees its gradient in
the batch, and ``Replay.judge`` compares the two.

Must not clip, weigh or release anything, must not judge by anything but the two gradients, and must not change what the batch
gives: the record alone leaves nothing behind but its gradient.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmpose_dp.gradients.blocks import SampleSum
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.noise import RandomSource
from mmpose_dp.privacy.records import PADDING, Block, Collector, Samples

from ..padding import padded
from .first_difference import first_difference
from .random_tape import RandomTape, States, numbers_from, torch_numbers_from

# How far the two gradients may be apart, relative to the longer one. Rounding moves a few ReLUs across their kinks, so the gaps of
# correct models are larger than the precision: tests/test_zoo.py measures them (0.02 % in float32, 0.2 % in bfloat16).
_LIMITS = {torch.float64: 1e-3, torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.1}
_TF32_LIMIT = 0.1
# a gradient shorter than this share of C moves the clipped sum by less than the share, whatever its direction
_SHORT = 1e-3
# The largest relative distance of two gradients from forwards of one shape, where kernels are the same: on a CPU, and elsewhere,
# where some kernels add in any order.
SAME_SHAPE, SAME_SHAPE_ELSEWHERE = 1e-5, 1e-3
_FAILURES = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
_BATCH = 'a batch must be the dict of lists, inputs and data_samples, that collate_samples makes'


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


def same_shape_limit(device: torch.device) -> float:
    """The largest relative gap between two gradients of a record from forwards of one shape."""
    return SAME_SHAPE if device.type == 'cpu' else SAME_SHAPE_ELSEWHERE


class HalfPrecision(NamedTuple):
    """A tensor in half of its memory: float16 in units of its largest entry, off by 2^-12 of each entry but the tiny ones."""

    largest: Tensor
    values: Tensor

    @classmethod
    def of(cls, x: Tensor) -> 'HalfPrecision':
        """The tensor in float16, with its largest entry."""
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
        scale: C times the loss scale, the length to which clipping brings a long gradient; less if clipping also lengthens short
            gradients (automatic clipping).
    """

    def __init__(self, alone: Sequence[HalfPrecision | Tensor | None], samples: Sequence[int], scale: float) -> None:
        self._alone = {i: x for i, x in enumerate(alone) if x is not None}
        self._samples, self.scale = samples, scale
        # by parameter: among others, alone, apart, by sample; read once at the end
        self._norms: dict[int, list[Tensor]] = {}
        self._squares: dict[int, list[float]] = {}
        self.alone_is_finite = True  # whether the gradient alone is; known after ``gap``

    def add(self, block: Block) -> None:
        """See Collector.add. Reads nothing from the device."""
        for index, grads in zip(block.indices, block.per_sample(self._samples)):
            among, kept = grads.sum(0) if len(grads) > 1 else grads[0], self._alone.pop(index, None)
            alone = torch.zeros_like(among) if kept is None else kept.float()
            lengths = [torch.linalg.vector_norm(x) for x in (among, alone)]
            apart = torch.linalg.vector_norm(alone.sub_(among))  # in place: a step has many parameters
            self._norms[index] = [*lengths, apart, torch.linalg.vector_norm(grads) if len(grads) > 1 else lengths[0]]

    def gap(self, rounding: float = 0.0) -> float:
        """The distance of the two gradients, relative to the longer one; 0 where neither is finite, infinity where one is not.

        Args:
            rounding: the relative rounding of a sample's gradient, which is taken off the distance: where the samples of a record
                all but cancel (a residual on a flat picture), nothing else is left.
        """
        for index, kept in self._alone.items():  # no block had these: the gradient among others is zero
            alone = torch.linalg.vector_norm(kept.float())
            self._norms[index] = [torch.zeros_like(alone), alone, alone, torch.zeros_like(alone)]
        self._alone = {}
        if self._norms:
            table = torch.stack([torch.stack(norms) for norms in self._norms.values()]).tolist()
            self._squares = {index: [x * x for x in norms] for index, norms in zip(self._norms, table)}
        columns = [*zip(*self._squares.values())] or [()] * 4
        among, lone, apart, by_sample = (float(sum(column)) for column in columns)
        self.alone_is_finite = math.isfinite(lone)
        if not (self.alone_is_finite and math.isfinite(among)):
            return float('inf') if self.alone_is_finite or math.isfinite(among) else 0.0
        longer = max(among, lone, (_SHORT * self.scale) ** 2) ** 0.5
        return max(apart**0.5 - rounding * by_sample**0.5, 0.0) / longer

    def worst(self) -> int | None:
        """The parameter, by number, in which the two are farthest apart; known after ``gap``."""
        return max(self._squares, key=lambda index: self._squares[index][2]) if self._squares else None


RunAlone = Callable[[dict], list[HalfPrecision | None]]
RunAmong = Callable[[dict, Collector], None]


class Replay:
    """Of each logical batch, one private record that is chosen at random is run alone before the batch that it is in.

    Args:
        random: chooses the record where PrivateTrainLoop has not.

    Attributes:
        chosen: the record, by ``dp_record``, or None: one of the first micro-batch that has private records. Where the chosen one
            could not be read, another of its micro-batch takes its place.
        here: whether the current micro-batch has the chosen record.
        fixed_shape: whether forwards have one shape, whatever was sampled, so that what follows the shape reveals nothing.
        fault: why this logical batch must not be released; empty if nothing is wrong.
    """

    fixed_shape = False

    def __init__(self, random: RandomSource) -> None:
        self._random = random
        self.chosen: int | None = None
        self.here = True
        self.forget()

    def expect(self, record: int | None) -> None:
        """The chosen record is in the next micro-batch, or in another one (None). All forwards have ``fixed_shape`` from now on."""
        self.fixed_shape = True
        self.here = record is not None
        if record is not None:
            self.chosen = record

    def forget(self) -> None:
        """Begins a logical batch."""
        self.chosen = None
        self.here = True
        self.fault = ''
        self._done = self._running = self._began = False
        self._keys: set[Any] = set()  # the private records that came to the data preprocessor of the last forward
        self._alone: list[HalfPrecision | None] | None = None
        self._indices: Sequence[int] = ()
        self._tape = RandomTape()  # the record's random numbers of torch
        self._before: States | None = None  # the generators before it ran alone
        self._after: States | None = None  # and after: where those of torch begin for its batch
        self._batches: tuple[dict, dict] | None = None  # the record's, and the one that it is in

    @contextmanager
    def armed(self, model: Any, run_alone: RunAlone) -> Iterator[None]:
        """Inside, a batch that comes to the model's data preprocessor is looked through for the chosen record.

        Args:
            model: the pose estimator.
            run_alone: the gradient of the loss of a batch, which is one record's, with capture switched off.
        """
        self._began, self._alone, self._keys, stack = False, None, set(), ExitStack()
        look = partial(self._look, run_alone, stack)
        handle = model.data_preprocessor.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with stack:
                yield
        finally:
            handle.remove()

    def _look(self, run_alone: RunAlone, stack: ExitStack, module: nn.Module, args: Any, kwargs: dict) -> None:
        if self._running:
            return
        self._began, batch = True, args[0] if args else kwargs.get('data')
        if not isinstance(batch, dict) or {type(batch.get(key)) for key in ('inputs', 'data_samples')} != {list}:
            raise PrivacyError(f'model.data_preprocessor got {type(batch).__name__}: {_BATCH}')
        keys = [sample.metainfo.get('dp_record', -1 - index) for index, sample in enumerate(batch['data_samples'])]
        private = {*keys} - {None, PADDING}
        self._keys |= private
        if self._done or self.fault:
            return
        indices = self._samples_of_chosen(keys, private)
        if not indices:
            return
        part = {key: [values[index] for index in indices] for key, values in batch.items()}
        self._batches, self._indices, tape = (part, batch), indices, RandomTape()
        self._before, self._running = States.now(), True
        try:
            with numbers_from(self._before), tape:
                self._alone = run_alone(part)
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            # its message may hold the record's values
            self.fault = f'the model does not run on one record alone ({type(error).__name__})'
        finally:
            self._running = False
        self._tape, self._after = tape, States.now()
        if tape.recorded:
            stack.enter_context(tape.play(indices, len(batch['inputs'])))

    def _samples_of_chosen(self, keys: Sequence[Any], records: set[Any]) -> list[int]:
        """The places in a batch, whose samples have these ``keys``, of the chosen record; none if it is not among ``records``."""
        private = sorted(records)
        if not private or not self.here:
            return []
        if self.chosen not in private:
            self.chosen = private[int(self._random.choice(len(private), 1)[0])]
        return [index for index, key in enumerate(keys) if key == self.chosen]

    def check_for(self, samples: Samples, scale: float) -> ReplayCheck | None:
        """What is to see the gradients of the batch that the last forward was on; None where the chosen record is not in it.

        Raises PrivacyError where private samples came by another way than the data preprocessor, or lost their record on it.
        """
        if samples.num_records and not self._began:
            raise PrivacyError(
                'train_step did not call self.data_preprocessor inside optim_wrapper.optim_context, so that no record can be '
                'replayed alone: write it as mmengine.model.BaseModel.train_step'
            )
        if self._began and self._keys != {*samples.keys}:
            raise PrivacyError(
                'the data samples that come to the head do not name the records that came to model.data_preprocessor, so that one '
                'record could count as several: change data samples in place, or keep their metainfo (dp_record, dp_weight)'
            )
        if self._alone is None or self._done:
            return None
        return ReplayCheck(self._alone, self._indices, scale)

    def judge(
        self,
        check: ReplayCheck,
        dtype: torch.dtype,
        params: Mapping[str, nn.Parameter],
        model: Any,
        run_among: RunAmong,
    ) -> None:
        """Sets ``fault`` if the two gradients are farther apart than rounding explains.

        Alone, a record runs through other kernels than in a batch: rounding that moves one ReLU across its kink can change the
        gradient of a small model by a few percent. If forwards have a fixed shape, a distance counts only if it shows there too.

        Args:
            check: has seen the gradients among other records.
            dtype: of the forward.
            params: what is trained, by name, in the engine's order.
            model: the pose estimator.
            run_among: gives the gradients of a batch to a collector, as the step did.
        """
        self._done, self._alone = True, None
        device = next(model.parameters()).device
        limit = tolerance(dtype, device)
        gap = check.gap(limit / 30)
        if dtype == torch.float16 and not check.alone_is_finite:
            gap = 0.0  # it overflowed alone; the rules that clip it work in float32
        if self._tape.fault:
            self.fault = f'one record could not be replayed alone: {self._tape.fault}'
        elif not gap <= limit and not self._agrees_in_one_shape(check.scale, [*params.values()], run_among):
            worst = check.worst()
            where = self._where(model, limit)
            where = where or ('the loss' if worst is None else f'the backward at {[*params][worst]}')
            self.fault = (
                f'the gradient of one record is not the same alone and among other records, from {where} on, by more '
                f'than the {limit:g} of its length that rounding explains'
            )
        self._batches = None

    def _agrees_in_one_shape(self, scale: float, params: Sequence[nn.Parameter], run_among: RunAmong) -> bool:
        """Whether the record has one gradient among the others, and among blank samples in other places of as large a batch.

        False where forwards have no fixed shape: then what follows the shape is not the same in neighbouring data sets. With the
        random numbers of the first look, so that a layer that mixes records at random mixes the same ones again.
        """
        before, after = self._before, self._after
        assert self._batches is not None and before is not None and after is not None
        (part, batch), own = self._batches, list(self._indices)
        total = len(batch['inputs'])
        if not self.fixed_shape or len(own) == total:
            return False
        blank = padded(part, total)
        start = 0 if own[0] else total - len(own)
        blank = {key: [*values[-start:], *values[:-start]] if start else values for key, values in blank.items()}
        places = range(start, start + len(own))

        def run(batch: dict, samples: Sequence[int], collector: Collector) -> None:
            with numbers_from(before), torch_numbers_from(after), self._tape.play(samples, total):
                run_among(batch, collector)

        self._running = True
        try:
            alone = SampleSum(params, places)
            run(blank, places, alone)
            check = ReplayCheck([x if x.numel() else None for x in alone.total], own, scale)
            run(batch, own, check)
            return not self._tape.fault and check.gap() <= same_shape_limit(params[0].device)
        except torch.OutOfMemoryError:
            raise
        except (*_FAILURES, PrivacyError):
            return False
        finally:
            self._running = False

    def _where(self, model: Any, limit: float) -> str | None:
        """The first module that gives the record something else in the batch than alone; None if all give the same."""
        assert self._batches is not None and self._before is not None
        (part, batch), before = self._batches, self._before
        own = range(len(part['inputs']))

        def alone() -> None:
            with numbers_from(before), self._tape.play(own, len(own)):
                model(**prepared(model, part), mode='loss')

        def among() -> None:
            with numbers_from(before), self._tape.play(self._indices, len(batch['inputs'])):
                model(**prepared(model, batch), mode='loss')

        self._running = True
        try:
            with torch.no_grad():
                inputs = [prepared(model, data)['inputs'] for data in (part, batch)]
                if not torch.allclose(inputs[0], inputs[1][list(self._indices)], rtol=limit, atol=1e-5, equal_nan=True):
                    return 'the data_preprocessor'
                return first_difference(model, alone, among, self._indices, limit)
        except torch.OutOfMemoryError:
            raise
        except _FAILURES:
            return None
        finally:
            self._running = False


def prepared(model: Any, batch: dict) -> dict:
    """What the model takes of a collated batch, which stays as it is."""
    return model.data_preprocessor(copy.deepcopy(batch), True)
