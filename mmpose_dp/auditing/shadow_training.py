"""Trains the models that a membership attack compares, each on a random half of the records, and measures every record's loss.

Private and plain configs train as they are, without the other half. Must not keep the models: nobody should use them.
"""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.registry import DATA_SAMPLERS, DATASETS, HOOKS, OPTIM_WRAPPERS
from rich.console import Console
from rich.progress import track
from torch.utils.data import Sampler

from mmpose_dp.datasets import PublicPrivateDataset, collate_samples
from mmpose_dp.datasets.randomness import fixed_randomness
from mmpose_dp.datasets.resolving import is_kind
from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.extras.risk import risk_of
from mmpose_dp.models import make_private, unwrapped
from mmpose_dp.privacy.errors import ConfigError

_QUERIES = 4  # augmentations of each sample whose losses are averaged: the same ones for every model
_FORWARD = 32  # samples in one forward


@HOOKS.register_module()
class LeaveOutHook(Hook):
    """Leaves records out of a private training; N and the rates stay, as in the guarantee's neighbouring data sets.

    Args:
        records: their numbers.
    """

    priority = 'LOW'  # after PrivacyBudgetHook, which sets the rates

    def __init__(self, records: Sequence[int]) -> None:
        self.records = set(records)

    def before_train(self, runner: Runner) -> None:
        """Takes the records out of what may be sampled."""
        runner.train_dataloader.batch_sampler.sampling.leave_out(self.records)


@DATA_SAMPLERS.register_module()
class MemberSampler(Sampler):
    """Shuffles some samples of a data set, anew in each epoch: plain training on these alone.

    Args:
        dataset: the data set, which is not needed.
        members: indices of the samples.
        seed: of the order.
    """

    def __init__(self, dataset: Any, members: Sequence[int], seed: int = 0, **_: Any) -> None:
        self.members, self.seed, self.epoch = list(members), seed, 0

    def __iter__(self) -> Iterator[int]:
        """Each member once."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.members))
        return iter([self.members[i] for i in order])

    def __len__(self) -> int:
        """The number of members."""
        return len(self.members)

    def set_epoch(self, epoch: int) -> None:
        """Called by mmengine, for another order in each epoch."""
        self.epoch = epoch


@dataclass(frozen=True)
class Shadows:
    """What the trained models show.

    Attributes:
        losses: (models, records).
        members: (models, records) bool, whether the model was trained on the record.
        bound: by rate of false positives, the most true positives that the guarantee allows; empty if there is none.
    """

    losses: np.ndarray
    members: np.ndarray
    bound: dict[float, float]


def train_shadows(cfg: Config, models: int, records: int | None = None, seed: int = 0) -> Shadows:
    """Trains ``models`` models, each on records chosen with probability one half, and measures the loss of every record in each.

    Args:
        cfg: private or plain.
        models: at least 4, so that every record is in some and not in others.
        records: how many records, chosen at random, are measured; None: all.
        seed: of the choice, of the halves and of the plain trainings; privacy's own randomness has none.

    Raises ConfigError for too few models or records.
    """
    random = np.random.default_rng(seed)
    total = number_of_records(DATASETS.build(cfg.train_dataloader.dataset))
    if models < 4 or total < 20 or not 20 <= (records or total) <= total:
        raise ConfigError(
            f'an attack on {records or total} of {total} records by {models} models needs at least 20 and 4'
        )
    members = random.integers(0, 2, (models, total)) == 1
    chosen = np.sort(random.choice(total, records or total, replace=False))
    losses, bound = [], {}
    for number in track(range(models), 'models', console=Console(stderr=True)):
        with tempfile.TemporaryDirectory() as folder:  # a new one each: one work dir is one budget
            runner = Runner.from_cfg(shadow_config(cfg, members[number], number, seed, folder))
            runner.train()
        losses.append(losses_of(runner, chosen.tolist()))
        bound = bound_of(runner)
    return Shadows(np.array(losses), members[:, chosen], bound)


def bound_of(runner: Runner) -> dict[float, float]:
    """The most true positives, by rate of false positives, that what a private training has spent allows."""
    wrapper = runner.optim_wrapper
    if not isinstance(wrapper, DPOptimWrapper) or wrapper.plan is None:
        return {}
    risk = risk_of(wrapper.ledger.history, wrapper.plan.target_delta)
    found = {} if risk is None else risk['add_or_remove']['true_positive_rate_at']
    return {float(rate): value for rate, value in found.items()}


def shadow_config(cfg: Config, members: np.ndarray, number: int, seed: int, folder: str) -> Config:
    """The config that trains model ``number``, in ``folder``, on the records for which ``members``, (records,) bool, holds."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = folder
    cfg.experiment_name = Path(folder).name  # mmengine shares what has one name
    cfg.visualizer = dict(type='PoseLocalVisualizer', name=cfg.experiment_name, vis_backends=[])
    cfg.randomness = dict(seed=seed + number)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.default_hooks.checkpoint = None
    cfg.log_level = 'ERROR'
    if is_kind(OPTIM_WRAPPERS, cfg.optim_wrapper, DPOptimWrapper):
        hook = dict(type='LeaveOutHook', records=np.flatnonzero(~members).tolist())
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
    else:
        chosen = np.flatnonzero(members).tolist()
        cfg.train_dataloader.sampler = dict(type='MemberSampler', members=chosen, seed=seed + number)
    return cfg


def number_of_records(dataset: Any) -> int:
    """Records of a private data set, or samples of a plain one."""
    return dataset.num_records if isinstance(dataset, PublicPrivateDataset) else len(dataset)


def losses_of(runner: Runner, records: Sequence[int]) -> np.ndarray:
    """The loss of each record under the trained model, (records,): the mean over its samples and a few fixed augmentations."""
    model = unwrapped(runner.model).eval()
    make_private(model.head)  # one loss per sample
    dataset = runner.train_dataloader.dataset
    samples = [(place, sample) for place, record in enumerate(records) for sample in _samples_of(dataset, record)]
    total, count = np.zeros(len(records)), np.zeros(len(records))
    queries = [(place, sample, query) for place, sample in samples for query in range(_QUERIES)]
    for start in range(0, len(queries), _FORWARD):
        part = queries[start : start + _FORWARD]
        packed = [_packed(dataset, sample, query) for _, sample, query in part]
        usable = [(place, one) for (place, _, _), one in zip(part, packed) if one is not None]
        if not usable:
            continue
        batch = collate_samples([[one] for _, one in usable])
        with torch.no_grad():
            found = model(**model.data_preprocessor(batch, False), mode='loss')
        losses = torch.stack([values for name, values in found.items() if 'loss' in name]).sum(0).double().cpu().numpy()
        places = [place for place, _ in usable]
        finite = np.isfinite(losses)  # a loss that is none says nothing of who was a member
        np.add.at(total, places, np.where(finite, losses, 0.0))
        np.add.at(count, places, finite)
    return total / count.clip(1)


def _samples_of(dataset: Any, record: int) -> list[int]:
    return dataset.samples_of(record) if isinstance(dataset, PublicPrivateDataset) else [record]


def _packed(dataset: Any, sample: int, query: int) -> Any:
    """A sample under augmentation number ``query``; None if it cannot be read."""
    with fixed_randomness([sample, query, 0, 0, 0, sample * _QUERIES + query]):
        try:
            return (dataset.private if isinstance(dataset, PublicPrivateDataset) else dataset)[sample]
        except Exception:  # training passes over such a record too
            return None
