"""What weights were trained on is not forgotten: not after a hop over another training, not after one that spent nothing."""

import json
import sys

import pytest
import torch
from helpers import REPO
from runs import train, unvalidated

from mmpose_dp.engine.hooks.provenance import Descent, loaded_by_init_cfg
from mmpose_dp.privacy import LEDGER_NAME, Ledger, PrivacyError

sys.path.insert(0, str(REPO / 'tools'))
from publish_model import published  # noqa: E402

VIEWS = dict(train_cfg__max_epochs=1, train_cfg__public_epochs=1)


def config(data, work_dir, method='dpsgd', **options):
    return unvalidated(data, work_dir, method, **{'train_cfg__max_epochs': 1, **options})


def told(work_dir):
    return json.loads((work_dir / 'privacy_statement.json').read_text())['pretraining']


@pytest.fixture(scope='module')
def views(synthetic, tmp_path_factory):
    """A training on public views alone."""
    work_dir = tmp_path_factory.mktemp('views')
    train(config(synthetic, work_dir, 'feature', **VIEWS))
    return work_dir


def test_views_alone_open_a_ledger(views, synthetic):
    assert Ledger.read(views / LEDGER_NAME).runs[0]['public_view'] and not Ledger.read(views / LEDGER_NAME).steps
    with pytest.raises(PrivacyError, match='public_view.*another work_dir'):
        train(config(synthetic, views))


def test_views_elsewhere_are_told(views, synthetic, tmp_path):
    train(config(synthetic, tmp_path / 'a', load_from=str(views / 'epoch_1.pth')))
    assert 'public views (Gaussian blur' in told(tmp_path / 'a')
    given = published(torch.load(tmp_path / 'a/epoch_1.pth', weights_only=False))
    torch.save(given, tmp_path / 'given.pth')
    train(config(synthetic, tmp_path / 'b', load_from=str(tmp_path / 'given.pth')))
    assert 'private training made' in told(tmp_path / 'b')


def test_public_pictures_elsewhere_are_told(synthetic, synthetic_public, tmp_path):
    cfg = config(synthetic, tmp_path / 'a', 'feature', **VIEWS)
    half = cfg.train_dataloader.dataset
    half.public = dict(half.private, data_root=f'{synthetic_public}/')
    train(cfg)
    train(config(synthetic, tmp_path / 'b', load_from=str(tmp_path / 'a/epoch_1.pth')))
    assert 'trained on MpiiDataset mpii_train.json' in told(tmp_path / 'b')


def test_a_private_folder_takes_no_training_on_views_alone(synthetic, tmp_path):
    train(config(synthetic, tmp_path))
    with pytest.raises(PrivacyError, match='views alone.*another work_dir'):
        train(config(synthetic, tmp_path, 'feature', **VIEWS))


def test_a_hop_over_a_training_that_spends_nothing(synthetic, tmp_path):
    train(config(synthetic, tmp_path / 'a'))
    train(config(synthetic, tmp_path / 'b', 'feature', load_from=str(tmp_path / 'a/epoch_1.pth'), **VIEWS))
    train(config(synthetic, tmp_path / 'c', load_from=str(tmp_path / 'b/epoch_1.pth')))
    assert 'private training made' in told(tmp_path / 'c') and 'public views (' in told(tmp_path / 'c')
    again = Descent.of(torch.load(tmp_path / 'c/epoch_1.pth', weights_only=False))
    assert again.private and len(again.public_views) == 1


def test_weights_that_init_cfg_loads_are_named(synthetic, tmp_path):
    runner = train(config(synthetic, tmp_path / 'a'))
    start = str(tmp_path / 'backbone.pth')
    kept = torch.load(tmp_path / 'a/epoch_1.pth', weights_only=False)
    torch.save({**kept, 'state_dict': runner.model.backbone.state_dict()}, start)
    cfg = config(synthetic, tmp_path / 'b')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=start)
    assert loaded_by_init_cfg(train(cfg).model) == [start]
    assert 'init_cfg from backbone.pth' in told(tmp_path / 'b') and 'private training made' in told(tmp_path / 'b')
    torch.save(dict(state_dict={'head.none': torch.zeros(1)}), tmp_path / 'head.pth')  # leaves the backbone as it is
    cfg = config(synthetic, tmp_path / 'c', load_from=str(tmp_path / 'head.pth'))
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=start)
    train(cfg)
    assert 'backbone.pth and loaded from head.pth, which a private training made' in told(tmp_path / 'c')


def test_private_steps_without_the_hook_are_refused(synthetic, tmp_path):
    cfg = config(synthetic, tmp_path, optim_wrapper__noise_multiplier=1.0, optim_wrapper__expected_batch_size=10)
    del cfg.default_hooks.privacy_budget
    with pytest.raises(PrivacyError, match='counted nowhere.*PrivacyBudgetHook'):
        train(cfg)
    assert not list(tmp_path.glob('*.pth'))
