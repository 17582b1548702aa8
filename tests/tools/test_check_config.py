"""check_config.py on a user's own configs outside the repository: complete, incomplete and impossible ones."""

import json
import re
import shutil
import sys
from fractions import Fraction

import check_config
import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmpose.registry import MODELS
from reference_gradients import plain_class

from mmpose_dp.configs import private
from mmpose_dp.engine import settings_in_words
from mmpose_dp.engine.hooks.provenance import Start
from mmpose_dp.models.heads.private_head import KNOWN
from mmpose_dp.privacy.calibration import calibrate_noise_multiplier
from tests.support.paths import REPO
from tests.support.processes import run

OWN_BACKBONE = """
import torch
from mmengine.model import BaseModule
from mmpose.registry import MODELS
from torch import nn


@MODELS.register_module()
class OwnBackbone(BaseModule):
    def __init__(self, centred=False):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 7, 4, 3), nn.Conv2d(8, 16, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.centred = centred

    def forward(self, x):
        x = torch.relu(self.stem(x))
        if self.centred:
            x = x - x.mean(0, keepdim=True)
        return (self.body(x) * self.scale,)


@MODELS.register_module()
class FeatureLossHead(MODELS.get('SimCCHead')):
    def loss(self, feats, batch_data_samples, train_cfg=None):
        return dict(super().loss(feats, batch_data_samples, train_cfg), loss_feats=feats[-1].square().mean())
"""
PRIVATE = """
model = dict(backbone=dict(_delete_=True, type='OwnBackbone'), head=dict(type='PrivateSimCCHead'))
train_dataloader = dict(
    batch_sampler=dict(_base_.dp_batch_sampler, expected_batch_size=10),
    dataset=dict(_base_.dp_dataset, private=dict(_base_.train_dataloader.dataset, data_root=r'{data}')),
)
custom_imports = dict(imports=['mmpose_dp', 'own_backbone'])
train_cfg, optim_wrapper = dict(_base_.dp_train_cfg, max_epochs=5), _base_.dp_optim_wrapper
default_hooks = dict(_base_.dp_hooks, privacy_budget=dict(type='PrivacyBudgetHook', target_epsilon=4.0, target_delta=1e-3))
"""


@pytest.fixture
def check(tmp_path, monkeypatch, call):
    """check(base, text, *options): (exit status, what was printed) for a config of that base and text, in a folder apart."""
    (tmp_path / 'own_backbone.py').write_text(OWN_BACKBONE)

    def checked(bases, text, *options):
        (tmp_path / 'own.py').write_text(f'_base_ = {bases!r}\n{text}')
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        done = call(check_config, 'own.py', *options)
        return done.returncode, done.stdout + done.stderr

    return checked


def bases(*names):
    return [f'{REPO}/configs/_base_/{name}.py' for name in names]


def test_a_private_config_of_ones_own(check, synthetic):
    status, page = check(bases('hrnet_synthetic', 'dpsgd'), PRIVATE.format(data=synthetic))
    assert status == 2 and 'VALIDATION WAS NOT CHECKED: val_dataloader.dataset: there is no data/' in page
    assert 'WARNING: Private training starts without load_from' in page and 'random: no load_from' in page
    assert 'Samples: 40 of MpiiDataset, in 40 records (one record: one instance)' in page and 'Method: DP-SGD' in page
    assert re.search(r'by the layer: \d+ parameters of Conv2d, ', page)
    assert 'by the operations that use it: 1 parameters of OwnBackbone' in page
    assert float(re.search(r'largest deviation (\S+) ', page)[1]) < 1e-5
    sigma = calibrate_noise_multiplier(4.0, 1e-3, Fraction(1, 4), 20, 'pld')
    assert f'noise_multiplier {sigma:.4f}, 20 private steps' in page
    curve = [float(value) for value in re.findall(r'^ +[\d.]+ +(\d(?:\.\d{1,3})?)$', page, re.M)]
    assert curve == sorted(curve) and len(curve) == 5 and 3.99 < curve[-1] <= 4.0
    assert re.search(r'activations of \d+ samples', page)


def test_for_a_plain_config_it_prints_what_to_write(check):
    status, page = check(bases('hrnet_synthetic'), 'custom_imports = dict(imports=["mmpose_dp"])')
    assert status == 0 and 'head.type' not in page
    assert 'Samples: random' in page and 'No budget yet' in page
    assert (
        'The model can be made private. THE DATA WERE NOT CHECKED: train_dataloader.dataset: there is no data/' in page
    )


PLAIN = """
model = dict(type='TopdownPoseEstimator', head=dict(type='HeatmapHead', in_channels=8, out_channels=4))
train_dataloader = dict(dataset=dict(type='CocoDataset'))
optim_wrapper = dict(optimizer=dict(type='Adam'))
"""


@pytest.mark.parametrize('top', ['', 'from mmpose.datasets import CocoDataset\n'], ids=['text', 'new style'])
def test_what_it_prints_for_a_plain_config_can_be_pasted(tmp_path, top):
    """A config that has its own model is no base of itself: private(_base_, ...) at its end would not see the model."""
    plain, own = tmp_path / 'plain.py', tmp_path / 'own.py'
    plain.write_text(top + PLAIN)
    lines = re.findall('"(.*?)"', check_config.how_to_make_private(str(plain)))
    own.write_text((plain.read_text() if top else '') + '\n'.join(lines))
    cfg = Config.fromfile(own)
    assert cfg.train_dataloader.dataset.type == 'PublicPrivateDataset' and cfg.model.head.out_channels == 4


DSNT = """
codec = dict(type='IntegralRegressionLabel', input_size=(64, 64), heatmap_size=(16, 16), sigma=1.5, normalize=True)
losses = [dict(type='SmoothL1Loss', use_target_weight=True), dict(type='JSDiscretLoss', use_target_weight={weighed})]
model = dict(
    backbone=dict(_delete_=True, type='OwnBackbone'),
    head=dict(
        _delete_=True, type='DSNTHead', in_channels=16, in_featuremap_size=(16, 16), num_joints=16, decoder=codec,
        deconv_out_channels=None, loss=dict(type='MultipleLossWrapper', losses=losses)))
steps = _base_.train_dataloader.dataset.pipeline
steps = [dict(s, encoder=codec) if s['type'] == 'GenerateTarget' else s for s in steps]
steps = [dict(s, input_size=(64, 64)) if s['type'] == 'TopdownAffine' else s for s in steps]
train_dataloader = dict(dataset=dict(data_root=r'{data}', pipeline=steps))
custom_imports = dict(imports=['mmpose_dp', 'own_backbone'])
"""


def test_joints_that_are_not_visible_leave_no_gradient(check, synthetic, tmp_path):
    """JSDiscretLoss with a torch of today: MMPose's gradient is NaN too, which was taken for no deviation."""
    shutil.copytree(synthetic, tmp_path / 'people')
    path = tmp_path / 'people/annotations/mpii_train.json'
    people = json.loads(path.read_text())
    for number, person in enumerate(people):
        person['joints_vis'] = [1] * 16
        person['joints_vis'][3] = number % 2
    path.write_text(json.dumps(people))
    status, page = check(bases('hrnet_synthetic'), DSNT.format(data=tmp_path / 'people', weighed=True))
    assert re.search(r'WARNING: \d of \d samples that were tried have no finite gradient', page), page[-2000:]
    status, page = check(bases('hrnet_synthetic'), DSNT.format(data=tmp_path / 'people', weighed=False))
    assert status == 0 and 'no finite gradient' not in page


def test_a_head_of_three_channels_per_joint(check, synthetic):
    """MMPose's accuracy, which is no part of the loss, ended it in a traceback: "boolean index did not match"."""
    text = """
codec = dict(_delete_=True, type='UDPHeatmap', input_size=(64, 64), heatmap_size=(16, 16), heatmap_type='combined')
udp = dict(type='UDPHeatmap', input_size=(64, 64), heatmap_size=(16, 16), heatmap_type='combined')
model = dict(head=dict(_delete_=True, type='HeatmapHead', in_channels=16, out_channels=48, deconv_out_channels=None,
    loss=dict(type='CombinedTargetMSELoss', use_target_weight=True), decoder=udp))
steps = [dict(type='LoadImage'), dict(type='GetBBoxCenterScale'), dict(type='TopdownAffine', input_size=(64, 64), use_udp=True),
    dict(type='GenerateTarget', encoder=udp), dict(type='PackPoseInputs')]
"""
    data = f"train_dataloader = dict(dataset=dict(data_root=r'{synthetic}', pipeline=steps))"
    status, page = check(bases('hrnet_synthetic'), text + data)
    assert status == 0 and 'This config can be made private.' in page, page[-2000:]


def test_layer_wise_rates_that_private_leaves_out_are_told():
    """ViTPose's config has them, and ``private`` takes the method's optimizer: nothing said that they are gone."""
    base = get_config('mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_ViTPose-small_8xb64-210e_coco-256x192.py')
    kept = private(base, 'dpsgd', optim_wrapper=dict(paramwise_cfg=dict(num_layers=12, layer_decay_rate=0.8)))
    old = settings_in_words(base)['optimizer']
    assert old.endswith(', with paramwise_cfg (custom_keys, layer_decay_rate, num_layers)')
    assert 'paramwise_cfg' not in settings_in_words(private(base, 'dpsgd'))['optimizer']
    assert settings_in_words(kept)['optimizer'] == 'AdamW, lr 0.0001, with paramwise_cfg (layer_decay_rate, num_layers)'


def test_weights_of_the_whole_model_are_named_as_the_start():
    """It said "random: no load_from"."""
    base = get_config('mmpose::body_2d_keypoint/integral_regression/coco/ipr_res50_debias-8xb64-210e_coco-256x256.py')
    words = settings_in_words({**base, **private(base, 'dpsgd')})['weights of the backbone']
    assert words == 'init_cfg td-hm_res50_8xb64-210e_coco-256x192.pth'


def test_what_a_public_view_shows_is_printed_without_the_data_too():
    assert 'Gaussian blur' in check_config.described(dict(type='PublicView'))
    assert check_config.described(None) == check_config.described(dict(mode='blur')) == ''


def test_as_a_command(tmp_path):
    (tmp_path / 'own.py').write_text(
        "model = dict(type='TopdownPoseEstimator', backbone=dict(type='ResNet', depth=18))"
    )
    done = run(sys.executable, '-W', 'ignore', REPO / 'tools/check_config.py', 'own.py', cwd=tmp_path)
    assert done.returncode == 2 and 'mmpose_dp: model.head is missing' in done.stderr and 'Traceback' not in done.stderr


def test_without_the_data_set_the_budget_needs_its_size(check):
    status, page = check(bases('hrnet_synthetic', 'dpsgd'), PRIVATE.format(data='nowhere'))
    assert status == 2 and 'train_dataloader.dataset.private: there is no nowhere/annotations/mpii_train.json' in page
    assert 'ready to train' not in page and 'nothing about the data was checked' in page and '--num-records N' in page
    status, page = check(bases('hrnet_synthetic', 'dpsgd'), PRIVATE.format(data='nowhere'), '--num-records', '800')
    assert status == 0 and 'N 800' in page and '400 private steps' in page
    assert 'THE DATA WERE NOT CHECKED: train_dataloader.dataset.private: there is no nowhere/' in page


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('Annotations/MPII_train.json', 'annotations/mpii_train.json: write its name as it is. If the data are'),
        ('${DATA}/mpii_train.json', 'write {{$NAME:}} in its place'),
    ],
)
def test_a_path_that_is_nearly_right(check, synthetic, name, words):
    """Training said what to write, and check_config did not."""
    text = PRIVATE.format(data=synthetic)
    option = f'train_dataloader.dataset.private.ann_file={name}'
    status, page = check(bases('hrnet_synthetic', 'dpsgd'), text, '--cfg-options', option)
    assert status == 2 and words in page


def test_it_shows_what_private_replaced_and_what_has_no_effect(check, synthetic):
    text = f"""
from mmpose_dp.configs import private
globals().update(private(_base_, 'dpsgd', train_cfg=dict(max_epochs=6), optim_wrapper=dict(trainable='norms+first_stage'),
    train_dataloader=dict(batch_sampler=dict(expected_batch_size=10), dataset=dict(private=dict(data_root=r'{synthetic}'))),
    default_hooks=dict(privacy_budget=dict(target_delta=1e-3)),
    val_dataloader=None, val_cfg=None, val_evaluator=None))
"""
    status, page = check(f'{REPO}/configs/_base_/hrnet_synthetic.py', text)
    assert status == 0 and page.endswith('This config is private and ready to train.\n'), page[-2000:]
    assert re.search(r'optimizer +AdamW, lr 0.0001  \* instead of: AdamW, lr 0.002', page)
    assert re.search(r'epochs +6  \* instead of: 20', page)
    assert re.search(r'schedule +MultiStepLR at epoch 20  \* instead of: CosineAnnealingLR to epoch 20', page)
    assert 'WARNING: param_scheduler: MultiStepLR at 20 acts beyond train_cfg.max_epochs=6' in page
    assert re.search(
        r"WARNING: optim_wrapper.trainable='norms.first_stage' leaves backbone .*, head \(\S+ numbers\) at random", page
    )


def test_an_output_layer_for_other_joints_counts_as_loaded():
    """As in training, which fits it to the joints: check_config.py said that it was left at random weights."""
    joints = [dict(num_keypoints=n, keypoint_id2name=dict(enumerate('abc'[:n]))) for n in (2, 3)]
    weights = {'0.weight': torch.ones(2, 4, 1, 1), '0.bias': torch.ones(2)}
    checkpoint = dict(state_dict=weights, meta=dict(dataset_meta=joints[0]))
    cfg = Config(dict(model=dict(head=dict(out_channels=3))))
    start = Start.of('load_from', 'start.pth', '', checkpoint), checkpoint
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 3, 1))
    assert check_config.report_start(cfg, start, model, joints[1]) == {*weights}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            "model['backbone']['centred'] = True",
            'from backbone.stem on, the loss of one record depends on the samples of another',
        ),
        (
            "model['head'] = dict(type='FeatureLossHead')",
            'move that into forward(feats), so that the loss uses only what forward(feats) returns',
        ),
        (
            "model['head'] = dict(_delete_=True, type='EDPoseHead')",
            'model.head is EDPoseHead, which has no per-record losses',
        ),
        ("optim_wrapper = dict(optim_wrapper, trainable='tail')", "'tail' matches no trainable parameter"),
        ('optim_wrapper = dict(optim_wrapper, accumulative_counts=4)', 'optim_wrapper.accumulative_counts=4'),
        ('optim_wrapper = dict(optim_wrapper, projector=dict(rank=4))', 'optim_wrapper.projector needs public data'),
        (
            "train_dataloader['dataset']['public_view'] = dict(mode='blur')\n"
            'optim_wrapper = dict(optim_wrapper, public_weight=1.0)',
            "dataset.public_view={'mode': 'blur'} must be a config",
        ),
        (
            'optim_wrapper = dict(optim_wrapper, public_weight=1.0)\n'
            "train_dataloader['dataset']['public'] = train_dataloader['dataset']['private']",
            'dataset.public without optim_wrapper.projector',
        ),
        (
            "model['head']['out_channels'] = 17",
            'model.head.out_channels=17 does not fit the 16 joints of train_dataloader.dataset.private',
        ),
        (
            'train_cfg = dict(max_epochs=3)',
            'train_cfg configures plain training, while the rest of this config is private',
        ),
        (
            'optim_wrapper = dict(max_grad_norm=1.0); del train_cfg',
            'optim_wrapper, train_cfg configure plain training, while the rest of this config is private',
        ),
        (
            "train_dataloader = train_dataloader['dataset']['private']; train_dataloader = dict(dataset=train_dataloader)",
            'train_dataloader.dataset configures plain training, while the rest of this config is private',
        ),
        (
            "optim_wrapper = dict(optim_wrapper, type='AmpOptimWrapper', loss_scale='dynamic')",
            "Leave out optim_wrapper.type='AmpOptimWrapper', since private training needs 'DPOptimWrapper'; for mixed precision",
        ),
        (
            "visualizer = dict(type='PoseLocalVisualizer', vis_backends=[dict(type='TensorBoardVisBackend')])",
            "visualizer.vis_backends[0].type='TensorBoardVisBackend' is registered nowhere: did you mean TensorboardVisBackend?",
        ),
        (
            "val_evaluator = [dict(type='CocoMetrics')]",
            "val_evaluator[0].type='CocoMetrics' is registered nowhere: did you mean CocoM",
        ),
        (
            "model['head']['out_chanels'] = 16",
            'model.head: PrivateSimCCHead cannot be built: TypeError: SimCCHead.__init__() got an unexpected keyword argument',
        ),
        (
            "model['test_cgf'] = {}",
            'model: TopdownPoseEstimator cannot be built: TypeError: TopdownPoseEstimator.__init__() got an unexpected',
        ),
        ('max_epoch = 3', 'own.py, line 11: max_epoch is read by nothing'),
        ("load_from = ['a.pth']", "load_from=['a.pth'] must be the path of one checkpoint"),
        ("default_hooks['privacy_budget']['target_delta'] = 0.5", 'target_delta=0.5 is too large for 40 records'),
    ],
)
def test_a_config_that_cannot_be_made_private_is_refused(check, synthetic, change, message):
    status, page = check(bases('hrnet_synthetic', 'dpsgd'), PRIVATE.format(data=synthetic) + change)
    assert status == 2 and 'can be made private' not in page
    assert 'mmpose_dp: ' in page and message in page, page[-2000:]
    assert 'Traceback' not in page


def test_without_a_training_set_there_is_nothing_to_check(check):
    status, page = check(bases('hrnet_synthetic'), 'train_dataloader = None')
    assert status == 2 and 'train_dataloader.dataset is missing: give a config that trains' in page


@pytest.mark.parametrize('head', KNOWN)
def test_gradients_are_compared_with_those_of_the_plain_head(head):
    """Behind VisPredictHead's class is one that is no module."""
    assert plain_class(MODELS.get(f'Private{head.__name__}')) is head


def test_a_start_that_fits_nothing_is_refused_as_in_training(check, synthetic, tmp_path):
    torch.save({'layer.weight': torch.ones(3, 2)}, tmp_path / 'start.pth')
    text = f"load_from = r'{tmp_path}/start.pth'"
    status, page = check(
        bases('hrnet_synthetic', 'dpsgd'), PRIVATE.format(data='nowhere') + text, '--num-records', '800'
    )
    assert (
        status == 2
        and 'start.pth fits nothing of model, which would start from random weights. It has layer.weight' in page
    )


def test_a_data_set_that_reads_its_files_when_it_is_built_may_be_elsewhere(check):
    """InterHand3D does, and its pipeline needs fields of its own."""
    base = 'mmpose::hand_3d_keypoint/internet/interhand3d/internet_res50_4xb16-20e_interhand3d-256x256.py'
    status, page = check(base, '', '--num-records', '800')
    assert status == 2 and "mmpose_dp: train_dataloader.dataset: the pipeline needs 'hand_type', which only" in page


def test_a_config_that_lost_its_private_parts_is_refused(check):
    """Each of the four in turn is in the cases above; here all are lost, so that only private()'s mark is left."""
    text = "replaced_by_private = dict(optimizer='AdamW')"
    status, page = check(f'{REPO}/configs/_base_/hrnet_synthetic.py', text)
    assert (
        status == 2
        and 'optim_wrapper, train_dataloader.dataset, train_cfg, default_hooks.privacy_budget configure plain' in page
    )


def test_a_picture_that_cannot_be_read_is_passed_over_as_in_training(check, synthetic, tmp_path):
    shutil.copytree(synthetic, tmp_path / 'data')
    people = json.loads((tmp_path / 'data/annotations/mpii_train.json').read_text())
    (tmp_path / 'data/images' / people[0]['image']).write_bytes(b'damaged')
    text = PRIVATE.format(data=tmp_path / 'data') + '\nval_dataloader = val_cfg = val_evaluator = None'
    status, page = check(bases('hrnet_synthetic', 'dpsgd'), text)
    assert status == 0 and 'This config is private and ready to train' in page and 'Traceback' not in page, page[-2000:]


def test_public_epochs_alone_and_a_record_without_joints(check, synthetic, tmp_path):
    (tmp_path / 'data/annotations').mkdir(parents=True)
    (tmp_path / 'data/images').symlink_to(synthetic / 'images')
    people = json.loads((synthetic / 'annotations/mpii_train.json').read_text())
    people[0]['joints_vis'] = [0] * 16
    (tmp_path / 'data/annotations/mpii_train.json').write_text(json.dumps(people))
    change = """
train_cfg = dict(train_cfg, public_epochs=5)
train_dataloader['dataset']['public_view'] = dict(type='PublicView')
train_dataloader['batch_sampler']['public_batch_size'] = 8
val_dataloader = val_cfg = val_evaluator = None
"""
    status, page = check(bases('hrnet_synthetic', 'dpsgd'), PRIVATE.format(data=tmp_path / 'data') + change)
    assert status == 0 and 'all 5 epochs are public' in page and 'Traceback' not in page, page[-2000:]
