"""Plans, reports and stops: everything about the budget except the mechanism itself.

The hook makes the plan before training, puts the ledger into every checkpoint, stops before the budget would be exceeded and
writes the statement. Must not count steps: the optimizer wrapper does, in the call that makes the noise.
"""

import sys
from dataclasses import asdict
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.registry import HOOKS

from mmpose_dp.datasets import refuse_private_metrics, refuse_private_validation
from mmpose_dp.extras.accountability import checked_decision, filled_in
from mmpose_dp.extras.evidence import PAGE_NAME, intact_statement, ledger_in_statement
from mmpose_dp.extras.risk import ceiling
from mmpose_dp.extras.statement_page import write_statement
from mmpose_dp.models import replace_batch_norm, unwrapped
from mmpose_dp.privacy.errors import ConfigError, PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.validation import as_delta, as_given, as_positive, as_whole, rounded_up

from ..checks.own_state import (
    AFTER_PUBLIC_EPOCHS,
    OwnStateHook,
    refuse_not_finite,
    refuse_other_models,
    restore_own_values,
)
from ..loops import PrivateTrainLoop
from ..never_reached import never_reached
from ..optim_wrappers import DPOptimWrapper
from ..own_parts import names_in, own_code_in_words, own_parts
from ..schedules import idle_steps
from . import showing
from .budget_words import announce, budgets_in_words, changed_budget, finished_in_words, resumed_in_words
from .fitting_norm import unfitting_norms
from .foreign_hooks import averages
from .origin import Origin
from .planning import make_plan, refuse_other_plans, run_metadata_of_views
from .preflight import refuse_late_failures
from .provenance import CHECKPOINT_KEY, Lineage, part_of, refuse_other_experts, spent_in
from .resuming import (
    check_resumed,
    check_same_model,
    check_same_optimizer,
    check_same_view_source,
    find_start,
    ledger_elsewhere,
    open_ledger,
    other_view_source,
)
from .stating import WrittenCheckpoints, full_statement

_HINTS = ('time', 'data_time', 'memory', 'eta')  # in the message hub: they hint at how many records were sampled


@HOOKS.register_module()
class PrivacyBudgetHook(Hook):
    """Calibrates the noise to the budget and stops training before the budget is exceeded.

    Args:
        target_delta: delta.
        target_epsilon: the budget for the whole training. None only with an explicit ``noise_multiplier``; epsilon is then
            reported and not limited.
        accountant: 'pld' (default, the tightest), 'prv' or 'rdp'.
        interval: steps between two values of the epsilon spent. None: one in every line of the log.
        expose_private_metrics: logs losses and accuracies of private batches. They are outside the guarantee, and the
            statement says so.
        decision: texts for the statement, for who asks why, under the names of ``mmpose_dp.extras.accountability.DECISIONS``, such
            as 'controller' and 'chosen_by'. Without one the statement says 'not stated'.

    Raises ConfigError for values out of range.

    Examples:
        >>> default_hooks = dict(privacy_budget=dict(type='PrivacyBudgetHook', target_epsilon=0.8, target_delta=1 / 22000))
    """

    priority = 'NORMAL'  # before LoggerHook, so that epsilon is in the log line

    def __init__(
        self,
        target_delta: float,
        target_epsilon: float | None = None,
        accountant: str = 'pld',
        interval: int | None = None,
        expose_private_metrics: bool = False,
        decision: dict[str, str] | None = None,
    ) -> None:
        self.expose_private_metrics = expose_private_metrics
        self.decision = checked_decision(decision)
        key = 'default_hooks.privacy_budget.target_'
        self.target_epsilon = None if target_epsilon is None else as_positive(target_epsilon, f'{key}epsilon')
        self._given_epsilon = self.target_epsilon  # also of those who name no personal budget
        self.target_delta = as_delta(target_delta, f'{key}delta')
        self.accountant = accountant
        self.interval = None if interval is None else as_whole(interval, 'default_hooks.privacy_budget.interval')
        self.plan: PrivacyPlan | None = None
        self.origin = Origin()
        self._run_metadata: dict | None = None  # what the ledger keeps of this training
        self._steps_left = 0
        self._loaded: dict = {}  # what the checkpoint to resume from says of privacy
        self._engine_reported = False
        self._began = False  # whether this runner has begun to train
        self._resumed = False
        self._goes_on = True  # False for a resume that finds nothing left to do
        self._saved = False  # whether this training wrote a checkpoint
        self._stated = False  # whether it was finished before, and its statement names its last checkpoint
        self._written: WrittenCheckpoints | None = None
        self._own: set[str] = set()  # names of other code that this training, and those before it in the work dir, ran

    # ---- before training -------------------------------------------------------------------------------------------
    def before_run(self, runner: Runner) -> None:
        """Makes the plan. Raises PrivacyError for a training that cannot be private."""
        loop = getattr(runner, '_train_loop', None)
        if loop is None or isinstance(loop, dict):  # testing: the model must have the layers with which it was trained
            if (runner.cfg.get('optim_wrapper') or {}).get('norm') == 'group':
                replace_batch_norm(unwrapped(runner.model))
            return
        if self._began:  # testing after this runner's training, whose ledger and statement stay
            self._stated = loop.stop_training or loop.epoch >= loop.max_epochs
            self.origin.forget_watch()
            return
        wrapper = runner.optim_wrapper
        _refuse_parts(runner)
        # A mean over ranks is not exact to the bit, and there is nothing to sync: the loop broadcasts what public epochs learn.
        runner._hooks = [hook for hook in runner.hooks if not averages(hook)]
        runner.register_hook(OwnStateHook())
        # A runner with the same name and start time shares the hub: its losses would be in this one's checkpoints.
        showing.guard(runner, self.expose_private_metrics)
        # runner.val() may have loaded the start, which nobody watched, and mmengine resets weights: it is loaded again
        runner._has_loaded = False
        try:
            find_start(runner)
            wrapper.prepare(unwrapped(runner.model), self.expose_private_metrics)
            self._plan(runner, loop, wrapper)
            refuse_late_failures(runner)
        except BaseException:
            showing.release(runner)
            raise
        if not (runner._resume and runner._load_from):  # resume=True without a checkpoint is a first start
            self.origin.watch(runner)

    def _plan(self, runner: Runner, loop: PrivateTrainLoop, wrapper: DPOptimWrapper) -> None:
        """Opens the ledger and fixes the noise; for a training on public views only, fixes what the ledger keeps of it."""
        if loop.private_steps:
            wrapper.mechanism.ledger = open_ledger(runner)
            resuming = runner._resume and runner._load_from
            self.plan = make_plan(
                loop,
                wrapper,
                self._given_epsilon,
                target_delta=self.target_delta,
                accountant=self.accountant,
                expose_private_metrics=self.expose_private_metrics,
                earlier_history=wrapper.ledger.earlier_history if resuming else wrapper.ledger.history,
            )
            wrapper.mechanism.attach(self.plan)
            # with personal budgets, the largest: ledger and log name it too
            self.target_epsilon = self.plan.target_epsilon
            own = dict(target_epsilon=self.target_epsilon, view_source=loop.dataloader.dataset.view_source)
            self._run_metadata = {**self.plan.run_metadata, **own}
            if self.plan.record_rates:
                loop.sampler.sampling.set_rates(self.plan.record_rates)
            announce(runner, self.plan)
        elif loop.dataloader.dataset.public_view is not None:
            wrapper.mechanism.ledger = open_ledger(runner)
            if wrapper.ledger.steps and not runner._resume:
                raise ConfigError(
                    f'work_dir={runner.work_dir} holds a private training, whose statement would be beside weights trained on '
                    'public views alone: write another work_dir'
                )
            self._run_metadata = run_metadata_of_views(loop, wrapper)

    def before_train(self, runner: Runner) -> None:
        """Opens this training in the ledger and finds how many steps the budget still allows.

        Raises ConfigError if the training would start from a file that fits nothing of the model, from NaN, or with
        different weights, settings or records on different processes, and for a runner whose training ended early.
        """
        if self._began:
            self._refuse_to_begin_again(runner)
            return
        self._began = True
        self.origin.report(runner)
        refuse_not_finite(unwrapped(runner.model))
        refuse_other_models(unwrapped(runner.model), runner.optim_wrapper.experts)
        refuse_other_plans(self.plan, runner.train_loop.dataloader.dataset)
        if self._run_metadata is None:
            return
        self._written = WrittenCheckpoints(runner.work_dir)
        stated = intact_statement(Path(runner.work_dir)) or {}
        self._own = names_in(stated) | names_in(part_of(self._loaded, 'statement'))
        if self._resumed:
            self.decision = filled_in(self.decision, part_of(stated, 'decision'))
        ledger = runner.optim_wrapper.ledger
        if self._resumed and self._nothing_left(runner, ledger, stated):
            return
        if words := other_view_source(ledger, self._run_metadata['view_source']):
            runner.logger.warning(f'{words}.')
        open_run = ledger.resume_run if self._resumed else ledger.begin_run
        open_run(**self._run_metadata)
        if is_main_process():
            ledger.keep_at(Path(runner.work_dir) / LEDGER_NAME)
        if self.plan is not None:
            self._steps_left = self.plan.allowed_steps(ledger)
            if self._resumed:
                self._report_resume(runner, ledger)
            of_start = [] if self._resumed else unfitting_norms(runner)
            for warning in [*never_reached(runner), *idle_steps(runner), *of_start]:
                runner.logger.warning(f'{warning}.')

    def _refuse_to_begin_again(self, runner: Runner) -> None:
        """Raises ConfigError unless the training of this runner is finished: what it would start from is in no statement."""
        if not self._stated:
            raise ConfigError(
                f'this runner has trained before, and that training ended early: build another one, with resume=True and '
                f'load_from=None to go on from the last checkpoint in {runner.work_dir}'
            )

    def _nothing_left(self, runner: Runner, ledger: Ledger, stated: dict) -> bool:
        """Whether a resumed training has all its epochs or its whole budget behind it: it then stops and changes nothing.

        ``stated``: the statement in the work dir, {} if there is none.
        """
        finished = runner.epoch >= runner.max_epochs
        spent = self.plan is not None and self.plan.allowed_steps(ledger) <= 0
        if not (finished or spent):
            return False
        ledger.check_resumes(**(self._run_metadata or {}))  # else resume_run does
        epochs = runner.max_epochs if finished else None
        words = finished_in_words(self.plan, ledger, epochs, spent, self._lost(ledger), self.target_epsilon)
        runner.logger.info(words)
        # a kill may have come before it was written; whichever checkpoint is resumed from, it is the statement of all steps
        named = (stated.get('checkpoint') or {}).get('file', '')
        whole = stated.get('ledger') == ledger_in_statement(ledger)
        self._stated = whole and bool(named) and (Path(runner.work_dir) / named).is_file()
        runner.train_loop.stop_training, self._goes_on = True, False
        return True

    def _lost(self, ledger: Ledger) -> int:
        """How many of the spent steps came after the checkpoint to resume from."""
        return ledger.steps - sum(entry[2] for entry in self._loaded.get('ledger', {}).get('entries', ()))

    def _report_resume(self, runner: Runner, ledger: Ledger) -> None:
        """Logs what this training has spent, what is left, and what is not as it was."""
        ahead = runner.train_loop.private_steps_from(runner.iter)
        spent, lost = self._spent(runner), self._lost(ledger)
        runner.logger.info(resumed_in_words(ledger, spent, ahead, self._steps_left, lost, self.target_epsilon))
        if elsewhere := ledger_elsewhere(runner):
            runner.logger.warning(elsewhere)
        changed = changed_budget(self._budgets(ledger)[-2], self.target_epsilon)
        if changed:
            (runner.logger.warning if 'RAISED' in changed else runner.logger.info)(changed)

    def _budgets(self, ledger: Ledger) -> list[float | None]:
        """The target_epsilon of this training and of its resumes; older ledgers do not say what the first was."""
        budgets = list(ledger.budgets or (self.target_epsilon,))
        if ledger.runs and 'target_epsilon' not in ledger.runs[-1]:
            known = next((budget for budget in budgets if budget is not None), self.target_epsilon)
            before = part_of(self._loaded, 'statement').get('target_epsilon', known)
            budgets = [before if budget is None else budget for budget in budgets]
        return budgets

    def progress(self, runner: Runner) -> str:
        """What a training that was interrupted has spent, one or two sentences; empty if it has no private steps."""
        if self.plan is None:
            return ''
        steps = runner.optim_wrapper.ledger.run_steps
        return (
            f'{steps} of {self.plan.steps} private steps are spent, and count whether a checkpoint has seen them or not '
            f'({self._spent(runner)}). '
        )

    def _spent(self, runner: Runner) -> str:
        """The epsilon spent, of the target, in words."""
        spent = rounded_up(runner.optim_wrapper.ledger.epsilon(self.target_delta, self.accountant))
        limit = '' if self.target_epsilon is None else f' of {self.target_epsilon:g}'
        return f'epsilon {spent}{limit} at delta {as_given(self.target_delta)}'

    # ---- during training -------------------------------------------------------------------------------------------
    def before_train_epoch(self, runner: Runner) -> None:
        """Raises ConfigError, before the first private step, if public epochs have made weights NaN or infinite."""
        if self.plan is not None and runner.epoch == runner.train_loop.public_epochs > 0:
            refuse_not_finite(unwrapped(runner.model), AFTER_PUBLIC_EPOCHS)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Stops before the step that would exceed the budget, and saves a checkpoint."""
        if self.plan is None or runner.optim_wrapper.public_only:
            return
        if self._steps_left <= 0:
            planned = runner.optim_wrapper.ledger.run_steps >= self.plan.steps
            why = (
                f'All {self.plan.steps} private steps are'
                if planned
                else f'The budget of epsilon {self.target_epsilon} is'
            )
            name = f'budget_spent_iter_{runner.iter}.pth'
            runner.logger.warning(f'{why} spent: training stops. {name} is the last checkpoint, and was not validated.')
            runner.train_loop.end_here()
            # mmengine would write one iteration more, since it saves before it counts the one that has ended
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            runner.save_checkpoint(runner.work_dir, name, meta=meta, by_epoch=False)
            return
        self._steps_left -= 1

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        """Logs the epsilon spent and, after the first batch, how per-sample gradients are computed."""
        if not (self._engine_reported or runner.optim_wrapper.public_only):
            runner.logger.info(f'Per-sample gradients: {runner.optim_wrapper.engine}.')
            self._engine_reported = True
        if self.plan is not None and self._is_due(runner, batch_idx):
            epsilon = runner.optim_wrapper.ledger.epsilon(self.target_delta, self.accountant)
            runner.message_hub.update_scalar('train/epsilon', ceiling(epsilon))  # the log line has four places
            if self.target_epsilon is not None:
                runner.message_hub.update_scalar('train/epsilon_target', self.target_epsilon)

    def _is_due(self, runner: Runner, batch_idx: int) -> bool:
        """Whether epsilon is to be computed, which takes a tenth of a second: where a line of the log will show it."""
        if self.interval is not None:
            return self.every_n_train_iters(runner, self.interval)
        return showing.is_logged(runner.hooks, batch_idx) or self.end_of_epoch(runner.train_dataloader, batch_idx)

    def after_train(self, runner: Runner) -> None:
        """Writes the statement of the whole training into the work dir."""
        if self.plan is None or not is_main_process() or self._stated:
            return
        self._state(runner, finished=self._saved or self._resumed)
        steps, loss = runner.optim_wrapper.ledger.run_steps, runner.message_hub.log_scalars.get('train/loss_public')
        seen = '' if loss is None else f', public loss {loss.mean(runner.log_processor.window_size):.4f}'
        runner.logger.info(f'Spent in {steps} private steps: {self._spent(runner)}{seen}.')
        runner.logger.info(f'Privacy statement: {runner.work_dir}/{PAGE_NAME}')

    def after_run(self, runner: Runner) -> None:
        """Lets a later runner, which may have the same hub and visualizer, show what it likes."""
        showing.release(runner)

    def after_failure(self, runner: Runner) -> None:
        """As ``after_run``, for a training that an error or an interruption ended; PrivateTrainLoop calls it.

        After Ctrl-C the statement is that of all steps so far, and names the last checkpoint, so that it can be published.
        """
        showing.release(runner)
        interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        if interrupted and self.plan is not None and (self._saved or self._resumed) and is_main_process():
            self._state(runner, finished=True)

    def _state(self, runner: Runner, finished: bool = False) -> dict:
        """Writes the statement of the steps so far into the work dir and returns it."""
        assert self.plan is not None
        self._own |= own_parts(runner)  # a hook may have switched the pipeline
        statement = full_statement(
            self.plan,
            runner.optim_wrapper.ledger,
            runner,
            pretraining=self.origin.pretraining,
            decision=self.decision,
            own_code=own_code_in_words(self._own),
            checkpoints={} if self._written is None else self._written.hashes(runner.optim_wrapper.ledger),
            budgets=budgets_in_words(self._budgets(runner.optim_wrapper.ledger)),
            finished=finished,
            before=part_of(self._loaded, 'statement'),
            goes_on=self._goes_on,
        )
        write_statement(statement, runner.work_dir)
        return statement

    # ---- checkpoints -----------------------------------------------------------------------------------------------
    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Puts the ledger and the statement into every checkpoint, even if the optimizer is not saved, and removes step times.

        Raises PrivacyError if anything but the counted steps changed a parameter or a buffer.
        """
        if isinstance(runner.optim_wrapper, DPOptimWrapper):
            fault = runner.optim_wrapper.changed_outside()
            if fault:
                raise PrivacyError(f'no checkpoint is written: {fault}')
            if 'ema_state_dict' not in checkpoint:  # EMAHook has not swapped the two yet
                restore_own_values(unwrapped(runner.model), checkpoint['state_dict'])
            statement, self._saved = (None if self.plan is None else self._state(runner)), True
            ledger = runner.optim_wrapper.ledger
            view, data = ((self._run_metadata or {}).get(key) for key in ('public_view', 'public_data'))
            lineage = self.origin.lineage.joined(
                Lineage(ledger.steps > 0, (view,) if view else (), (data,) if data else ())
            )
            checkpoint[CHECKPOINT_KEY] = dict(
                ledger=ledger.state_dict(),
                statement=statement,
                pretraining=self.origin.pretraining,
                lineage=asdict(lineage),
                experts=[digest for _, digest in runner.optim_wrapper.experts],
                marking='' if statement is None or statement['private'] else 'NOT PRIVATE: a debug seed or no noise',
            )
            # the day alone: from the seconds in two checkpoints follows how long the steps between them took
            checkpoint['meta']['time'] = checkpoint['meta']['time'][:8]
            checkpoint['message_hub'] = {
                part: {name: value for name, value in values.items() if name.split('/')[-1] not in _HINTS}
                for part, values in checkpoint['message_hub'].items()
            }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Checks the ledger on resume. A checkpoint without a ledger can be loaded but not resumed. Raises PrivacyError."""
        if self._began or not isinstance(runner.optim_wrapper, DPOptimWrapper):  # or for a test after training
            return
        if not runner._resume:
            self.origin.start_from(runner, checkpoint)
            return
        self._resumed, self._loaded = True, part_of(checkpoint, CHECKPOINT_KEY)
        self.origin.go_on_from(runner, checkpoint)
        if self.plan is not None:
            check_resumed(checkpoint, runner.optim_wrapper.ledger)
        elif spent_in(checkpoint):
            raise ConfigError(
                f'train_cfg.public_epochs={runner.train_loop.public_epochs} leaves no private step, so the ledger of the '
                'checkpoint to resume from would be lost: write a larger max_epochs or fewer public_epochs'
            )
        if self._run_metadata is not None:
            check_same_view_source(runner.optim_wrapper.ledger, self._run_metadata['view_source'])
        check_same_optimizer(checkpoint, runner.cfg)
        refuse_other_experts(runner.optim_wrapper.experts, checkpoint)
        check_same_model(checkpoint, unwrapped(runner.model))
        showing.drop_resumed(checkpoint)


def _refuse_parts(runner: Runner) -> None:
    """Raises ConfigError for parts of a runner that private training cannot use."""
    if not isinstance(runner.train_loop, PrivateTrainLoop):
        raise ConfigError("train_cfg.type must be 'PrivateTrainLoop' with PrivacyBudgetHook")
    if not isinstance(runner.optim_wrapper, DPOptimWrapper):
        raise ConfigError("optim_wrapper.type must be 'DPOptimWrapper' with PrivacyBudgetHook")
    if runner.auto_scale_lr and runner.auto_scale_lr.get('enable'):
        raise ConfigError(
            'auto_scale_lr.enable=True scales by a batch size that private training does not have: write enable=False and set '
            'optim_wrapper.optimizer.lr itself'
        )
    for key in ('activation_checkpointing', 'efficient_conv_bn_eval', 'compile'):
        if runner.cfg.get(key):
            raise ConfigError(f'{key} changes how gradients are computed and cannot be used here: write {key}=None')
    if runner.val_loop is not None:
        dataset = runner.train_dataloader.dataset
        refuse_private_validation(dataset.private, dataset.images, runner.val_loop.dataloader.dataset)
        refuse_private_metrics(dataset.private, getattr(getattr(runner.val_loop, 'evaluator', None), 'metrics', ()))
