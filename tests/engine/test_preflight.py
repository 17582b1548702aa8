"""What would fail after paid steps is refused before the first one, and the look at it leaves nothing behind."""

import copy
import re
from contextlib import contextmanager, nullcontext
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook
from mmengine.optim import OneCycleLR
from mmengine.runner import LogProcessor, Runner
from mmpose.evaluation import NME
from mmpose.registry import HOOKS, MODELS

from mmpose_dp.engine.dry_run import blank_batch, refuse_early_mixing, refuse_loss_of_unseen_joints, try_batch
from mmpose_dp.engine.hooks.foreign_hooks import refuse_hooks
from mmpose_dp.engine.hooks.preflight import _try_log, indices_of_parts, refuse_late_failures
from mmpose_dp.engine.loops.validation import check_train_cfg, train_loader
from mmpose_dp.engine.never_reached import never_reached
from mmpose_dp.engine.schedules import idle_steps
from mmpose_dp.models.heads.private_head import make_private
from mmpose_dp.privacy.errors import PrivacyError, UnsupportedModelError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from tests.support.runs import config, tiny, train, unvalidated


@HOOKS.register_module()
class _LateSwitch(Hook):
    """The settings of mmdet's PipelineSwitchHook."""

    def __init__(self, switch_epoch):
        self.switch_epoch, self.switch_pipeline = switch_epoch, None


def ready(cfg):
    """A runner as it is before the first step."""
    runner = Runner.from_cfg(cfg)
    runner.train_loop  # noqa: B018
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    return runner


@pytest.fixture(scope='module')
def runner(synthetic, tmp_path_factory):
    runner = ready(tiny(config(synthetic, tmp_path_factory.mktemp('ready'), 'hybrid')))
    runner.model.eval()
    return runner


def test_a_right_training_passes_and_nothing_is_kept(runner, monkeypatch, capsys):
    before = {name: x.clone() for name, x in runner.model.state_dict().items()}
    rates = [group['lr'] for group in runner.optim_wrapper.param_groups]
    states = [copy.copy(vars(s)) for s in runner.param_schedulers]
    secret, state = runner.train_dataloader.dataset.random, torch.get_rng_state()
    files = sorted(Path(runner.work_dir).rglob('*'))
    monkeypatch.setattr(
        type(runner.val_loop.evaluator.metrics[0]), 'evaluate', lambda *_: print('AP = 0.000') or {'PCK': 0.0}
    )
    refuse_late_failures(runner)
    assert 'AP' not in capsys.readouterr().out  # as COCO's metric prints: it looks like a score of the model
    assert all(torch.equal(x, before[name]) for name, x in runner.model.state_dict().items())
    assert rates == [group['lr'] for group in runner.optim_wrapper.param_groups]
    assert states == [vars(s) for s in runner.param_schedulers]
    assert runner.train_dataloader.dataset.random is secret and torch.equal(state, torch.get_rng_state())
    assert not runner.model.training and sorted(Path(runner.work_dir).rglob('*')) == files
    assert not any(metric.results for metric in runner.val_loop.evaluator.metrics)
    assert runner.model.head._last is None


def test_a_config_file_with_a_misspelled_name(runner, monkeypatch, tmp_path):
    """Also where another train.py than ours has read it."""
    (tmp_path / 'own.py').write_text("_base_ = './base.py'\ntarget_epsilom = 8\n")
    monkeypatch.setattr(runner, 'cfg', Config(runner.cfg._cfg_dict, filename=str(tmp_path / 'own.py')))
    with pytest.raises(PrivacyError, match='own.py, line 2: target_epsilom is read by nothing'):
        refuse_late_failures(runner)


def test_the_model_sees_nothing_of_a_private_record(runner):
    dataset = runner.train_dataloader.dataset
    assert [name for name, _ in indices_of_parts(dataset)] == ['private', 'public_view']
    packed = dataset[0][0]
    batch = blank_batch(packed)
    labels, own = batch['data_samples'][0].gt_instance_labels, packed['data_samples'].gt_instance_labels
    assert batch['inputs'][0].shape == packed['inputs'].shape and not torch.equal(batch['inputs'][0], packed['inputs'])
    for name in ('keypoint_x_labels', 'keypoint_y_labels'):
        assert labels[name].shape == own[name].shape and not torch.equal(labels[name], own[name])
    assert labels['keypoint_weights'].shape == own['keypoint_weights'].shape
    assert bool((labels['keypoint_weights'] == 1).all())  # whatever the record's are


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(head=dict(out_channels=17)),
            'model.head.out_channels=17 does not fit the 16 joints of here: write out_ch',
        ),
        (dict(head=dict(out_channels=1)), 'model.head.out_channels=1 does not fit the 16 joints'),
        (
            dict(head=dict(in_channels=8)),
            'model.head does not take the output of the backbone, .1, 32, 2, 2. .*in_channels',
        ),
        (dict(head=dict(in_featuremap_size=(4, 4))), 'model.head does not take .*in_featuremap_size'),
        (dict(head=dict(input_size=(32, 32))), 'model.head gives .*here has the targets .*so that they fit'),
        (
            dict(head=dict(simcc_split_ratio=1.0)),
            'model.head gives .*here has the targets .*simcc_split_ratio.*so that they fit',
        ),
        (dict(backbone=dict(in_channels=1)), 'model.backbone does not take the images of here'),
        (dict(head=dict(decoder=dict(input_size=(32, 32)))), 'model.head.decoder.input_size'),
        (dict(neck=dict(type='FeatureMapProcessor', select_index=7)), 'model.neck'),
        (
            dict(data_preprocessor=dict(std=[0.0, 0.0, 0.0])),
            'model.data_preprocessor makes numbers that are not finite of the images of here.* a std above 0',
        ),
    ],
)
def test_parts_of_a_model_that_do_not_fit(runner, change, message):
    cfg = copy.deepcopy(runner.cfg.model)
    for key, value in change.items():
        _merge(cfg, key, value)
    with pytest.raises(PrivacyError, match=message) as error:
        model = MODELS.build(cfg)
        make_private(model.head)
        try_batch(model, blank_batch(runner.train_dataloader.dataset[0][0]), 'here')
    assert len(str(error.value)) < 800


def test_public_data_of_other_joints(runner):
    """The advice was to change the head, which fits the private data."""
    cfg = copy.deepcopy(runner.cfg.model)
    cfg.head.out_channels = 17
    model = MODELS.build(cfg)
    make_private(model.head)
    batch = blank_batch(runner.train_dataloader.dataset[0][0])
    with pytest.raises(
        PrivacyError, match='16 joints of dataset.public: give public data with the 17 joints of the private'
    ):
        try_batch(model, batch, 'dataset.public')


def _merge(cfg, key, value):
    if isinstance(value, dict) and isinstance(cfg.get(key), dict):
        for inner, part in value.items():
            _merge(cfg[key], inner, part)
    else:
        cfg[key] = value


def test_pictures_of_another_size_than_all_parts_are_for(runner):
    """TopdownAffine is missing from the pipeline: the head is right."""
    packed = copy.deepcopy(runner.train_dataloader.dataset[0][0])
    packed['inputs'] = packed['inputs'].repeat(1, 2, 2)
    with pytest.raises(PrivacyError, match='does not fit the images of here, .* and TopdownAffine with its input_size'):
        try_batch(runner.model, blank_batch(packed), 'here')


def test_a_target_that_is_missing(runner):
    batch = blank_batch(runner.train_dataloader.dataset[0][0])
    del batch['data_samples'][0].gt_instance_labels.keypoint_x_labels
    with pytest.raises(PrivacyError, match='has the targets'):
        try_batch(runner.model, batch, 'here')
    assert 'loss' not in vars(runner.model.head) and 'forward' not in vars(runner.model.head)


def test_a_head_whose_loss_does_without_its_forward(runner):
    model = MODELS.build(copy.deepcopy(runner.cfg.model))

    class Shortcut(type(model.head)):
        def loss(self, feats, batch_data_samples, train_cfg=None):
            return dict(loss_kpt=feats[-1].mean())

    model.head.__class__ = Shortcut
    make_private(model.head)
    with pytest.raises(UnsupportedModelError, match='does not call self.forward'):
        try_batch(model, blank_batch(runner.train_dataloader.dataset[0][0]), 'here')


@pytest.mark.parametrize(
    ('change', 'words'),
    [(lambda x: [x, x], 'as a list'), (lambda x: x.expand(5), 'as 5 numbers')],
    ids=['list', 'vector'],
)
def test_a_loss_that_is_not_one_number(runner, change, words):
    """Plain MMPose takes its mean; here "'list' object has no attribute 'reshape'" was all there was."""
    model = MODELS.build(copy.deepcopy(runner.cfg.model))

    class Several(type(model.head)):
        def loss(self, *args, **kwargs):
            return {name: change(value) for name, value in super().loss(*args, **kwargs).items()}

    model.head.__class__ = Several
    make_private(model.head)
    with pytest.raises(UnsupportedModelError, match=f'model.head gives loss_kpt {words} and must give one number'):
        try_batch(model, blank_batch(runner.train_dataloader.dataset[0][0]), 'here')


class JointsBySoftness(MODELS.get('KLDiscretLoss')):
    """As MMPose's JSDiscretLoss does, it multiplies predictions by their weights before a logarithm: 0 log 0 has no gradient."""

    def forward(self, pred_simcc, gt_simcc, target_weight):
        weighed = [x.softmax(-1) * target_weight[..., None] for x in pred_simcc]
        return sum(torch.xlogy(x, x + 1e-24).sum() - torch.xlogy(x, 0.5 * x).sum() for x in weighed)


@pytest.mark.parametrize('bad', [False, True])
def test_a_loss_without_gradient_where_a_joint_is_not_visible(runner, bad):
    """MMPose's DSNT, with a torch of today: a budget was spent on zeros, and check_config.py found no deviation."""
    wrapper, packed = runner.optim_wrapper, runner.train_dataloader.dataset[0][0]
    loss, head = runner.model.head.loss_module, runner.model.head
    try:
        if bad:
            head.loss_module = JointsBySoftness()
        with pytest.raises(PrivacyError, match='no finite gradient for a sample of here') if bad else nullcontext():
            refuse_loss_of_unseen_joints(wrapper, packed, 'here')
    finally:
        head.loss_module = loss


@pytest.mark.parametrize('noise', [0.0, 1.0], ids=['fixed', 'random'])
def test_a_preprocessor_that_mixes_samples(runner, noise):
    """Its gradients could pass the replay: those of a new last layer hardly depend on the picture. What is random is left to it."""
    model = MODELS.build(copy.deepcopy(runner.cfg.model))

    class Mixing(type(model.data_preprocessor)):
        def forward(self, data, training=False):
            data = super().forward(data, training)
            inputs = data['inputs'] + noise * torch.rand(())
            return dict(data, inputs=0.9 * inputs + 0.1 * inputs.flip(0))

    batch = blank_batch(runner.train_dataloader.dataset[0][0], 3)
    refuse_early_mixing(model, batch, 'here')
    model.data_preprocessor.__class__ = Mixing
    with (
        nullcontext()
        if noise
        else pytest.raises(UnsupportedModelError, match='preprocessor gives .* here another output among others')
    ):
        refuse_early_mixing(model, batch, 'here')


def test_a_model_that_mixes_samples_before_its_first_layer(runner):
    model = MODELS.build(copy.deepcopy(runner.cfg.model))

    class Centred(type(model)):
        def extract_feat(self, inputs):
            return super().extract_feat(inputs - 0.1 * inputs.mean(0))

    model.__class__ = Centred
    with pytest.raises(
        UnsupportedModelError,
        match='model.backbone.* gives a sample of .* another output among others .* there or before it',
    ):
        refuse_early_mixing(model, blank_batch(runner.train_dataloader.dataset[0][0], 3), 'here')


def test_a_look_at_the_first_layer_runs_no_other(runner):
    model = MODELS.build(copy.deepcopy(runner.cfg.model))

    class Unreached(type(model.head)):
        def forward(self, feats):
            raise AssertionError

    model.head.__class__ = Unreached
    refuse_early_mixing(model, blank_batch(runner.train_dataloader.dataset[0][0], 3), 'here')


def test_a_model_with_a_loss_of_its_own(runner):
    """It ended the first private step, which was counted."""
    model = MODELS.build(copy.deepcopy(runner.cfg.model))

    class Auxiliary(type(model)):
        def loss(self, inputs, data_samples):
            return dict(super().loss(inputs, data_samples), loss_size=inputs.mean())

    model.__class__ = Auxiliary
    make_private(model.head)
    with pytest.raises(
        UnsupportedModelError, match='adds loss_size to the losses of model.head.* move it into the head'
    ):
        try_batch(model, blank_batch(runner.train_dataloader.dataset[0][0]), 'here')


# ---- hooks and schedulers ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(save_best='coco/AP', rule='greater'), "save_best='coco/AP': val_evaluator gives .*PCK"),
        (dict(save_best='auto'), "rule is needed with save_best='auto'"),
        (dict(filename_tmpl='last.pth'), "filename_tmpl='last.pth' must hold one"),
        (dict(filename_tmpl='{epoch}.pth'), 'filename_tmpl'),
        (dict(published_keys=['meta', 'state_dict']), 'published_keys=.* does not say what its training has spent'),
        (dict(max_keep_ckpt=3), 'checkpoint has max_keep_ckpt, which CheckpointHook does not know'),
        (dict(filename='x'), 'checkpoint has filename, which CheckpointHook does not know'),
        (dict(interval='often'), "interval='often' must be a whole number"),
        (dict(out_dir=__file__), 'out_dir: checkpoints cannot be written'),
        (dict(backend_args=dict(backend='nowhere')), 'checkpoints cannot be written'),
    ],
)
def test_checkpoints_that_would_fail_late(runner, settings, message):
    with with_hook(runner, CheckpointHook(**settings)), pytest.raises(PrivacyError, match=message):
        refuse_late_failures(runner)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(custom_cfg=[dict(data_src='lr', method_name='mean', window_size='epochs')]), 'invalid epochs'),
        (dict(custom_cfg=[dict(data_src='loss_public', method_name='median')]), 'median has not been registered'),
        (dict(custom_cfg=[dict(data_src='lr', method_name='mean', windowsize=3)]), 'windowsize'),
        (dict(window_size='all'), 'window size should be int'),
        (dict(num_digits='four'), 'ValueError'),
        (dict(custom_cfg=[dict(data_src='loss', method_name='mean', window_size='epoch')]), ''),
        (dict(custom_cfg=[dict(data_src='lr', log_name='now', method_name='mean', window_size=3)], by_epoch=False), ''),
    ],
)
def test_a_log_that_could_not_be_written(runner, monkeypatch, settings, message):
    """It ended training after its first step."""
    monkeypatch.setattr(runner, 'log_processor', LogProcessor(**settings))
    before = dict(runner.message_hub.log_scalars)
    with pytest.raises(PrivacyError, match=f'log_processor .*{message}') if message else nullcontext():
        refuse_late_failures(runner) if message else _try_log(runner)
    assert dict(runner.message_hub.log_scalars) == before


@contextmanager
def with_hook(runner, hook):
    """Inside, the runner has one more hook."""
    before = list(runner._hooks)
    runner._hooks.append(hook)
    try:
        yield
    finally:
        runner._hooks[:] = before


class _Broken(Hook):
    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        raise RuntimeError('a picture rule')


class _Switch(Hook):
    def __init__(self, steps):
        self.switch_pipeline = steps


class _Reader(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.count = len(data_batch['inputs'])


class _Careful(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.count = 0 if data_batch is None else len(data_batch['inputs'])
        super().after_train_iter(runner, batch_idx, data_batch, outputs)


class _LossReader(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.loss = outputs['loss']


class CheckInvalidLossHook(Hook):
    """As mmdet's, by its name."""


class PreciseBNHook(Hook):
    """As mmpretrain's, by its name."""


class YOLOXPoseModeSwitchHook(Hook):
    """As mmpose's, by its name."""


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (_Broken, 'the hook _Broken, after a validation batch, fails .*a picture rule'),
        (lambda: EarlyStoppingHook('AP', rule='greater'), "EarlyStoppingHook.monitor='AP': val_evaluator gives"),
        (lambda: _Switch([dict(type='LoadImage')]), 'needs a top-down pipeline'),
        (lambda: _Switch([dict(type='NoSuchStep')]), 'switch_pipeline of _Switch'),
    ],
)
def test_hooks_that_would_fail_late(runner, make, message):
    with with_hook(runner, make()), pytest.raises(PrivacyError, match=message):
        refuse_late_failures(runner)
    refuse_late_failures(runner)  # the pipeline is the old one again


@pytest.mark.parametrize(
    ('hook', 'message'),
    [
        (_Reader(), '_Reader.after_train_iter reads data_batch'),
        (_LossReader(), r"reads outputs\['loss'\]"),
        (CheckInvalidLossHook(), 'CheckInvalidLossHook cannot be used'),
        (PreciseBNHook(), 'computes the statistics of BatchNorm from private pictures'),
        (YOLOXPoseModeSwitchHook(), 'exchanges the data loader'),
    ],
)
def test_hooks_that_need_what_is_private(hook, message):
    with pytest.raises(PrivacyError, match=message):
        refuse_hooks([_Careful(), CheckpointHook(), hook])
    refuse_hooks([_Careful(), CheckpointHook()])


def test_a_schedule_that_ends_before_training_does(runner):
    scheduler = OneCycleLR(runner.optim_wrapper, eta_max=1e-3, total_steps=3, by_epoch=False)
    runner.param_schedulers.append(scheduler)
    try:
        with pytest.raises(PrivacyError, match='param_scheduler: OneCycleLR fails in epoch 1 of 3'):
            refuse_late_failures(runner)
    finally:
        runner.param_schedulers.pop()


def test_steps_at_a_learning_rate_of_0_are_told(synthetic, tmp_path):
    runner = ready(unvalidated(synthetic, tmp_path, train_cfg__max_epochs=3))

    def found(**settings):
        for group in runner.optim_wrapper.param_groups:
            group['lr'] = 1e-3
        runner.param_schedulers = runner.build_param_scheduler([settings])
        return ''.join(idle_steps(runner))

    words = '8 of 12 private steps to come, first in epoch 2.*let the schedule end later'
    assert re.search(words, found(type='PolyLR', power=1.0, end=2))
    assert not found(type='PolyLR', power=1.0, end=2, eta_min=1e-5)
    assert not found(type='LinearLR', start_factor=1e-3, end=9, by_epoch=False)
    assert 'in 4 of 12 private steps to come, first in epoch 3' in found(type='PolyLR', power=1.0, end=3)
    runner.optim_wrapper._global_step = 0  # as after a step, without which mmengine warns
    for _ in range(2):
        runner.param_schedulers[0].step()
    runner.train_loop._epoch = 2
    later = ''.join(idle_steps(runner))
    assert 'in 4 of 4 private steps to come, first in epoch 3' in later
    assert 'a resume keeps the schedule of its checkpoint' in later


def test_a_warm_up_that_is_longer_than_the_training_is_told(synthetic, tmp_path):
    """MMPose's own has 500 steps, which a private training of few people never makes: its learning rate stayed small."""
    runner = ready(unvalidated(synthetic, tmp_path, train_cfg__max_epochs=3))  # of 4 steps each
    warm_up = dict(type='LinearLR', begin=0, end=500, start_factor=1e-3, by_epoch=False)
    for settings, words in (
        (warm_up, 'LinearLR goes on to 500, beyond the 12 steps of this training'),
        (dict(warm_up, end=12), ''),
        (dict(type='MultiStepLR', milestones=[8, 20], by_epoch=False), 'MultiStepLR at 20 acts beyond the 12 steps'),
        (dict(type='CosineAnnealingLR', T_max=90, by_epoch=False), 'CosineAnnealingLR goes on to 90'),
        (dict(type='LinearLR', end=500, start_factor=1e-3), ''),  # by epoch
    ):
        runner.cfg.param_scheduler = [settings]
        told = ''.join(idle_steps(runner))
        assert words in told and bool(words) == bool(told)
    runner.cfg.param_scheduler = warm_up
    runner.train_loop._epoch = 2
    assert not idle_steps(runner)  # a resume keeps its schedule


def test_a_part_without_learning_rate_is_not_the_whole_model(synthetic, tmp_path):
    """With lr_mult=0 for the backbone, all steps were said to change nothing."""
    cfg = unvalidated(synthetic, tmp_path, train_cfg__max_epochs=3)
    cfg.param_scheduler = [dict(type='CosineAnnealingLR', T_max=3, eta_min=1e-5)]
    cfg.optim_wrapper.paramwise_cfg = dict(custom_keys=dict(backbone=dict(lr_mult=0)))
    runner = ready(cfg)
    groups = runner.optim_wrapper.param_groups
    rates, bases = [group['lr'] for group in groups], list(runner.param_schedulers[0].base_values)
    assert min(rates) == 0 < max(rates)
    assert not idle_steps(runner)
    assert rates == [group['lr'] for group in groups] and bases == runner.param_schedulers[0].base_values
    for group in groups:
        group['lr'] = group['initial_lr'] = 0
    runner.param_schedulers = []
    assert re.search(
        r'optimizer: the learning rate is 0 in 12 of 12 .*write optim_wrapper.optimizer.lr', *idle_steps(runner)
    )


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({}, ''),
        (dict(default_hooks__checkpoint=dict(_delete_=True, type='CheckpointHook', interval=9)), ''),
        (dict(default_hooks__checkpoint__save_last=False, default_hooks__checkpoint__interval=1), ''),
        (
            dict(default_hooks__checkpoint__save_last=False, default_hooks__checkpoint__interval=4),
            'writes no checkpoint',
        ),
        (
            dict(default_hooks__checkpoint__save_last=False, default_hooks__checkpoint__save_begin=4),
            'writes no checkpoint',
        ),
        (dict(default_hooks__checkpoint=None), 'writes no checkpoint of this training, so its weights are lost'),
        (
            dict(custom_hooks=[dict(type='_LateSwitch', switch_epoch=3)]),
            '_LateSwitch.switch_epoch=3 is after the last of 3 epochs',
        ),
        (dict(custom_hooks=[dict(type='_LateSwitch', switch_epoch=2)]), ''),
    ],
)
def test_what_training_ends_before_is_told(synthetic, tmp_path, changes, words):
    """A training without a checkpoint spent its budget for nothing; RTMPose's second pipeline was never used."""
    cfg = unvalidated(synthetic, tmp_path, train_cfg__max_epochs=3)
    for key, value in changes.items():
        *path, name = key.split('__')
        reduce(getitem, path, cfg)[name] = value
    told = ''.join(never_reached(ready(cfg)))
    assert words in told and bool(words) == bool(told)


def test_a_validation_after_the_last_epoch_is_told(runner, monkeypatch):
    assert not never_reached(runner)
    monkeypatch.setattr(runner.train_loop, 'val_begin', 99)
    told = ''.join(never_reached(runner))
    assert 'train_cfg.val_begin=99 is after the last of' in told


@pytest.mark.parametrize('settings', [dict(begin_epoch=4), dict(begin_iter=13)])
def test_averages_that_begin_too_late_are_refused(synthetic, tmp_path, settings):
    """mmengine's EMAHook stopped with an AssertionError, after check_config.py had called the config ready."""
    cfg = unvalidated(synthetic, tmp_path, train_cfg__max_epochs=3)
    cfg.custom_hooks = [dict(type='EMAHook', **settings)]
    with pytest.raises(PrivacyError, match=r'EMAHook.begin_.*=\d+ is after the end of this training, (3|12): write'):
        refuse_late_failures(ready(cfg))
    cfg.custom_hooks = [dict(type='EMAHook', **{key: value - 1 for key, value in settings.items()})]
    refuse_late_failures(ready(cfg))


# ---- validation ----------------------------------------------------------------------------------------------------
class _Asserting(NME):
    """Asserts without a word, as much of MMPose does."""

    def __init__(self):
        super().__init__('keypoint_distance')

    def process(self, data_batch, data_samples):
        raise AssertionError  # pytest gives words to an assert of its own files


def test_an_evaluator_that_would_fail_late(synthetic, tmp_path, runner):
    evaluator = runner.val_loop.evaluator
    own, evaluator.metrics = evaluator.metrics, [NME('keypoint_distance', keypoint_indices=[0, 99])]
    evaluator.dataset_meta = runner.val_dataloader.dataset.metainfo
    try:
        with pytest.raises(PrivacyError, match='val_evaluator fails on two samples'):
            refuse_late_failures(runner)
        assert not evaluator.metrics[0].results
        evaluator.metrics = [_Asserting()]
        with pytest.raises(PrivacyError, match=r'AssertionError: test_preflight.py, line \d+: raise AssertionError'):
            refuse_late_failures(runner)
    finally:
        evaluator.metrics = own
    cfg = tiny(config(synthetic, tmp_path, 'dpsgd'))
    cfg.val_dataloader.dataset.ann_file = 'annotations/nowhere.json'
    with pytest.raises(PrivacyError, match='val_dataloader, val_evaluator or val_cfg cannot be used'):
        train(cfg)
    assert Ledger.read(tmp_path / LEDGER_NAME).steps == 0


# ---- train_cfg and the loader --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(others=dict(max_iters=100)), 'train_cfg.max_iters=100 cannot be used'),
        (dict(others=dict(by_epoch=False)), 'train_cfg.by_epoch=False'),
        (dict(others=dict(fp16=True)), 'train_cfg.fp16=True'),
        (dict(max_epochs=None), 'train_cfg.max_epochs=None must be a whole number'),
        (dict(max_epochs='3'), "train_cfg.max_epochs='3' must be a whole number"),
        (dict(max_epochs=0), 'train_cfg.max_epochs=0 must be a whole number above 0'),
        (dict(max_epochs=-1), 'train_cfg.max_epochs=-1 must be a whole number above 0'),
        (
            dict(public_epochs=10),
            'public_epochs=10 must be .* between 0 and max_epochs=3: write both in train_cfg, since',
        ),
        (dict(val_interval=0), 'train_cfg.val_interval=0 must be'),
        (dict(val_begin='late'), "train_cfg.val_begin='late'"),
        (dict(dynamic_intervals=[(2, 0)]), 'train_cfg.dynamic_intervals'),
        (dict(dynamic_intervals=5), 'train_cfg.dynamic_intervals=5'),
    ],
)
def test_train_cfg(settings, message):
    right = dict(max_epochs=3, public_epochs=1, val_begin=1, val_interval=1, dynamic_intervals=None, others={})
    with pytest.raises(PrivacyError, match=message):
        check_train_cfg(**{**right, **settings})
    kept = check_train_cfg(**{**right, 'dynamic_intervals': [[2, 1]], 'others': dict(by_epoch=True, _delete_=True)})
    assert kept == [(2, 1)]


def test_train_dataloader():
    settings = dict(
        num_workers=0, persistent_workers=True, prefetch_factor=4, drop_last=True, dataset=dict(_delete_=True)
    )
    assert train_loader(settings) == dict(
        num_workers=0,
        dataset={},
        sampler=dict(type='DefaultSampler'),
        collate_fn=dict(type='collate_samples'),
        pin_memory=torch.cuda.is_available(),
    )
    with_workers = dict(num_workers=2, persistent_workers=True, collate_fn=dict(type='pseudo_collate'))
    assert train_loader(with_workers)['persistent_workers'] is True
    for key, value in (
        ('collate_fn', dict(type='yolox_collate')),
        ('sampler', dict(type='MultiSourceSampler')),
        ('num_batch_per_epoch', 5),
    ):
        with pytest.raises(PrivacyError, match=f'train_dataloader.{key}'):
            train_loader({key: value})


# ---- hooks that change what is trained on ---------------------------------------------------------------------------
class _Change(Hook):
    def __init__(self, change, epoch=1):
        self.change, self.epoch = change, epoch

    def before_train_epoch(self, runner):
        if runner.epoch == self.epoch:
            self.change(runner)


def _frozen(runner):
    next(runner.model.backbone.parameters()).requires_grad_(False)


def _other_loader(runner):
    runner.train_loop.dataloader = copy.copy(runner.train_dataloader)


def _past_the_views(runner):
    dataset = runner.train_dataloader.dataset
    dataset.private.pipeline = copy.copy(dataset.private.pipeline)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (_frozen, 'a hook froze backbone'),
        (_other_loader, 'exchanged the data loader'),
        (_past_the_views, 'a hook changed a pip'),
    ],
)
def test_a_change_during_training_is_noticed(synthetic, tmp_path, change, message):
    runner = Runner.from_cfg(unvalidated(synthetic, tmp_path, train_cfg__max_epochs=2))
    runner.register_hook(_Change(change))
    with pytest.raises(PrivacyError, match=message):
        runner.train()
    assert Ledger.read(tmp_path / LEDGER_NAME).steps == 4  # the first epoch alone


def test_a_pipeline_switch_reaches_data_and_views(runner):
    dataset = runner.train_dataloader.dataset
    view = next(step for step in dataset.views.pipeline.transforms if type(step).__name__ == 'PublicView')
    old, steps = [part.pipeline for part in (dataset.private, dataset.views)], runner.cfg.train_pipeline
    plain = [step for step in steps if step['type'] != 'RandomFlip']
    try:
        dataset.pipeline = plain
        kinds = [
            [type(step).__name__ for step in part.pipeline.transforms] for part in (dataset.private, dataset.views)
        ]
        assert kinds[0] == [step['type'] for step in plain]
        assert kinds[1] == [*kinds[0][:2], 'PublicView', *kinds[0][2:]] and view in dataset.views.pipeline.transforms
        for steps, message in (
            ([*plain[:2], dict(type='Mosaic'), *plain[2:]], 'Mosaic mixes several records'),
            ([plain[0], dict(type='GetBBoxCenterScale', padding=1.5), *plain[2:]], 'a second public view'),
            ([dict(type='LoadImage', to_float32=True), *plain[1:]], 'a second public view'),
            ([plain[0], *plain[2:]], 'GetBBoxCenterScale'),
        ):
            with pytest.raises(PrivacyError, match=message):
                dataset.pipeline = steps
    finally:
        dataset.private.pipeline, dataset.views.pipeline = old
        dataset.switched = False


class _Count(Hook):
    validations = 0

    def before_val(self, runner):
        self.validations += 1


def test_usual_hooks_and_settings_are_served(synthetic, tmp_path):
    """An average of the weights, early stopping, by_epoch's interval that changes, and idle workers' settings."""
    options = dict(
        train_cfg__max_epochs=2,
        train_cfg__val_interval=5,
        train_dataloader__persistent_workers=True,
        val_dataloader__persistent_workers=True,
    )
    cfg = tiny(config(synthetic, tmp_path, 'dpsgd', **options))
    cfg.train_cfg.dynamic_intervals = [(1, 1)]
    cfg.custom_hooks = [
        dict(type='EMAHook', momentum=0.1),
        dict(type='SyncBuffersHook'),
        dict(type='EarlyStoppingHook', monitor='PCK', rule='greater', patience=9),
    ]
    counted = _Count()
    runner = Runner.from_cfg(cfg)
    runner.register_hook(counted)
    runner.train()
    assert counted.validations == 2
    assert 'ema_state_dict' in torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
