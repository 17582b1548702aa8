"""Plans, reports and stops: everything about the budget that is not the mechanism itself.

It makes the one plan before training, keeps the ledger in every checkpoint, stops before the budget would be exceeded and
writes the statement. Must not count steps: the optimizer wrapper does, in the call that makes the noise.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.registry import HOOKS

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.models import fit_joints, replace_batch_norm
from mmpose_dp.privacy import LEDGER_NAME, Budget, PrivacyError, PrivacyPlan, build_statement, write_statement
from mmpose_dp.privacy.accounting import History
from mmpose_dp.privacy.per_sample import LoopEngine

from ..loops import PrivateTrainLoop
from ..optim_wrappers import DPOptimWrapper
from .resuming import check_resumed, find_start, open_ledger

CHECKPOINT_KEY = (
    'privacy'  # of what a checkpoint says about its own privacy: the ledger and where the weights came from
)


@HOOKS.register_module()
class PrivacyBudgetHook(Hook):
    """Calibrates the noise to the budget and holds training to it.

    Args:
        target_epsilon: the budget for the whole training. None only with an explicit ``noise_multiplier``; epsilon is then
            reported and not limited.
        target_delta: delta.
        accountant: 'pld' (default, the tightest), 'prv' or 'rdp'.
        interval: private steps between two reports of the epsilon spent.
        expose_private_metrics: logs losses and accuracies of private batches. They are outside the guarantee, and the
            statement says so.

    Examples:
        >>> default_hooks = dict(privacy_budget=dict(type='PrivacyBudgetHook', target_epsilon=0.8, target_delta=1 / 22000))
    """

    priority = 'NORMAL'  # before LoggerHook, so that epsilon reaches the log line

    def __init__(
        self,
        target_delta: float,
        target_epsilon: float | None = None,
        accountant: str = 'pld',
        interval: int = 50,
        expose_private_metrics: bool = False,
    ) -> None:
        if type(interval) is not int or interval < 1:
            raise PrivacyError(f'default_hooks.privacy_budget.interval={interval!r} must be a whole number above 0')
        self.expose_private_metrics = expose_private_metrics
        self.target_epsilon = target_epsilon
        self.target_delta = target_delta
        self.accountant = accountant
        self.interval = interval
        self.plan: PrivacyPlan | None = None
        self.pretraining = 'none: random weights'
        self._steps_left = 0
        self._engine_reported = False
        self._resumed = False

    # ---- before training -------------------------------------------------------------------------------------------
    def before_run(self, runner: Runner) -> None:
        """Makes the plan. Raises PrivacyError for a combination that cannot be private."""
        loop = getattr(runner, '_train_loop', None)
        if loop is None or isinstance(loop, dict):  # testing: the checkpoint's model, as it was trained
            if (runner.cfg.get('optim_wrapper') or {}).get('norm') == 'group':
                replace_batch_norm(getattr(runner.model, 'module', runner.model))
            return
        wrapper = runner.optim_wrapper
        if not isinstance(loop, PrivateTrainLoop):
            raise PrivacyError("train_cfg.type must be 'PrivateTrainLoop' with PrivacyBudgetHook")
        if not isinstance(wrapper, DPOptimWrapper):
            raise PrivacyError("optim_wrapper.type must be 'DPOptimWrapper' with PrivacyBudgetHook")
        if runner.auto_scale_lr and runner.auto_scale_lr.get('enable'):
            raise PrivacyError(
                'auto_scale_lr scales by a batch size that private training does not have: set lr itself'
            )
        for key in ('activation_checkpointing', 'efficient_conv_bn_eval', 'compile'):
            if runner.cfg.get(key):
                raise PrivacyError(f'{key} changes how gradients are found and cannot be used here: write {key}=None')
        find_start(runner)
        wrapper.prepare(getattr(runner.model, 'module', runner.model), self.expose_private_metrics)
        if isinstance(wrapper.engine, LoopEngine):
            loop.sampler.micro_batch_size = 1  # a backward a row: the loop is cheapest with one row a forward
        if loop.private_steps:
            wrapper.ledger = open_ledger(runner)
            resuming = runner._resume and runner._load_from
            prior = wrapper.ledger.prior if resuming else wrapper.ledger.history
            self.plan = self._plan(loop, wrapper, prior)
            wrapper.attach(self.plan)
            if self.plan.budgets:
                self._draw_by_budget(loop)
            self._announce(runner, wrapper)
        if runner._load_from and not runner._resume:
            self.pretraining = f'weights loaded from {Path(runner._load_from).name}'
        elif not runner._resume:
            runner.logger.warning(
                'Private training starts without load_from. It rarely works from random weights: start from a checkpoint '
                'that was trained on public data.'
            )

    def _plan(self, loop: PrivateTrainLoop, wrapper: DPOptimWrapper, prior: History) -> PrivacyPlan:
        dataset = loop.dataloader.dataset
        assert isinstance(dataset, PublicPrivateDataset)
        settings: dict[str, Any] = dict(
            method=_method(dataset, wrapper, loop),
            privacy_unit=dataset.privacy_unit,
            num_records=dataset.num_records,
            expected_batch_size=loop.sampler.expected_batch_size,
            steps=loop.private_steps,
            max_grad_norm=wrapper.max_grad_norm,
            target_delta=self.target_delta,
            accountant=self.accountant,
            public_view=dataset.public_description if dataset.public_view is not None else None,
            public_data=dataset.public_description if dataset.public_view is None else None,
            secret_randomness=wrapper.random.is_secret and loop.sampler.random.is_secret,
            secure_mode=wrapper.secure_mode,
            expose_private_metrics=self.expose_private_metrics,
            schedule=wrapper.schedule,
            prior=prior,
        )
        budgets = self._budgets(dataset)
        if budgets and wrapper.noise_multiplier is not None:
            raise PrivacyError('with personal_epsilon the noise follows from the budgets: leave noise_multiplier out')
        if wrapper.noise_multiplier is not None:
            plan = PrivacyPlan(
                noise_multiplier=wrapper.noise_multiplier,
                target_epsilon=self.target_epsilon,
                **settings,
            )
        elif self.target_epsilon is None:
            raise PrivacyError('give PrivacyBudgetHook a target_epsilon, or DPOptimWrapper a noise_multiplier')
        else:
            target = max((budget.epsilon for budget in budgets), default=self.target_epsilon)
            plan = PrivacyPlan.calibrate(target_epsilon=target, budgets=budgets, **settings)
        return plan

    def _budgets(self, dataset: PublicPrivateDataset) -> tuple[Budget, ...]:
        """The personal budgets, smallest first; none where nobody has one."""
        if not any(dataset.personal_epsilons):
            return ()
        own = [self.target_epsilon if own is None else own for own in dataset.personal_epsilons]
        if None in own:
            raise PrivacyError(
                'some records have no personal_epsilon: give PrivacyBudgetHook a target_epsilon for them'
            )
        return tuple(Budget(float(epsilon), count) for epsilon, count in sorted(Counter(own).items()))

    def _draw_by_budget(self, loop: PrivateTrainLoop) -> None:
        assert self.plan is not None
        rate = {budget.epsilon: budget.sample_rate for budget in self.plan.budgets}
        own = loop.dataloader.dataset.personal_epsilons
        loop.sampler.set_rates([rate[self.target_epsilon if epsilon is None else epsilon] for epsilon in own])

    def _announce(self, runner: Runner, wrapper: DPOptimWrapper) -> None:
        plan = self.plan
        assert plan is not None
        count = sum(p.numel() for p in getattr(runner.model, 'module', runner.model).parameters())
        runner.logger.info(
            f'Private training ({plan.method}): epsilon {plan.target_epsilon}, delta {plan.target_delta:.3g}, '
            f'noise_multiplier {plan.noise_multiplier:.4f}, max_grad_norm {plan.max_grad_norm}, sample_rate '
            f'{plan.event.sample_rate}, {plan.steps} steps, accountant {plan.accountant}; '
            f'{sum(p.numel() for p in wrapper.params):,} of {count:,} parameters are trained.'
        )
        if plan.is_feature_dp:
            runner.logger.warning(
                'FEATURE DP: the guarantee covers what the public view removes. The view itself '
                f'({plan.public_view}), keypoint labels, boxes and membership are treated as public.'
            )
        if plan.prior:
            spent = wrapper.ledger.epsilon(plan.target_delta, plan.accountant)
            runner.logger.warning(
                f'Earlier trainings in {runner.work_dir} have spent epsilon {spent:.3f} of the budget.'
            )
        for warning in plan.warnings:
            runner.logger.warning(warning)

    def before_train(self, runner: Runner) -> None:
        """How many steps the budget still allows, after a checkpoint's ledger has been taken over."""
        if self.plan is None:
            return
        ledger = runner.optim_wrapper.ledger
        if is_main_process():
            ledger.keep_at(Path(runner.work_dir) / LEDGER_NAME)
        open_run = ledger.resume_run if self._resumed else ledger.begin_run
        open_run(
            method=self.plan.method,
            privacy_unit=self.plan.privacy_unit,
            num_records=self.plan.num_records,
            personal_budgets=[[budget.epsilon, budget.num_records] for budget in self.plan.budgets],
            secret_randomness=self.plan.secret_randomness,
        )
        self._steps_left = self.plan.allowed_steps(ledger)

    # ---- during training -------------------------------------------------------------------------------------------
    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Stops before the step that would exceed the budget, and saves what there is."""
        if self.plan is None or runner.optim_wrapper.public_only:
            return
        if self._steps_left <= 0:
            runner.logger.warning(f'Budget of epsilon {self.plan.target_epsilon} spent: training stops.')
            runner.train_loop.stop_training = True
            runner.save_checkpoint(runner.work_dir, f'budget_spent_iter_{runner.iter}.pth', by_epoch=False)
            return
        self._steps_left -= 1

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Puts the epsilon spent into the log, and once how the gradients are found, which the first batch tells."""
        if not self._engine_reported:
            runner.logger.info(f'Per-sample gradients: {runner.optim_wrapper.engine}.')
            self._engine_reported = True
        if (
            self.plan is not None
            and not runner.optim_wrapper.public_only
            and self.every_n_train_iters(runner, self.interval)
        ):
            epsilon = runner.optim_wrapper.ledger.epsilon(self.target_delta, self.accountant)
            runner.message_hub.update_scalar('train/epsilon', epsilon)

    def after_train(self, runner: Runner) -> None:
        """Writes the statement beside the checkpoints."""
        if self.plan is None or not is_main_process():
            return
        statement = build_statement(self.plan, runner.optim_wrapper.ledger, pretraining=self.pretraining)
        write_statement(statement, runner.work_dir)
        runner.logger.info(f'Privacy statement: {runner.work_dir}/privacy_statement.md')

    # ---- checkpoints -----------------------------------------------------------------------------------------------
    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """The ledger goes with every checkpoint, whether or not the optimizer is saved."""
        if isinstance(runner.optim_wrapper, DPOptimWrapper):
            ledger = runner.optim_wrapper.ledger
            private = self.plan is None or self.plan.is_private and ledger.is_secret
            checkpoint[CHECKPOINT_KEY] = dict(
                ledger=ledger.state_dict(),
                pretraining=self.pretraining,
                marking='' if private else 'NOT PRIVATE: a debug seed or no noise',
            )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Takes the ledger over on resume; a checkpoint without one may be loaded, not resumed."""
        if not isinstance(runner.optim_wrapper, DPOptimWrapper):
            return
        if not runner._resume:
            _fit(runner, checkpoint)
            if (checkpoint.get(CHECKPOINT_KEY) or {}).get('ledger', {}).get('entries'):
                self.pretraining += (
                    ', which a private training made: were it on the same records, its ledger is to be added'
                )
                runner.logger.warning(
                    'load_from holds the result of a private training. If that was on the same records, what it has spent is '
                    'not counted here: add its ledger (tools/privacy_ledger.py add), or resume it.'
                )
            return
        self._resumed = True
        if self.plan is not None:
            check_resumed(checkpoint, runner.optim_wrapper.ledger, CHECKPOINT_KEY)
            self.pretraining = checkpoint[CHECKPOINT_KEY].get('pretraining', 'not known')


def _fit(runner: Runner, checkpoint: dict) -> None:
    """Tells what of a checkpoint of another data set is kept."""
    known = checkpoint.get('meta', {}).get('dataset_meta') or {}
    joints = [
        [meta.get('keypoint_id2name', {}).get(i, '') for i in range(meta.get('num_keypoints', 0))]
        for meta in (known, runner.train_dataloader.dataset.metainfo)
    ]
    model = getattr(runner.model, 'module', runner.model)
    for line in fit_joints(checkpoint.get('state_dict', checkpoint), model.state_dict(), *joints):
        runner.logger.warning(f'load_from: {line}')


def _method(dataset: PublicPrivateDataset, wrapper: DPOptimWrapper, loop: PrivateTrainLoop) -> str:
    """What the combination of public half and projector is called."""
    if dataset.public is None:
        if wrapper.projector is not None:
            raise PrivacyError(
                'optim_wrapper.projector needs public data: set train_dataloader.dataset.public_view (Feature DP) or '
                'public (a data set that is really public)'
            )
        return 'dpsgd'
    if wrapper.projector is None and not wrapper.public_weight and not loop.public_epochs:
        raise PrivacyError(
            'train_dataloader.dataset has a public half that nothing uses: set optim_wrapper.public_weight or projector, '
            'or train_cfg.public_epochs, or take the public half out'
        )
    if dataset.public_view is not None:
        return 'feature' if wrapper.projector is None else 'hybrid'
    if wrapper.projector is None:
        raise PrivacyError(
            'train_dataloader.dataset.public without optim_wrapper.projector is not a method offered here'
        )
    return 'projected'
