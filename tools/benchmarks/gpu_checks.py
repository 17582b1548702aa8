"""What a card must show beside speed: exactness, noise, the replay, an epoch with its loader. Must not print anything."""

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.registry import MODELS
from performance_worker import make_batch
from scipy.stats import kstest
from torch import Tensor, nn
from torch.optim import SGD

from mmpose_dp.datasets.synthetic import make_synthetic_mpii
from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.extras.device_noise import DeviceRandomSource
from mmpose_dp.models import freeze_batch_norm
from mmpose_dp.privacy.clipping import clipping_norm
from mmpose_dp.privacy.errors import PrivacyError

RECORDS, C = 4, 0.05  # of the comparison with float64
_BATCH = 64  # samples in memory in an epoch: what MMPose's HRNet config for MPII has
PRECISIONS: dict[str, tuple[bool, dict]] = {  # by name: whether TF32 is allowed, and what DPOptimWrapper is given
    'float32': (False, {}),
    'TF32': (True, {}),
    'bfloat16': (True, dict(amp_dtype='bfloat16')),
}


def settle(device: str) -> None:
    """Waits for the device."""
    if device != 'cpu':
        torch.cuda.synchronize()


def model_of(cfg: Config, device: str) -> nn.Module:
    """The config's model with random weights, in train mode, without dropout, BatchNorm frozen."""
    torch.manual_seed(0)
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.backbone.init_cfg = None
    model = MODELS.build(model_cfg).to(device).train()
    freeze_batch_norm(model)
    for module in model.modules():
        if 'Drop' in type(module).__name__:
            module.eval()
    return model


# ---- exactness -------------------------------------------------------------------------------------------------------
def in_float64(model: Any, batch: dict) -> dict:
    """What a model in float64 takes of a collated batch, which stays as it is."""
    ready = model.data_preprocessor(copy.deepcopy(batch), True)
    for sample in ready['data_samples']:
        for part in (sample.get('gt_instance_labels'), sample.get('gt_fields')):
            for key, value in part.items() if part is not None else ():
                if isinstance(value, Tensor) and value.is_floating_point():
                    part.set_field(value.double(), key)
    return dict(ready, inputs=ready['inputs'].double())


def clipped_by_loop(model: nn.Module, batch: dict) -> Tensor:
    """The clipped sum of single records in float64, flat, by plain autograd."""
    exact: Any = copy.deepcopy(model).double()
    params = [p for p in exact.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in params), device=params[0].device).double()
    for i in range(RECORDS):
        exact(**in_float64(exact, {key: values[i : i + 1] for key, values in batch.items()}), mode='loss')
        found = torch.autograd.grad(exact.head.take().losses[0], params, allow_unused=True)
        parts = [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(params, found)]
        gradient = torch.cat(parts)
        total += gradient * (clipping_norm(C) / gradient.norm()).clamp_max(1)
    return total


def clipped_by_step(model: nn.Module, batch: dict, settings: dict) -> Tensor:
    """The same by a private step without noise."""
    params, seen = [p for p in model.parameters() if p.requires_grad], list[Tensor]()
    wrapper = DPOptimWrapper(SGD(params, lr=1.0), C, noise_multiplier=0.0, expected_batch_size=1, **settings)
    wrapper.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.double().flatten() for p in params))
    model.train_step(batch, wrapper)
    return torch.cat(seen)


def exactness(cfg: Config, device: str) -> dict[str, float | str]:
    """By precision, how far a step is from single records in float64, relative to their clipped sum; or why it does not run."""
    allowed, found = torch.backends.cudnn.allow_tf32, dict[str, float | str]()
    try:
        model, batch = model_of(cfg, device), make_batch(cfg, RECORDS, 0)
        DPOptimWrapper(SGD(model.parameters(), lr=1.0), C).prepare(model)  # a private head
        wanted = clipped_by_loop(model, batch)
        for name, (tf32, settings) in PRECISIONS.items():
            torch.backends.cudnn.allow_tf32 = tf32
            own = copy.deepcopy(model)
            found[name] = float((clipped_by_step(own, batch, settings) - wanted).norm() / wanted.norm())
    except Exception as error:  # whatever a device raises for a model
        missing = [name for name in PRECISIONS if name not in found]
        found |= dict.fromkeys(missing, f'does not run: {type(error).__name__}: {str(error)[:100]}')
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    return found


# ---- noise -----------------------------------------------------------------------------------------------------------
def noise(device: str, numbers: int, tested: int) -> dict[str, float]:
    """The p-value of Kolmogorov and Smirnov's test of ``tested`` numbers, and the seconds that ``numbers`` take."""
    source, seconds = DeviceRandomSource(), list[float]()
    for _ in range(4):  # the first one warms up
        made = torch.zeros(numbers, device=device)
        settle(device)
        start = time.perf_counter()
        source.add_gaussian(made, 2.0)
        settle(device)
        seconds.append(time.perf_counter() - start)
    sample = (made[:tested] / 2).cpu().numpy()
    return dict(pvalue=float(kstest(sample, 'norm').pvalue), seconds=median(seconds[1:]))


# ---- the replay ------------------------------------------------------------------------------------------------------
def leak_is_refused(cfg: Config, device: str) -> bool:
    """Whether a model whose records begin to depend on one another after its first step is stopped at the next."""
    model: Any = model_of(cfg, device)
    wrapper = DPOptimWrapper(SGD(model.parameters(), lr=1e-6), C, noise_multiplier=0.0, expected_batch_size=2)
    batch = make_batch(cfg, 2, 0)
    wrapper.begin_micro_batch(True, 0)
    model.train_step(batch, wrapper)
    mixing = model.backbone.register_forward_hook(
        lambda module, inputs, output: tuple(x + x.mean(0, keepdim=True) for x in output)
    )
    try:
        wrapper.begin_micro_batch(True, 0)
        model.train_step(batch, wrapper)
    except PrivacyError:
        return True
    finally:
        mixing.remove()
    return False


# ---- an epoch --------------------------------------------------------------------------------------------------------
class EpochTimes(Hook):
    """Notes how long each epoch takes."""

    priority = 'LOWEST'

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self._device, self._start = device, 0.0

    def before_train_epoch(self, runner: Runner) -> None:
        """Begins."""
        settle(self._device)
        self._start = time.perf_counter()

    def after_train_epoch(self, runner: Runner) -> None:
        """Ends."""
        settle(self._device)
        self.seconds.append(time.perf_counter() - self._start)


def without_validation(cfg: Config, root: Path, name: str, count: int) -> Config:
    """The config of a training of ``count`` epochs on the people in ``root`` that neither validates nor saves."""
    cfg.work_dir, cfg.experiment_name, cfg.log_level = str(root / name), f'gpu_{name}', 'ERROR'
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.train_cfg.max_epochs, cfg.model.backbone.init_cfg = count, None
    cfg.visualizer.name, cfg.visualizer.vis_backends = cfg.experiment_name, [dict(type='LocalVisBackend')]
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=100, save_last=False)
    workers = min(8, len(os.sched_getaffinity(0)) // 2 - 1)  # none on two cores
    cfg.train_dataloader.update(batch_size=_BATCH, num_workers=workers, persistent_workers=workers > 0)
    return cfg


def private_training(config: str, root: Path, people: int, count: int) -> Config:
    """Epochs of private steps, four steps each, by a hybrid config; the first one finds a basis."""
    cfg = without_validation(Config.fromfile(config), root, 'private', count)
    cfg.train_cfg.public_epochs = 0
    cfg.train_dataloader.dataset.private.data_root = str(root)
    cfg.train_dataloader.batch_sampler.update(expected_batch_size=people // 4, public_batch_size=min(32, people // 4))
    cfg.default_hooks.privacy_budget.update(target_epsilon=None, target_delta=0.1 / people)
    cfg.default_hooks.public_data.num_samples = min(100, people)
    cfg.optim_wrapper.noise_multiplier = 1.0
    return cfg


def plain_training(config: str, root: Path, people: int, count: int) -> Config:
    """Plain epochs."""
    cfg = without_validation(Config.fromfile(config), root, 'plain', count)
    cfg.train_dataloader.dataset.data_root = str(root)
    return cfg


def epochs(private: str, plain: str, root: Path, people: int, count: int, device: str) -> dict[str, float]:
    """Seconds of the last of ``count`` private epochs and of as many plain ones, and the private one's share of waiting."""
    size = Config.fromfile(private).codec.input_size[0]
    cores = len(os.sched_getaffinity(0))
    make_synthetic_mpii(root, 'private', people, 1, image_size=size, workers=cores)
    trainings: dict[str, Callable[..., Config]] = dict(private=private_training, plain=plain_training)
    found = {}
    for (name, training), config in zip(trainings.items(), (private, plain)):
        runner, times = Runner.from_cfg(training(config, root, people, count)), EpochTimes(device)
        runner.register_hook(times)
        runner.train()
        found[name] = times.seconds[-1]
        if name == 'private':
            found['waiting'] = runner.train_loop.loader_wait.share
    return found
