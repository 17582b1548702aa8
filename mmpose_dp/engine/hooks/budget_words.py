"""What a private training says of its budget in the log: as it begins, as it is resumed, and when nothing is left of it.

Must not decide anything: what is spent, and what is allowed, the ledger and the plan know.
"""

from collections.abc import Sequence

from mmengine.runner import Runner

from mmpose_dp.extras.accountability import plan_warnings
from mmpose_dp.messages import warn_in_terminal
from mmpose_dp.models import unwrapped
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.validation import as_given, rounded_up

from ..unread import config_warnings


def announce(runner: Runner, plan: PrivacyPlan) -> None:
    """Logs the plan of a training, and what in it or in the config asks for care."""
    wrapper = runner.optim_wrapper
    count = sum(p.numel() for p in unwrapped(runner.model).parameters())
    runner.logger.info(
        f'Private training ({plan.method}): epsilon {plan.target_epsilon}, delta {as_given(plan.target_delta)}, '
        f'noise_multiplier {plan.noise_multiplier:.4f}, max_grad_norm {plan.max_grad_norm}, sample_rate '
        f'{plan.event.sample_rate}, {plan.steps} steps, accountant {plan.accountant}; '
        f'{sum(p.numel() for p in wrapper.params):,} of {count:,} parameters are trained.'
    )
    if plan.is_feature_dp:
        runner.logger.warning(
            'FEATURE DP: the guarantee covers what the public view removes. The view itself '
            f'({plan.public_view}), keypoint labels, boxes, whatever else annotations say, and membership are treated as public.'
        )
    if plan.earlier_history:
        spent = wrapper.ledger.epsilon(plan.target_delta, plan.accountant)
        runner.logger.warning(
            f'Earlier trainings in {runner.work_dir} have spent epsilon {rounded_up(spent)} of the budget.'
        )
    largest, usual = runner.train_loop.sampler.largest_forward, runner.train_loop.sampler.micro_batch_size
    if largest > usual:
        warn_in_terminal(
            f'A record has up to {largest} samples, which go through one forward: memory is needed for {largest} samples, not '
            f'for the {usual} of train_dataloader.batch_size. To use fewer, set '
            'train_dataloader.batch_sampler.max_rows_per_record.'
        )
    for warning in [*plan_warnings(plan), *config_warnings(runner.cfg)]:
        runner.logger.warning(warning)


def resumed_in_words(
    ledger: Ledger, spent: str, ahead: int, allowed: int, lost: int, target_epsilon: float | None
) -> str:
    """What a resumed training has spent, and how many steps are left. A kill loses steps, and they count.

    Args:
        ledger: its ledger.
        spent: the epsilon spent, in words.
        ahead: private steps from the checkpoint to the end of training.
        allowed: private steps that plan and budget still allow.
        lost: spent steps that came after the checkpoint.
        target_epsilon: the budget.
    """
    left = min(allowed, ahead)
    words = f'Resumed: {ledger.run_steps} private steps are spent ({spent}), {left} are left.'
    if lost > 0:
        words += f' {lost} of the spent steps came after the checkpoint: they count although their result is lost.'
    if left < ahead:
        short = ahead - left
        why = 'because of them' if short <= lost else f'since the budget of epsilon {target_epsilon} allows no more'
        words += f' Training stops {short} step{"s" if short > 1 else ""} before its end, {why}.'
    return words


def finished_in_words(
    plan: PrivacyPlan | None, ledger: Ledger, epochs: int | None, spent: bool, lost: int, target_epsilon: float | None
) -> str:
    """Why a resumed training has nothing left to do, and what to write for more.

    Args:
        plan: its plan; None without private steps.
        ledger: its ledger.
        epochs: all its epochs if the checkpoint has them, else None.
        spent: whether plan and budget allow no further step.
        lost: spent steps that came after the checkpoint.
        target_epsilon: the budget.
    """
    more = ['train_cfg.max_epochs', 'default_hooks.privacy_budget.target_epsilon']
    if epochs is not None:
        why, more = f'the checkpoint has all {epochs} epochs', more if spent else more[:1]
    elif plan is not None and ledger.run_steps >= plan.steps:
        why = f'all {plan.steps} private steps are spent'
        why += ', those after this checkpoint too although their result is lost' if lost > 0 else ''
    else:
        why, more = f'the budget of epsilon {target_epsilon} is spent', more[1:]
    return (
        f'Training is finished: {why}, and nothing is left to do. Ledger and checkpoints stay as they are. For more '
        f'{"steps" if epochs is None else "epochs"}, write a larger {" and a larger ".join(more)}.'
    )


def changed_budget(old: float | None, new: float | None) -> str:
    """A sentence if a resume has another target_epsilon than the training had before; else empty."""
    if old is None or old == new:
        return ''
    if new is not None and new < old:
        return f'The budget was epsilon {old:g} and is now {new:g}: what was spent stays spent.'
    now = 'there is none' if new is None else f'it is {new:g}'
    return (
        f'THE BUDGET WAS RAISED: it was epsilon {old:g} and now {now}, so this training may spend more than was promised before; '
        'the privacy statement says so.'
    )


def budgets_in_words(budgets: Sequence[float | None]) -> str | None:
    """The target_epsilon of a training and of its resumes, for the statement; None if it was always the same."""
    words = ['none' if budget is None else f'{budget:g}' for budget in budgets]
    kept = [word for before, word in zip([None, *words], words) if word != before]
    return None if len(kept) < 2 else f'{kept[0]} at first, then by a resume {", then ".join(kept[1:])}'
