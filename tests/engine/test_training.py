"""Whole private trainings through mmengine's Runner: real data set, real checkpoints, real logs."""

import json
import re
from fractions import Fraction

import pytest
import torch
from runs import config, logged, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmpose_dp.privacy import PrivacyError, StepEvent, epsilon


@pytest.fixture(scope='module')
def hybrid(synthetic, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('hybrid')
    return train(config(synthetic, work_dir)), work_dir


def test_hybrid_trains_counts_and_states(hybrid):
    runner, work_dir = hybrid
    wrapper = runner.optim_wrapper
    assert wrapper.ledger.history == ((StepEvent(wrapper.noise_multiplier, Fraction(1, 4)), 8),)
    assert runner.train_loop.iter == 5 + 2 * 4  # 40 views in batches of 8, then two epochs of 40 / 10 private steps
    statement = json.loads((work_dir / 'privacy_statement.json').read_text())
    assert statement['private'] and statement['steps'] == 8 and 7.9 < statement['epsilon'] <= 8.0
    assert statement['epsilon'] == pytest.approx(epsilon(wrapper.ledger.history, 1e-3))
    page = (work_dir / 'privacy_statement.md').read_text()
    for words in ('feature DP', 'Gaussian blur', 'keypoint labels', 'membership'):
        assert words in page


def test_no_private_loss_is_logged_or_kept(hybrid):
    runner, work_dir = hybrid
    allowed = {
        'loss_public',
        'epsilon',
        'lr',
        'data_time',
        'time',
        'memory',
        'iter',
        'epoch',
        'step',
    }
    assert {k for k in logged(work_dir) if 'PCK' not in k} <= allowed | {'coco/AP'}
    kept = torch.load(work_dir / 'epoch_3.pth', weights_only=False)['message_hub']
    assert {k.split('/')[1] for k in kept['log_scalars'] if k.startswith('train/')} <= allowed
    events = EventAccumulator(str(next(work_dir.glob('*/vis_data'))))
    events.Reload()
    tags = {tag for tag in events.Tags()['scalars'] if 'PCK' not in tag}
    assert 'loss_public' in tags and tags <= allowed | {'base_lr'}
    for log in work_dir.glob('*/*.log'):
        assert not re.search(r'loss_kpt|acc_pose|[^_]loss: ', log.read_text().split('Private training')[1])


def test_epsilon_is_logged_as_it_is_spent(hybrid):
    spent = logged(hybrid[1])['epsilon']
    assert len(spent) == 8 and spent == sorted(spent) and spent[-1] <= 8.0


def test_resume_continues_the_ledger(hybrid, synthetic, tmp_path):
    cfg = config(synthetic, tmp_path, load_from=str(hybrid[1] / 'epoch_2.pth'), resume=True)
    runner = train(cfg)
    assert runner.optim_wrapper.ledger.steps == 8 and runner.train_loop.iter == 13
    assert json.loads((tmp_path / 'privacy_statement.json').read_text())['epsilon'] <= 8.0


def test_resume_inside_an_epoch(hybrid, synthetic, tmp_path):
    first = tmp_path / 'first'
    cfg = config(
        synthetic,
        first,
        default_hooks__checkpoint__interval=7,
        default_hooks__checkpoint__by_epoch=False,
    )
    train(cfg)
    cfg = config(synthetic, tmp_path / 'second', load_from=str(first / 'iter_7.pth'), resume=True)
    runner = train(cfg)
    assert runner.optim_wrapper.ledger.steps == 8 and runner.train_loop.iter == 13


def test_the_ledger_survives_save_optimizer_false(synthetic, tmp_path):
    train(
        config(
            synthetic,
            tmp_path,
            'dpsgd',
            default_hooks__checkpoint__save_optimizer=False,
            train_cfg__max_epochs=1,
        )
    )
    assert (
        sum(e[3] for e in torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['privacy']['ledger']['entries']) == 4
    )


def test_a_checkpoint_without_ledger_is_for_load_from_only(hybrid, synthetic, tmp_path):
    checkpoint = torch.load(hybrid[1] / 'epoch_2.pth', weights_only=False)
    del checkpoint['privacy']
    torch.save(checkpoint, tmp_path / 'bare.pth')
    with pytest.raises(PrivacyError, match='no privacy ledger.*load_from'):
        train(config(synthetic, tmp_path / 'a', load_from=str(tmp_path / 'bare.pth'), resume=True))
    runner = train(
        config(
            synthetic,
            tmp_path / 'b',
            'dpsgd',
            load_from=str(tmp_path / 'bare.pth'),
            train_cfg__max_epochs=1,
        )
    )
    assert runner.optim_wrapper.ledger.steps == 4
    statement = json.loads((tmp_path / 'b/privacy_statement.json').read_text())
    assert 'bare.pth' in statement['pretraining']


def test_training_stops_before_the_budget_is_exceeded(hybrid, synthetic, tmp_path):
    """A longer training resumed from a ledger that was planned for a shorter one."""
    options = dict(load_from=str(hybrid[1] / 'epoch_3.pth'), resume=True, train_cfg__max_epochs=8)
    runner = train(config(synthetic, tmp_path, **options))
    ledger = runner.optim_wrapper.ledger
    assert ledger.epsilon(1e-3) <= 8.0
    assert 8 <= ledger.steps < 28 and (tmp_path / f'budget_spent_iter_{runner.train_loop.iter}.pth').exists()
    assert (tmp_path / 'privacy_statement.md').exists()


@pytest.mark.parametrize('method', ['dpsgd', 'projected', 'feature'])
def test_the_other_methods(synthetic, synthetic_public, tmp_path, method):
    options = dict(public_root=synthetic_public) if method == 'projected' else {}
    runner = train(config(synthetic, tmp_path, method, train_cfg__max_epochs=1, **options))
    assert runner.optim_wrapper.ledger.steps == 4
    statement = json.loads((tmp_path / 'privacy_statement.json').read_text())
    assert ('feature DP' in statement['guarantee']) == (method == 'feature')
    assert (statement['public_data'] == 'none') == (method == 'dpsgd')


def test_empty_draws_are_steps_of_noise_alone(synthetic, tmp_path):
    cfg = config(
        synthetic,
        tmp_path,
        'dpsgd',
        train_dataloader__batch_sampler__expected_batch_size=1,
        train_cfg__max_epochs=1,
    )
    runner = train(cfg)
    assert runner.optim_wrapper.ledger.steps == 40 and runner.train_loop.iter == 40


def test_image_unit(synthetic, tmp_path):
    cfg = config(
        synthetic,
        tmp_path,
        'dpsgd',
        train_dataloader__dataset__privacy_unit='image',
        train_cfg__max_epochs=1,
    )
    runner = train(cfg)
    assert runner.optim_wrapper.plan.privacy_unit == 'image' and runner.optim_wrapper.plan.num_records < 40


def test_a_debug_seed_says_not_private(synthetic, tmp_path):
    train(config(synthetic, tmp_path, 'dpsgd', optim_wrapper__debug_seed=1, train_cfg__max_epochs=1))
    assert 'NOT PRIVATE' in (tmp_path / 'privacy_statement.md').read_text()
    assert not json.loads((tmp_path / 'privacy_statement.json').read_text())['private']


@pytest.mark.parametrize(
    ('method', 'options', 'message'),
    [
        (
            'dpsgd',
            dict(default_hooks__privacy_budget=dict(target_epsilon=1e-6, target_delta=1e-12)),
            'target_epsilon=1e-06.*cannot be met',
        ),
        ('dpsgd', dict(default_hooks__privacy_budget__target_delta=0.5), 'target_delta=0.5'),
        ('dpsgd', dict(default_hooks__privacy_budget__accountant='gdp'), 'gdp'),
        ('dpsgd', dict(optim_wrapper__noise_multiplier=0.1), 'noise_multiplier=0.1 spends epsilon'),
        ('dpsgd', dict(optim_wrapper__clip_grad=dict(max_norm=1)), 'optim_wrapper.clip_grad'),
        ('dpsgd', dict(optim_wrapper__projector=dict(rank=2)), 'projector needs public data'),
        ('dpsgd', dict(auto_scale_lr__enable=True), 'auto_scale_lr'),
        (
            'dpsgd',
            dict(train_dataloader__dataset__private__data_root='/nowhere'),
            '(?s)/nowhere.*make_synthetic_mpii',
        ),
        ('dpsgd', dict(model__head__type='SimCCHead'), "model.head.type='PrivateSimCCHead'"),
        ('dpsgd', dict(optim_wrapper__constructor='DefaultOptimWrapperConstructor'), 'train mode'),
        ('dpsgd', dict(optim_wrapper__type='OptimWrapper'), 'DPOptimWrapper'),
        (
            'hybrid',
            dict(optim_wrapper__projector__rank=100),
            'wants 100 public records and .* has 40',
        ),
        (
            'hybrid',
            dict(train_dataloader__dataset__public_view=None),
            'public_batch_size=8 is more than the 0',
        ),
        ('feature', dict(optim_wrapper__public_weight=0.0), 'public half that nothing uses'),
    ],
)
def test_one_clear_error_before_training(synthetic, tmp_path, method, options, message):
    cfg = config(synthetic, tmp_path, method, **options)
    if 'optim_wrapper__type' in options:
        cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    with pytest.raises(PrivacyError, match=message):
        train(cfg)
    assert not list(tmp_path.glob('*.pth'))
