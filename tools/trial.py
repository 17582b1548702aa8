"""Builds what a config describes, as training does, and stops before the first step: what several tools look at.

Not a tool itself. Must not train, download or print anything, and writes nothing outside of the folder that it is given.
"""

import copy
from pathlib import Path
from typing import Any

from cli import building
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmpose.registry import DATASETS, HOOKS, MODELS, OPTIM_WRAPPERS
from torch import nn

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.datasets.resolving import every_dict, is_kind, resolved
from mmpose_dp.datasets.samplers import check_batch_size
from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.engine.hooks.planning import plan_for
from mmpose_dp.engine.hooks.provenance import Start
from mmpose_dp.engine.hooks.resuming import refuse_no_path
from mmpose_dp.extras.schedule import Schedule, ScheduledPlan
from mmpose_dp.models import check_head, read_checkpoint
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.plan import PrivacyPlan


# ---- what a config says ----------------------------------------------------------------------------------------------
def check_head_of(cfg: Config) -> None:
    """Raises PrivacyError if the config has no head, or one that private training cannot use."""
    head = cfg.model.get('head')
    if not isinstance(head, dict):
        raise PrivacyError('model.head is missing: private training is for top-down models, whose head has the loss')
    kind = resolved(MODELS, head.get('type'))
    if kind is not None:  # else MODELS.build names what is missing
        check_head(kind)


def has_private_wrapper(cfg: Config) -> bool:
    """Whether optim_wrapper is a private one."""
    return is_kind(OPTIM_WRAPPERS, cfg.get('optim_wrapper') or {}, DPOptimWrapper)


def has_private_data(cfg: Config) -> bool:
    """Whether train_dataloader.dataset says what is private."""
    return is_kind(DATASETS, cfg.train_dataloader.dataset, PublicPrivateDataset)


def trained_part(cfg: Config) -> str:
    """What the config trains in private steps."""
    return str(cfg.optim_wrapper.get('trainable', 'all'))


def annotations_of(dataset: Any) -> Path | None:
    """The annotation file that a data set's config names; None if it names none."""
    if not isinstance(dataset, dict) or not isinstance(dataset.get('ann_file'), str):
        return None
    return Path(dataset.get('data_root') or '') / dataset['ann_file']


def is_there(dataset: Any) -> bool:
    """Whether the annotations that a data set's config names are on this machine, as far as it names a file."""
    path = annotations_of(dataset)
    # without a name, or with that of a folder, what builds the data set says what is wrong
    return path is None or path.is_file() or path.is_dir()


# ---- the weights ---------------------------------------------------------------------------------------------------
def start_of(cfg: Config) -> tuple[Start, Any] | None:
    """load_from as training starts from it, and the checkpoint itself; None without it, or if the file is elsewhere.

    Raises PrivacyError for what is no path, and for a file that cannot be read or holds no weights.
    """
    path = _load_from(cfg)
    if path is None or not path.is_file():
        return None
    checkpoint = read_checkpoint(str(path), 'load_from')
    return Start.of('load_from', str(path), '', checkpoint), checkpoint


def is_start_known(cfg: Config) -> bool:
    """Whether ``start_of`` tells all tensors that files fill; to be asked before ``without_downloads``.

    It does not if load_from is elsewhere, or if the model has files of its own. Raises PrivacyError for what is no path.
    """
    path = _load_from(cfg)
    own_files = any('Pretrained' in str(part.get('init_cfg')) for part in every_dict(cfg.model))
    return (path is None or path.is_file()) and not own_files


def _load_from(cfg: Config) -> Path | None:
    refuse_no_path(cfg.get('load_from'))
    return Path(cfg.load_from).expanduser() if cfg.get('load_from') else None


def without_downloads(node: Any) -> None:
    """Takes pretrained weights out of a model's config, in place, so that building it downloads nothing."""
    for part in every_dict(node):
        if isinstance(part.get('init_cfg'), dict) and part['init_cfg'].get('type') == 'Pretrained':
            part['init_cfg'] = None


# ---- what training would build -------------------------------------------------------------------------------------
def private_model(cfg: Config) -> tuple[nn.Module, DPOptimWrapper]:
    """The model and the wrapper that the config asks for, without noise; of a plain config, those of its simplest private form.

    Raises PrivacyError.
    """
    settings = cfg.get('optim_wrapper') or {}
    if not has_private_wrapper(cfg):
        settings = dict(type='DPOptimWrapper', optimizer=dict(type='SGD', lr=1.0), max_grad_norm=1.0)
        settings['constructor'] = 'DPOptimWrapperConstructor'
    with building(cfg):
        model = MODELS.build(cfg.model).train()
    wrapper = build_optim_wrapper(model, Config(dict(settings))._cfg_dict)
    assert isinstance(wrapper, DPOptimWrapper)
    return model, wrapper


def private_data(cfg: Config) -> tuple[dict, Any]:
    """The private data set's config, and the data set itself if its files are there."""
    whole = cfg.train_dataloader.dataset
    dataset = whole.get('private', whole)
    if not is_there(dataset):
        return dataset, None  # some data sets read their files when they are built
    built = DATASETS.build(dict(dataset, lazy_init=True))
    if not Path(built.ann_file).is_file():
        return dataset, None
    if has_private_data(cfg):  # refuses what is wrong with the private or the public part
        return dataset, DATASETS.build(whole).private
    built.full_init()
    return dataset, built


def trial(cfg: Config, folder: str) -> Runner:
    """Builds the runner of a private config and does all that training does before its first step. Raises PrivacyError.

    It writes to ``folder`` only. Hooks from outside mmpose_dp are built but not called.
    """
    cfg = copy.deepcopy(cfg)
    cfg.work_dir, cfg.launcher, cfg.log_level, cfg.resume = folder, 'none', 'ERROR', False
    if isinstance(cfg.get('visualizer'), dict):
        cfg.visualizer.vis_backends = []
    for hook in (cfg.get('default_hooks') or {}).values():
        if isinstance(hook, dict) and is_kind(HOOKS, hook, CheckpointHook):
            hook.pop('out_dir', None)
    if not is_there((cfg.get('val_dataloader') or {}).get('dataset')):
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    with building(cfg):
        runner = Runner.from_cfg(cfg)
    runner.train_loop  # noqa: B018  (a property that builds)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    if runner.param_schedulers is not None:
        runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    for hook in runner.hooks:
        if type(hook).__module__.startswith('mmpose_dp.'):
            hook.before_run(runner)
    return runner


def planned(cfg: Config, num_records: int, size: int) -> PrivacyPlan:
    """The plan for ``num_records`` and an expected batch of ``size``. Raises PrivacyError for a budget that cannot be met."""
    budget, dataset = cfg.default_hooks.privacy_budget, cfg.train_dataloader.dataset
    settings = dict(
        method='dpsgd',  # the noise of every method is that of DP-SGD
        privacy_unit=dataset.get('privacy_unit', 'instance'),
        num_records=num_records,
        expected_batch_size=size,
        steps=(cfg.train_cfg.max_epochs - cfg.train_cfg.get('public_epochs', 0)) * (num_records // size),
        max_grad_norm=cfg.optim_wrapper.max_grad_norm,
        target_delta=budget.target_delta,
        accountant=budget.get('accountant', 'pld'),
        schedule=Schedule(**cfg.optim_wrapper.get('schedule') or {}),
    )
    check_batch_size(size, num_records)
    noise_multiplier = cfg.optim_wrapper.get('noise_multiplier')
    return plan_for(ScheduledPlan, noise_multiplier, budget.get('target_epsilon'), **settings)
