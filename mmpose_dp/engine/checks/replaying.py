"""Runs one record of a logical batch alone, from the data preprocessor on, and has the two gradients compared.

Must not change what the batch gives: the record alone leaves nothing behind but its gradient.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpose_dp.gradients.blocks import SampleSum
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.noise import RandomSource
from mmpose_dp.privacy.records import PADDING, Collector, Samples

from ..padding import padded
from .replay import Halved, RandomTape, ReplayCheck, first_difference, tolerance

# The largest relative distance of two gradients from forwards of one shape, where kernels are the same: on a CPU, and elsewhere,
# where some kernels add in any order.
SAME_SHAPE, SAME_SHAPE_ELSEWHERE = 1e-5, 1e-3
_FAILURES = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
_BATCH = 'a batch must be the dict of lists, inputs and data_samples, that collate_samples makes'


RunAlone = Callable[[dict], list[Halved | None]]
RunAmong = Callable[[dict, Collector], None]


class Replay:
    """Of each logical batch, one private record that is chosen at random is run alone before the batch that it is in.

    Args:
        random: chooses the record where PrivateTrainLoop has not.

    Attributes:
        chosen: the record, by ``dp_record``, or None: one of the first micro-batch that has private records. Where the chosen one
            could not be read, another of its micro-batch takes its place.
        here: whether the chosen record's micro-batch is the one at hand.
        fixed_shape: whether forwards have one shape, whatever was sampled, so that what follows the shape reveals nothing.
        fault: why this logical batch must not be released; empty if nothing is wrong.
    """

    fixed_shape = False

    def __init__(self, random: RandomSource) -> None:
        self._random = random
        self._torch = _torch_states()  # where torch's random numbers of the batch with the record begin
        self.chosen: int | None = None
        self.here = True
        self.forget()

    def expect(self, record: int | None) -> None:
        """The chosen record is in the next micro-batch, or, for None, in another one; all have ``fixed_shape`` from now on."""
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
        self._alone: list[Halved | None] | None = None
        self._indices: Sequence[int] = ()
        self._tape = RandomTape()  # the record's random numbers of torch
        self._states = _states()  # and where those of Python and NumPy begin
        self._batches: tuple[dict, dict] | None = None  # the record's, and the one that it is in

    @contextmanager
    def armed(self, model: Any, run_alone: RunAlone) -> Iterator[None]:
        """Inside, a batch that comes to the model's data preprocessor is looked through for the chosen record.

        Args:
            model: the pose estimator.
            run_alone: the gradient of the loss of a batch, which is one record's, with capture switched off.
        """
        self._began, self._alone, stack = False, None, ExitStack()

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._running:
                self._began = True
                self._look(args[0] if args else kwargs.get('data'), run_alone, stack)

        handle = model.data_preprocessor.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with stack:
                yield
        finally:
            handle.remove()

    def _look(self, batch: Any, run_alone: RunAlone, stack: ExitStack) -> None:
        if self._done or self.fault:
            return
        if not isinstance(batch, dict) or {type(batch.get(key)) for key in ('inputs', 'data_samples')} != {list}:
            raise PrivacyError(f'model.data_preprocessor got {type(batch).__name__}: {_BATCH}')
        indices = self._samples_of_chosen(batch)
        if not indices:
            return
        part = {key: [values[index] for index in indices] for key, values in batch.items()}
        self._batches, self._indices, tape = (part, batch), indices, RandomTape()
        self._states, self._running = _states(), True
        try:
            with _numbers_from(self._states), tape:
                self._alone = run_alone(part)
        except torch.OutOfMemoryError:
            raise
        except _FAILURES as error:
            # its message may hold the record's values
            self.fault = f'the model does not run on one record alone ({type(error).__name__})'
        finally:
            self._running = False
        self._tape, self._torch = tape, _torch_states()
        if not tape.is_empty:
            stack.enter_context(tape.play(indices, len(batch['inputs'])))

    def _samples_of_chosen(self, batch: dict) -> list[int]:
        """The places of the chosen record's samples in a batch; none if it is not in it."""
        keys = [sample.metainfo.get('dp_record', -1 - index) for index, sample in enumerate(batch['data_samples'])]
        private = sorted({key for key in keys if key is not None and key != PADDING})
        if not private or not self.here:
            return []
        if self.chosen not in private:
            self.chosen = private[int(self._random.choice(len(private), 1)[0])]
        return [index for index, key in enumerate(keys) if key == self.chosen]

    def check_for(self, samples: Samples, scale: float) -> ReplayCheck | None:
        """What is to see the gradients of the batch that the last forward was on; None where the chosen record is not in it.

        Raises PrivacyError where private samples came by another way than the data preprocessor.
        """
        if samples.num_records and not self._began:
            raise PrivacyError(
                'train_step did not call self.data_preprocessor inside optim_wrapper.optim_context, so that no record can be '
                'replayed alone: write it as mmengine.model.BaseModel.train_step'
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

        Alone, a record meets other kernels than in a batch: rounding that tips one ReLU over its kink can move the gradient of a
        small model by a few percent. If forwards have a fixed shape, a distance counts only if it is still there in that shape.

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
        assert self._batches is not None
        (part, batch), own = self._batches, list(self._indices)
        total = len(batch['inputs'])
        if not self.fixed_shape or len(own) == total:
            return False
        blank = padded(part, total)
        start = 0 if own[0] else total - len(own)
        blank = {key: [*values[-start:], *values[:-start]] if start else values for key, values in blank.items()}
        places = range(start, start + len(own))

        def run(batch: dict, samples: Sequence[int], collector: Collector) -> None:
            with _numbers_from(self._states), _torch_numbers_from(self._torch), self._tape.play(samples, total):
                run_among(batch, collector)

        self._running = True
        try:
            alone = SampleSum(params, places)
            run(blank, places, alone)
            check = ReplayCheck([x if x.numel() else None for x in alone.total], own, scale)
            run(batch, own, check)
            limit = SAME_SHAPE if params[0].device.type == 'cpu' else SAME_SHAPE_ELSEWHERE
            return not self._tape.fault and check.gap() <= limit
        except torch.OutOfMemoryError:
            raise
        except (*_FAILURES, PrivacyError):
            return False
        finally:
            self._running = False

    def _where(self, model: Any, limit: float) -> str | None:
        """The first module that gives the record something else in the batch than alone; None if all give the same."""
        assert self._batches is not None
        part, batch = self._batches
        own = range(len(part['inputs']))

        def alone() -> None:
            with _numbers_from(self._states), self._tape.play(own, len(own)):
                model(**prepared(model, part), mode='loss')

        def among() -> None:
            with _numbers_from(self._states), self._tape.play(self._indices, len(batch['inputs'])):
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


def _states() -> tuple[Any, Any]:
    """The states of the random generators of Python and NumPy."""
    return random.getstate(), np.random.get_state()


def _torch_states() -> tuple[Tensor, Tensor | None]:
    """The states of torch's generators: the CPU's, and that of the GPU at work."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


@contextmanager
def _torch_numbers_from(states: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Inside, torch's generators go on from ``states``; afterwards from where they were."""
    with torch.random.fork_rng():
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1])
        yield


@contextmanager
def _numbers_from(states: tuple[Any, Any]) -> Iterator[None]:
    """Inside, the generators of Python and NumPy go on from ``states``; afterwards from where they were."""
    before = _states()
    random.setstate(states[0])
    np.random.set_state(states[1])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
