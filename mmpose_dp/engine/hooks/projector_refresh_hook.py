"""Gives the projector its basis V from public samples, before the first private step and every refresh_interval steps.

Must not use the private part of the data set.
"""

from collections.abc import Iterator

import torch
from mmengine.dist import broadcast, get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.registry import HOOKS
from torch import Tensor

from mmpose_dp.datasets import collate_samples
from mmpose_dp.privacy.errors import ConfigError

from ..basis import fit_basis
from ..optim_wrappers import DPOptimWrapper


@HOOKS.register_module()
class ProjectorRefreshHook(Hook):
    """Refreshes the projector's basis from per-sample gradients of public samples.

    Args:
        num_samples: number of public samples for each basis, chosen uniformly and independently of the private sampling.
            None: the projector's rank.
    """

    priority = 'NORMAL'

    def __init__(self, num_samples: int | None = None) -> None:
        self.num_samples = num_samples
        self._age = 0

    def before_run(self, runner: Runner) -> None:
        """Raises ConfigError for a projector without enough public data."""
        wrapper = getattr(runner, 'optim_wrapper', None)
        if not isinstance(wrapper, DPOptimWrapper) or wrapper.projector is None:
            return
        available = runner.train_dataloader.dataset.num_public
        wanted = self.num_samples or wrapper.projector.max_rank
        if available < wanted:
            raise ConfigError(
                f'optim_wrapper.projector needs {wanted} public samples but train_dataloader.dataset has {available}: set '
                'public_view (Feature DP) or public (a data set that is really public), or lower projector.rank and '
                'default_hooks.public_data.num_samples'
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Fits a new basis if there is none or refresh_interval steps have passed."""
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, DPOptimWrapper) or wrapper.projector is None or wrapper.public_only:
            return
        if not wrapper.projector.basis or self._age >= wrapper.projector.refresh_interval:
            self._refresh(runner, wrapper)
            self._age = 0
        self._age += 1

    def _refresh(self, runner: Runner, wrapper: DPOptimWrapper) -> None:
        """Fits the basis on the first rank and broadcasts it."""
        projector = wrapper.projector
        assert projector is not None
        if get_rank() == 0:
            count = self.num_samples or projector.max_rank
            fit_basis(projector, self._gradients(runner, wrapper, count), count)
        rank = torch.tensor(projector.rank if get_rank() == 0 else 0)
        broadcast(rank)
        if get_rank() > 0:
            projector.basis = [p.new_empty((int(rank), *p.shape), dtype=projector.dtype) for p in wrapper.params]
        for part in projector.basis:
            broadcast(part)

    def _gradients(self, runner: Runner, wrapper: DPOptimWrapper, count: int) -> Iterator[list[Tensor]]:
        """Batches of per-sample gradients of ``count`` public samples, (samples, *parameter shape) per parameter."""
        dataset = runner.train_dataloader.dataset
        sampler = runner.train_dataloader.batch_sampler
        chosen = [dataset.public_samples[int(i)] for i in sampler.sampling.random.choice(dataset.num_public, count)]
        for start in range(0, count, sampler.micro_batch_size):
            batch = collate_samples([dataset[i] for i in chosen[start : start + sampler.micro_batch_size]])
            if batch['inputs']:
                yield wrapper.public_gradients(batch)


HOOKS.register_module(name='PublicDataHook', module=ProjectorRefreshHook)  # the name in older configs
