"""One training for accuracy.py: a config with the settings of a row, mmengine's Runner, and the scores.

Must not choose settings or compare results.
"""

import json
import shutil
import time
import warnings
from pathlib import Path

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import people_backbone  # noqa: F401  (registers it)
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmpose.utils import register_all_modules

from mmpose_dp.configs import private

REPO = Path(__file__).resolve().parents[2]


def set_up() -> None:
    """Sets up a worker process: one thread, since the workers share the cores, and no warnings."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    register_all_modules()


def plain_or_private(job: dict, name: str) -> Config:
    """The config ``name``, such as 'dpsgd_eps08' or 'nonprivate', of a job's family. On people it is made of one plain config."""
    if job['weights'] is None:
        return Config.fromfile(REPO / f'configs/dp/hrnet_{job["family"]}_{name}.py')
    cfg = Config.fromfile(REPO / f'tools/benchmarks/people/{job["family"]}.py')
    backbone = cfg.model.backbone
    for part in (backbone, backbone.get('init_cfg') or {}):
        part.update({key: f'{job["weights"]}/{part[key]}' for key in ('file', 'checkpoint') if key in part})
    method = name.removesuffix('_eps08')
    if method not in ('pretrain', 'nonprivate'):
        cfg.merge_from_dict(private(cfg._cfg_dict, method))
    if method == 'hybrid':  # as on synthetic people: what a row tunes is the optimizer of its public epochs too
        cfg.optim_wrapper.public_optimizer = None
        cfg.default_hooks.public_data = dict(type='ProjectorRefreshHook')
    return cfg


def config_of(job: dict) -> Config:
    """The config that a job trains: what ``tools/train.py CONFIG --cfg-options ...`` makes of the job's settings."""
    cfg = plain_or_private(job, job['config'])
    if job['epsilon'] is not None:
        # rows that name none were run with it, before the recipes had a shorter one
        wrapper = cfg.optim_wrapper
        wrapper.public_weight = 0.1 / wrapper.max_grad_norm * wrapper.get('public_weight', 0.0)
        wrapper.max_grad_norm = 0.1
    dataset = cfg.train_dataloader.dataset
    private_set = dataset.get('private', dataset)
    private_set.data_root = job['train_on'] or private_set.data_root
    if 'public' in dataset:
        dataset.public.data_root = job['public'] or dataset.public.data_root
    elif job['pictures']:
        public = dict(private_set, data_root=job['public'])
        if dataset is private_set:
            metainfo = dict(from_file='configs/_base_/datasets/mpii.py')
            both = dict(type='CombinedDataset', metainfo=metainfo, datasets=[private_set, public], pipeline=[])
            cfg.train_dataloader.dataset = both
        else:
            dataset.public = public
    cfg.merge_from_dict(job['settings'])
    if job['epsilon'] is not None:
        cfg.default_hooks.privacy_budget.target_epsilon = job['epsilon']
    cfg.work_dir, cfg.load_from = job['folder'], job['load_from']
    if job['experts']:
        cfg.optim_wrapper.experts = job['experts']
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None  # scored once, at the end
    return quiet(cfg, job)


def quiet(cfg: Config, job: dict) -> Config:
    """Sets the log level and the seed, and a name of its own, since several run in one process."""
    cfg.log_level, cfg.randomness = 'ERROR', dict(seed=job['seed'])
    cfg.experiment_name = f'{Path(job["folder"]).name}_{time.time_ns()}'
    return cfg


def tested(cfg: Config, job: dict, checkpoint: str) -> dict:
    """What the evaluators of ``cfg`` find in a checkpoint on its people to test."""
    cfg.load_from, cfg.work_dir = checkpoint, f'{job["folder"]}/test'
    cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = cfg.param_scheduler = None
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    return Runner.from_cfg(quiet(cfg, job)).test()


def score(job: dict, checkpoint: str, data_root: str | None) -> float:
    """Mean PCKh@0.5 of a checkpoint on the validation people in ``data_root``, by default the config's own."""
    cfg = plain_or_private(job, 'nonprivate')
    cfg.merge_from_dict({key: value for key, value in job['settings'].items() if key.startswith('model.')})
    if data_root is not None:
        cfg.test_dataloader.dataset.data_root = data_root
        cfg.test_dataloader.dataset.headbox_file = f'{data_root}annotations/mpii_gt_val.mat'
    found = tested(cfg, job, checkpoint)
    return float(found['PCK'] if 'PCK' in found else 100 * found['PCKh'])


def trained(job: dict) -> str:
    """Trains; the path of the last checkpoint."""
    Runner.from_cfg(config_of(job)).train()
    return (Path(job['folder']) / 'last_checkpoint').read_text()


def mean_of(checkpoints: list[str], folder: Path) -> str:
    """The path of the mean of the checkpoints' weights, which is written into ``folder``."""
    weights = [torch.load(path, map_location='cpu', weights_only=False)['state_dict'] for path in checkpoints]
    mean = {
        name: torch.stack([w[name].float() for w in weights]).mean(0).to(value.dtype)
        for name, value in weights[0].items()
    }
    folder.mkdir(parents=True)
    torch.save(dict(state_dict=mean, meta={}), folder / 'mean.pth')
    return str(folder / 'mean.pth')


def run_job(job: dict) -> dict:
    """Trains and scores; raises whatever the training raised."""
    began = time.time()
    folder = Path(job['folder'])
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run: one folder is one budget
    checkpoint = mean_of([job['load_from'], *job['experts']], folder) if job['mean'] else trained(job)
    statement = folder / 'privacy_statement.json'
    spent = json.loads(statement.read_text())['epsilon'] if statement.exists() else None
    scores = [score(job, checkpoint, root) for root in job['test_on']]
    return dict(scores=scores, epsilon_spent=spent, seconds=round(time.time() - began, 1), checkpoint=checkpoint)
