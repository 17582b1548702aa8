"""The shipped configs: each one loads, is short, and asks for what its name says."""

import re
from pathlib import Path

import mmpose
import pytest
import torch
from helpers import REPO
from mmengine.config import Config
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.registry import DATASETS, MODELS
from shared_data import shared

CONFIGS = sorted((REPO / 'configs/dp').glob('*.py'))
PRIVATE = [c for c in CONFIGS if re.search(r'_eps\d\d$', c.stem)]


def test_the_promised_configs_are_there():
    names = {c.stem for c in CONFIGS}
    for data in ('mpii', 'synthetic'):
        for method in ('dpsgd', 'projected', 'feature', 'hybrid'):
            assert {f'hrnet_{data}_{method}_eps{e}' for e in ('02', '04', '06', '08')} <= names
        assert f'hrnet_{data}_nonprivate' in names
    assert 'tinyvit_simcc_mpii_hybrid_eps08' in names


@pytest.mark.parametrize('path', PRIVATE, ids=lambda p: p.stem)
def test_a_private_config_is_what_its_name_says(path):
    cfg = Config.fromfile(path)
    method = re.search('dpsgd|projected|feature|hybrid', path.stem)[0]
    budget = cfg.default_hooks.privacy_budget
    assert budget.target_epsilon == int(path.stem[-2:]) / 10 and budget.target_delta == (
        1e-6 if 'humanart' in path.stem else 1 / 22000
    )
    assert cfg.optim_wrapper.type == 'DPOptimWrapper' and cfg.train_cfg.type == 'PrivateTrainLoop'
    assert 'noise_multiplier' not in cfg.optim_wrapper  # calibrated, never written down
    assert ('projector' in cfg.optim_wrapper) == (method in ('projected', 'hybrid'))
    assert ('public_data' in cfg.default_hooks) == ('projector' in cfg.optim_wrapper)
    dataset = cfg.train_dataloader.dataset
    assert ('public_view' in dataset) == (method in ('feature', 'hybrid'))
    assert ('public' in dataset) == (method == 'projected' or 'coco' in path.stem)
    if 'humanart' in path.stem:
        assert dataset.private.type == 'HumanArtDataset' and 'coco' not in dataset.private.ann_file
    else:
        assert dataset.private.type == 'MpiiDataset' and cfg.val_evaluator.type == 'MpiiPCKAccuracy'
    assert cfg.model.head.type.startswith('Private')
    assert 'debug_seed' not in cfg.pretty_text


def test_every_mpii_config_of_mmpose_has_its_hybrid():
    folder = Path(mmpose.__file__).parent / '.mim/configs'
    bases = {str(path.relative_to(folder)) for path in folder.glob('body_2d_keypoint/**/mpii/*.py')}
    hybrids = (REPO / 'configs/dp').glob('*_mpii*_hybrid_eps08.py')
    found = {re.search('mmpose::(.*py)', path.read_text())[1] for path in hybrids}
    assert len(bases) == 31 and bases <= found


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_a_leaf_states_only_what_is_its_own(path):
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith('#')]
    assert len(lines) <= 26
    assert '_base_' in lines[0]


@pytest.mark.parametrize('method', ['projected', 'hybrid'])
def test_coco_as_public_data_has_mpiis_joints(synthetic, method):
    cfg = Config.fromfile(REPO / f'configs/dp/hrnet_mpii_{method}_coco_eps08.py').train_dataloader.dataset
    cfg.private.update(data_root=str(synthetic))
    cfg.public.update(data_root=str(shared('coco')), ann_file='test_coco.json', data_prefix=dict(img=''))
    cfg.public.pop('indices', None)  # more than this COCO has
    dataset = DATASETS.build(cfg)
    # every public record through the whole pipeline; COCO has no pelvis, thorax, upper neck and head top
    coco = range(len(dataset) - len(dataset.public), len(dataset))
    weights = torch.cat([dataset[i][0]['data_samples'].gt_instance_labels.keypoint_weights for i in coco])
    assert weights.shape == (len(coco), 16) and not weights[:, 6:10].any() and weights.any(0).sum() == 12
    # and before any augmentation, each joint by its name
    public, own = dataset.public, parse_pose_metainfo(dict(from_file='configs/_base_/datasets/coco.py'))
    assert public.metainfo['keypoint_name2id']['thorax'] == 7
    info = public.get_data_info(0)
    converted = public.pipeline.transforms[1](dict(info))
    for name, i in own['keypoint_name2id'].items():
        if name in public.metainfo['keypoint_name2id']:
            mine = converted['keypoints'][0, public.metainfo['keypoint_name2id'][name]]
            assert (mine == info['keypoints'][0, i]).all(), name
    assert converted['flip_indices'] == public.metainfo['flip_indices']


@pytest.mark.parametrize(
    'name', ['hrnet_mpii_hybrid_eps08', 'tinyvit_simcc_mpii_hybrid_eps08', 'hrnet_synthetic_dpsgd_eps02']
)
def test_the_model_has_the_state_dict_of_its_plain_twin(name):
    cfg = Config.fromfile(REPO / f'configs/dp/{name}.py')
    private = MODELS.build(cfg.model).state_dict()
    cfg.model.head.type = cfg.model.head.type.removeprefix('Private')
    plain = MODELS.build(cfg.model).state_dict()
    assert {k: v.shape for k, v in private.items()} == {k: v.shape for k, v in plain.items()}


def test_the_readmes_example_works_and_is_short(tmp_path):
    code = re.search(r'```python\n(.*?)```', (REPO / 'README.md').read_text(), re.S)[1]
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith('#')]) < 10
    (tmp_path / '_base_').symlink_to(REPO / 'configs/_base_')
    (tmp_path / 'dp').mkdir()
    (tmp_path / 'dp/own.py').write_text(code)
    cfg = Config.fromfile(tmp_path / 'dp/own.py')
    assert cfg.optim_wrapper.type == 'DPOptimWrapper' and cfg.optim_wrapper.projector.rank == 25
    assert cfg.train_dataloader.dataset.private.type == 'MpiiDataset'
    assert type(MODELS.build(cfg.model).head).__name__ == 'PrivateHeatmapHead'
