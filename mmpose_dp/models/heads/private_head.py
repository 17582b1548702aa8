"""Feature-masking heads: MMPose's top-down heads with one loss per sample.

To support another head: one of your own needs nothing, if its ``loss`` calls ``self.forward(feats)``. One of MMPose's goes into
``KNOWN`` below, and into ``HEADS`` of tests/models/heads/test_private_head.py, which shows whether its loss works sample by
sample. One whose ``loss`` calls something else needs a mixin that makes it one forward, as ``_OneForward`` does.

``make_private`` swaps the class of a head that is built, so configs name MMPose's own head. A private head is its own class
with one change, in ``loss``: the parent's loss is taken sample by sample. So every loss is one number per sample, exactly as on
a batch of that sample alone, and a mask says which samples are private records and which are public views; one forward serves
them all. Parameters, state-dict keys and predictions are the parent's. Must not report anything computed from a private sample
except those losses.
"""

import copy
import warnings
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from mmpose.models import heads
from mmpose.registry import MODELS
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.records import PADDING, Samples
from mmpose_dp.tensors import at_least_float32

_UNUSABLE = 'loss_unusable'  # of a sample whose loss cannot be found, or is not wanted


def _of_sample(outputs: Any, index: int) -> Any:
    """Sample ``index`` of every (samples, ...) tensor in nested containers, as a batch of one, in float32 at least: in mixed
    precision too, losses are no place for 8 bits, and NumPy has no bfloat16."""
    return tree_map_only(Tensor, lambda x: at_least_float32(x[index : index + 1]), outputs)


def _finite_samples(outputs: Any) -> list[bool]:
    """Of each sample, whether all (samples, ...) tensors in nested containers are finite there; one wait for a GPU."""
    finite = [x.detach().reshape(len(x), -1).isfinite().all(1) for x in tensors_in(outputs)]
    return torch.stack(finite).all(0).tolist()


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and data elements."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if hasattr(value, 'values') else value if isinstance(value, (tuple, list)) else ()
    return [x for part in parts for x in tensors_in(part)]


def labels_in(sample: Any) -> list[Tensor]:
    """Every tensor that a data sample has as a label or a target."""
    return [x for name in ('gt_instance_labels', 'gt_fields') for x in tensors_in(sample.get(name))]


class SampleLosses(NamedTuple):
    """What one training forward of a private head gives to the optimizer wrapper.

    Attributes:
        samples: what each sample of the batch is.
        losses: the total loss of each sample, a scalar with a separate graph down to the outputs.
        accuracies: (samples,) by name; empty unless ``compute_acc`` is set.
    """

    samples: Samples
    losses: list[Tensor]
    accuracies: dict[str, Tensor]


class FeatureMaskingHead:
    """Mixin for MMPose heads whose ``loss`` calls ``self.forward(feats)`` and compares the result with the data samples.

    The forward runs once on all samples; the parent's loss then runs once per sample and is given that sample's outputs. That is
    right for losses that sum over the batch, average over it or normalise over it, for intermediate supervision and for several
    losses, and needs no flag that says which.

    Attributes:
        compute_acc: whether to keep each sample's accuracies too; off, since nobody may see them (expose_private_metrics).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._no_batch_yet()

    def _no_batch_yet(self) -> None:
        self.compute_acc = False
        self._last: SampleLosses | None = None
        self._outputs: Any = None
        self._asked = False  # whether the loss of the current sample has called forward

    def take(self) -> SampleLosses:
        """The losses of the last ``loss``, which the head then forgets. Raises PrivacyError where there was none."""
        last, self._last = self._last, None
        if last is None:
            raise PrivacyError('update_params was called without a training forward of the private head before it')
        return last

    def forward(self, feats: Any) -> Any:
        """The parent's forward; inside ``loss``, its output for the current sample."""
        self._asked = True
        return super().forward(feats) if self._outputs is None else self._outputs  # type: ignore[misc]

    def called_per_sample(self) -> list[nn.Module]:
        """The loss modules: they see one sample at a time, so what they learn (RLE's flow) needs one backward per sample."""
        named = self.named_modules()  # type: ignore[attr-defined]
        return [module for name, module in named if 'loss' in name.rpartition('.')[2]]

    def loss(self, feats: Any, batch_data_samples: list, train_cfg: dict | None = None) -> dict:
        """The parent's losses, each of shape (samples,); accuracies are left out.

        A data sample whose metainfo holds ``dp_record=None`` is public; samples of equal ``dp_record`` are one record; without
        the field every sample is a separate record. Samples whose ``dp_record`` is PADDING get the loss 0. ``dp_weight`` is
        Samples.weights'.
        """
        outputs, config = self.forward(feats), dict(train_cfg or {}, compute_acc=self.compute_acc)
        each = []
        try:
            # looked at before the loss: on a GPU a loss that asserts ends the process, and no exception can be caught
            for index, (sample, finite) in enumerate(zip(batch_data_samples, _finite_samples(outputs))):
                self._outputs = _of_sample(outputs, index)
                if sample.metainfo.get('dp_record') == PADDING:
                    each.append({_UNUSABLE: 0.0 * tensors_in(self._outputs)[0].sum()})
                else:
                    each.append(self._loss_of_sample(feats, sample, config) if finite else self._unusable())
        finally:
            self._outputs = None
        names = next((one for one in each if _UNUSABLE not in one), each[0])
        each = [dict.fromkeys(names, one[_UNUSABLE]) if _UNUSABLE in one else one for one in each]
        table = {name: torch.stack([one[name].reshape(()) for one in each]) for name in names}
        losses = {name: values for name, values in table.items() if 'loss' in name}
        accuracies = {name: values for name, values in table.items() if name not in losses}
        keys = [sample.metainfo.get('dp_record', -1 - i) for i, sample in enumerate(batch_data_samples)]
        weights = [sample.metainfo.get('dp_weight', 1.0) for sample in batch_data_samples]
        samples = Samples.from_keys(keys, () if set(weights) == {1.0} else weights)
        parts = [[one[name].reshape(()) for name in losses] for one in each]
        totals = [found[0] if len(found) == 1 else torch.stack(found).sum() for found in parts]
        self._last = SampleLosses(samples, totals, accuracies)
        return losses

    def _unusable(self) -> dict:
        """The loss of a sample that contributes nothing: its gradient is not finite."""
        return {_UNUSABLE: torch.nan * tensors_in(self._outputs)[0].sum()}

    def _loss_of_sample(self, feats: Any, sample: Any, config: dict) -> dict:
        """The parent's losses of one sample; NaN where the values of that sample are what the parent raises for.

        Nothing that a private sample holds may end a training. What is wrong with the form of outputs or labels, which all
        samples have in common, is raised. A loss that never calls ``forward`` is computed from the features of all samples: the
        sample contributes nothing, unless the loss is a constant (the dry run before training refuses such a head).
        """
        self._asked = False
        try:
            losses = super().loss(feats, [sample], config)  # type: ignore[misc]
            return losses if self._asked or not any(x.requires_grad for x in tensors_in(losses)) else self._unusable()
        except Exception as error:
            if not self._works_on_plain_numbers(feats, sample, config):
                raise
            # without the error's text, which may show the sample's values
            warnings.warn(f'a sample contributes nothing, since its loss raised {type(error).__name__}', stacklevel=1)
            return self._unusable()

    def _works_on_plain_numbers(self, feats: Any, sample: Any, config: dict) -> bool:
        """Whether the parent finds losses where the sample's outputs and labels are replaced by zeros, or by ones."""
        outputs, sample = self._outputs, copy.deepcopy(sample)
        try:
            for number in (0.0, 1.0):
                self._outputs = tree_map_only(Tensor, partial(torch.full_like, fill_value=number), outputs)
                for x in labels_in(sample):
                    x.fill_(number)
                try:
                    super().loss(feats, [sample], config)  # type: ignore[misc]
                    return True
                except Exception:
                    continue
            return False
        finally:
            self._outputs = outputs


class _OneForward:
    """Mixed into VisPredictHead: its two forwards made one, as FeatureMaskingHead needs it."""

    pose_head: Any
    loss_module: Any

    def forward(self, feats: Any) -> Any:
        """Poses and visibility."""
        return self.pose_head.forward(feats), super().vis_forward(feats)  # type: ignore[misc]

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
        self._asked = False  # that was not the parent's loss asking

        def given(_: Any) -> Any:
            self._asked = True
            return poses

        self.pose_head.forward = given
        try:
            return super().loss(feats, batch_data_samples, train_cfg)  # type: ignore[misc]
        finally:
            del self.pose_head.forward


# MMPose's top-down heads: ``loss`` compares what ``forward`` gives with the data samples
KNOWN = (
    heads.HeatmapHead,
    heads.CPMHead,
    heads.MSPNHead,
    heads.ViPNASHead,
    heads.SimCCHead,
    heads.RTMCCHead,
    heads.RTMWHead,
    heads.RegressionHead,
    heads.RLEHead,
    heads.IntegralRegressionHead,
    heads.DSNTHead,
    heads.InternetHead,
    heads.VisPredictHead,
)


def check_head(head: Any) -> None:
    """Raises PrivacyError for a head class that cannot have one loss per sample: not MMPose's top-down heads, nor one like them."""
    name = getattr(head, '__name__', head)
    methods = isinstance(head, type) and all(hasattr(head, key) for key in ('loss', 'forward'))
    if not methods or head.forward is nn.Module.forward:
        raise PrivacyError(
            f'model.head is {name}, which has no per-record losses: write a top-down head, whose '
            'loss(feats, batch_data_samples, train_cfg) calls self.forward(feats)'
        )
    parents = [
        cls for cls in head.__mro__ if cls.__module__.startswith('mmpose.models.heads.') and cls is not heads.BaseHead
    ]
    if parents and parents[0] not in KNOWN:
        known = ', '.join(sorted(cls.__name__ for cls in KNOWN))
        raise PrivacyError(
            f"model.head is {name}, which has no per-record losses: write one of MMPose's top-down heads ({known}) or one of "
            'your own'
        )


def make_private(head: Any) -> FeatureMaskingHead:
    """Gives a head one loss per sample, by changing its class in place; a head that has them already stays as it is.

    The head is one of MMPose's top-down heads, of a class derived from one, or any module whose ``loss(feats,
    batch_data_samples, train_cfg)`` calls ``self.forward(feats)``. Its parameters, keys and predictions stay the same.
    Raises PrivacyError for any other.
    """
    if isinstance(head, FeatureMaskingHead):
        return head
    kind: Any = type(head)
    check_head(kind)
    head.__class__ = _swapped(kind)
    head._no_batch_yet()
    return head


def _parents(head: type[nn.Module]) -> tuple[type, ...]:
    """What a private class of a head derives from."""
    one = (_OneForward,) if issubclass(head, heads.VisPredictHead) else ()
    return (FeatureMaskingHead, *one, head)


@cache
def _swapped(head: Any) -> Any:
    """The class that ``make_private`` gives to a head of class ``head``."""
    rebuilt = dict(__reduce__=lambda self: (_blank, (head,), self.__dict__))  # pickle finds no class that has no module
    return type(f'Private{head.__name__}', _parents(head), dict(rebuilt, __module__=__name__, __doc__=head.__doc__))


def _blank(head: Any) -> Any:
    """An empty private head, for pickle and deepcopy to fill."""
    cls = _swapped(head)
    return cls.__new__(cls)


def private_twin(head: type[nn.Module]) -> type[nn.Module]:
    """Makes and registers an alias of a head class, 'Private' and its name, for configs that name one; make_private needs none."""
    doc = f'Private twin of :class:`{head.__module__}.{head.__name__}`; takes the same arguments.'
    twin = type(f'Private{head.__name__}', _parents(head), dict(__doc__=doc, __module__=__name__))
    return MODELS.register_module(module=twin)


# the names that configs had before the class was swapped
for _head in KNOWN:
    globals()[f'Private{_head.__name__}'] = private_twin(_head)
