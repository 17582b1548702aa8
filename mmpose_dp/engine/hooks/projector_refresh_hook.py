"""Gives the projector its basis V from public samples, before the first private step and every refresh_interval steps.

Must not use the private part of the data set.
"""

from collections.abc import Iterator, Sequence

import torch
from mmengine.dist import broadcast, broadcast_object_list, get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.registry import HOOKS
from torch import Tensor

from mmpose_dp.datasets import batches_of
from mmpose_dp.extras.kronecker import KroneckerProjector, in_passes, samples_for
from mmpose_dp.privacy.errors import ConfigError
from mmpose_dp.privacy.projection import Projector

from ..basis import GradientTable, fit_basis
from ..optim_wrappers import DPOptimWrapper
from .fitting_norm import unfitting_coordinates

MOST_WHOLE = 16  # samples whose whole gradients are in memory at a time


@HOOKS.register_module()
class ProjectorRefreshHook(Hook):
    """Refreshes the projector's basis from per-sample gradients of public samples.

    Args:
        num_samples: number of public samples for each basis, chosen uniformly and independently of the private sampling.
            None: as many as :func:`mmpose_dp.extras.kronecker.samples_for` says.
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
        wanted = self.num_samples or samples_for(wrapper.projector)
        if available < wanted:
            own = self.num_samples or isinstance(wrapper.projector, KroneckerProjector)
            key = 'default_hooks.public_data.num_samples' if own else 'optim_wrapper.projector.rank'
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
            count = self.num_samples or samples_for(projector)
            first = not projector.basis
            if first:
                # the first one takes as long as many steps, and nothing else is logged meanwhile
                runner.logger.info(f'Finding the subspace on {count} public samples.')
            dataset, random = runner.train_dataloader.dataset, runner.train_dataloader.batch_sampler.sampling.random
            chosen = [dataset.public_samples[int(i)] for i in random.choice(dataset.num_public, count)]
            if isinstance(projector, KroneckerProjector):
                projector.fit(wrapper.params, [_whole(runner, wrapper, part) for part in in_passes(chosen)])
            else:
                projector.place(torch.zeros(0, 0), [])  # its memory is needed
                fit_basis(projector, self._table(runner, wrapper, chosen))
            for warning in unfitting_coordinates(runner, chosen) if first else []:
                runner.logger.warning(f'{warning}.')
        if isinstance(projector, KroneckerProjector):
            share_factors(projector, wrapper.params[0].device)
        else:
            _share_basis(projector, wrapper)

    def _table(self, runner: Runner, wrapper: DPOptimWrapper, chosen: Sequence[int]) -> GradientTable:
        """The gradients of public samples, micro-batch by micro-batch."""
        assert wrapper.projector is not None
        table = GradientTable(wrapper.params, len(chosen), wrapper.projector.dtype)
        loader = runner.train_dataloader
        for batch in batches_of(loader.dataset, chosen, loader.batch_sampler.micro_batch_size):
            wrapper.public_gradients(batch, table.next_rows(len(batch['inputs'])))
        return table


def _whole(runner: Runner, wrapper: DPOptimWrapper, chosen: Sequence[int]) -> Iterator[list[Tensor]]:
    """Batches of the gradients of public samples, each as DPOptimWrapper.public_gradients gives them."""
    loader = runner.train_dataloader
    size = min(loader.batch_sampler.micro_batch_size, MOST_WHOLE)
    return (wrapper.public_gradients(batch) for batch in batches_of(loader.dataset, chosen, size))


def _share_basis(projector: Projector, wrapper: DPOptimWrapper) -> None:
    """Gives every rank the basis of the first one."""
    rank = torch.tensor(projector.rank if get_rank() == 0 else 0)
    broadcast(rank)
    if get_rank() > 0:
        shapes = [p.shape for p in wrapper.params]
        size = int(rank), sum(shape.numel() for shape in shapes)
        projector.place(wrapper.params[0].new_empty(size, dtype=projector.dtype), shapes)
    broadcast(projector.flat)


def share_factors(projector: KroneckerProjector, device: torch.device) -> None:
    """Gives every rank the basis of the first one."""
    shared = [[factors.to('cpu') for factors in projector.basis] if get_rank() == 0 else []]
    broadcast_object_list(shared)
    if get_rank() > 0:
        projector.basis = [factors.to(device) for factors in shared[0]]


HOOKS.register_module(name='PublicDataHook', module=ProjectorRefreshHook)  # the name in older configs
