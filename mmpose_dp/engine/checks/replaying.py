"""Runs one record of a logical batch alone, from the data preprocessor on, and has the two gradients compared.

Must not change what the batch gives: the record alone leaves nothing behind but its gradient.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmpose_dp.gradients.engine import Engine
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.noise import RandomSource
from mmpose_dp.privacy.records import Samples

from .replay import Halved, RandomTape, ReplayCheck, first_difference, tolerance

_BATCH = 'a batch must be the dict of lists, inputs and data_samples, that collate_samples makes'


class Replay:
    """Of each logical batch, one private record that is chosen at random is run alone before the batch that it is in.

    Args:
        random: chooses the record where PrivateTrainLoop has not.

    Attributes:
        chosen: the record, by ``dp_record``, or None: one of the first micro-batch that has private records. Where the chosen one
            could not be read, another of its micro-batch takes its place.
        here: whether the chosen record's micro-batch is the one at hand.
        fault: why this logical batch must not be released; empty if nothing is wrong.
    """

    def __init__(self, random: RandomSource) -> None:
        self._random = random
        self.forget()

    def expect(self, record: int | None) -> None:
        """The chosen record is in the next micro-batch, or, for None, in another one."""
        self.here = record is not None
        self.chosen = record if self.here else self.chosen

    def forget(self) -> None:
        """Begins a logical batch."""
        self.chosen: int | None = None
        self.here = True
        self.fault = ''
        self._done = self._running = self._began = False
        self._alone: list[Halved | None] | None = None
        self._indices: Sequence[int] = ()
        self._tape = RandomTape()
        self._batches: tuple[dict, dict] | None = None  # the record's, and the one that it is in

    @contextmanager
    def armed(self, model: nn.Module, run_alone: Callable[[dict], list[Halved | None]]) -> Iterator[None]:
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

    def _look(self, batch: Any, run_alone: Callable[[dict], list[Halved | None]], stack: ExitStack) -> None:
        if self._done or self.fault:
            return
        if not isinstance(batch, dict) or {type(batch.get(key)) for key in ('inputs', 'data_samples')} != {list}:
            raise PrivacyError(f'model.data_preprocessor got {type(batch).__name__}: {_BATCH}')
        indices = self._samples_of_chosen(batch)
        if not indices:
            return
        part = {key: [values[index] for index in indices] for key, values in batch.items()}
        self._batches, self._indices, tape = (part, batch), indices, RandomTape()
        states = random.getstate(), np.random.get_state()
        self._running = True
        try:
            with tape:
                self._alone = run_alone(copy.deepcopy(part))
        except torch.OutOfMemoryError:
            raise
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # its message may hold the record's values
            self.fault = f'the model does not run on one record alone ({type(error).__name__})'
        finally:
            self._running = False
            random.setstate(states[0])
            np.random.set_state(states[1])
        self._tape = tape
        if not tape.is_empty:
            stack.enter_context(tape.play(indices, len(batch['inputs'])))

    def _samples_of_chosen(self, batch: dict) -> list[int]:
        """The places of the chosen record's samples in a batch; none if it is not in it."""
        keys = [sample.metainfo.get('dp_record', -1 - index) for index, sample in enumerate(batch['data_samples'])]
        private = sorted({key for key in keys if key is not None})
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

    def judge(self, check: ReplayCheck, dtype: torch.dtype, names: Sequence[str], model: nn.Module) -> None:
        """Sets ``fault`` if the two gradients are farther apart than rounding explains."""
        self._done, self._alone = True, None
        device = next(model.parameters()).device
        limit = tolerance(dtype, device)
        gap = check.gap(limit / 30)
        if dtype == torch.float16 and not check.alone_is_finite:
            gap = 0.0  # it overflowed alone; the rules that clip it work in float32
        if self._tape.fault:
            self.fault = f'one record could not be replayed alone: {self._tape.fault}'
        elif not gap <= limit:
            worst = check.worst()
            where = self._where(model, limit) or ('the loss' if worst is None else f'the backward at {names[worst]}')
            self.fault = (
                f'the gradient of one record is not the same alone and among other records, from {where} on, by more '
                f'than the {limit:g} of its length that rounding explains'
            )
        self._batches = None

    def _where(self, model: nn.Module, limit: float) -> str | None:
        """The first module that gives the record something else in the batch than alone; None if all give the same."""
        assert self._batches is not None
        part, batch = self._batches
        tape = RandomTape()

        def run(data: dict) -> None:
            model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')

        def alone() -> None:
            with tape:
                run(part)

        def among() -> None:
            with tape.play(self._indices, len(batch['inputs'])):
                run(batch)

        self._running = True
        try:
            with torch.no_grad():
                inputs = [model.data_preprocessor(copy.deepcopy(data), True)['inputs'] for data in (part, batch)]
                if not torch.allclose(inputs[0], inputs[1][list(self._indices)], rtol=limit, atol=1e-5, equal_nan=True):
                    return 'the data_preprocessor'
                return first_difference(model, alone, among, self._indices, limit)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            return None
        finally:
            self._running = False


def gradient_alone(model: nn.Module, engine: Engine, part: dict, loss_of: Callable[[], Tensor]) -> list[Halved | None]:
    """The gradient of one record's loss by plain autograd: one per parameter of the engine, or None for zero.

    Args:
        model: the pose estimator.
        engine: whose capture is switched off meanwhile.
        part: the record's collated samples.
        loss_of: the loss of the last forward, weighted and scaled as among other records.
    """
    with engine.paused():
        model(**model.data_preprocessor(part, True), mode='loss')
        loss = loss_of()
        found = torch.autograd.grad(loss, engine.params, allow_unused=True)
    torch.clear_autocast_cache()  # the casts made here must not serve the batch, whose graph is another one
    return [Halved.of(x) if x is not None and x.numel() else None for x in found]
