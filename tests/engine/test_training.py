"""Whole private trainings through mmengine's Runner: real data set, real checkpoints, real logs."""

import json
import re
import shutil
from fractions import Fraction

import pytest
import torch
from mmengine.hooks import IterTimerHook
from mmengine.runner import Runner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmpose_dp.engine.hooks import showing
from mmpose_dp.privacy.accounting import StepEvent, epsilon
from mmpose_dp.privacy.errors import ConfigError, PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from tests.engine.test_preflight import ready
from tests.support.runs import config as full_config
from tests.support.runs import logged, tiny, train, train_until, unvalidated


def config(*arguments, **options):
    """With the tiny model: test_recipes and test_mpii_end_to_end train the larger ones."""
    return tiny(full_config(*arguments, **options))


@pytest.fixture(scope='module')
def hybrid(synthetic, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('hybrid')
    return train(config(synthetic, work_dir)), work_dir


def test_what_a_config_should_say_instead_is_logged_at_the_start(synthetic, tmp_path):
    adam = dict(_delete_=True, type='AdamW', lr=1e-3)
    train(config(synthetic, tmp_path, optim_wrapper__optimizer=adam, train_cfg__max_epochs=2))
    (log,) = tmp_path.glob('*/*.log')
    assert 'optim_wrapper.optimizer is AdamW, beside optim_wrapper.projector' in log.read_text()


def test_hybrid_trains_counts_and_states(hybrid):
    runner, work_dir = hybrid
    wrapper = runner.optim_wrapper
    assert wrapper.ledger.history == ((StepEvent(wrapper.mechanism.noise_multiplier, Fraction(1, 4)), 8),)
    assert runner.train_loop.iter == 5 + 2 * 4  # 40 views in batches of 8, then two epochs of 40 / 10 private steps
    statement = json.loads((work_dir / 'privacy_statement.json').read_text())
    assert statement['private'] and statement['steps'] == 8 and 7.9 < statement['epsilon'] <= 8.0
    assert statement['epsilon'] == pytest.approx(epsilon(wrapper.ledger.history, 1e-3))
    page = (work_dir / 'privacy_statement.md').read_text()
    for words in ('feature DP', 'Gaussian blur', 'keypoint labels', 'membership'):
        assert words in page


def test_statistics_are_learned_from_public_samples_alone(hybrid):
    """In the public epoch BatchNorm learns; in the private ones not one bit of its statistics moves."""
    _, work_dir = hybrid
    weights = [torch.load(work_dir / f'epoch_{i}.pth', weights_only=False)['state_dict'] for i in (1, 2, 3)]
    statistics = [{k: v for k, v in w.items() if 'running' in k or 'tracked' in k} for w in weights]
    assert len(statistics[0]) > 20
    assert all(v > 0 for k, v in statistics[0].items() if 'tracked' in k)
    for later in statistics[1:]:
        assert all(torch.equal(value, later[name]) for name, value in statistics[0].items())


def test_public_epochs_that_diverge_end_before_a_private_step(synthetic, tmp_path):
    cfg = config(synthetic, tmp_path / 'work')
    cfg.optim_wrapper.public_optimizer = dict(type='SGD', lr=1e30)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(
        ConfigError, match='holds NaN or infinity.* Public epochs diverged, and no private step was made'
    ):
        runner.train()
    assert runner.epoch == 1 and runner.optim_wrapper.ledger.run_steps == 0


def test_a_schedule_by_steps_of_private_epochs_is_refused(synthetic, tmp_path):
    """mmengine would stretch it over epochs of another length."""
    cfg = config(synthetic, tmp_path)
    cfg.param_scheduler = [dict(type='CosineAnnealingLR', T_max=3, by_epoch=True, convert_to_iter_based=True)]
    with pytest.raises(PrivacyError, match='convert_to_iter_based=True counts 4 steps in every epoch.*have 5'):
        train(cfg)


def test_no_private_loss_is_logged_or_kept(hybrid):
    runner, work_dir = hybrid
    allowed = {'loss_public', 'epsilon', 'epsilon_target', 'lr', 'data_time', 'time', 'memory', 'iter', 'epoch', 'step'}
    assert {k for k in logged(work_dir) if 'PCK' not in k} <= allowed | {'coco/AP'}
    kept = torch.load(work_dir / 'epoch_3.pth', weights_only=False)['message_hub']
    assert {k.split('/')[1] for k in kept['log_scalars'] if k.startswith('train/')} <= allowed
    events = EventAccumulator(str(next(work_dir.glob('*/vis_data'))))
    events.Reload()
    tags = {tag for tag in events.Tags()['scalars'] if 'PCK' not in tag}
    assert 'loss_public' in tags and tags <= allowed | {'base_lr'}
    for log in work_dir.glob('*/*.log'):
        assert not re.search(r'loss_kpt|acc_pose|[^_]loss: ', log.read_text().split('Private training')[1])


def test_the_pause_before_private_steps_is_announced_and_public_steps_do_not_count_for_the_end(hybrid):
    runner, work_dir = hybrid
    log = ''.join(path.read_text() for path in work_dir.glob('*/*.log'))
    assert log.count('Finding the subspace on 6 public samples.') == 1
    assert [hook.start_iter for hook in runner.hooks if isinstance(hook, IterTimerHook)] == [5]


def test_epsilon_is_logged_as_it_is_spent(hybrid):
    spent = logged(hybrid[1])['epsilon']
    assert spent[:5] == [0] * 5  # public steps
    assert len(spent) == 13 and spent == sorted(spent) and 0 < spent[5] and spent[-1] <= 8.0


def test_resume_continues_the_ledger(synthetic, tmp_path):
    """Killed after step 10, of which 5 were private; the checkpoint is from step 9. What was done since is spent."""
    train_until(config(synthetic, tmp_path, train_cfg__val_interval=10), 10)
    assert Ledger.read(tmp_path / LEDGER_NAME).steps == 5
    runner = train(config(synthetic, tmp_path, resume=True))
    assert runner.optim_wrapper.ledger.steps == 8 and runner.train_loop.iter == 12  # one step less than planned
    assert runner.optim_wrapper.ledger.runs == Ledger.read(tmp_path / LEDGER_NAME).runs
    assert len(runner.optim_wrapper.ledger.runs) == 1
    assert json.loads((tmp_path / 'privacy_statement.json').read_text())['epsilon'] <= 8.0


def test_resume_inside_an_epoch(synthetic, tmp_path):
    first, options = tmp_path / 'first', dict(default_hooks__checkpoint__by_epoch=False)
    train_until(config(synthetic, first, default_hooks__checkpoint__interval=7, **options), 7)
    cfg = config(synthetic, tmp_path / 'second', load_from=str(first / 'iter_7.pth'), resume=True, **options)
    runner = train(cfg)
    assert runner.optim_wrapper.ledger.steps == 8 and runner.train_loop.iter == 13
    assert (tmp_path / 'second' / LEDGER_NAME).read_bytes().startswith((first / LEDGER_NAME).read_bytes())
    log = ''.join(path.read_text() for path in (tmp_path / 'second').glob('*/*.log'))
    assert f'{first / LEDGER_NAME} does not count them' in log


def test_a_finished_training_cannot_be_had_twice_by_resuming_it(hybrid, synthetic, tmp_path):
    """Its last checkpoints are out: another way on from an earlier one spends more, and there is no more."""
    runner = train(config(synthetic, tmp_path, load_from=str(hybrid[1] / 'epoch_2.pth'), resume=True))
    assert runner.optim_wrapper.ledger.steps == 8 and runner.train_loop.iter == 9


def test_one_work_dir_is_one_budget(synthetic, tmp_path):
    """Two trainings in one folder share its budget: the second is calibrated to what the first left."""
    options = dict(train_cfg__max_epochs=1)
    first = train_until(config(synthetic, tmp_path, 'dpsgd', **options), 2).optim_wrapper
    second = train(config(synthetic, tmp_path, 'dpsgd', **options)).optim_wrapper
    assert second.mechanism.noise_multiplier > first.mechanism.noise_multiplier and second.ledger.run_steps == 4
    assert 7.9 < second.ledger.epsilon(1e-3) <= 8.0 and second.ledger.steps == 6
    statement = json.loads((tmp_path / 'privacy_statement.json').read_text())
    assert statement['steps_of_earlier_trainings'] == 2 and 'included' in statement['cost_of_tuning']
    with pytest.raises(PrivacyError, match='already spent.*another work_dir'):
        train(config(synthetic, tmp_path, 'dpsgd', **options))


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda path: path.unlink(), 'privacy_ledger.jsonl is missing'),
        (lambda path: path.write_text(path.read_text().replace('"1/4"', '"1/40"', 1)), 'line 2, is damaged'),
        (lambda path: path.write_text(path.read_text().replace('"steps": 1', '"steps": 0', 1)), 'line 2, is damaged'),
        (lambda path: path.write_text(''.join(path.read_text().splitlines(True)[:-1])), 'not the beginning'),
        (lambda path: path.write_text(''.join(path.read_text().splitlines(True)[1:])), 'line 1, is damaged'),
        (lambda path: path.write_text(''), 'not the beginning'),
    ],
)
def test_a_missing_or_changed_ledger_is_refused(hybrid, synthetic, tmp_path, damage, message):
    for name in ('epoch_3.pth', LEDGER_NAME):
        shutil.copy(hybrid[1] / name, tmp_path)
    damage(tmp_path / LEDGER_NAME)
    with pytest.raises(PrivacyError, match=message):
        train(config(synthetic, tmp_path, resume=True, train_cfg__max_epochs=8))


def test_a_checkpoint_that_a_kill_cut_off_is_passed_over(synthetic, tmp_path):
    train_until(config(synthetic, tmp_path, train_cfg__val_interval=10), 10)
    ledger = (tmp_path / LEDGER_NAME).read_text().splitlines(True)
    (tmp_path / LEDGER_NAME).write_text(''.join(ledger[:-1]) + ledger[-1][:20])  # and one that a kill tore
    whole = (tmp_path / 'epoch_2.pth').read_bytes()
    (tmp_path / 'epoch_3.pth').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'last_checkpoint').write_text('')
    runner = train(config(synthetic, tmp_path, resume=True))
    assert runner.optim_wrapper.ledger.steps == 8 and runner.train_loop.iter == 13


def test_the_ledger_survives_save_optimizer_false(synthetic, tmp_path):
    train(
        config(synthetic, tmp_path, 'dpsgd', default_hooks__checkpoint__save_optimizer=False, train_cfg__max_epochs=1)
    )
    kept = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['privacy']['ledger']['entries']
    assert [entry[1:] for entry in kept] == [['1/4', 4]]


def test_a_checkpoint_without_ledger_is_for_load_from_only(hybrid, synthetic, tmp_path):
    checkpoint = torch.load(hybrid[1] / 'epoch_2.pth', weights_only=False)
    del checkpoint['privacy']
    torch.save(checkpoint, tmp_path / 'bare.pth')
    shutil.copy(hybrid[1] / LEDGER_NAME, tmp_path)
    with pytest.raises(PrivacyError, match='no privacy ledger.*load_from'):
        train(config(synthetic, tmp_path / 'a', load_from=str(tmp_path / 'bare.pth'), resume=True))
    runner = train(
        config(synthetic, tmp_path / 'b', 'dpsgd', load_from=str(tmp_path / 'bare.pth'), train_cfg__max_epochs=1)
    )
    assert runner.optim_wrapper.ledger.steps == 4
    statement = json.loads((tmp_path / 'b/privacy_statement.json').read_text())
    assert 'bare.pth' in statement['pretraining']


def test_starting_from_a_private_checkpoint_is_told(hybrid, synthetic, tmp_path):
    """Its steps are not in the new ledger; nobody may think that its training data was public."""
    train(config(synthetic, tmp_path, 'dpsgd', load_from=str(hybrid[1] / 'epoch_3.pth'), train_cfg__max_epochs=1))
    assert 'private training made' in json.loads((tmp_path / 'privacy_statement.json').read_text())['pretraining']


def test_training_stops_before_the_budget_is_exceeded(hybrid, synthetic, tmp_path):
    """A longer training resumed from a ledger that was planned for a shorter one, whose budget is spent: no step is made."""
    options = dict(load_from=str(hybrid[1] / 'epoch_3.pth'), resume=True, train_cfg__max_epochs=8)
    runner = train(config(synthetic, tmp_path, **options))
    ledger = runner.optim_wrapper.ledger
    assert ledger.epsilon(1e-3) <= 8.0
    assert ledger.steps == 8 and not list(tmp_path.glob('*.pth'))
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
        synthetic, tmp_path, 'dpsgd', train_dataloader__batch_sampler__expected_batch_size=1, train_cfg__max_epochs=1
    )
    runner = train(cfg)
    assert runner.optim_wrapper.ledger.steps == 40 and runner.train_loop.iter == 40


def test_image_unit(synthetic, tmp_path, capsys):
    cfg = config(
        synthetic,
        tmp_path,
        'dpsgd',
        train_dataloader__dataset__privacy_unit='image',
        train_dataloader__batch_size=1,
        train_cfg__max_epochs=1,
    )
    runner = train(cfg)
    assert runner.optim_wrapper.plan.privacy_unit == 'image' and runner.optim_wrapper.plan.num_records < 40
    # how many people a picture has is for the terminal alone: a log may be published
    said, logged = capsys.readouterr().err, ''.join(path.read_text() for path in tmp_path.glob('**/*.log'))
    assert 'A record has up to' in said and 'A record has up to' not in logged and 'Private training' in logged


@pytest.mark.parametrize(
    'part', ['optim_wrapper', 'train_dataloader__batch_sampler', 'train_dataloader__dataset', 'nothing']
)
def test_a_debug_seed_of_noise_sampling_or_augmentation_is_enough(synthetic, tmp_path, part):
    options = {} if part == 'nothing' else {f'{part}__debug_seed': 1}
    runner = ready(unvalidated(synthetic, tmp_path, **options))
    runner.call_hook('before_run')
    showing.release(runner)
    plan = runner.optim_wrapper.plan
    assert plan.is_private == plan.run_metadata['secret_randomness'] == (part == 'nothing')


def test_a_debug_seed_says_not_private(synthetic, tmp_path):
    """The mark stays with the checkpoints and with what is trained on from them."""
    train_until(config(synthetic, tmp_path, 'dpsgd', optim_wrapper__debug_seed=1, train_cfg__val_interval=10), 5)
    assert 'NOT PRIVATE' in torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['privacy']['marking']
    train(config(synthetic, tmp_path, 'dpsgd', resume=True))
    assert not json.loads((tmp_path / 'privacy_statement.json').read_text())['private']
    last = (tmp_path / 'last_checkpoint').read_text()  # the step that was lost ends the last epoch early
    assert 'NOT PRIVATE' in torch.load(last, weights_only=False)['privacy']['marking']
    assert 'NOT PRIVATE' in (tmp_path / 'privacy_statement.md').read_text()
    assert not json.loads((tmp_path / 'privacy_statement.json').read_text())['private']


@pytest.mark.parametrize(
    ('method', 'options', 'message'),
    [
        (
            'dpsgd',
            dict(default_hooks__privacy_budget=dict(target_epsilon=1e-10, target_delta=1e-12)),
            'target_epsilon=1e-10.*cannot be met',
        ),
        ('dpsgd', dict(default_hooks__privacy_budget__target_delta=0.5), 'target_delta=0.5'),
        ('dpsgd', dict(default_hooks__privacy_budget__accountant='gdp'), 'gdp'),
        ('dpsgd', dict(optim_wrapper__noise_multiplier=0.1), 'noise_multiplier=0.1 spends epsilon'),
        ('dpsgd', dict(optim_wrapper__clip_grad=dict(max_norm=1)), 'optim_wrapper.clip_grad'),
        ('dpsgd', dict(optim_wrapper__projector=dict(rank=2)), 'projector needs public data'),
        ('dpsgd', dict(auto_scale_lr__enable=True), 'auto_scale_lr'),
        ('dpsgd', dict(train_dataloader__dataset__private__data_root='/nowhere'), '(?s)/nowhere.*make_synthetic_mpii'),
        ('dpsgd', dict(optim_wrapper__constructor='DefaultOptimWrapperConstructor'), 'train mode'),
        ('dpsgd', dict(optim_wrapper__type='OptimWrapper'), 'DPOptimWrapper'),
        (
            'hybrid',
            dict(optim_wrapper__projector__rank=100),
            'needs 100 public samples but .* has 40: lower optim_wrapper.projector.rank,',
        ),
        (
            'hybrid',
            dict(default_hooks__public_data__num_samples=50),
            'needs 50 public samples but .* has 40: lower default_hooks.public_data.num_samples,',
        ),
        ('hybrid', dict(train_dataloader__dataset__public_view=None), 'public_batch_size=8 is more than the 0'),
        ('feature', dict(optim_wrapper__public_weight=0.0), 'public part that nothing uses'),
    ],
)
def test_one_clear_error_before_training(synthetic, tmp_path, method, options, message):
    cfg = config(synthetic, tmp_path, method, **options)
    if 'optim_wrapper__type' in options:
        cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    with pytest.raises(PrivacyError, match=message):
        train(cfg)
    assert not list(tmp_path.glob('*.pth'))
