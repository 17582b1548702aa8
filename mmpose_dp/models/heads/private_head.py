"""Feature-masking heads: the private twins of MMPose's top-down heads.

A private head is its MMPose parent with one change, in ``loss``: the parent's loss is taken row by row, so that every loss
is one number a row, exactly as on a batch of that row alone, and a mask says which rows of the features are private
records and which are public views; one forward serves them all. Parameters, state-dict keys and predictions are the
parent's. Must not report anything computed from a private row except those losses.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from mmpose.models import heads
from mmpose.registry import MODELS
from torch import Tensor, nn

from mmpose_dp.privacy.records import Rows

_UNUSABLE = 'loss_unusable'  # of a row whose loss cannot be found


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples and lists with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_each(item, change) for item in value) if isinstance(value, (tuple, list)) else value


def _row(value: Any, row: int) -> Any:
    """Row ``row`` of every (rows, ...) tensor in nested tuples and lists, as a batch of one, in float32 at least: in mixed
    precision too, losses are no place for 8 bits, and NumPy has no bfloat16."""

    def taken(x: Tensor) -> Tensor:
        one = x[row : row + 1]
        return one.float() if one.dtype in (torch.bfloat16, torch.float16) else one

    return _each(value, taken)


def _finite_rows(outputs: Any) -> list[bool]:
    """Of each row, whether all (rows, ...) tensors in nested tuples and lists are finite there; one wait for a GPU."""
    finite = [x.detach().reshape(len(x), -1).isfinite().all(1) for x in tensors_in(outputs)]
    return torch.stack(finite).all(0).tolist()


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and data elements."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if hasattr(value, 'values') else value if isinstance(value, (tuple, list)) else ()
    return [x for part in parts for x in tensors_in(part)]


class FeatureMaskingHead:
    """Mixin for MMPose heads whose ``loss`` calls ``self.forward(feats)`` and compares the result with the data samples.

    The forward runs once on all rows; the parent's loss then runs once a row and is given that row's outputs. That is right
    for losses that sum over the batch, average over it or normalise over it, for intermediate supervision and for several
    losses, and needs no flag that says which.

    Attributes:
        rows: what each row of the last batch was (``mmpose_dp.privacy.Rows``).
        record_losses: the total loss of each row of the last batch, a scalar with a graph of its own down to the outputs.
        compute_acc: whether to keep each row's accuracies too; off, since nobody may see them (expose_private_metrics).
        record_accuracies: then, (rows,) by name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: Rows | None = None
        self.record_losses: list[Tensor] | None = None
        self.compute_acc = False
        self.record_accuracies: dict[str, Tensor] = {}
        self._outputs: Any = None

    def forward(self, feats: Any) -> Any:
        """The parent's forward; inside ``loss``, what it gave for the row at hand."""
        return super().forward(feats) if self._outputs is None else self._outputs  # type: ignore[misc]

    def called_per_sample(self) -> list[nn.Module]:
        """The loss modules: they see one row at a time, so what they learn (RLE's flow) needs a backward a row."""
        named = self.named_modules()  # type: ignore[attr-defined]
        return [module for name, module in named if 'loss' in name.rpartition('.')[2]]

    def loss(self, feats: Any, batch_data_samples: list, train_cfg: dict | None = None) -> dict:
        """The parent's losses, each of shape (rows,); accuracies are left out.

        A data sample whose metainfo holds ``dp_record=None`` is a public row; rows of equal ``dp_record`` are one
        record; without the field every row is a record of its own. ``dp_weight`` is Rows.weights'.
        """
        outputs, config = self.forward(feats), dict(train_cfg or {}, compute_acc=self.compute_acc)
        each = []
        try:
            # looked at before the loss: on a GPU a loss that asserts ends the process, and no exception can be caught
            for row, (sample, finite) in enumerate(zip(batch_data_samples, _finite_rows(outputs))):
                self._outputs = _row(outputs, row)
                each.append(self._loss_of_row(feats, sample, config) if finite else self._unusable())
        finally:
            self._outputs = None
        names = next((one for one in each if _UNUSABLE not in one), each[0])
        each = [dict.fromkeys(names, one[_UNUSABLE]) if _UNUSABLE in one else one for one in each]
        table = {name: torch.stack([one[name].reshape(()) for one in each]) for name in names}
        losses = {name: values for name, values in table.items() if 'loss' in name}
        self.record_accuracies = {name: values for name, values in table.items() if name not in losses}
        keys = [sample.metainfo.get('dp_record', -1 - i) for i, sample in enumerate(batch_data_samples)]
        weights = [sample.metainfo.get('dp_weight', 1.0) for sample in batch_data_samples]
        self.rows = Rows.from_keys(keys, () if set(weights) == {1.0} else weights)
        self.record_losses = [torch.stack([one[name].reshape(()) for name in losses]).sum() for one in each]
        return losses

    def _unusable(self) -> dict:
        """The loss of a row that contributes nothing: its gradient is not finite."""
        return {_UNUSABLE: torch.nan * tensors_in(self._outputs)[0].sum()}

    def _loss_of_row(self, feats: Any, sample: Any, config: dict) -> dict:
        """The parent's losses of one row; NaN where the values of that row are what the parent raises for.

        Nothing that a private row holds may end a training. What is wrong with the form of outputs or labels, which all rows
        have in common, is raised.
        """
        try:
            return super().loss(feats, [sample], config)  # type: ignore[misc]
        except Exception as error:
            if not self._works_on_plain_numbers(feats, sample, config):
                raise
            # without the error's text, which may show the row's values
            warnings.warn(f'a row contributes nothing, since its loss raised {type(error).__name__}', stacklevel=1)
            return self._unusable()

    def _works_on_plain_numbers(self, feats: Any, sample: Any, config: dict) -> bool:
        """Whether the parent finds losses where the row's outputs and labels are replaced by zeros, or by ones."""
        outputs, sample = self._outputs, copy.deepcopy(sample)
        try:
            for number in (0.0, 1.0):
                self._outputs = _each(outputs, lambda x, number=number: torch.full_like(x, number))
                for part in (sample.get('gt_instance_labels'), sample.get('gt_fields')):
                    for x in tensors_in(part):
                        x.fill_(number)
                try:
                    super().loss(feats, [sample], config)  # type: ignore[misc]
                    return True
                except Exception:
                    continue
            return False
        finally:
            self._outputs = outputs


def private_twin(head: type[nn.Module], name: str = '') -> type[nn.Module]:
    """Makes and registers the private twin of a head class, under 'Private' and its name; it takes the same arguments.

    For a head of your own::

        >>> private_twin(MyHead)  # then: model=dict(head=dict(type='PrivateMyHead'))
    """
    doc = f'Private twin of :class:`{head.__module__}.{head.__name__}`; takes the same arguments.'
    twin = type(name or f'Private{head.__name__}', (FeatureMaskingHead, head), dict(__doc__=doc, __module__=__name__))
    return MODELS.register_module(module=twin)


class _VisPredictHead(heads.VisPredictHead):
    """VisPredictHead with its two forwards made one, as the mixin needs it."""

    def forward(self, feats: Any) -> Any:
        """Poses and visibility."""
        return self.pose_head.forward(feats), super().vis_forward(feats)

    def vis_forward(self, feats: Any) -> Tensor:
        """The visibility half of ``forward``."""
        return self.forward(feats)[1]

    def loss(self, feats: Any, batch_data_samples: list, train_cfg: dict | None = None) -> dict:
        """The parent's loss, with what ``forward`` gave in the place of the pose head's own forward.

        Raises ValueError for a visibility that binary cross-entropy has no value for, which would end the process on a GPU.
        """
        labels = [sample.gt_instance_labels.keypoint_weights for sample in batch_data_samples]
        if getattr(self.loss_module, 'use_sigmoid', False) and not all(
            bool(((x >= 0) & (x <= 1)).all()) for x in labels
        ):
            raise ValueError('a visibility is outside 0 to 1')
        poses = self.forward(feats)[0]
        self.pose_head.forward = lambda _: poses
        try:
            return super().loss(feats, batch_data_samples, train_cfg)
        finally:
            del self.pose_head.forward


PrivateHeatmapHead = private_twin(heads.HeatmapHead)
PrivateCPMHead = private_twin(heads.CPMHead)
PrivateMSPNHead = private_twin(heads.MSPNHead)
PrivateViPNASHead = private_twin(heads.ViPNASHead)
PrivateSimCCHead = private_twin(heads.SimCCHead)
PrivateRTMCCHead = private_twin(heads.RTMCCHead)
PrivateRTMWHead = private_twin(heads.RTMWHead)
PrivateRegressionHead = private_twin(heads.RegressionHead)
PrivateRLEHead = private_twin(heads.RLEHead)
PrivateIntegralRegressionHead = private_twin(heads.IntegralRegressionHead)
PrivateDSNTHead = private_twin(heads.DSNTHead)
PrivateInternetHead = private_twin(heads.InternetHead)
PrivateVisPredictHead = private_twin(_VisPredictHead, 'PrivateVisPredictHead')
