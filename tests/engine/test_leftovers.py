"""Configs that inherit little, or much: leftovers of inheritance, types as classes, layer decay, checkpoints kept elsewhere."""

import os

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmpose.registry import MODELS, OPTIM_WRAPPERS

from mmpose_dp.datasets.resolving import resolved
from mmpose_dp.engine import DPOptimWrapper, newest_checkpoint, without_leftovers
from mmpose_dp.engine.hooks.resuming import checkpoint_folders
from mmpose_dp.engine.optim_wrappers.validation import check_paramwise
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.runs import unvalidated


def test_leftovers_are_taken_out():
    cfg = Config(
        dict(
            train_cfg=dict(type='mmpose.PrivateTrainLoop', by_epoch=True, max_epochs=3, _delete_=True),
            train_dataloader=dict(dataset=dict(_delete_=True, parts=[dict(_delete_=True, a=1)])),
        )
    )
    assert without_leftovers(cfg).to_dict() == dict(
        train_cfg=dict(type='mmpose.PrivateTrainLoop', max_epochs=3),
        train_dataloader=dict(dataset=dict(parts=[dict(a=1)])),
    )
    with pytest.raises(PrivacyError, match='train_cfg.by_epoch must be True'):
        without_leftovers(Config(dict(train_cfg=dict(type='PrivateTrainLoop', by_epoch=False))))
    plain = Config(dict(train_cfg=dict(type='EpochBasedTrainLoop', by_epoch=True)))
    assert 'by_epoch' in without_leftovers(plain).train_cfg


def test_a_type_may_be_a_class_or_have_a_scope():
    for kind in ('DPOptimWrapper', 'mmpose.DPOptimWrapper', DPOptimWrapper):
        assert resolved(OPTIM_WRAPPERS, kind) is DPOptimWrapper
    assert resolved(OPTIM_WRAPPERS, 'NoSuchWrapper') is None


# ---- paramwise_cfg -------------------------------------------------------------------------------------------------
VIT = dict(type='mmpretrain.VisionTransformer', arch='deit-tiny', img_size=(64, 64), patch_size=16, out_type='featmap')


def wrapper_of(synthetic, tmp_path, paramwise_cfg, backbone=None):
    cfg = unvalidated(synthetic, tmp_path)
    if backbone is not None:
        cfg.model.backbone = backbone
        cfg.model.head.update(in_channels=192, in_featuremap_size=(4, 4))
    cfg.optim_wrapper.paramwise_cfg = paramwise_cfg
    return build_optim_wrapper(MODELS.build(cfg.model), cfg.optim_wrapper)


def test_layer_decay_is_that_of_mmpose(synthetic, tmp_path):
    wrapper = wrapper_of(synthetic, tmp_path, dict(num_layers=12, layer_decay_rate=0.5), VIT)
    rates = {group['group_name']: group['lr'] for group in wrapper.optimizer.param_groups}
    assert rates['layer_0_decay'] == pytest.approx(0.5**13 * rates['layer_13_decay'])
    assert rates['layer_12_decay'] == pytest.approx(0.5 * rates['layer_13_decay'])
    assert all(isinstance(group['weight_decay'], float) for group in wrapper.optimizer.param_groups)
    trained = {id(p) for group in wrapper.optimizer.param_groups for p in group['params']}
    assert trained == {id(p) for p in wrapper.params}


def test_layer_decay_without_layers_is_refused(synthetic, tmp_path):
    with pytest.raises(PrivacyError, match='layer_decay_rate changes no learning rate of this model'):
        wrapper_of(synthetic, tmp_path, dict(num_layers=12, layer_decay_rate=0.5))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(layer_decay_rates=0.5), 'paramwise_cfg.layer_decay_rates is unknown'),
        (dict(layer_decay_rate=0.5), 'layer_decay_rate and num_layers go together'),
        (dict(layer_decay_rate='half', num_layers=12), "layer_decay_rate='half'"),
        (['norm'], 'must be a dict'),
        (
            dict(custom_keys=dict(backbone=0.1)),
            r"custom_keys\['backbone'\]=0.1 must be a dict of numbers named lr_mult",
        ),
        (dict(custom_keys=dict(head=dict(lr_mult='0.1'))), 'must be a dict of numbers'),
        (dict(custom_keys=dict(head=dict(weight_decay=0.0))), 'must be a dict of numbers named lr_mult and decay_mult'),
    ],
)
def test_odd_paramwise_settings(settings, message):
    with pytest.raises(PrivacyError, match=message):
        check_paramwise(settings)
    check_paramwise(dict(norm_decay_mult=0.0, custom_keys={}))
    check_paramwise(dict(custom_keys=dict(bias=dict(decay_multi=0.0), norm=dict(lr_mult=0, decay_mult=0.0))))


# ---- checkpoints ---------------------------------------------------------------------------------------------------
def test_the_newest_checkpoint_is_found_where_it_is_kept(tmp_path):
    work, store = tmp_path / 'work', tmp_path / 'store'
    kept = store / 'work'
    work.mkdir(), kept.mkdir(parents=True)
    assert checkpoint_folders(str(work)) == [str(work)] and checkpoint_folders(work, str(store))[-1] == str(kept)
    assert newest_checkpoint(work, str(store)) is None
    for age, path in enumerate([kept / 'epoch_2.pth', work / 'epoch_1.pth', kept / 'best_PCK_epoch_3.pth']):
        torch.save(dict(a=1), path)
        os.utime(path, (1000 - age, 1000 - age))
    assert newest_checkpoint(work, str(store)) == str(kept / 'epoch_2.pth')
    assert newest_checkpoint(work) == str(work / 'epoch_1.pth')
    torch.save(dict(a=1), kept / 'w[1]-7.ckpt')
    assert newest_checkpoint(work, str(store), 'w[1]-{}.ckpt') == str(kept / 'w[1]-7.ckpt')
    (work / 'last_checkpoint').write_text('s3://bucket/work/epoch_4.pth')
    (work / 'epoch_1.pth').unlink()
    assert newest_checkpoint(work, 's3://bucket') == 's3://bucket/work/epoch_4.pth'


def test_the_newest_checkpoint_is_the_one_that_has_seen_the_most(tmp_path):
    """Of the ledger, then of the steps: a copy of a folder has other file times."""
    seen = {
        'epoch_6': (8, 6, 22),
        'budget_spent_iter_22': (8, 5, 22),
        'epoch_5': (7, 5, 20),
        'second_run_epoch_1': (12, 1, 4),
        'views_2': (1, 2, 8),
        'views_4': (1, 4, 16),
    }
    for age, (name, (lines, epoch, steps)) in enumerate(seen.items()):
        path, meta = tmp_path / f'{name}.pth', dict(epoch=epoch, iter=steps)
        torch.save(dict(meta=meta, privacy=dict(ledger=dict(lines=lines)), state_dict={}), path)
        os.utime(path, (1000 + age, 1000 + age))
    torch.save(dict(state_dict={}), tmp_path / 'exported.pth')
    for name in ('second_run_epoch_1', 'epoch_6', 'budget_spent_iter_22', 'epoch_5', 'views_4', 'views_2', 'exported'):
        assert newest_checkpoint(tmp_path) == str(tmp_path / f'{name}.pth')
        (tmp_path / f'{name}.pth').unlink()
