"""A key that nothing reads is refused, with the closest name: a misspelled budget must not leave the default in force."""

import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import OptimWrapper

from mmpose_dp.configs import METHODS, private
from mmpose_dp.engine import refuse_misspelled
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.paths import REPO

sys.path.insert(0, str(REPO / 'tools'))
from cli import merge_options  # noqa: E402

DATA, SAMPLER, BUDGET = (
    'train_dataloader=dict(dataset=dict(',
    'train_dataloader.batch_sampler.',
    'default_hooks.privacy_budget.',
)
FILE = REPO / 'configs/_base_/hrnet_synthetic.py'


@pytest.fixture(scope='module')
def base():
    return Config.fromfile(FILE)._cfg_dict


@pytest.fixture(scope='module')
def hybrid():
    return Config.fromfile(REPO / 'configs/dp/hrnet_synthetic_hybrid_eps08.py')


def nested(path, value=1):
    for key in reversed(path.split('.')):
        value = {key: value}
    return value


@pytest.mark.parametrize(
    ('path', 'meant'),
    [
        ('epsilom', 'epsilon'),
        ('epsilons', 'epsilon'),
        ('eps', 'epsilon'),
        ('optim_wrapper.dtype', 'amp_dtype'),
        ('epsilon_target', 'epsilon'),
        ('optim_wraper', 'optim_wrapper'),
        ('delta', 'default_hooks=dict(privacy_budget=dict(target_delta=...))'),
        ('unit', f'{DATA}privacy_unit=...))'),
        ('batch_size', 'train_dataloader=dict(batch_size=...)'),
        ('max_epochs', 'train_cfg=dict(max_epochs=...)'),
        ('lr', 'optim_wrapper=dict(optimizer=dict(lr=...))'),
        ('seed', 'randomness=dict(seed=...)'),
        ('train_dataloader.expected_batch_size', 'train_dataloader=dict(batch_sampler=dict(expected_batch_size=...))'),
        (f'{SAMPLER}expected_batchsize', 'expected_batch_size'),
        ('train_dataloader.dataset.ann_file', f'{DATA}private=dict(ann_file=...)))'),
        ('train_dataloader.dataset.data_root', f'{DATA}private=dict(data_root=...)))'),
        ('train_dataloader.dataset.private.annfile', 'ann_file'),
        ('train_dataloader.dataset.public_view.sgima', 'sigma'),
        ('train_cfg.max_epoch', 'max_epochs'),
        ('optim_wrapper.max_grad_nrom', 'max_grad_norm'),
        ('optim_wrapper.target_epsilon', 'default_hooks=dict(privacy_budget=dict(target_epsilon=...))'),
        ('optim_wrapper.projector.rnak', 'rank'),
        ('default_hooks.privacy_bugdet.target_epsilon', 'privacy_budget'),
        (f'{BUDGET}target_dleta', 'target_delta'),
        ('default_hooks.checkpoint.max_keep_ckpt', 'max_keep_ckpts'),
    ],
)
def test_a_misspelled_key_is_refused_with_the_closest_name(base, path, meant):
    with pytest.raises(PrivacyError, match=path.split('.')[-1 if 'bugdet' not in path else 1]) as error:
        private(base, 'hybrid', **nested(path))
    assert str(error.value).endswith(f'did you mean {meant}?')


def test_a_number_of_iterations_is_said_in_epochs(base):
    with pytest.raises(
        PrivacyError, match='train_cfg.max_iters is unknown .* write max_epochs, each of num_records //'
    ):
        private(base, 'hybrid', train_cfg=dict(max_iters=100))


def test_other_unknown_keys_and_those_of_hooks(base):
    with pytest.raises(PrivacyError, match='fortytwo.*: take it out'):
        private(base, 'hybrid', fortytwo=42)
    with pytest.raises(PrivacyError, match=r'custom_hooks\[0\]\.num_sampels.*num_samples'):
        private(base, 'hybrid', custom_hooks=[dict(type='ProjectorRefreshHook', num_sampels=1)])


@pytest.mark.parametrize(
    ('option', 'meant'),
    [
        ('epsilon', 'target_epsilon'),
        ('target_epsilon', 'target_epsilon'),
        ('optim_wrapper.max_grad_nrom', 'max_grad_norm'),
        (f'{BUDGET}target_dleta', 'target_delta'),
        ('default_hooks.privacy_bugdet.target_epsilon', 'privacy_budget'),
    ],
)
def test_options_of_the_command_line_are_refused_too(hybrid, option, meant):
    with pytest.raises(PrivacyError, match=f'did you mean .*{meant}'):
        merge_options(Config(hybrid._cfg_dict.to_dict()), {option: 8})


def test_what_is_read_is_taken(base, hybrid):
    """Keys of mmengine that the base lacks, those of the base, foreign hooks, and every argument of ours."""
    known = dict(
        load_from='x', randomness=dict(seed=0), codec=dict(sigma=2), custom_hooks=[dict(type='EMAHook', momentum=0.1)]
    )
    wrapper = dict(
        norm='frozen', trainable='head', clip_grad=None, accumulative_counts=1, paramwise_cfg=dict(), schedule=None
    )
    for method in METHODS:
        private(base, method, **known, optim_wrapper=wrapper, train_cfg=dict(by_epoch=True), work_dir='y')
    cfg = Config(hybrid._cfg_dict.to_dict())
    merge_options(
        cfg, {'load_from': 'x', 'work_dir': 'y', f'{BUDGET}priority': 'NORMAL', 'optim_wrapper.secure_mode': True}
    )
    refuse_misspelled(Config.fromfile(FILE))


@pytest.mark.parametrize('kind', ['OptimWrapper', OptimWrapper, 'AmpOptimWrapper'])
def test_a_plain_configs_wrapper_is_not_looked_at(kind):
    """Many of MMPose's configs name it, with what its constructor takes."""
    wrapper = dict(
        type=kind, optimizer=dict(type='Adam'), constructor='LayerDecayOptimWrapperConstructor', paramwise_cfg={}
    )
    refuse_misspelled(Config(dict(optim_wrapper=wrapper)))


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('model.backbone.type', 'ResNett', 'is registered nowhere: did you mean ResNet? For a class .* custom_imports'),
        ('model.backbone.type', 'nowhere.ViT', 'is registered nowhere: install nowhere, which is not installed here'),
        ('model.backbone.type', 'mmpose.ViT', 'is registered nowhere: correct it, or list the module'),
        ('model.head', 'HeatmapHead', "must be a dict with a type, such as dict(type='...')"),
        ('optim_wrapper.optimizer', ['AdamW'], 'must be a dict with a type'),
        ('optim_wrapper.optimizer.type', 'AdamX', 'did you mean Adam?'),
        ('optim_wrapper.optimizer.type', 'adamw', 'did you mean AdamW?'),
        ('optim_wrapper.constructor', None, "write constructor='DPOptimWrapperConstructor'"),
        ('optim_wrapper.constructor', 'LayerDecayOptimWrapperConstructor', "write constructor='DPOptimWrapperConstructor'"),
        ('optim_wrapper.optimizer.lr', '1e-3', "optimizer.lr='1e-3' is text and must be a number.*write 1.0e-3 there"),
        ('param_scheduler', [dict(type='LinearLR', start_factor='1e-3')], "[0].start_factor='1e-3' is text"),
        ('train_dataloader.num_workers', '2', "train_dataloader.num_workers='2' is text"),
        ('val_cfg', None, 'belong together: val_cfg is None or missing, and val_dataloader and val_evaluator are not'),
        ('test_evaluator', None, 'belong together: test_evaluator is None or missing'),
        ('custom_hooks', [dict(type='EMAHook', priority='FIRST')], "custom_hooks[0].priority='FIRST': write a number from 0 to"),
        ('default_hooks.logger.priority', 500, 'default_hooks.logger.priority=500: write a number from 0 to 100, or one of HIGH'),
        ('custom_hooks', dict(type='EMAHook'), 'must be a list: write custom_hooks=[dict(...)]'),
        ('default_hooks.visualization', None, 'None cannot be used: .*are off with enable=False'),
        ('default_hooks.logger', 50, "must be a dict with a type, such as dict(type='...')"),
        ('val_dataloader.dataset.data_root', Path('data'), 'data_root=.*which cannot be written.*write text'),
        ('param_scheduler', [dict(type='LinearLR', warmup_iters=5)], 'param_scheduler[0]: LinearLR cannot be built: TypeError'),
        ('param_scheduler', [dict(type='MultiStepLR', milestones=3)], 'MultiStepLR cannot be built: TypeError'),
        ('param_scheduler', [dict(type='LinearLR', begin=5, end=3)], 'LinearLR cannot be built: ValueError: end should be larger'),
        ('param_scheduler', 'cosine', 'must be a dict with a type'),
        ('param_scheduler', [dict(end=3)], "param_scheduler[0] has no type: add type='...'"),
        ('param_scheduler', dict(type='LineareLR', _delete_=True), 'param_scheduler.type=.* did you mean LinearLR?'),
        ('custom_hooks', [dict(type='EMAHok')], 'custom_hooks[0].type=.* did you mean EMAHook?'),
        ('default_hooks.logger.type', 'LogerHook', 'did you mean LoggerHook?'),
        ('default_hooks.logger.interval', 0, 'LoggerHook cannot be built: ValueError: interval must be greater than 0'),
        ('custom_hooks', [dict(type='EarlyStoppingHook', monitor='PCK')], 'custom_hooks[0]: .* rule must be specified'),
        ('default_hooks.checkpoint', dict(type='CheckpointHook', save_best='PCK'), 'CheckpointHook cannot be built: .* rule must'),
        ('visualizer.vis_backends', [dict(type='TensorBoardVisBackend')], 'did you mean TensorboardVisBackend?'),
        ('train_dataloader.dataset.private.pipeline', [dict(type='LoadImages')], 'did you mean LoadImage?'),
        ('train_dataloader.dataset.private.type', 'TopDownMpiiDataset', 'did you mean MpiiDataset?'),
        ('train_dataloader.dataset.private.dataset_info', {}, 'did you mean metainfo, its name since MMPose 1.0?'),
        ('train_dataloader.dataset.private', dict(type='CombinedDataset', datasets=[dict(pipeline=[dict(type='X')])]),
         'datasets[0].pipeline[0].type=.* correct it, or list the module'),
        ('val_dataloader.dataset.pipeline', [dict(kind='LoadImage')], 'dataset.pipeline[0] has no type'),
        ('val_evaluator', [dict(type='CocoMetrics')], 'val_evaluator[0].type=.* did you mean CocoMetric?'),
    ],
)  # fmt: skip
def test_what_mmengine_could_not_build_is_named(hybrid, key, value, message):
    cfg = Config(hybrid._cfg_dict.to_dict())
    *path, last = key.split('.')
    node = cfg._cfg_dict
    for part in path:
        node = node[part]
    node[last] = value
    with pytest.raises(PrivacyError) as error:
        merge_options(cfg, {})
    assert all(
        one in str(error.value) for one in ('.'.join(key.split('.')[:2]).removesuffix('.type'), *message.split('.*'))
    )
