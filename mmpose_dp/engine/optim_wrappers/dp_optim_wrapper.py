"""The optimizer wrapper that makes a training step private.

It gives the per-sample gradients of a model to ``mmpose_dp.privacy.mechanism``, which clips, sums, counts, adds noise and divides.
To what the mechanism releases, the wrapper adds the public gradient; the optimizer then moves the parameters. Must not clip, add
noise or divide by itself, and must not hand out anything else that is computed from private samples.
"""

import copy
import math
import random
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from mmpose.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mmpose_dp.extras.clipping_variants import STABILITY
from mmpose_dp.extras.device_noise import DeviceRandomSource
from mmpose_dp.extras.schedule import Schedule
from mmpose_dp.gradients.blocks import PerSampleGradients, SampleSum
from mmpose_dp.gradients.engine import Engine
from mmpose_dp.models import has_batch_statistics, public_statistics, refuse_batch_statistics, unwrapped
from mmpose_dp.models.heads.private_head import SampleLosses, labels_in
from mmpose_dp.privacy.errors import PrivacyError, UnsupportedModelError
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.noise import RandomSource
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.records import Collector, Samples
from mmpose_dp.processes import several_processes, sum_over_processes
from mmpose_dp.tensors import of_samples, parts_of

from ..checks.attributes import Attributes
from ..checks.fingerprint import Fingerprint
from ..checks.own_state import refuse_other_state
from ..checks.random_tape import States, numbers_from, torch_numbers_from
from ..checks.replay import HalfPrecision, Replay, ReplayCheck, prepared, same_shape_limit
from .stepping import SteppingOptimWrapper
from .validation import build_mechanism, check_settings, from_settings, private_head, projector_from


@OPTIM_WRAPPERS.register_module()
class DPOptimWrapper(SteppingOptimWrapper):
    """DP-SGD, Projected DP-SGD, Feature DP and their hybrid as an mmengine optimizer wrapper.

    One logical step adds up the clipped gradients of the private records, adds N(0, (noise_multiplier * max_grad_norm)^2)
    and divides by ``expected_batch_size`` (Abadi et al. 2016); with a projector the k coordinates take the place of the
    p gradient entries; ``public_weight`` times the mean gradient of the public samples is added.

    Args:
        optimizer: any torch optimizer; it gets the private gradient in ``param.grad``.
        max_grad_norm: C, the clipping norm: one record's gradient has at most this L2 norm in the sum.
        noise_multiplier: sigma, in units of C. None: PrivacyBudgetHook calibrates it.
        expected_batch_size: B, what the sum is divided by. None: taken from the plan.
        projector: None, or the arguments of :class:`mmpose_dp.privacy.Projector`, or of
            :class:`mmpose_dp.extras.kronecker.KroneckerProjector` with ``type='KroneckerProjector'``.
        public_weight: w, the weight of the public gradient. 0 ignores public samples.
        clipping: 'flat' (to C), 'automatic' (every record weighs about C: Bu et al. 2023), 'adaptive' (C begins at
            ``max_grad_norm`` and moves to where half of the records are clipped: Andrew et al. 2021) or 'per-parameter' (each of
            P parameters to C / sqrt(P); not with ``project-then-clip``, which clips coordinates).
        engine: 'auto', 'rules' or 'loop' (see mmpose_dp.gradients).
        schedule: None, or the arguments of :class:`mmpose_dp.extras.schedule.Schedule`: how sigma and C change over the training.
        amp_dtype: None, 'bfloat16' or 'float16' to run the forward in mixed precision; norms and sums stay in float32.
        loss_scale: what the losses are multiplied by against underflow, a fixed number (1024 with 'float16'). A record
            that overflows contributes nothing; a step whose noised update is not finite is skipped, and counted.
        secure_mode: deprecated, and without effect: all noise withstands attacks on floating-point numbers
            (mmpose_dp/privacy/noise.py).
        debug_seed: for tests only; the run is then NOT PRIVATE.

    Examples:
        >>> model = torch.nn.Linear(2, 1)  # or a model of MMPose
        >>> wrapper = DPOptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0), max_grad_norm=0.1, noise_multiplier=0.0,
        ...                          expected_batch_size=4)

        It moves the parameters by -(sum of clipped gradients) / 4 (skipped where this is tested: it needs a pose model and images):

        >>> model.train_step(data, wrapper)  # doctest: +SKIP
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_grad_norm: float,
        noise_multiplier: float | None = None,
        expected_batch_size: int | None = None,
        projector: dict | Projector | None = None,
        public_weight: float = 0.0,
        clipping: str = 'flat',
        engine: str = 'auto',
        schedule: dict | Schedule | None = None,
        amp_dtype: str | None = None,
        loss_scale: float | None = None,
        secure_mode: bool | None = None,
        debug_seed: int | None = None,
        **plain_settings: Any,
    ) -> None:
        check_settings(
            plain_settings,
            max_grad_norm=max_grad_norm,
            noise_multiplier=noise_multiplier,
            expected_batch_size=expected_batch_size,
            public_weight=public_weight,
            amp_dtype=amp_dtype,
            loss_scale=loss_scale,
        )
        super().__init__(optimizer)
        if secure_mode is not None:
            warnings.warn('optim_wrapper.secure_mode is deprecated: all noise is secure. Take it out', stacklevel=2)
        self.params = [p for group in optimizer.param_groups for p in group['params'] if p.requires_grad]
        self.trained = self.params
        self.schedule = from_settings(Schedule, schedule, 'schedule')
        self.public_weight = public_weight
        self.engine_kind = engine
        self.amp_dtype = None if amp_dtype is None else getattr(torch, amp_dtype)
        self.loss_scale = loss_scale or (1024.0 if amp_dtype == 'float16' else 1.0)
        self.mechanism = build_mechanism(
            clipping,
            self.schedule,
            params=self.params,
            max_grad_norm=max_grad_norm,
            noise_multiplier=noise_multiplier,
            expected_batch_size=expected_batch_size,
            projector=projector_from(projector),
            loss_scale=self.loss_scale,
            random=(DeviceRandomSource if any(p.is_cuda for p in self.params) else RandomSource)(debug_seed),
        )
        self.adaptive_norm = getattr(self.mechanism, 'adaptive_norm', None)
        self._lengthened = STABILITY if clipping == 'automatic' else math.inf  # shorter gradients are lengthened
        self._layers_random = RandomSource(debug_seed)
        self._model: Any = None
        self._exposed = False  # whether metrics of private samples are let through, outside the guarantee
        self.replay = Replay(RandomSource(debug_seed))
        self._fingerprint: Fingerprint | None = None  # the model after the last step, or before the first
        self.loggable_metrics: dict[str, float] = {}  # what may be logged of the last step
        self.micro_batches = 0  # that update_params has added
        self.forget_batch()

    def forget_batch(self) -> None:
        """Drops the logical batch, also an unfinished one that an interruption left: a record counts once in a sum."""
        self.mechanism.forget()
        self._public_sum: list[Tensor] | None = None
        self._public_count = 0
        # for each micro-batch, whether its loss was the head's only; read at the end
        self._own_losses: list[Tensor] = []
        self._attributes: Attributes | None = None  # of the model, before the first forward of this logical batch
        self._seen: dict[str, list[Tensor]] = {}  # what may be logged, by name, of each micro-batch
        self.replay.forget()
        self.accumulating = False  # set by PrivateTrainLoop: more micro-batches of this logical batch follow

    @property
    def projector(self) -> Projector | None:
        """The mechanism's."""
        return self.mechanism.projector

    @property
    def ledger(self) -> Ledger:
        """The mechanism's: what has been spent."""
        return self.mechanism.ledger

    @property
    def plan(self) -> PrivacyPlan | None:
        """The mechanism's: what was promised."""
        return self.mechanism.plan

    # ---- the model -------------------------------------------------------------------------------------------------
    def prepare(self, model: nn.Module, expose_private_metrics: bool = False) -> None:
        """Finds the private head and builds the per-sample engine. Raises PrivacyError on a model it cannot serve.

        With ``expose_private_metrics`` losses and accuracies of private samples are released too, outside the guarantee.
        """
        refuse_other_state(model)
        self._head = private_head(model)
        self._head.compute_acc = self._exposed = expose_private_metrics
        self._norms = [(n, m) for n, m in model.named_modules() if has_batch_statistics(m)]
        refuse_batch_statistics(self._norms)
        if getattr(getattr(model, 'data_preprocessor', None), 'batch_augments', None):
            raise PrivacyError('model.data_preprocessor.batch_augments can mix records: write batch_augments=None')
        for module in model.modules():  # checkpointing would save nothing: the layers' inputs are kept anyway
            if getattr(module, 'with_cp', False):
                setattr(module, 'with_cp', False)  # noqa: B010  (mypy takes it for a tensor)
        self.engine = Engine(model, self.params, self._head.called_per_sample(), self.engine_kind)
        names = {id(param): name for name, param in model.named_parameters()}
        self._named = {names[id(param)]: param for param in self.params}
        self._model, self._fingerprint = model, None

    def should_sync(self) -> bool:
        """Never: clipped sums are added over ranks here, gradients are not averaged by DDP."""
        return False

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Counts the private step that an error inside ends: that a record could end the training is a release too."""
        try:
            yield
        except (Exception, SystemExit):  # a layer that calls sys.exit() too
            if not self.public_only:
                self.mechanism.count()
            self.forget_batch()
            raise

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Captures what per-sample gradients need from a step's forward, which is inside."""
        with self._counted(), self._captured(model):
            if not self.public_only and self._attributes is None:
                self._attributes = Attributes(self._model)
            yield

    @contextmanager
    def _captured(self, model: nn.Module) -> Iterator[None]:
        """As ``optim_context``, for forwards of no step too."""
        if model is not self._model and (core := unwrapped(model)) is not self._model:
            self.prepare(core)
        if not self.public_only:
            refuse_batch_statistics(self._norms)
        if not self.public_only and self._fingerprint is None:
            self._fingerprint = Fingerprint(self._model)
        # of dropout and other random layers: under mmengine's seed, which checkpoints hold, one more record would change the
        # numbers of the others in a known way
        seed = int(self._layers_random.uint64(1)[0])
        torch.manual_seed(seed)
        others = random.Random(seed).getstate(), np.random.RandomState([seed % 2**32, seed >> 32]).get_state()
        with numbers_from(others), super().optim_context(model), self._mixed_precision():
            if self.public_only:
                yield
                return
            with self.engine.capture(), self.replay.armed(self._model, self._gradient_alone):
                yield

    def _mixed_precision(self) -> AbstractContextManager[Any]:
        device = self.params[0].device.type
        return torch.autocast(device, dtype=self.amp_dtype) if self.amp_dtype else nullcontext()

    def public_gradients(self, batch: dict, total: list[Tensor] | None = None) -> list[Tensor]:
        """Per-sample gradients of a collated batch of public samples: (samples, *shape) float32, one tensor per parameter.

        ``total`` are zeros of these shapes that are filled instead, of any floating dtype.
        """
        assert self._model is not None
        with self._captured(self._model):
            self._model(**self._model.data_preprocessor(batch, True), mode='loss')
        last = self._taken()
        if last.samples.num_records:
            raise PrivacyError('public_gradients got a private record: give it public samples only')
        gradients = PerSampleGradients(self.params, range(len(last.losses)), self.loss_scale, total)
        self.engine.backward(self._scaled(last), gradients)
        return gradients.total

    def _gradient_alone(self, part: dict) -> list[HalfPrecision | None]:
        """The gradient of one record's scaled loss by plain autograd, without capture: one per parameter, or None for zero."""
        with self.engine.paused():
            self._model(**prepared(self._model, part), mode='loss')
            loss = torch.stack(self._scaled(self._taken())).sum()
            found = torch.autograd.grad(loss, self.params, allow_unused=True)
        torch.clear_autocast_cache()  # the casts made here must not serve the batch, whose graph is another one
        return [HalfPrecision.of(x) if x is not None and x.numel() else None for x in found]

    def rehearse(self, batch: dict) -> None:
        """Runs the engine's checks on a batch of several blank samples, in full precision, before any step is counted.

        The first private batches are checked again. Raises PrivacyError if samples mix, if the per-sample gradients do not add up
        to autograd's, or if the model remembers samples in plain attributes.
        """
        several, before = len(batch['inputs']) > 1, States.now()
        second = SampleSum(self.params, [1] if several else [])
        self._gradients_of(batch, second)
        self._refuse_memory(batch)
        if several and not self.engine.one_at_a_time:
            self._refuse_slight_mixing(batch, second.total, before)
        self.engine.look_again()

    def _refuse_slight_mixing(self, batch: dict, gradient: list[Tensor], before: States) -> None:
        """Raises UnsupportedModelError where other pictures and labels beside the second sample change its ``gradient``.

        The replay of each step lets pass what may be rounding, of forwards of two shapes. Here shapes are the same, and so are the
        random numbers, which begin ``before``. What is slight for each record is much for all of them together.
        """
        other: dict[str, list] = copy.deepcopy(batch)
        for place, (picture, sample) in enumerate(zip(batch['inputs'], other['data_samples'])):
            if place != 1:
                other['inputs'][place] = (picture > 127).to(picture.dtype) * 255
                for label in labels_in(sample):
                    label.copy_(label / 2)
        check = ReplayCheck(gradient, [1], torch.finfo(torch.float32).tiny)
        with numbers_from(before), torch_numbers_from(before):
            self._gradients_of(other, check)
        gap, worst = check.gap(), check.worst()
        if gap > same_shape_limit(self.params[0].device) and worst is not None:
            raise UnsupportedModelError(
                f'the gradient of a sample at {[*self._named][worst]} is another one if other samples are beside it, by {gap:.1g} '
                'of its length, so records depend on one another: let every layer treat each sample by itself'
            )

    def _gradients_of(self, batch: dict, *collectors: Collector) -> None:
        """Gives the gradients of a batch, in full precision, to the collectors."""
        with torch.enable_grad():
            with self.engine.capture():
                self._model(**prepared(self._model, batch), mode='loss')
            self.engine.backward(self._scaled(self._taken()), *collectors)

    def norms_alone(self, batch: dict) -> list[float]:
        """The norm of the gradient of each blank sample by plain autograd; NaN or infinite if the loss or the gradient is."""
        with torch.enable_grad(), self.engine.paused():
            self._model(**prepared(self._model, batch), mode='loss')
            norms = []
            for loss in self._taken().losses:
                grads = torch.autograd.grad(loss, self.params, retain_graph=True, allow_unused=True)
                squares = [float(x.double().square().sum()) for x in grads if x is not None]
                norms.append(math.sqrt(sum(squares)) if bool(loss.isfinite()) else math.nan)
        return norms

    def _refuse_memory(self, batch: dict) -> None:
        """Raises UnsupportedModelError where another forward changes what the model holds in plain attributes."""
        before, other = Attributes(self._model, numbers=True), {**batch, 'inputs': [x // 2 for x in batch['inputs']]}
        with torch.no_grad():
            self._model(**prepared(self._model, other), mode='loss')
        self._taken()
        kept = before.changed(self._model)
        if kept:
            raise UnsupportedModelError(_remembers(kept))

    def _gradients_among(self, batch: dict, *collectors: Collector) -> None:
        """Gives the gradients of a batch, as in a step, to the collectors."""
        with self._mixed_precision(), self.engine.capture():
            self._model(**prepared(self._model, batch), mode='loss')
        self.engine.backward(self._scaled(self._taken()), *collectors)

    def _taken(self) -> SampleLosses:
        """What the last forward of the private head gave, once."""
        if self._model is None:
            raise PrivacyError('update_params was called without a training forward of the private head before it')
        return self._head.take()

    def _scaled(self, last: SampleLosses) -> list[Tensor]:
        """The losses that the backward starts from: times the loss scale and the samples' weights."""
        weights = last.samples.weights or [1.0] * len(last.losses)
        factors = [self.loss_scale * weight for weight in weights]
        return [loss.float() if x == 1 else loss.float() * x for loss, x in zip(last.losses, factors)]

    # ---- the step --------------------------------------------------------------------------------------------------
    def begin_epoch(self, model: nn.Module, public_only: bool) -> None:
        """Drops an unfinished logical batch; the epoch's steps are on public samples alone, or private."""
        self.forget_batch()
        self.train_on(public_only)
        public_statistics(model, public_only)

    def begin_micro_batch(self, is_last: bool, replayed: int | None) -> None:
        """Says what the next forward is of; PrivateTrainLoop calls it.

        Args:
            is_last: whether it ends its logical batch.
            replayed: the private record in it that is to be replayed alone; None if that one is in another micro-batch.
        """
        self.accumulating = not is_last
        self.replay.expect(replayed)

    def update_params(self, loss: Tensor, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        """Adds one micro-batch to the logical batch and, unless ``accumulating``, ends the logical step.

        The gradients come from the head's losses per sample. ``loss`` must be their mean: the model may add no other loss.
        """
        with self._counted():
            last = self._taken()
            values = torch.stack(last.losses).detach().float()
            # of the size of all losses, which may cancel or be too large for float32: a record must not end the training
            size = values.abs().mean()
            self._own_losses.append(
                (loss.detach().float() - values.mean()).abs().le(1e-2 * size).logical_or(~size.isfinite())
            )
            (self._add_public if self.public_only else self._add)(last)
            self._note(values, last)
        self.micro_batches += 1
        if not self.accumulating:
            self.finish_step(step_kwargs, zero_kwargs)

    def _add(self, last: SampleLosses) -> None:
        """Adds the private samples' clipped sum, and the public samples' plain one, to those of the logical batch."""
        samples = last.samples
        private = self.mechanism.collector(samples) if samples.num_records else None
        wanted = samples.public if self.public_weight else samples.public[:0]
        # the last bits of such a public sum, which no noise hides, would reveal how many others there are
        if private is not None and len(wanted):
            raise PrivacyError(
                'a public sample is in one forward with private ones: call train_step for private and public samples separately'
            )
        # continues the sum so far: another sum would need the memory of all parameters again
        public = SampleSum(self.params, wanted, self.loss_scale, self._public_sum) if len(wanted) else None
        # longer gradients are shortened to about this in the current step
        longest = min(self.mechanism.noise_and_norm()[1], self._lengthened)
        check = self.replay.check_for(samples, longest * self.loss_scale)
        collectors = (collector for collector in (private, public, check) if collector is not None)
        self._backward(self._scaled(last), samples, *collectors)
        if self.engine.one_at_a_time and samples.num_records + (len(samples.public) > 0) > 1:
            raise PrivacyError(
                f'{self.engine}: give model.train_step one record at a time, its samples together, or call rehearse before'
            )
        if check is not None:
            dtype = self.amp_dtype or self.params[0].dtype
            self.replay.judge(check, dtype, self._named, self._model, self._gradients_among)
        if private is not None:
            self.mechanism.add(private)
        if public is not None:
            self._public_sum = public.total
            self._public_count += len(wanted)

    def _backward(self, losses: list[Tensor], samples: Samples, *collectors: Collector) -> None:
        """Gives the gradients of a step's samples to the collectors; an audit replaces those of its canaries here."""
        self.engine.backward(losses, *collectors)

    def _add_public(self, last: SampleLosses) -> None:
        """Adds the sum of the gradients in a step on public samples only: plain training needs no per-sample gradients."""
        if last.samples.num_records:
            raise PrivacyError(
                'a private record is in a step of a public epoch: give model.train_step public samples only'
            )
        loss = torch.stack(last.losses).float().sum() * self.loss_scale
        found = torch.autograd.grad(loss, self.trained, allow_unused=True)
        part = [
            torch.zeros_like(p, dtype=torch.float32) if g is None else g.float() for p, g in zip(self.trained, found)
        ]
        part = [*torch._foreach_div(part, self.loss_scale)]  # not in place: autograd may give one tensor twice
        if self._public_sum is None:
            self._public_sum = part
        else:
            torch._foreach_add_(self._public_sum, part)
        self._public_count += len(last.samples.public)

    def finish_step(self, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        """Ends a logical batch: also right when it was empty."""
        with self._counted():  # a check may fail too, for example if memory runs out
            fault = self._fault()
        if self.public_only:
            if fault:
                raise PrivacyError(fault)
            update, weight = [torch.zeros_like(p, dtype=torch.float32) for p in self.trained], 1.0
        else:
            update = self.mechanism.release(fault)
            weight = self.public_weight
        if weight:
            public = self._public_mean()
            torch._foreach_mul_(public, weight)
            torch._foreach_add_(update, public)
        for param, gradient in zip(self.trained, update):
            param.grad = gradient.to(param.dtype)
        # an overflow is skipped as in AmpOptimWrapper. The noised update alone decides: a private sample must not
        means = {name: torch.cat(values).mean().float() for name, values in self._seen.items()}
        # one read from the device
        finite, *values = torch.stack([all_finite(update).float(), *means.values()]).tolist()
        if finite:
            if self.public_only:
                self.public_step()
            else:
                self.optimizer.step(**(step_kwargs or {}))
        self._global_step += 1
        self.optimizer.zero_grad(**(zero_kwargs or {}))
        if self._model is not None and not self.public_only:
            self._fingerprint = Fingerprint(self._model)
        self._inner_count += 1
        self.loggable_metrics = dict(zip(means, values))
        if self.adaptive_norm is not None:
            self.loggable_metrics['max_grad_norm'] = self.adaptive_norm.max_grad_norm
        self.forget_batch()

    def _fault(self) -> str:
        """Why the logical batch must not be released, in words; empty if nothing is wrong. One read from the device."""
        if self.replay.fault:
            return self.replay.fault
        kept = '' if self._attributes is None else self._attributes.changed(self._model)
        if kept:
            return _remembers(kept)
        looks = list(self._own_losses)
        if not self.public_only and self._fingerprint is not None and self._model is not None:
            looks.append(self._fingerprint.is_that_of(self._model).to(self.params[0].device))
        if not looks or bool(torch.stack(looks).all()):
            return ''
        name = '' if self.public_only else self.changed_outside()
        return name or 'the model adds a loss that is not made by its private head, one number per sample'

    def changed_outside(self) -> str:
        """What moved a parameter or a buffer since the last private step other than that step, in words; empty if nothing did."""
        name = '' if self._fingerprint is None or self._model is None else self._fingerprint.changed(self._model)
        if not name:
            return ''
        return f'{name} was changed by the training forward or by a hook, so a checkpoint would hold private batches without noise'

    def _note(self, losses: Tensor, last: SampleLosses) -> None:
        """Keeps what may be logged of a micro-batch: nothing of private samples, unless the user asked for that."""
        samples = last.samples
        if len(samples.public):
            self._seen.setdefault('loss_public', []).append(of_samples(losses, samples.public))
        if self._exposed and len(samples.private):
            for name, values in {'loss': losses, **last.accuracies}.items():
                private = of_samples(values, samples.private).to(losses.device)
                self._seen.setdefault(f'{name}_private', []).append(private)

    def _public_mean(self) -> list[Tensor]:
        total = self._public_sum or [torch.zeros_like(p, dtype=torch.float32) for p in self.trained]
        count = torch.tensor(float(self._public_count))
        if several_processes():
            flat = torch.cat([*(x.flatten() for x in total), count.to(total[0].device).view(1)])
            sum_over_processes(flat)
            *total, count = parts_of(flat, [*(x.shape for x in total), count.shape])
        torch._foreach_div_(total, count.clamp_min(1))
        return total


def _remembers(name: str) -> str:
    return (
        f'a training forward keeps something in model.{name}, through which samples could influence later ones: compute it anew '
        'from each sample, or keep it in a local variable'
    )


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether there is no NaN and no infinity in any of them: a bool, shape ()."""
    filled = [tensors[0].new_zeros(1), *(x for x in tensors if x.numel())]  # an empty one has no largest number
    return torch.stack(torch._foreach_norm(filled, float('inf'))).isfinite().all()
