"""Small trainings through mmengine's Runner, from the synthetic configs."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from tests.support.paths import REPO


def config(data, work_dir, method='hybrid', **options):
    """The synthetic config of ``method``, cut down to a few steps on 40 records; ``options`` as --cfg-options (__ for .)."""
    cfg = Config.fromfile(REPO / f'configs/dp/hrnet_synthetic_{method}_eps08.py')
    cfg.work_dir, cfg.experiment_name = str(work_dir), f'test_{Path(work_dir).name}_{method}'
    # a name of its own: mmengine reuses a visualizer of the same name, with its old folder
    cfg.visualizer.name = cfg.experiment_name
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    dataset = cfg.train_dataloader.dataset
    dataset.private.data_root = str(data)
    if 'public' in dataset:
        dataset.public.data_root = str(options.pop('public_root'))
    for loader in ('val_dataloader', 'test_dataloader'):
        cfg[loader].dataset.data_root = str(data)
        cfg[loader].dataset.headbox_file = f'{data}/annotations/mpii_gt_val.mat'
    small = {
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.num_workers': 0,
        'val_dataloader.persistent_workers': False,
        'train_dataloader.batch_size': 8,
        'train_dataloader.batch_sampler.expected_batch_size': 10,
        'train_cfg.max_epochs': 3,
        'default_hooks.privacy_budget.target_epsilon': 8.0,
        'default_hooks.privacy_budget.target_delta': 1e-3,
        'default_hooks.checkpoint.interval': 1,
        'default_hooks.logger.interval': 1,
    }
    if method in ('feature', 'hybrid'):
        small['train_dataloader.batch_sampler.public_batch_size'] = 8
    if method in ('projected', 'hybrid'):
        small['optim_wrapper.projector.rank'] = 6
    if method == 'hybrid':
        small['train_cfg.public_epochs'] = 1
    cfg.merge_from_dict({**small, **{k.replace('__', '.'): v for k, v in options.items()}})
    return cfg


def tiny(cfg):
    """The same training with a model of 90,000 parameters."""
    cfg.model.backbone = dict(type='ResNet', depth=18, base_channels=4, stem_channels=4, init_cfg=None)
    cfg.model.head.update(in_channels=32, in_featuremap_size=(2, 2))
    # MMPose's own initialization is so small that a picture changes nothing in float32
    cfg.model.head.init_cfg = [dict(type='Normal', layer=layer, std=0.1) for layer in ('Conv2d', 'Linear')]
    return cfg


def unvalidated(data, work_dir, method='dpsgd', **options):
    """``config`` with the tiny model, and without validation."""
    cfg = tiny(config(data, work_dir, method, **options))
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    return cfg


def train(cfg):
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


class Interruption(Exception):
    pass


class _Stop(Hook):
    priority = 'LOWEST'

    def __init__(self, after):
        self.after = after

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after:
            raise Interruption


def train_until(cfg, after):
    """Trains ``after`` logical steps and stops there, as if killed."""
    runner = Runner.from_cfg(cfg)
    runner.register_hook(_Stop(after))
    with pytest.raises(Interruption):
        runner.train()
    runner.optim_wrapper.ledger.close()
    return runner


def logged(work_dir):
    """All values of each scalar that mmengine logged, by its name."""
    lines = [
        json.loads(line) for f in Path(work_dir).glob('*/vis_data/scalars.json') for line in f.read_text().splitlines()
    ]
    found = {}
    for line in lines:
        for key, value in line.items():
            found.setdefault(key, []).append(value)
    return found
