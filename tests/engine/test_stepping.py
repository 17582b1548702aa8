"""The steps on public rows alone may have an optimizer of their own: both do their own steps, and a resume keeps both."""

import pytest
import torch
from runs import train, train_until, unvalidated

from mmpose_dp.engine import DPOptimWrapper

PUBLIC_STEPS, PRIVATE_STEPS = 5, 4  # an epoch


def config(synthetic, work_dir, **options):
    settings = dict(
        train_cfg__max_epochs=3,
        train_cfg__public_epochs=2,
        optim_wrapper__optimizer=dict(_delete_=True, type='SGD', lr=0.1, momentum=0.9),
        optim_wrapper__public_optimizer=dict(_delete_=True, type='AdamW', lr=1e-2),
        param_scheduler=[dict(type='MultiStepLR', milestones=[PUBLIC_STEPS], gamma=0.1, by_epoch=False)],
    )
    return unvalidated(synthetic, work_dir, 'hybrid', **settings, **options)


def steps_of(optimizer):
    return {int(state['step']) for state in optimizer.state.values()}


def test_each_optimizer_takes_its_own_steps(synthetic, tmp_path, recwarn):
    wrapper = train_until(config(synthetic, tmp_path), 2 * PUBLIC_STEPS).optim_wrapper
    assert isinstance(wrapper, DPOptimWrapper)
    assert not wrapper.optimizer.state and steps_of(wrapper.public_optimizer) == {2 * PUBLIC_STEPS}
    assert not [w for w in recwarn if 'scheduler.step' in str(w.message)]
    # the scheduler knows the other one alone
    assert [g['lr'] for g in wrapper.optimizer.param_groups] == [pytest.approx(0.1 * 0.1)]
    assert [g['lr'] for g in wrapper.public_optimizer.param_groups] == [pytest.approx(1e-2 * 0.1)]


def test_a_resume_keeps_both(synthetic, tmp_path):
    train_until(config(synthetic, tmp_path), PUBLIC_STEPS + 2)
    wrapper = train(config(synthetic, tmp_path, resume=True)).optim_wrapper
    assert steps_of(wrapper.public_optimizer) == {2 * PUBLIC_STEPS}
    assert wrapper.ledger.steps == PRIVATE_STEPS
    assert all('momentum_buffer' in state for state in wrapper.optimizer.state.values())
    kept = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)['optimizer']
    assert {int(s['step']) for s in kept['public_optimizer']['state'].values()} == {2 * PUBLIC_STEPS}
