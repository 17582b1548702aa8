"""HRNet-w32 under the hybrid from the command line: trains, is killed, resumes, and its checkpoint runs in plain MMPose."""

import json
import os
import sys

import numpy as np
import pytest
import torch
import train as train_tool

from mmpose_dp.datasets.synthetic import make_synthetic_mpii
from tests.support.paths import REPO
from tests.support.processes import run

CONFIG = REPO / 'configs/dp/hrnet_mpii_hybrid_eps08.py'
SMALL = [
    'train_dataloader.batch_sampler.expected_batch_size=2',
    'train_dataloader.batch_sampler.public_batch_size=2',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'train_cfg.public_epochs=1',
    'optim_wrapper.projector.rank=4',
    'default_hooks.public_data.num_samples=4',
    'default_hooks.privacy_budget.target_epsilon=60',
    'default_hooks.privacy_budget.target_delta=0.01',
    'default_hooks.checkpoint.interval=1',
    # small pictures; plain MMPose then tests with the config's own
    'train_dataloader.dataset.private.pipeline.4.input_size=(64,64)',
    *(
        f'{codec}.{size}'
        for codec in ('train_dataloader.dataset.private.pipeline.5.encoder', 'model.head.decoder')
        for size in ('input_size=(64,64)', 'heatmap_size=(16,16)')
    ),
]
# MMPose as its users have it. On an install without mmcv's compiled operators it needs the stand-ins of compat.py, which is
# run here as a file of its own: mmpose_dp itself cannot be imported.
PLAIN = """
import runpy, sys
sys.modules['mmpose_dp'] = None
runpy.run_path(sys.argv[1])['apply']()
import json
from mmpose.apis import inference_topdown, init_model
from mmengine.config import Config
config = Config.fromfile(sys.argv[2])
config.model.backbone.init_cfg = None
model = init_model(config, sys.argv[3], device='cpu')
result = inference_topdown(model, sys.argv[4], [[20, 20, 200, 240]])[0]
json.dump(result.pred_instances.keypoints.tolist(), sys.stdout)
"""
PLAIN_CONFIG = 'body_2d_keypoint/topdown_heatmap/mpii/td-hm_hrnet-w32_8xb64-210e_mpii-256x256.py'


def succeed(*command, cwd=REPO):
    done = run(*command, cwd=cwd, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def train(folder, *arguments, options=()):
    return succeed(
        *(sys.executable, REPO / 'tools/train.py', CONFIG, '--work-dir', folder / 'run', '--no-validate', *arguments),
        *('--cfg-options', *SMALL, *options),
        cwd=folder,
    )


def ledger_steps(path):
    return sum(entry[2] for entry in torch.load(path, weights_only=False)['privacy']['ledger']['entries'])


def predict_in_plain_mmpose(checkpoint, image):
    import mmpose

    config = os.path.join(os.path.dirname(mmpose.__file__), '.mim/configs', PLAIN_CONFIG)
    done = succeed(sys.executable, '-W', 'ignore', '-c', PLAIN, REPO / 'mmpose_dp/compat.py', config, checkpoint, image)
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def lay_out_mpii(folder):
    """Links a set as data/mpii in a folder: real pictures, or synthetic people where there are none beside the checkout."""
    pictures, layout = REPO.parent / 'shared/data/mpii', folder / 'set'
    if pictures.exists():
        (layout / 'annotations').mkdir(parents=True)
        (layout / 'annotations/mpii_train.json').symlink_to(pictures / 'test_mpii.json')
        (layout / 'images').symlink_to(pictures)
    else:
        make_synthetic_mpii(layout, 'private', 5, 2, image_size=128, workers=1)
    (folder / 'data').mkdir()
    (folder / 'data/mpii').symlink_to(layout)


def test_trains_resumes_and_predicts_in_plain_mmpose(tmp_path):
    """Five people, several steps; the ledger continues after the resume."""
    lay_out_mpii(tmp_path)
    train(tmp_path, options=['train_cfg.max_epochs=2'])
    run_folder = tmp_path / 'run'
    assert (ledger_steps(run_folder / 'epoch_1.pth'), ledger_steps(run_folder / 'epoch_2.pth')) == (0, 2)
    # Going back to an earlier checkpoint gives no budget back: its two later steps are spent.
    options = ['train_cfg.max_epochs=3', 'default_hooks.privacy_budget.target_epsilon=200']
    done = train(tmp_path, '--resume', run_folder / 'epoch_1.pth', options=options)
    assert 'All 4 private steps are spent: training stops. budget_spent_iter_' in done.stdout + done.stderr
    assert ledger_steps(run_folder / 'epoch_2.pth') == 4
    statement = json.loads((run_folder / 'privacy_statement.json').read_text())
    assert statement['private'] and statement['steps'] == 4 and 60 < statement['epsilon'] <= 200
    picture = next((tmp_path / 'data/mpii/images').glob('*.jpg'))
    joints = predict_in_plain_mmpose(run_folder / 'epoch_2.pth', picture)
    assert joints.shape == (1, 16, 2) and np.isfinite(joints).all()


@pytest.mark.parametrize('missing', ['annotations/mpii_train.json', 'images'])
def test_missing_data_is_one_message_with_the_layout_and_the_remedy(call, monkeypatch, tmp_path, missing):
    (tmp_path / 'data/mpii/annotations').mkdir(parents=True)
    if missing == 'images':
        (tmp_path / 'data/mpii/annotations/mpii_train.json').write_text('[]')
    monkeypatch.chdir(tmp_path)
    done = call(train_tool, CONFIG, '--work-dir', tmp_path / 'run')
    assert done.returncode == 2
    message = done.stderr[done.stderr.index('mmpose_dp:') :]
    assert f'data/mpii/{missing}' in message and 'make_synthetic_mpii.py --out data/mpii' in message
    assert 'Traceback' not in done.stderr
