"""The steps on public samples alone may have an optimizer of their own: both do their own steps, and a resume keeps both."""

import pytest
import torch
from mmengine.runner import Runner

from mmpose_dp.engine import DPOptimWrapper, PrivateTrainLoop
from mmpose_dp.engine.checks.replay import Replay
from tests.support.runs import tiny, train, train_until, unvalidated

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


def test_public_steps_train_all_and_private_ones_what_is_chosen(synthetic, tmp_path):
    changed = dict(optim_wrapper__trainable='norms+head', optim_wrapper__projector=None)
    train_until(config(synthetic, tmp_path, **changed), 2 * PUBLIC_STEPS + 1)
    first = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['state_dict']
    second = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)['state_dict']
    conv, norm = 'backbone.layer1.0.conv1.weight', 'backbone.bn1.weight'
    assert not torch.equal(first[conv], second[conv])
    runner = train(config(synthetic, tmp_path, resume=True, **changed))
    last = {name: value.cpu() for name, value in runner.model.state_dict().items()}
    assert torch.equal(second[conv], last[conv]) and not torch.equal(second[norm], last[norm])
    trained = {name for name, param in runner.model.named_parameters() if param.requires_grad}
    assert conv not in trained and norm in trained


def test_a_resume_keeps_both(synthetic, tmp_path):
    train_until(config(synthetic, tmp_path), PUBLIC_STEPS + 2)
    wrapper = train(config(synthetic, tmp_path, resume=True)).optim_wrapper
    assert steps_of(wrapper.public_optimizer) == {2 * PUBLIC_STEPS}
    assert wrapper.ledger.steps == PRIVATE_STEPS
    assert all('momentum_buffer' in state for state in wrapper.optimizer.state.values())
    kept = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)['optimizer']
    assert {int(s['step']) for s in kept['public_optimizer']['state'].values()} == {2 * PUBLIC_STEPS}


@pytest.mark.parametrize(
    ('now', 'first', 'wanted'),
    [
        ((0.1, 0.1), (0.1, 0.1), (1.0, 1.0)),
        ((0.0, 0.05), (0.0, 0.1), (0.5, 0.5)),  # the first group has lr_mult=0
        ((0.05, 0.0), (0.1, 0.0), (0.5, 0.5)),
        ((0.05, 0.02), (0.1, 0.2), (0.5, 0.1)),  # a schedule down to one least rate for all
        ((0.0, 0.0), (0.1, 0.1), (0.0, 0.0)),  # the begin of a warm-up
        ((0.0, 0.0), (0.0, 0.0), (1.0, 1.0)),
        ((0.0, 0.1), (None, None), (1.0, 1.0)),  # no schedule
    ],
)
def test_public_rates_follow_their_own_group(now, first, wanted):
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [dict(params=[p], lr=lr) for p, lr in zip(params, now)]
    for group, lr in zip(groups, first):
        group.update({} if lr is None else dict(initial_lr=lr))
    wrapper = DPOptimWrapper(torch.optim.SGD(groups, lr=1.0), max_grad_norm=1.0)
    # one parameter more, which private steps do not train
    wrapper.public_optimizer = torch.optim.SGD([dict(params=[p]) for p in params], lr=0.01)
    for _ in range(2):
        wrapper.public_step()
        rates = [group['lr'] for group in wrapper.public_optimizer.param_groups]
        common = wanted[0] if first[0] or (first[0] is None and now[0]) else wanted[1]
        assert rates == pytest.approx([0.01 * wanted[0], 0.01 * wanted[1], 0.01 * common])


def test_an_interrupted_batch_is_forgotten(synthetic, tmp_path, monkeypatch):
    """Going on in the same process, as in a notebook: a record sampled again would be in one sum twice."""
    runner = Runner.from_cfg(unvalidated(synthetic, tmp_path, train_dataloader__batch_size=1))
    whole = PrivateTrainLoop._train_on

    def interrupted(self, wrapper, batch, is_last, replayed):
        whole(self, wrapper, batch, is_last, replayed)
        if not is_last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PrivateTrainLoop, '_train_on', interrupted)
        runner.train()
    loop, wrapper = runner.train_loop, runner.optim_wrapper
    assert wrapper.accumulating and wrapper.mechanism._sum is not None
    before, found, call = wrapper.ledger.steps, [], runner.call_hook

    def look(name, **arguments):
        if name == 'before_train_iter':
            found.append((wrapper.accumulating, wrapper.mechanism._sum))
        call(name, **arguments)

    monkeypatch.setattr(runner, 'call_hook', look)
    loop.run_epoch()
    assert found and set(found) == {(False, None)} and wrapper.ledger.steps == before + len(found)


def test_the_chosen_record_is_replayed_where_forwards_hold_one_record(synthetic, tmp_path, monkeypatch):
    wanted, judged = [], []
    whole, judge = PrivateTrainLoop._train_on, Replay.judge

    def noted(self, wrapper, batch, is_last, replayed):
        wanted.extend([] if replayed is None else [replayed])
        whole(self, wrapper, batch, is_last, replayed)

    monkeypatch.setattr(PrivateTrainLoop, '_train_on', noted)
    monkeypatch.setattr(Replay, 'judge', lambda self, *args: judged.append(self.chosen) or judge(self, *args))
    cfg = tiny(unvalidated(synthetic, tmp_path, optim_wrapper__engine='loop', train_cfg__max_epochs=1))
    assert train(cfg).optim_wrapper.engine.one_at_a_time
    assert len(judged) > 1 and judged == wanted
