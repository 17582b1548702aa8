"""What a public view is: the interface of ``PublicView`` and of a view of your own. Must not know any particular view."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform

from mmpose_dp.privacy.errors import ConfigError

KEY = 'train_dataloader.dataset.public_view'


class View(BaseTransform):
    """A transform that replaces a picture with what may be published of it. Derive from it and register it in TRANSFORMS.

    Feature DP protects what ``transform`` removes and nothing else. So the result must be a function of the picture and its
    annotation, without anything random and without other records' data; it must be rounded (to 8 bits), since even a strong
    filter can be inverted if its result is exact; and a region must not stay visible because an annotation is missing.
    PublicPrivateDataset puts the view right after GetBBoxCenterScale and refuses one that is random.

    ``transform(results)`` gets the dict of MMPose's pipelines and returns it with another ``img`` of the same shape and type:

    * ``img``: (H, W, 3) uint8, the whole picture; ``bbox_center`` and ``bbox_scale``: (1, 2), the person's padded box in pixels;
      ``keypoints``: (1, K, 2) and ``keypoints_visible``: (1, K); whatever else the data set has loaded;
    * ``people``: the other annotated people of the picture, each a dict with ``bbox``, ``keypoints``, ``keypoints_visible`` and
      ``padded_box``: (4,), the corners of the square around them that ``bbox_center`` and ``bbox_scale`` span for a record. A view
      that hides a part of each person must hide theirs too: another record's view shows the same picture. Some are no records:
      crowds, and people without joints. They are there unless ``follows_box`` is set;
    * ``view_box``: the longer side of the largest padded box of the records in the picture. A view whose strength follows the
      box takes this one, so that all of them have one view: several would together hold more.

    Attributes:
        follows_box: whether the view's strength follows ``view_box``. The privacy statement says so.
    """

    follows_box = False

    @property
    @abstractmethod
    def description(self) -> str:
        """What the view keeps of a picture, with its settings, for the privacy statement. A resume and a second training in the
        same work dir are refused if it changed."""

    def check_joints(self, names: Mapping[int, str]) -> None:  # noqa: B027 (a view that needs no joints has nothing to check)
        """Raises ConfigError if the view needs joints that the data set lacks; ``names`` are the data set's joints by number."""


def check_view(view: Any) -> None:
    """Raises ConfigError for a transform that does not say what it keeps, as ``View.description`` does."""
    described = getattr(view, 'description', None)
    if not isinstance(described, str) or not described.strip():
        raise ConfigError(
            f'{KEY}.type={type(view).__name__} does not say what it keeps, and the privacy statement must: give it a property '
            'description that returns a text, or derive it from mmpose_dp.datasets.View'
        )


def changed_before(steps: Sequence[Callable], info: dict, follows_box: bool) -> str:
    """The first of a person's box, joints and visibility that the steps before a view change; empty if they leave all as it is.

    A view gets the other people of the picture, and their box sizes, as they are annotated. So the person's own box and joints
    must be as annotated too: with other joints under the numbers that it knows, a view would hide another part.

    Args:
        steps: the transforms before GetBBoxCenterScale.
        info: the input of the pipeline.
        follows_box: whether the view reads boxes alone, and no joints.
    """
    given: Any = copy.deepcopy(info)
    try:
        for step in steps:
            given = step(given)
    except Exception:  # this record contributes nothing, see PublicPrivateDataset
        return ''
    if not isinstance(given, dict):
        return ''
    names = ('bbox',) if follows_box else ('bbox', 'keypoints', 'keypoints_visible')
    return next((name for name in names if name in info and not _same(info[name], given.get(name))), '')


def _same(one: Any, other: Any) -> bool:
    return np.shape(one) == np.shape(other) and np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)
