"""Plans, reports and stops: everything about the budget that is not the mechanism itself.

It makes the one plan before training, keeps the ledger in every checkpoint, stops before the budget would be exceeded and
writes the statement. Must not count steps: the optimizer wrapper does, in the call that makes the noise.
"""

from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.registry import HOOKS

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.models import fit_joints, replace_batch_norm
from mmpose_dp.privacy import PrivacyError, PrivacyPlan, build_statement, write_statement
from mmpose_dp.privacy.per_sample import LoopEngine

from ..loops import PrivateTrainLoop
from ..optim_wrappers import DPOptimWrapper

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
    ) -> None:
        self.target_epsilon = target_epsilon
        self.target_delta = target_delta
        self.accountant = accountant
        self.interval = interval
        self.plan: PrivacyPlan | None = None
        self.pretraining = 'none: random weights'
        self._steps_left = 0
        self._engine_reported = False

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
        runner_model = getattr(runner.model, 'module', runner.model)
        wrapper.prepare(runner_model)
        if isinstance(wrapper.engine, LoopEngine):
            loop.sampler.micro_batch_size = 1  # a backward a row: the loop is cheapest with one row a forward
        if loop.private_steps:
            self.plan = self._plan(loop, wrapper)
            wrapper.attach(self.plan)
            self._announce(runner, wrapper)
        if runner._load_from and not runner._resume:
            self.pretraining = f'weights loaded from {runner._load_from}'
        elif not runner._resume:
            runner.logger.warning(
                'Private training starts without load_from. It rarely works from random weights: start from a checkpoint '
                'that was trained on public data.'
            )

    def _plan(self, loop: PrivateTrainLoop, wrapper: DPOptimWrapper) -> PrivacyPlan:
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
        )
        if wrapper.noise_multiplier is not None:
            plan = PrivacyPlan(
                noise_multiplier=wrapper.noise_multiplier,
                target_epsilon=self.target_epsilon,
                **settings,
            )
        elif self.target_epsilon is None:
            raise PrivacyError('give PrivacyBudgetHook a target_epsilon, or DPOptimWrapper a noise_multiplier')
        else:
            plan = PrivacyPlan.calibrate(target_epsilon=self.target_epsilon, **settings)
        return plan

    def _announce(self, runner: Runner, wrapper: DPOptimWrapper) -> None:
        plan = self.plan
        assert plan is not None
        count = sum(p.numel() for p in getattr(runner.model, 'module', runner.model).parameters())
        runner.logger.info(
            f'Private training ({plan.method}): epsilon {plan.target_epsilon}, delta {plan.target_delta:.3g}, '
            f'noise_multiplier {plan.noise_multiplier:.4f}, max_grad_norm {plan.max_grad_norm}, sample_rate '
            f'{plan.sample_rate}, {plan.steps} steps, accountant {plan.accountant}; '
            f'{sum(p.numel() for p in wrapper.params):,} of {count:,} parameters are trained.'
        )
        if plan.is_feature_dp:
            runner.logger.warning(
                'FEATURE DP: the guarantee covers what the public view removes. The view itself '
                f'({plan.public_view}), keypoint labels, boxes and membership are treated as public.'
            )
        for warning in plan.warnings:
            runner.logger.warning(warning)

    def before_train(self, runner: Runner) -> None:
        """How many steps the budget still allows, after a checkpoint's ledger has been taken over."""
        if self.plan is not None:
            self._steps_left = self.plan.allowed_steps(runner.optim_wrapper.ledger)

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
            ledger = runner.optim_wrapper.ledger.state_dict()
            checkpoint[CHECKPOINT_KEY] = dict(ledger=ledger, pretraining=self.pretraining)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Takes the ledger over on resume; a checkpoint without one may be loaded, not resumed."""
        if not isinstance(runner.optim_wrapper, DPOptimWrapper):
            return
        if not runner._resume:
            _fit(runner, checkpoint)
            return
        if CHECKPOINT_KEY not in checkpoint:
            raise PrivacyError(
                'the checkpoint to resume from has no privacy ledger, so what it has spent is unknown. To start a new '
                'private training from its weights, use load_from without resume'
            )
        runner.optim_wrapper.ledger.load_state_dict(checkpoint[CHECKPOINT_KEY].get('ledger'))
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
