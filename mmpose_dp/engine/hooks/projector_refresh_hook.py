"""Gives the projector its basis V from public samples, before the first private step and every refresh_interval steps.

Must not use the private part of the data set.
"""

import torch
from mmengine.dist import broadcast, get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.registry import HOOKS

from mmpose_dp.datasets import collate_samples
from mmpose_dp.privacy.errors import ConfigError

from ..basis import GradientTable, fit_basis
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
            key = 'default_hooks.public_data.num_samples' if self.num_samples else 'optim_wrapper.projector.rank'
            instead = f'lower {key}' if available else 'set train_dataloader.dataset.public_view (Feature DP)'
            raise ConfigError(
                f'optim_wrapper.projector needs {wanted} public samples but train_dataloader.dataset has {available}: {instead}, '
                'or add public data as train_dataloader.dataset.public (a data set that is really public)'
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
            if not projector.basis:
                # the first one takes as long as many steps, and nothing else is logged meanwhile
                runner.logger.info(f'Finding the subspace on {count} public samples.')
            projector.place(torch.zeros(0, 0), [])  # its memory is needed
            fit_basis(projector, self._gradients(runner, wrapper, count))
        rank = torch.tensor(projector.rank if get_rank() == 0 else 0)
        broadcast(rank)
        if get_rank() > 0:
            shapes = [p.shape for p in wrapper.params]
            size = int(rank), sum(shape.numel() for shape in shapes)
            projector.place(wrapper.params[0].new_empty(size, dtype=projector.dtype), shapes)
        broadcast(projector.flat)

    def _gradients(self, runner: Runner, wrapper: DPOptimWrapper, count: int) -> GradientTable:
        """The gradients of ``count`` public samples, micro-batch by micro-batch."""
        assert wrapper.projector is not None
        table = GradientTable(wrapper.params, count, wrapper.projector.dtype)
        dataset = runner.train_dataloader.dataset
        sampler = runner.train_dataloader.batch_sampler
        chosen = [dataset.public_samples[int(i)] for i in sampler.sampling.random.choice(dataset.num_public, count)]
        for start in range(0, count, sampler.micro_batch_size):
            batch = collate_samples([dataset[i] for i in chosen[start : start + sampler.micro_batch_size]])
            if batch['inputs']:
                wrapper.public_gradients(batch, table.next_rows(len(batch['inputs'])))
        return table


HOOKS.register_module(name='PublicDataHook', module=ProjectorRefreshHook)  # the name in older configs
