"""The configs of the repository: each loads, is short, and is what its name says."""

import re
from pathlib import Path

import mmpose
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.registry import DATASETS, MODELS

from mmpose_dp.configs import METHODS, private
from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.engine.leftovers import without_deletions
from mmpose_dp.models import make_private
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.paths import REPO, shared

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
    assert not cfg.model.head.type.startswith('Private')  # MMPose's own: its class is swapped when the wrapper is built
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
    model = MODELS.build(cfg.model)
    plain = {k: v.shape for k, v in model.state_dict().items()}
    make_private(model.head)
    assert {k: v.shape for k, v in model.state_dict().items()} == plain


def test_the_readmes_example_works_and_is_short(tmp_path):
    code = re.search(r'```python\n(.*?)```', (REPO / 'README.md').read_text(), re.S)[1]
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith('#')]) < 10
    (tmp_path / 'own.py').write_text(code)
    cfg = Config.fromfile(tmp_path / 'own.py')
    assert cfg.optim_wrapper.type == 'DPOptimWrapper' and cfg.optim_wrapper.projector.rank == 25
    assert cfg.train_dataloader.dataset.private.type == 'MpiiDataset'
    assert cfg.model.head.type == 'HeatmapHead'


# ---- mmpose_dp.configs ----------------------------------------------------------------------------------------------
TEXT = """_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_res50_8xb64-210e_mpii-256x256.py'
from mmpose_dp.configs import private

globals().update(private(_base_, {method!r}, epsilon=2.0, train_cfg=dict(max_epochs=7)))
"""
PLAIN = """from mmpose.datasets import MpiiDataset
from mmpose.models import HeatmapHead, ResNet, TopdownPoseEstimator

backbone = dict(type=ResNet, depth=18, init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18'))
model = dict(type=TopdownPoseEstimator, backbone=backbone, head=dict(type=HeatmapHead, in_channels=512, out_channels=16))
train_dataloader = dict(batch_size=64, num_workers=2, dataset=dict(type=MpiiDataset, data_root='data/mpii/', pipeline=[]))
train_cfg = dict(by_epoch=True, max_epochs=210)
optim_wrapper = dict(optimizer=dict(type='Adam', lr=5e-4), clip_grad=dict(max_norm=1.0))
param_scheduler = [dict(type='LinearLR')]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=10, save_best='PCK'))
"""
NEW_STYLE = """from mmengine.config import read_base

with read_base():
    from .plain import *

from importlib import import_module

globals().update(import_module('mmpose_dp.configs').private(globals(), {method!r}, epsilon=2.0, train_cfg=dict(max_epochs=7)))
"""


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('leaf', [TEXT, NEW_STYLE], ids=['text', 'new style'])
def test_three_statements_make_a_config_private(tmp_path, leaf, method):
    (tmp_path / 'plain.py').write_text(PLAIN)
    (tmp_path / 'own.py').write_text(leaf.format(method=method))
    cfg = Config.fromfile(tmp_path / 'own.py')
    recipe = Config.fromfile(REPO / f'configs/_base_/{method}.py')
    data = cfg.train_dataloader.dataset
    assert (data.type, cfg.train_dataloader.batch_size) == ('PublicPrivateDataset', 64)
    assert 'MpiiDataset' in str(data.private.type) and data.private.data_root == 'data/mpii/'
    assert cfg.model.backbone.init_cfg is None and 'HeatmapHead' in str(cfg.model.head.type)
    assert cfg.optim_wrapper == without_deletions(recipe.dp_optim_wrapper)
    assert cfg.train_dataloader.batch_sampler == recipe.dp_batch_sampler
    assert cfg.train_cfg == dict(without_deletions(recipe.dp_train_cfg), max_epochs=7)
    assert cfg.param_scheduler == recipe.dp_param_scheduler and 'mmpose_dp' in cfg.custom_imports.imports
    budget = cfg.default_hooks.privacy_budget
    assert budget == dict(recipe.dp_hooks.privacy_budget, target_epsilon=2.0) and 'logger' in cfg.default_hooks
    assert ('public' in data) == (method in ('projected', 'kronecker'))
    assert '_delete_' not in str(cfg._cfg_dict.to_dict())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(optim_wrapper=dict(type='OptimWrapper')),
            "Leave out optim_wrapper.type='OptimWrapper', .*'DPOptimWrapper'",
        ),
        (
            dict(train_cfg=dict(type='IterBasedTrainLoop', max_iters=9)),
            "'PrivateTrainLoop'; in place of max_iters write max_epochs",
        ),
        (
            dict(train_dataloader=dict(dataset=dict(type='CocoDataset'))),
            'train_dataloader.dataset configures plain training',
        ),
        (
            dict(train_cfg=dict(_delete_=True, max_iters=9)),
            r"is private\. Private training needs 'PrivateTrainLoop'; in place of max_iters .*_delete_=True or None removes that",
        ),
        (
            dict(default_hooks=dict(privacy_budget=None)),
            r'is private\. The arguments of private\(_base_, ...\) are merged .* leave them out of default_hooks',
        ),
    ],
)
def test_a_plain_type_is_named_and_not_the_keys_beside_it(change, message):
    base = dict(
        train_dataloader=dict(dataset=dict(type='MpiiDataset', pipeline=[])), train_cfg=dict(type='EpochBasedTrainLoop')
    )
    with pytest.raises(PrivacyError, match=message):
        private(base, 'dpsgd', **change)


def test_changes_are_merged_or_replace():
    base = dict(
        model=dict(backbone=dict(type='A', init_cfg=dict(type='Pretrained'))),
        train_dataloader=dict(dataset=dict(type='Own', pipeline=[1])),
        custom_imports=dict(imports=['own'], allow_failed_imports=False),
    )
    before = str(base)
    changes = dict(optim_wrapper=dict(optimizer=dict(_delete_=True, type='SGD', lr=1.0)))
    found = private(base, 'dpsgd', model=dict(backbone=dict(_delete_=True, type='B')), custom_hooks=[], **changes)
    assert str(base) == before
    assert found['model'] == dict(backbone=dict(type='B'), _delete_=True)  # mmengine puts it in the base's place
    assert found['optim_wrapper']['optimizer'] == dict(type='SGD', lr=1.0)
    assert found['optim_wrapper']['max_grad_norm'] == 1e-3 and found['custom_hooks'] == []
    assert found['custom_imports']['imports'] == ['own', 'mmpose_dp']


@pytest.mark.parametrize(
    ('base', 'arguments', 'message'),
    [
        (dict(train_dataloader=dict(dataset=dict())), dict(method='hybird'), "'hybird'.*write one of dpsgd, projected"),
        (
            dict(model=dict()),
            dict(method='hybrid'),
            'no train_dataloader.dataset.* in the same file, give private.globals',
        ),
        (
            dict(train_dataloader=dict(dataset=dict(type='PublicPrivateDataset'))),
            dict(method='dpsgd'),
            'the base is private already. Give the plain config that it inherits from',
        ),
        (dict(train_dataloader=dict(dataset=dict())), dict(method='dpsgd', public='coco'), "write 'coco_as_mpii'"),
        (
            'mmpose::x.py',
            dict(method='dpsgd'),
            "Write _base_ = 'mmpose::x.py' on a line above, and private._base_, 'dpsgd'",
        ),
    ],
)
def test_a_config_that_cannot_be_made_private(base, arguments, message):
    with pytest.raises(PrivacyError, match=message):
        private(base, **arguments)


def test_the_parts_can_be_inherited_as_before(tmp_path):
    """A config of the first version: a second base, all parts written out, and the private name of the head."""
    (tmp_path / 'own.py').write_text(f"""
_base_ = [
    'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_hrnet-w32_8xb64-210e_mpii-256x256.py',
    r'{REPO}/configs/_base_/dpsgd.py',
]
model = dict(backbone=dict(init_cfg=None), head=dict(type='PrivateHeatmapHead'))
train_dataloader = dict(
    batch_sampler=_base_.dp_batch_sampler, dataset=dict(_base_.dp_dataset, private=_base_.train_dataloader.dataset)
)
custom_imports, train_cfg = _base_.dp_imports, _base_.dp_train_cfg
optim_wrapper = _base_.dp_optim_wrapper
param_scheduler, default_hooks = _base_.dp_param_scheduler, _base_.dp_hooks
""")
    old, new = Config.fromfile(tmp_path / 'own.py'), Config.fromfile(REPO / 'configs/dp/hrnet_mpii_dpsgd_eps08.py')
    head = MODELS.get(old.model.head.type)
    assert head.__mro__[2] is MODELS.get(new.model.head.type)
    old.model.head.type = new.model.head.type
    for key in set(new) - {'replaced_by_private', 'written_by_private'}:  # for the tools; only private() writes them
        assert without_deletions(old[key]) == new[key], key


def test_a_config_of_the_package_is_inherited_by_its_name(tmp_path):
    (tmp_path / 'own.py').write_text("""
_base_ = 'mmpose_dp::dp/hrnet_synthetic_dpsgd_eps08.py'
default_hooks = dict(privacy_budget=dict(target_epsilon=2.0))
""")
    cfg = Config.fromfile(tmp_path / 'own.py')
    assert cfg.default_hooks.privacy_budget.target_epsilon == 2.0
    scopes = set(re.findall(r"'_scope_': '(\w+)'", str(cfg._cfg_dict.to_dict())))
    assert scopes == {'mmpose'}  # whose registries have what mmpose_dp registers
    model = MODELS.build(cfg.model)
    assert isinstance(build_optim_wrapper(model, cfg.optim_wrapper), DPOptimWrapper)


@pytest.mark.parametrize(('scope', 'then'), [(None, 'mmpose'), ('mmpose', 'mmpose'), ('mmdet', 'mmdet')])
def test_without_a_scope_the_names_of_our_classes_are_found(scope, then):
    """New-style configs name classes and may have no scope; mmengine would look for the names among its own."""
    base = dict(Config.fromfile(REPO / 'configs/_base_/hrnet_synthetic.py')._cfg_dict, default_scope=scope)
    assert {**base, **private(base, 'hybrid')}['default_scope'] == then
