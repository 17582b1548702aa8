"""The train loop of private training: one iteration is one logical step, whatever micro-batches it takes.

It handles empty batches, the public-only epochs and resuming inside an epoch. Must not show a private batch, or a loss computed
from one, to any hook.
"""

import gc
from typing import Any

from mmengine.dist import broadcast
from mmengine.hooks import IterTimerHook
from mmengine.model import BaseDataPreprocessor
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmpose.registry import LOOPS
from torch import nn
from torch.utils.data import DataLoader

from mmpose_dp.datasets import PoissonBatchSampler, by_record, collate_samples
from mmpose_dp.messages import failure
from mmpose_dp.models import unwrapped
from mmpose_dp.privacy.errors import PrivacyError

from ..optim_wrappers import DPOptimWrapper
from ..padding import padded
from .loader_wait import LoaderWait
from .validation import about_detections, check_train_cfg, refuse_lost_annotations, train_loader, without_idle_workers
from .watch import Watch

_UNCOUNTED = (
    'no ledger would count the private steps: add privacy_budget=dict(type="PrivacyBudgetHook", ...) to default_hooks, and let no '
    'hook change the number of epochs'
)


@LOOPS.register_module()
class PrivateTrainLoop(EpochBasedTrainLoop):
    """mmengine's epoch loop over Poisson-sampled logical batches.

    ``iter`` counts logical steps, so schedules, logging and checkpoint intervals mean what they mean in plain training.
    An epoch is ``num_records // expected_batch_size`` steps.

    Args:
        runner: the runner.
        dataloader: ``train_dataloader`` with ``batch_sampler.type='PoissonBatchSampler'``.
        max_epochs: all epochs, public-only ones included.
        public_epochs: how many epochs, at the start, train on public samples only. They add no noise and spend no privacy
            beyond what counts as public anyway. BatchNorm learns its statistics in them, as in plain training, and keeps
            them afterwards.
        val_begin, val_interval, dynamic_intervals: as in mmengine.
        others: ``by_epoch=True`` is taken; any other key of mmengine's own loops is refused by name.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        max_epochs: int | None = None,
        public_epochs: int = 0,
        val_begin: int = 1,
        val_interval: int = 1,
        dynamic_intervals: list[tuple[int, int]] | None = None,
        **others: Any,
    ) -> None:
        if not isinstance(runner, Runner):
            raise PrivacyError(
                f'runner_type={type(runner).__name__!r} cannot be used: it loads weights before anybody can see where they come '
                'from, and may hold a share of them on each device. Leave runner_type out, or build mmengine.runner.Runner'
            )
        dynamic_intervals = check_train_cfg(
            max_epochs, public_epochs, val_begin, val_interval, dynamic_intervals, others
        )
        assert max_epochs is not None
        if isinstance(dataloader, dict):
            dataloader = train_loader(dataloader)
        try:
            super().__init__(runner, dataloader, max_epochs, val_begin, val_interval, dynamic_intervals)
        except PrivacyError:
            raise
        except Exception as error:  # torch's and mmengine's, for settings of theirs
            raise PrivacyError(f'train_dataloader cannot be built: {failure(error)}') from error
        self.sampler = self._checked_sampler(public_epochs)
        self.public_epochs = public_epochs
        self._check_schedulers()
        self._max_iters = self._first_iter(max_epochs)
        self._build_validation()
        self.watch, self.loader_wait = Watch(self.dataloader), LoaderWait()
        self._cut = False  # whether the epoch ends before its last step

    def _checked_sampler(self, public_epochs: int) -> PoissonBatchSampler:
        """The batch sampler. Raises PrivacyError for a loader whose batches are not what it sampled."""
        sampler = self.dataloader.batch_sampler
        if not isinstance(sampler, PoissonBatchSampler) or self.dataloader.collate_fn.func is not collate_samples:
            raise PrivacyError(
                'train_dataloader.batch_sampler must be dict(type="PoissonBatchSampler", expected_batch_size=...): the '
                'accountant relies on what it samples'
            )
        if not getattr(self.dataloader, 'in_order', True):
            raise PrivacyError(
                'train_dataloader.in_order=False would put micro-batches of several steps into one: take it out'
            )
        if public_epochs and not sampler.public_batch_size:
            raise PrivacyError(
                'train_cfg.public_epochs needs public samples: set train_dataloader.batch_sampler.public_batch_size and '
                'train_dataloader.dataset.public_view (or public)'
            )
        return sampler

    def _check_schedulers(self) -> None:
        """Raises PrivacyError where mmengine would convert epochs to steps by a number that is wrong in some of them."""
        sampler, schedulers = self.sampler, self.runner.cfg.get('param_scheduler') or []
        converted = [
            s for s in ([schedulers] if isinstance(schedulers, dict) else schedulers) if s.get('convert_to_iter_based')
        ]
        if converted and self.public_epochs and sampler.steps_per_epoch(True) != sampler.steps_per_epoch(False):
            raise PrivacyError(
                f'param_scheduler: convert_to_iter_based=True counts {sampler.steps_per_epoch(False)} steps in every epoch, and '
                f'public epochs have {sampler.steps_per_epoch(True)}: write by_epoch=False with T_max, begin and end in steps'
            )

    def _build_validation(self) -> None:
        """Builds the validation loop, which mmengine would build next, so that what is wrong with it is one sentence."""
        runner = self.runner
        if isinstance(runner._val_dataloader, dict):
            runner._val_dataloader = without_idle_workers(runner._val_dataloader)
        refuse_lost_annotations(runner._val_evaluator)
        try:
            runner.val_loop  # noqa: B018  (a property that builds)
        except Exception as error:
            more = about_detections(runner._val_dataloader, error)
            raise PrivacyError(
                f'val_dataloader, val_evaluator or val_cfg cannot be used: {failure(error)}{more}'
            ) from error

    def _first_iter(self, epoch: int) -> int:
        """Logical steps before ``epoch``."""
        public = min(epoch, self.public_epochs)
        return public * self.sampler.steps_per_epoch(True) + (epoch - public) * self.sampler.steps_per_epoch(False)

    def private_steps_from(self, iteration: int) -> int:
        """Private logical steps that the plan has from number ``iteration`` of all logical steps on."""
        return self._max_iters - max(iteration, self._first_iter(self.public_epochs))

    @property
    def private_steps(self) -> int:
        """T, the private logical steps planned."""
        return (self._max_epochs - self.public_epochs) * self.sampler.steps_per_epoch(False)

    def end_here(self) -> None:
        """Ends training before the next step. The epoch does not count: no checkpoint of it is written, and it is not validated.

        mmengine would give the scores, and the best checkpoint, the number of the last whole epoch.
        """
        self.stop_training = self._cut = True
        self.val_begin = self._max_epochs + 1

    def run(self) -> nn.Module:
        """All epochs. Raises PrivacyError, before the first of them, where private steps would not be counted."""
        if self.private_steps and self.runner.optim_wrapper.plan is None:
            raise PrivacyError(_UNCOUNTED)
        self._begin_watch()
        # a full garbage collection, about once per step, would look at all that MMPose has loaded (0.3 s); now it skips that
        gc.freeze()
        try:
            return super().run()
        except BaseException:
            for hook in self.runner.hooks:
                getattr(hook, 'after_failure', lambda runner: None)(self.runner)
            raise
        finally:
            gc.unfreeze()

    def _begin_watch(self) -> None:
        model, wrapper = self.runner.model, self.runner.optim_wrapper
        frozen = {id(p) for p in wrapper.trained if not p.requires_grad}
        names = [name for name, param in model.named_parameters() if id(param) in frozen]
        if names:
            raise PrivacyError(
                f'a hook froze {names[0]} after the optimizer was built, which would still add noise to it. Remove that hook, and '
                'write optim_wrapper.trainable instead'
            )
        copier = getattr(unwrapped(model), 'data_preprocessor', None)
        if self.dataloader.pin_memory and isinstance(copier, BaseDataPreprocessor):
            copier._non_blocking = True  # mmengine's setting: the host does not wait while pictures are copied
        model.train()  # some backbones freeze their first stages in there
        self.watch.take_trained(model)

    def run_epoch(self) -> None:
        """One epoch, or what is left of it after a resume."""
        wrapper = self.runner.optim_wrapper
        assert isinstance(wrapper, DPOptimWrapper)
        self.watch.check(self.dataloader, self.runner.model)
        public_only = self._epoch < self.public_epochs
        if not public_only and wrapper.plan is None:  # a hook has added epochs to a training on public samples alone
            raise PrivacyError(_UNCOUNTED)
        wrapper.begin_epoch(self.runner.model, public_only)
        self._epoch_start = self._first_iter(self._epoch)
        self.sampler.begin_epoch(public_only, self._iter - self._epoch_start)
        self.watch.take_trained(self.runner.model)
        if self._epoch == self.public_epochs:
            self._time_anew()
        self.runner.call_hook('before_train_epoch')
        self.watch.check(self.dataloader, self.runner.model)
        self.runner.model.train()
        for batch in self.loader_wait.batches(self.dataloader):
            self._run_micro_batch(wrapper, batch)
            self.watch.check(self.dataloader, self.runner.model)
            if self.stop_training:
                break
        self.loader_wait.report(self.runner, self.dataloader, public_only)
        if public_only:  # each rank has learned its own
            for _, buffer in self.runner.model.named_buffers():
                broadcast(buffer)
        if self._cut:
            return
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _time_anew(self) -> None:
        """The expected end follows from private steps alone from now on: those on public samples take another time."""
        for hook in self.runner.hooks:
            if isinstance(hook, IterTimerHook):
                hook.time_sec_tot, hook.start_iter = 0, self._iter

    def _run_micro_batch(self, wrapper: DPOptimWrapper, batch: dict) -> None:
        index, step = self._iter - self._epoch_start, batch.pop('step')
        if not wrapper.accumulating:  # the first micro-batch of its logical batch
            self.runner.call_hook('before_train_iter', batch_idx=index, data_batch=None)
            if self.stop_training:
                return
            self._steps_before = wrapper.mechanism.ledger.run_steps
        wrapper.begin_micro_batch(step.is_last, step.replayed)
        if batch['inputs']:
            self._train_on(wrapper, batch, step.is_last, step.replayed)
        elif step.is_last:
            wrapper.finish_step()
        if step.is_last:
            self._refuse_uncounted(wrapper)
            self.runner.call_hook(
                'after_train_iter', batch_idx=index, data_batch=None, outputs=wrapper.loggable_metrics
            )
            self._iter += 1

    def _refuse_uncounted(self, wrapper: DPOptimWrapper) -> None:
        """Raises PrivacyError unless the logical batch made exactly one step, and a counted one if it was private."""
        made = wrapper.mechanism.ledger.run_steps - self._steps_before
        if wrapper.accumulating or made != (0 if wrapper.public_only else 1):
            self._refuse(wrapper, f'a logical batch made {made} counted steps')

    def _refuse(self, wrapper: DPOptimWrapper, why: str) -> None:
        """Raises PrivacyError. The current private step is counted, since a record may have caused the fault."""
        if not wrapper.public_only and wrapper.mechanism.ledger.run_steps == self._steps_before:
            wrapper.mechanism.count()
        raise PrivacyError(f'{why}: train_step must call optim_wrapper.update_params(loss) exactly once')

    def _train_on(self, wrapper: DPOptimWrapper, batch: dict, is_last: bool, replayed: int | None) -> None:
        """One forward, or one per record if the engine needs that, as the rehearsal before training found out."""
        if not wrapper.engine.one_at_a_time:
            is_private = batch['data_samples'][0].metainfo.get('dp_record') is not None
            self._train_step(wrapper, padded(batch, self.sampler.private_forward) if is_private else batch)
            return
        parts = by_record(batch)
        records = [part['data_samples'][0].metainfo.get('dp_record') for part in parts]
        if replayed is not None and replayed not in records:  # it could not be read
            replayed = records[0]
        for i, (part, record) in enumerate(zip(parts, records)):
            wrapper.begin_micro_batch(is_last and i + 1 == len(parts), replayed if record == replayed else None)
            self._train_step(wrapper, part)

    def _train_step(self, wrapper: DPOptimWrapper, part: dict) -> None:
        """The model's own. Raises PrivacyError where it leaves a batch out or takes it twice: each record counts once in a sum."""
        before = wrapper.micro_batches
        self.runner.model.train_step(part, optim_wrapper=wrapper)
        made = wrapper.micro_batches - before
        if made != 1 and not wrapper.public_only:
            self._refuse(wrapper, f'{made} forwards of one batch were used')
