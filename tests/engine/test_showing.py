"""What a training shows while it runs: epsilon in every line, and nothing that is not on the list of what is allowed."""

import json
import sys
import warnings

import numpy as np
import pytest
import torch
import train
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.runner import Runner
from mmengine.visualization import BaseVisBackend, LocalVisBackend, TensorboardVisBackend
from mmpose.registry import VISBACKENDS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmpose_dp.engine.hooks import showing
from mmpose_dp.extras.risk import ceiling
from tests.support.paths import REPO
from tests.support.runs import config, logged, tiny, unvalidated

LEAKS = ('loss', 'grad_norm', 'acc_pose', 'batch_size', 'num_samples', 'loss_private')
ALLOWED = {'epsilon', 'epsilon_target', 'loss_public', 'lr', 'epoch', 'iter', 'step'}


class Leaking(Hook):
    """Shows in every way that mmengine has what a training must not show; after PrivacyBudgetHook, before LoggerHook."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        for name in LEAKS:
            MessageHub.get_current_instance().update_scalar(f'train/{name}', 0.5)
            runner.message_hub.update_scalar(name, 0.5)
            runner.visualizer.add_scalar(f'hook/{name}', 0.5, step=runner.iter)
        runner.visualizer.add_scalars(dict(memory=3, weight=0.5, epsilon=runner.iter), step=runner.iter + 100)
        runner.visualizer.add_image('batch', np.zeros((8, 8, 3), np.uint8), step=runner.iter)
        runner.visualizer.add_graph(runner.model, None)


@pytest.fixture(scope='module')
def run(synthetic, tmp_path_factory):
    """(runner, work dir, warnings) of a hybrid training of 1 public and 2 private epochs in which a hook leaks."""
    folder = tmp_path_factory.mktemp('showing')
    cfg = tiny(config(synthetic, folder, default_hooks__logger__interval=2))
    cfg.optim_wrapper.public_optimizer = dict(type='AdamW', lr=5e-4)
    cfg.default_hooks.visualization.update(enable=True, interval=1)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Leaking())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        runner.train()
    return runner, folder, [str(w.message) for w in caught]


def events(folder):
    """What TensorBoard got."""
    (file,) = folder.rglob('events.out.tfevents*')
    found = EventAccumulator(str(file.parent), size_guidance=dict(scalars=0, images=0))
    found.Reload()
    return found


def train_lines(folder):
    """The train lines of the file beside the log."""
    (file,) = folder.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if 'lr' in line]


def test_every_line_has_the_epsilon_of_its_step(run):
    runner, folder, _ = run
    plan, lines = runner.optim_wrapper.plan, train_lines(folder)
    assert [line['step'] for line in lines] == [2, 4, 7, 9, 11, 13]  # 5 public steps, 4 + 4 private ones
    spent = [plan.epsilon_after(max(line['step'] - 5, 0)) for line in lines]
    assert [line['epsilon'] for line in lines] == [ceiling(x) for x in spent] and lines[0]['epsilon'] == 0
    assert {line['epsilon_target'] for line in lines} == {8.0} and all(line['loss_public'] > 0 for line in lines)
    log = next(folder.glob('*/*.log')).read_text()
    assert log.count('epsilon: ') == log.count('Epoch(train)') == 6 and log.count('eta: ') == 6
    assert 'Spent in 8 private steps: epsilon 8 of 8 at delta 0.001, public loss 0.0' in log


def test_a_public_epoch_logs_its_own_rate(run):
    rates = [line['lr'] for line in train_lines(run[1])]
    assert rates[:2] == [5e-4, 5e-4] and min(rates[2:]) > 0.01


def test_tensorboard_gets_what_is_allowed_and_nothing_else(run):
    found = events(run[1])
    tags = set(found.Tags()['scalars'])
    validated = {tag for tag in tags if 'PCK' in tag}
    assert validated and tags - validated - {'time', 'data_time'} == ALLOWED - {'step'}
    # validation's alone: one an epoch
    assert len(found.Scalars('time')) == len(found.Scalars('data_time')) == 3
    assert found.Tags()['images'] and {tag.split('/')[0] for tag in found.Tags()['images']} == {'val_img'}
    assert [e.value for e in found.Scalars('epsilon') if e.step < 100][-1] == pytest.approx(8, abs=0.01)


def test_file_log_and_checkpoints_have_nothing_else_either(run):
    _, folder, _ = run
    allowed = ALLOWED | {'time', 'data_time'}
    assert {name for name in logged(folder) if 'PCK' not in name} == allowed
    log = next(folder.glob('*/*.log')).read_text()
    trained = [line for line in log.splitlines() if 'Epoch(train)' in line]
    assert trained and not any(f'{name}: ' in line for line in trained for name in LEAKS)
    kept = torch.load(folder / 'epoch_3.pth', weights_only=False)['message_hub']['log_scalars']
    assert {name.split('/')[-1] for name in kept if not name.startswith('val/')} == ALLOWED - {'epoch', 'iter', 'step'}
    assert not [*folder.rglob('*batch*.png')]


def test_each_dropped_name_is_said_once(run):
    said = [message for message in run[2] if 'is not shown' in message]
    assert len(said) == len(LEAKS) + 1 and all('epsilon, epsilon_target' in message for message in said)
    assert any('add_graph' in message for message in run[2])


def test_the_guard_is_off_after_the_run(run):
    runner, _, _ = run
    assert type(runner.message_hub) is MessageHub
    assert {type(x) for x in runner.visualizer._vis_backends.values()} == {LocalVisBackend, TensorboardVisBackend}


class Uploading(BaseVisBackend):
    """Uploads files of the work dir when it is closed, as MLflow's and ClearML's backends do."""

    def __init__(self, save_dir, artifact_suffix):
        super().__init__(save_dir)
        self._artifact_suffix = artifact_suffix

    experiment = _init_env = None


@pytest.mark.parametrize(
    ('given', 'left'), [(('.json', '.log', '.py', 'yaml'), ('.py', 'yaml')), ('.jsonl', ()), (('.pth', ''), ('.pth',))]
)
def test_log_and_ledger_are_not_uploaded(tmp_path, given, left):
    backend = Uploading(tmp_path, given)
    showing.GuardedVisBackend(backend, showing.ShownScalars(), MessageHub.get_instance('uploading'))
    assert backend._artifact_suffix == left


def test_wandb_records_nothing_by_itself():
    """Neither the terminal, which shows step times, nor the load; what a config sets stays, and other backends too."""
    given = dict(settings=dict(console='wrap'), project='p')
    backends = [
        dict(type='WandbVisBackend'),
        dict(type='WandbVisBackend', init_kwargs=given),
        dict(type='LocalVisBackend'),
    ]
    cfg = showing.without_recordings(Config(dict(visualizer=dict(vis_backends=backends))))
    first, second, third = cfg.visualizer.vis_backends
    assert first.init_kwargs.settings == dict(console='off', x_disable_stats=True) and third == backends[2]
    assert second.init_kwargs == dict(settings=dict(console='wrap', x_disable_stats=True), project='p')
    assert not showing.without_recordings(Config({})).to_dict()


def test_the_training_tool_switches_recordings_off_in_private_training(monkeypatch):
    for method, found in (('dpsgd_eps08', True), ('nonprivate', False)):
        path = REPO / f'configs/dp/hrnet_synthetic_{method}.py'
        monkeypatch.setattr(sys, 'argv', ['train.py', str(path)])
        cfg = Config.fromfile(path)
        cfg.visualizer.vis_backends = [dict(type='WandbVisBackend')]
        cfg = train.merge_args(cfg, train.parse_args())
        assert ('init_kwargs' in cfg.visualizer.vis_backends[0]) == found


@pytest.mark.parametrize('recorded', [True, False])
def test_wandb_itself_is_silent_or_warned_of(tmp_path, monkeypatch, recorded):
    wandb = pytest.importorskip('wandb', reason='W&B is no requirement')
    monkeypatch.chdir(tmp_path)
    backend = dict(type='WandbVisBackend', init_kwargs=dict(mode='offline'))
    cfg = Config(dict(visualizer=dict(vis_backends=[backend])))
    if not recorded:
        (backend,) = showing.without_recordings(cfg).visualizer.vis_backends
    backend = VISBACKENDS.build(dict(backend, save_dir=str(tmp_path)))
    assert backend.experiment.run is not None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        showing._warn_of_recordings(backend)
    print('the terminal')
    wandb.finish()
    assert any('W&B records the terminal' in str(one.message) for one in caught) == recorded
    assert bool([*tmp_path.rglob('output.log')]) == recorded


def test_private_metrics_alone_come_with_the_flag():
    shown = showing.ShownScalars(exposed=True)
    assert shown.allows('train/acc_pose_private') and shown.allows('max_grad_norm')
    with pytest.warns(UserWarning, match='grad_norm is not shown'):
        assert not shown.allows('train/grad_norm')
    with pytest.warns(UserWarning, match='worst_record/step is not shown'):
        assert not shown.allows('train/worst_record/step')


def test_scalars_of_an_older_checkpoint_are_dropped():
    scalars = {'train/loss': 1, 'train/lr': 2, 'val/PCK': 3, 'train/epsilon': 4, 'train/time': 5}
    checkpoint = dict(message_hub=dict(log_scalars=scalars))
    with pytest.warns(UserWarning, match='train/loss'):
        showing.drop_resumed(checkpoint)
    assert set(scalars) == {'train/lr', 'val/PCK', 'train/epsilon', 'train/time'}
    showing.drop_resumed({})


@pytest.fixture
def hub(request):
    """A guarded hub, as while training is at work."""
    found = MessageHub.get_instance(f'showing_{request.node.name}')
    found.__class__, found.shown, found.informed = showing.GuardedMessageHub, showing.ShownScalars(), set()
    found.update_info('loop_stage', 'train')
    return found


NOT_KEPT = [np.zeros(3), [0.5, 0.25], (0.5,), 0.5, 3, 'bright', {'a': 0.5}, torch.zeros(2), object()]


@pytest.mark.parametrize('value', NOT_KEPT, ids=lambda value: type(value).__name__)
def test_what_training_keeps_in_the_hub_is_on_a_list_whatever_its_type(hub, value):
    hub.update_scalar('val/private_loss', 0.5)
    with pytest.warns(UserWarning, match='features is not kept'):
        hub.update_info('features', value)
    for name in ('last_ckpt', 'keep_ckpt_ids'):  # a name of the list, with a value of another type
        if not isinstance(value, str):
            hub.update_info(name, value)
    hub.update_info_dict(dict(val_features=value))
    hub.runtime_info['direct'] = value
    hub.log_scalars['direct'] = value
    hub._resumed_keys.update(direct=True)
    hub.update_info('epoch', 3)
    hub.update_info('keep_ckpt_ids', [1, 2])
    hub.update_info('loop_stage', 'val')
    hub.update_scalar('val/PCK', 0.5)
    hub.update_info('best_score', value)
    kept = hub.state_dict()
    assert set(kept['log_scalars']) == {'val/PCK'}
    assert set(kept['runtime_info']) == {'loop_stage', 'epoch', 'keep_ckpt_ids', 'best_score'}
    assert set(kept['resumed_keys']) == {'loop_stage', 'epoch', 'keep_ckpt_ids', 'best_score', 'val/PCK'}


def test_a_resumed_hub_keeps_what_validation_had_kept(hub):
    hub.load_state_dict(
        dict(log_scalars={}, runtime_info=dict(best_score=0.5, act=[0.5]), resumed_keys=dict(best_score=True, act=True))
    )
    assert set(hub.state_dict()['runtime_info']) == {'loop_stage', 'best_score'}


def test_the_guard_is_off_after_a_failure(synthetic, tmp_path):
    class Failing(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            raise KeyboardInterrupt

    runner = Runner.from_cfg(tiny(config(synthetic, tmp_path, 'dpsgd', train_cfg__max_epochs=1)))
    runner.register_hook(Failing())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert type(runner.message_hub) is MessageHub
    assert not any(isinstance(x, showing.GuardedVisBackend) for x in runner.visualizer._vis_backends.values())


# ---- several trainings in one process, as in a notebook ----------------------------------------------------------------
@pytest.fixture(scope='module')
def in_one_process(synthetic, tmp_path_factory):
    """Work dirs of a runner that is only built, of two private trainings, and of a runner after them, which is returned too.

    All visualizers have MMPose's own name.
    """
    folders = [tmp_path_factory.mktemp(name) for name in ('built', 'first', 'second', 'later')]

    def runner_of(folder, epochs=1):
        cfg = unvalidated(synthetic, folder, train_cfg__max_epochs=epochs)
        cfg.visualizer.name = 'visualizer'
        return Runner.from_cfg(cfg)

    runner_of(folders[0])
    for epochs, folder in enumerate(folders[1:3], 1):
        runner_of(folder, epochs).train()
    return folders, runner_of(folders[3])


def test_each_training_of_a_process_shows_in_its_own_folder(in_one_process):
    built, *trained, _ = in_one_process[0]
    assert not logged(built)
    for epochs, folder in enumerate(trained, 1):
        lines = logged(folder)
        assert len(lines['epsilon']) == 4 * epochs and lines['step'] == [*range(1, 4 * epochs + 1)]
        assert len(events(folder).Scalars('epsilon')) == 4 * epochs
        (shown,) = folder.glob('*/vis_data/config.py')
        assert str(folder) in shown.read_text()
        assert 'Spent in ' in next(folder.glob('*/*.log')).read_text()
        assert json.loads((folder / 'privacy_statement.json').read_text())['steps'] == 4 * epochs


def test_a_private_training_leaves_its_visualizer_to_nobody(in_one_process):
    later = in_one_process[1]
    assert {backend._save_dir for backend in later.visualizer._vis_backends.values()} == {f'{later.log_dir}/vis_data'}
