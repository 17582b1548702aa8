"""Finds what a hook changes during training: the data loader, the pipelines, which parameters are trained.

The loop and the optimizer wrapper were built for these as they were at first. Must not depend on what a private record holds.
"""

from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.datasets.nested import nested
from mmpose_dp.privacy.errors import PrivacyError


class Watch:
    """What the loop was built for, to compare with.

    Args:
        dataloader: the loop's.
    """

    def __init__(self, dataloader: DataLoader) -> None:
        self._dataloader = dataloader
        self._parts: tuple[Any, ...] = dataloader.dataset, dataloader.batch_sampler, dataloader.collate_fn
        self.take_pipelines()
        self._trained: dict[str, bool] = {}

    def take_pipelines(self) -> None:
        """Takes the pipelines as they are now for right."""
        dataset = self._parts[0]
        dataset.switched = False
        self._made_by = _fingerprint(dataset)

    def take_trained(self, model: nn.Module) -> None:
        """Takes what requires a gradient now for right."""
        self._trained = {name: param.requires_grad for name, param in model.named_parameters()}

    def check(self, dataloader: DataLoader, model: nn.Module) -> None:
        """Raises PrivacyError, with what to do instead, where something is not what it was."""
        found = dataloader.dataset, dataloader.batch_sampler, dataloader.collate_fn
        if dataloader is not self._dataloader or any(a is not b for a, b in zip(found, self._parts)):
            raise PrivacyError(
                'a hook exchanged the data loader of train_loop, its data set or its sampler: the accountant relies on those '
                'with which training began. Take that hook out; to switch pipelines, use mmdet.PipelineSwitchHook'
            )
        if self._parts[0].switched:
            self.take_pipelines()
        elif not _same(self._made_by, _fingerprint(self._parts[0])):
            raise PrivacyError(
                'a hook changed a pipeline inside train_dataloader.dataset: the public views would not change with it, and the '
                'checks for mixing transforms would not see it. Assign train_dataloader.dataset.pipeline, as '
                'mmdet.PipelineSwitchHook does'
            )
        for name, param in model.named_parameters():
            if param.requires_grad != self._trained.get(name, param.requires_grad):
                raise PrivacyError(
                    f'a hook {"thawed" if param.requires_grad else "froze"} {name} during training: per-sample gradients and noise '
                    'are for what is trained from the start. Write optim_wrapper.trainable, or run one training for each part'
                )


def _fingerprint(dataset: PublicPrivateDataset) -> list[Any]:
    """All that decides what a sample looks like: data sets, pipelines, every transform, and the description of the view."""
    objects = [x for part in dataset.parts().values() for x in (part, part.pipeline, *nested(part.pipeline.transforms))]
    return [*objects, dataset.view_description]


def _same(one: list[Any], other: list[Any]) -> bool:
    """Whether two fingerprints are of the same objects."""
    return len(one) == len(other) and all(a is b for a, b in zip(one[:-1], other[:-1])) and one[-1] == other[-1]
