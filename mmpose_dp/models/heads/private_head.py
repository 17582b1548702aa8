"""Feature-masking heads: the private twins of MMPose's heads.

A private head is its MMPose parent with two changes, both in ``loss``: every loss is one number a row, computed as on a
batch of that row alone, and a mask says which rows of the features are private records and which are public views, so that
one forward serves both. Parameters, state-dict keys and predictions are the parent's. Must not report anything computed
from a private row except those losses.
"""

from typing import Any

import torch
from mmpose.models.heads import HeatmapHead, RTMCCHead, SimCCHead
from mmpose.registry import MODELS
from torch import Tensor, nn

from mmpose_dp.privacy import Rows


class PerRecordLoss:
    """Mixed into a loss module: the loss of row i is what the module gives on a batch holding only row i.

    That is right for losses that sum over the batch, average over it, or normalise over it, and needs no flag that says
    which. Returns (rows,) where the module returned one number.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Splits every argument by row and calls the loss once a row."""
        rows = _num_rows((args, tuple(kwargs.values())))
        each = zip(_split(args, rows), _split(tuple(kwargs.values()), rows))
        losses = [super(PerRecordLoss, self).forward(*a, **dict(zip(kwargs, k))) for a, k in each]  # type: ignore[misc]
        return torch.stack([loss.reshape(()) for loss in losses])


def _num_rows(value: Any) -> int:
    """The leading size of the first tensor found in nested tuples."""
    if isinstance(value, Tensor):
        return len(value)
    if isinstance(value, (tuple, list)):
        return next((n for n in map(_num_rows, value) if n >= 0), -1)
    return -1


def _split(value: Any, rows: int) -> list[Any]:
    """Nested tuples of (rows, ...) tensors -> a list of the same nesting, one row each."""
    if isinstance(value, Tensor):
        return list(value.split(1))
    if isinstance(value, (tuple, list)):
        columns = [_split(item, rows) for item in value]
        return [type(value)(column[row] for column in columns) for row in range(rows)]
    return [value] * rows


def _per_record(module: nn.Module) -> None:
    """Turns a loss module into its per-record form in place, keeping its parameters and names."""
    cls = type(module)
    module.__class__ = type(f'PerRecord{cls.__name__}', (PerRecordLoss, cls), {})


class FeatureMaskingHead:
    """Mixin for MMPose heads that keep their loss in ``self.loss_module``.

    Attributes:
        rows: what each row of the last batch was (``mmpose_dp.privacy.Rows``).
        record_losses: (rows,) the total loss of each row of the last batch, with its graph.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _per_record(self.loss_module)
        self.rows: Rows | None = None
        self.record_losses: Tensor | None = None

    def loss(self, feats: Any, batch_data_samples: list, train_cfg: dict | None = None) -> dict:
        """The parent's losses, each of shape (rows,); accuracies of the batch are left out.

        A data sample whose metainfo holds ``dp_record=None`` is a public row; rows of equal ``dp_record`` are one
        record; without the field every row is a record of its own.
        """
        losses = super().loss(feats, batch_data_samples, dict(train_cfg or {}, compute_acc=False))  # type: ignore[misc]
        losses = {name: value for name, value in losses.items() if 'loss' in name}
        keys = [sample.metainfo.get('dp_record', -1 - i) for i, sample in enumerate(batch_data_samples)]
        self.rows = Rows.from_keys(keys)
        self.record_losses = torch.stack(list(losses.values())).sum(0)
        return losses


@MODELS.register_module()
class PrivateHeatmapHead(FeatureMaskingHead, HeatmapHead):
    """Private twin of :class:`mmpose.models.heads.HeatmapHead`; takes the same arguments."""


@MODELS.register_module()
class PrivateSimCCHead(FeatureMaskingHead, SimCCHead):
    """Private twin of :class:`mmpose.models.heads.SimCCHead`; takes the same arguments."""


@MODELS.register_module()
class PrivateRTMCCHead(FeatureMaskingHead, RTMCCHead):
    """Private twin of :class:`mmpose.models.heads.RTMCCHead`; takes the same arguments."""
