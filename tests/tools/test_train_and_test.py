"""train.py, test.py and the dist scripts: MMPose's arguments have the same effect as in MMPose."""

import importlib.util
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import cli
import mmpose
import pytest
import torch
from mmengine.config import Config
from mmpose.registry import MODELS

from mmpose_dp.privacy.errors import PrivacyError
from tests.support.paths import REPO
from tests.support.processes import free_port, run
from tests.support.runs import config, tiny

MMPOSE_TOOLS = Path(mmpose.__file__).parent / '.mim/tools'
PLAIN = REPO / 'configs/dp/hrnet_synthetic_nonprivate.py'
PRIVATE = REPO / 'configs/dp/hrnet_mpii_dpsgd_eps08.py'


def loaded(tool):
    """A tool's module; Python has a module ``test`` of its own."""
    spec = importlib.util.spec_from_file_location(f'{tool.parent.name}_{tool.stem}', tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def merged(monkeypatch):
    """The config after a tool has merged its arguments: merged(tool, config, *arguments)."""

    def merge(tool, *arguments):
        monkeypatch.setattr(sys, 'argv', [str(tool), *map(str, arguments)])
        monkeypatch.setenv('LOCAL_RANK', '0')
        module = loaded(tool)
        args = module.parse_args()
        return module.merge_args(Config.fromfile(args.config), args)

    return merge


def small(data):
    """Options that point the synthetic config at the small data set."""
    options = [f'train_dataloader.dataset.data_root={data}', 'env_cfg.dist_cfg.backend=gloo']
    for loader in ('val_dataloader', 'test_dataloader'):
        options.append(f'{loader}.dataset.data_root={data}')
        options.append(f'{loader}.dataset.headbox_file={data}/annotations/mpii_gt_val.mat')
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        options += [f'{loader}.num_workers=0', f'{loader}.persistent_workers=False']
    return [*options, 'train_dataloader.batch_size=10', 'train_cfg.max_epochs=1']


# ---- arguments -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'arguments',
    [
        [],
        ['--work-dir', 'elsewhere', '--resume', '--no-validate'],
        ['--resume', 'some.pth', '--auto-scale-lr', '--launcher', 'pytorch'],
        ['--amp'],
        ['--show', '--show-dir', 'pictures', '--interval', '3', '--wait-time', '0.5'],
        ['--show-dir', 'pictures', '--cfg-options', 'train_cfg.max_epochs=3', 'codec.sigma="[1,2]"'],
    ],
    ids=' '.join,
)
def test_train_changes_a_plain_config_as_mmpose_does(merged, arguments):
    ours = merged(REPO / 'tools/train.py', PLAIN, *arguments)
    theirs = merged(MMPOSE_TOOLS / 'train.py', PLAIN, *arguments)
    ours.work_dir, theirs.work_dir = map(os.path.normpath, (ours.work_dir, theirs.work_dir))
    assert ours.to_dict() == theirs.to_dict()


@pytest.mark.parametrize(
    'arguments',
    [
        [],
        ['--work-dir', 'elsewhere', '--dump', 'all.pkl', '--launcher', 'pytorch'],
        ['--badcase', '--show', '--wait-time', '2', '--interval', '4'],
        ['--show', '--interval', '3', '--cfg-options', 'test_dataloader.batch_size=3'],
    ],
    ids=' '.join,
)
def test_test_changes_a_config_as_mmpose_does(merged, arguments):
    ours = merged(REPO / 'tools/test.py', PLAIN, 'some.pth', *arguments)
    theirs = merged(MMPOSE_TOOLS / 'test.py', PLAIN, 'some.pth', *arguments)
    ours.work_dir, theirs.work_dir = map(os.path.normpath, (ours.work_dir, theirs.work_dir))
    assert ours.to_dict() == theirs.to_dict()


@pytest.mark.parametrize(('option', 'name'), [('--out', 'scores.txt'), ('--dump', 'all.json')])
def test_a_file_that_could_not_be_written_is_refused_before_the_test(merged, capsys, option, name):
    with pytest.raises(SystemExit):
        merged(REPO / 'tools/test.py', PLAIN, 'some.pth', option, name)
    assert f'{option} {name}: the name must end in' in capsys.readouterr().err


def test_amp_of_a_private_config_keeps_the_private_wrapper(merged):
    wrapper = merged(REPO / 'tools/train.py', PRIVATE, '--amp').optim_wrapper
    assert wrapper.type == 'DPOptimWrapper' and wrapper.amp_dtype == 'bfloat16'
    assert 'loss_scale' not in wrapper


def test_amp_of_an_unknown_wrapper_is_refused(merged, tmp_path):
    config = tmp_path / 'other.py'
    config.write_text("optim_wrapper = dict(type='ApexOptimWrapper')\n")
    with pytest.raises(PrivacyError, match="ApexOptimWrapper.*write type='OptimWrapper'"):
        merged(REPO / 'tools/train.py', config, '--amp')


def test_auto_scale_lr_of_a_private_config_is_refused(merged):
    with pytest.raises(PrivacyError, match='expected_batch_size'):
        merged(REPO / 'tools/train.py', PRIVATE, '--auto-scale-lr')


# ---- runs ----------------------------------------------------------------------------------------
def test_a_privacy_error_is_one_message_and_exit_status_2(tmp_path):
    done = run(sys.executable, '-W', 'ignore', REPO / 'tools/train.py', PRIVATE, '--auto-scale-lr')
    assert done.returncode == 2
    assert done.stderr.startswith('mmpose_dp: --auto-scale-lr') and done.stderr.count('\n') == 1


def test_the_dist_scripts_need_their_arguments_and_explain_them():
    for script, usage in (('dist_train.sh', 'CONFIG GPUS'), ('dist_test.sh', 'CHECKPOINT GPUS')):
        done = run(REPO / 'tools' / script)
        assert done.returncode == 1 and usage in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the scripts use mmengine's own set-up")
def test_the_dist_scripts_train_and_test_on_two_cpu_processes(synthetic, tmp_path):
    trained = run(
        *(REPO / 'tools/dist_train.sh', PLAIN, 2, '--work-dir', tmp_path),
        *('--cfg-options', *small(synthetic)),
        PYTHON=sys.executable,
        PORT=free_port(),
    )
    assert trained.returncode == 0, trained.stderr[-2000:]
    checkpoint = tmp_path / 'epoch_1.pth'
    assert 'Epoch(train) [1][2/2]' in trained.stderr + trained.stdout  # 40 records, 2 x 10 a step
    behind = torch.load(checkpoint, weights_only=False)['privacy']['lineage']
    assert behind['plain_data_sets'] == ('MpiiDataset mpii_train.json',)  # passed on to trainings that start from it

    scores, predictions = tmp_path / 'scores.json', tmp_path / 'predictions.pkl'
    tested = run(
        *(REPO / 'tools/dist_test.sh', PLAIN, checkpoint, 2, '--work-dir', tmp_path / 'test'),
        *('--out', scores, '--dump', predictions, '--cfg-options', *small(synthetic)),
        PYTHON=sys.executable,
        PORT=free_port(),
    )
    assert tested.returncode == 0, tested.stderr[-2000:]
    assert 0 <= json.loads(scores.read_text())['PCK'] <= 100
    assert len(pickle.loads(predictions.read_bytes())) == 12


def test_a_picture_that_cannot_be_read_ends_a_test_in_one_sentence(synthetic, call, tmp_path):
    """It was a traceback."""
    data, checkpoint = shutil.copytree(synthetic, tmp_path / 'data'), tmp_path / 'tiny.pth'
    cfg = tiny(config(data, tmp_path / 'work', 'dpsgd'))
    cfg.dump(tmp_path / 'tiny.py')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), checkpoint)
    picture = data / 'images' / json.loads((data / 'annotations/mpii_val.json').read_text())[0]['image']
    picture.write_bytes(picture.read_bytes()[:100])
    done = call(loaded(REPO / 'tools/test.py'), tmp_path / 'tiny.py', checkpoint)
    assert done.returncode == 2 and f'the test fails: AssertionError: {picture} is there, but is no' in done.stderr


def test_the_config_of_a_published_folder_has_no_test_set(call, tmp_path):
    """The message was about the model, which is right: "PoseDataPreprocessor is not in the mmengine::model registry"."""
    (tmp_path / 'config.py').write_text(
        "default_scope, model = 'mmpose', dict(type='TopdownPoseEstimator')\ntest_dataloader = dict(dataset=dict(pipeline=[]))"
    )
    done = call(loaded(REPO / 'tools/test.py'), tmp_path / 'config.py', tmp_path / 'model.pth')
    assert (
        done.returncode == 2 and 'has no test_cfg and no test_evaluator: give the config of the training' in done.stderr
    )


def test_a_learning_rate_of_no_batch_size_is_not_scaled(merged, tmp_path):
    """It was a traceback, as it is in MMPose."""
    (tmp_path / 'own.py').write_text(f"_base_ = '{PLAIN}'\nauto_scale_lr = None\n")
    with pytest.raises(PrivacyError, match=r'--auto-scale-lr: .* write auto_scale_lr = dict\(base_batch_size=...\)'):
        merged(REPO / 'tools/train.py', tmp_path / 'own.py', '--auto-scale-lr')


def test_without_a_gpu_another_backend_is_refused(merged, monkeypatch):
    cfg = merged(REPO / 'tools/train.py', PLAIN, '--launcher', 'pytorch')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='backend=gloo'):
        cli.start_ranks_on_cpu(cfg)
