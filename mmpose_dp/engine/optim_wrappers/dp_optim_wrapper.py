"""The optimizer wrapper that makes a training step private.

It joins the pieces of ``mmpose_dp.privacy`` in the order of one step: capture, backward, clip, sum; at the end of the
logical batch count, noise, project, public gradient, optimizer step. Must not divide by the number of records drawn, and
must not hand out anything computed from private rows other than the noised update.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from mmengine.dist import all_reduce, get_rank
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmpose.registry import OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.optim import Optimizer

from mmpose_dp.models import FeatureMaskingHead, has_batch_statistics
from mmpose_dp.privacy import (
    Ledger,
    PrivacyError,
    PrivacyPlan,
    Projector,
    RandomSource,
    Rows,
    build_engine,
    clipped_coordinates,
    clipped_sum,
)


@OPTIM_WRAPPERS.register_module()
class DPOptimWrapper(OptimWrapper):
    """DP-SGD, Projected DP-SGD, Feature DP and their hybrid as an mmengine optimizer wrapper.

    One logical step adds up the clipped gradients of the private rows, adds N(0, (noise_multiplier * max_grad_norm)^2)
    and divides by ``expected_batch_size`` (Abadi et al. 2016); with a projector the k coordinates take the place of the
    p gradient entries; ``public_weight`` times the mean gradient of the public rows is added.

    Args:
        optimizer: any torch optimizer; it gets the private gradient in ``param.grad``.
        max_grad_norm: C, the most one record's gradient can weigh.
        noise_multiplier: sigma, in units of C. None: PrivacyBudgetHook calibrates it.
        expected_batch_size: B, what the sum is divided by. None: taken from the plan.
        projector: None, or the arguments of :class:`mmpose_dp.privacy.Projector`.
        public_weight: w, the weight of the public gradient. 0 ignores public rows.
        engine: 'auto', 'rules' or 'loop' (see mmpose_dp.privacy.per_sample).
        amp_dtype: None, or 'bfloat16' to run the forward in mixed precision; norms and sums stay in float32.
        debug_seed: for tests only; the run is then NOT PRIVATE.

    Examples:
        >>> wrapper = DPOptimWrapper(SGD(model.parameters(), lr=1.0), max_grad_norm=0.1, noise_multiplier=0.0,
        ...                          expected_batch_size=4)
        >>> model.train_step(data, wrapper)  # moves the parameters by -(sum of clipped gradients) / 4
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_grad_norm: float,
        noise_multiplier: float | None = None,
        expected_batch_size: int | None = None,
        projector: dict | Projector | None = None,
        public_weight: float = 0.0,
        engine: str = 'auto',
        amp_dtype: str | None = None,
        debug_seed: int | None = None,
        **plain_settings: Any,
    ) -> None:
        for key, value in plain_settings.items():
            if key not in ('clip_grad', 'accumulative_counts', 'loss_scale'):
                raise TypeError(f'DPOptimWrapper got an unknown argument {key!r}')
            if value not in (None, 1):
                raise PrivacyError(
                    f'optim_wrapper.{key}={value!r} cannot be kept in private training: clipping is per record '
                    f'(max_grad_norm), large batches come from expected_batch_size. Write {key}=None'
                )
        if not max_grad_norm > 0:
            raise PrivacyError(f'optim_wrapper.max_grad_norm={max_grad_norm!r} must be above 0')
        if noise_multiplier is not None and not noise_multiplier >= 0:
            raise PrivacyError(f'optim_wrapper.noise_multiplier={noise_multiplier!r} must be 0 or above')
        if public_weight < 0:
            raise PrivacyError(f'optim_wrapper.public_weight={public_weight!r} must be 0 or above')
        if amp_dtype not in (None, 'bfloat16'):
            raise PrivacyError(f"optim_wrapper.amp_dtype={amp_dtype!r} is unknown; write 'bfloat16' or None")
        super().__init__(optimizer)
        self.max_grad_norm = float(max_grad_norm)
        self.noise_multiplier = noise_multiplier
        self.expected_batch_size = expected_batch_size
        self.projector = Projector(**projector) if isinstance(projector, dict) else projector
        self.public_weight = public_weight
        self.engine_kind = engine
        self.amp_dtype = None if amp_dtype is None else torch.bfloat16
        self.random = RandomSource(debug_seed)
        self.ledger = Ledger()
        self.plan: PrivacyPlan | None = None
        self.params = [p for group in optimizer.param_groups for p in group['params'] if p.requires_grad]
        self._model: nn.Module | None = None
        # set by PrivateTrainLoop: more micro-batches of this logical batch follow / a step on public rows alone
        self.accumulating = False
        self.public_only = False
        self._reset()

    def _reset(self) -> None:
        self._private_sum: list[Tensor] | None = None  # tensors by parameter, or [coordinates]
        self._public_sum: list[Tensor] | None = None
        self._public_rows = 0
        self._public_loss = 0.0

    def attach(self, plan: PrivacyPlan) -> None:
        """Takes sigma and B from the plan. Raises PrivacyError where the wrapper was given others."""
        for name in ('noise_multiplier', 'expected_batch_size', 'max_grad_norm'):
            own, planned = getattr(self, name), getattr(plan, name)
            if own is not None and own != planned:
                raise PrivacyError(
                    f'optim_wrapper.{name}={own} contradicts the plan ({planned}): leave one of them out'
                )
            setattr(self, name, planned)
        self.plan = plan

    # ---- the model -------------------------------------------------------------------------------------------------
    def prepare(self, model: nn.Module) -> None:
        """Finds the private head and builds the per-sample engine. Raises PrivacyError on a model it cannot serve."""
        heads = [m for m in model.modules() if isinstance(m, FeatureMaskingHead)]
        if len(heads) != 1:
            raise PrivacyError(_head_message(model, len(heads)))
        self._head = heads[0]
        self._norms = [(n, m) for n, m in model.named_modules() if has_batch_statistics(m)]
        self._refuse_batch_statistics()
        if getattr(getattr(model, 'data_preprocessor', None), 'batch_augments', None):
            raise PrivacyError('model.data_preprocessor.batch_augments can mix records: write batch_augments=None')
        for module in model.modules():
            if getattr(
                module, 'with_cp', False
            ):  # checkpointing would save nothing: the layers' inputs are kept anyway
                module.with_cp = False
        self.engine = build_engine(self.engine_kind, model, self.params, self._head.called_once_a_row())
        self._model, self._buffers_checked = model, False

    def _refuse_batch_statistics(self) -> None:
        for name, module in self._norms:
            if module.training:
                raise PrivacyError(
                    f'{name} ({type(module).__name__}) is in train mode: its batch statistics mix records and its running '
                    "statistics leak. Write optim_wrapper.constructor='DPOptimWrapperConstructor', which freezes it, or "
                    'call mmpose_dp.models.freeze_batch_norm(model)'
                )

    def should_sync(self) -> bool:
        """Never: clipped sums are added over ranks here, gradients are not averaged by DDP."""
        return False

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Captures what per-sample gradients need from the forward inside."""
        core = model.module if is_model_wrapper(model) else model
        if core is not self._model:
            self.prepare(core)
        self._refuse_batch_statistics()
        if not self._buffers_checked:
            self._buffers = {name: buffer.clone() for name, buffer in core.named_buffers()}
        device = next(core.parameters()).device.type
        amp = torch.autocast(device, dtype=self.amp_dtype) if self.amp_dtype else nullcontext()
        with super().optim_context(model), self.engine.capture(), amp:
            yield

    def public_gradients(self, batch: dict) -> list[Tensor]:
        """Per-sample gradients of a collated batch of public rows: (rows, *shape) float32, one tensor a parameter."""
        assert self._model is not None
        with self.optim_context(self._model):
            self._model(**self._model.data_preprocessor(batch, True), mode='loss')
        losses, rows = self._head.record_losses, self._head.rows
        self._head.record_losses = self._head.rows = None
        if losses is None or rows is None or rows.num_records:
            raise PrivacyError('a private record was offered as public')
        return self.engine.backward(losses.float()).per_row(torch.arange(len(losses), device=losses.device))

    # ---- the step --------------------------------------------------------------------------------------------------
    def update_params(self, loss: Tensor, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        """Adds one micro-batch to the logical batch and, unless ``accumulating``, ends the logical step."""
        losses, rows = self._head.record_losses, self._head.rows
        self._head.record_losses = self._head.rows = None
        if losses is None or rows is None:
            raise PrivacyError('update_params was called without a training forward of the private head before it')
        if not torch.isclose(loss.detach().float(), losses.detach().float().mean(), rtol=1e-2, equal_nan=True):
            raise PrivacyError('the model adds a loss that is not made by its private head, one number a record')
        if not self._buffers_checked:
            self._refuse_changed_buffers()
        gradients = self.engine.backward(losses.float())
        self._add_private(gradients, rows)
        self._add_public(gradients, rows, losses.detach())
        if not self.accumulating:
            self.finish_step(step_kwargs, zero_kwargs)

    def _refuse_changed_buffers(self) -> None:
        """Once, after the first forward and before anything is released: no private batch may leave a trace."""
        assert self._model is not None
        for name, buffer in self._model.named_buffers():
            if not torch.equal(buffer, self._buffers[name]):
                raise PrivacyError(f'the training forward changed the buffer {name}: it would leak the private batch')
        self._buffers_checked, self._buffers = True, {}

    def _add_private(self, gradients: Any, rows: Rows) -> None:
        if not rows.num_records:
            return
        if self.public_only:
            raise PrivacyError('a private record was drawn in a step on public rows alone')
        if self._in_coordinates:
            part = [clipped_coordinates(gradients, rows, self.max_grad_norm, self.projector)]
        else:
            part = clipped_sum(gradients, rows, self.max_grad_norm)
        self._private_sum = _added(self._private_sum, part)

    def _add_public(self, gradients: Any, rows: Rows, losses: Tensor) -> None:
        public = (rows.records < 0).to(losses.device)
        if not public.any() or not (self.public_weight or self.public_only):
            return
        self._public_sum = _added(self._public_sum, gradients.weighted_sum(public.float()))
        self._public_rows += int(public.sum())
        self._public_loss += float(losses[public].sum())

    @property
    def _in_coordinates(self) -> bool:
        return self.projector is not None and self.projector.order == 'project-then-clip'

    def finish_step(self, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        """Ends a logical batch: also right when it was empty."""
        if self.public_only:
            update, weight = [torch.zeros_like(p, dtype=torch.float32) for p in self.params], 1.0
        else:
            # counted before its result can be released: a crash from here on over-counts, never under-counts
            if self.plan is not None:
                self.ledger.count(self.plan.event)
            update, weight = self._private_gradient(), self.public_weight
        for gradient, public in zip(update, self._public_mean() if weight else []):
            gradient += weight * public
        for param, gradient in zip(self.params, update):
            param.grad = gradient.to(param.dtype)
        self.step(**(step_kwargs or {}))
        self.zero_grad(**(zero_kwargs or {}))
        self._inner_count += 1
        self.released_loss = self._public_loss / self._public_rows if self._public_rows else None
        self._reset()

    def _private_gradient(self) -> list[Tensor]:
        """(sum of clipped gradients + noise) / B, one float32 tensor a parameter."""
        if self.noise_multiplier is None or self.expected_batch_size is None:
            raise PrivacyError(
                'noise_multiplier or expected_batch_size is not set: add PrivacyBudgetHook to default_hooks, which '
                'calibrates them, or give both to DPOptimWrapper'
            )
        total = self._private_sum
        if total is None:
            like = [torch.zeros(self.projector.rank)] if self._in_coordinates else self.params
            total = [torch.zeros_like(x, dtype=torch.float32, device=self.params[0].device) for x in like]
        if get_rank() == 0:  # the ranks' sums are added, so the noise enters the total exactly once
            scale = self.noise_multiplier * self.max_grad_norm
            for x in total if scale else []:
                x += scale * self.random.gaussian(x.numel()).view(x.shape).to(x.device)
        for x in total:
            all_reduce(x)
            x /= self.expected_batch_size
        if self.projector is None:
            return total
        return self.projector.expand(total[0]) if self._in_coordinates else self.projector.project(total)

    def _public_mean(self) -> list[Tensor]:
        total = self._public_sum or [torch.zeros_like(p, dtype=torch.float32) for p in self.params]
        rows = torch.tensor(float(self._public_rows), device=total[0].device)
        for x in (*total, rows):
            all_reduce(x)
        return [x / rows.clamp_min(1) for x in total]


def _added(total: list[Tensor] | None, part: list[Tensor]) -> list[Tensor]:
    return part if total is None else [x.add_(y) for x, y in zip(total, part)]


def _head_message(model: nn.Module, found: int) -> str:
    if found > 1:
        return f'the model has {found} private heads; exactly one is supported'
    head = type(getattr(model, 'head', None)).__name__
    known = sorted(cls.__name__ for cls in FeatureMaskingHead.__subclasses__())
    twin = f'Private{head}'
    hint = f"write model.head.type='{twin}'" if twin in known else f'private heads exist for: {", ".join(known)}'
    return f'model.head is {head}, which has no per-record losses: {hint}'
