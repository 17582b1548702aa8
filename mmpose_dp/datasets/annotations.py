"""Checks of the annotations of a data set's samples, before any picture is read and before any privacy is spent.

Refuses what cannot be trained on. Must not log: figures over private annotations go to the terminal only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from mmengine.dataset import BaseDataset
from mmpose.datasets.transforms import KeypointConverter

from mmpose_dp.messages import warn_in_terminal
from mmpose_dp.privacy.errors import DataError

from .annotation_file import dicts_in, list_in

# in longer sides of the box: no crop shows a joint that is further from the box's centre, whatever the augmentation
_REACH = 1.5


class _Sample(NamedTuple):
    """A sample's joints (people, joints, 2), their visibility (people, joints), and its boxes (people, 4)."""

    joints: np.ndarray
    visible: np.ndarray
    boxes: np.ndarray | None


def look_at_annotations(dataset: BaseDataset, key: str) -> set[str]:
    """Checks the annotations of all samples without reading a picture, and returns the paths of the pictures.

    A step costs its budget even if no sample has a joint to learn from. A single sample without joints is accepted.

    Args:
        dataset: the private or the public data set.
        key: its config key, for messages.

    Raises:
        DataError: if samples have another number of joints than the data set's metainfo or than each other, if no sample has a
            joint that is visible and near its box, if all joints are fractions of a picture, if a box is not finite, or if a sample
            has no picture or several.
    """
    samples: list[_Sample] = []
    paths = set()
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        _refuse_other_than_a_picture(info, dataset, key)
        paths.add(info['img_path'])
        sample = _sample(info)
        if sample is not None:
            samples.append(sample)
            if sample.boxes is not None and not np.isfinite(sample.boxes).all():
                raise DataError(
                    f'{key}: annotation {info.get("id", index)} has a box with NaN or infinity, so it would teach nothing, and no '
                    'public view could hide the person: write its box, or take the annotation out'
                )
            if sample.joints.shape[1] != samples[0].joints.shape[1]:
                raise DataError(
                    f'{key}: annotation {info.get("id", index)} has {sample.joints.shape[1]} joints and others have '
                    f'{samples[0].joints.shape[1]}: give every annotation the same joints, with visibility 0 for unknown ones'
                )
    if samples:  # empty if the data set has no joints and boxes
        _refuse_other_joints(samples[0].joints.shape[1], dataset, key)
        _check_flips(dataset.metainfo, key)
        _warn_of_order(dataset, key)
        _warn_of_joints_without_place(samples, key)
        _refuse_useless_samples(samples, key)
    return paths


def _refuse_other_joints(joints: int, dataset: BaseDataset, key: str) -> None:
    """Refuses annotations of other joints than the metainfo names: flips would exchange the wrong ones, or fail."""
    named = dataset.metainfo.get('num_keypoints')
    if type(named) is int and named != joints and not _converts_joints(dataset):
        raise DataError(
            f'{key}: the annotations have {joints} joints and the metainfo of {type(dataset).__name__} names {named}: give the '
            f'data set a metainfo of these joints, as MMPose\'s docs say under "Customize Datasets"'
        )


def _check_flips(metainfo: dict, key: str) -> None:
    """Refuses joints that are not numbered as in the annotations, and warns of flips that move a joint without its counterpart.

    MMPose takes both as they are: a flip then exchanges the wrong joints, or fails. One of its own data sets does the latter.
    """
    names, flips = metainfo.get('keypoint_id2name'), metainfo.get('flip_indices')
    if not isinstance(names, dict) or not isinstance(flips, (list, tuple)) or len(flips) != len(names):
        return
    if any(isinstance(number, str) for number in names):
        raise DataError(
            f'{key}: keypoint_info of the metainfo has the keys {", ".join(map(repr, [*names][:2]))}, ..., which are text and must '
            'be numbers. JSON has no others: write the metainfo in a Python file, and metainfo=dict(from_file=...) with its path'
        )
    if [*names] != [*range(len(names))]:
        raise DataError(
            f'{key}: keypoint_info of the metainfo has the keys {", ".join(map(str, [*names][:4]))}, ..., so that a flip would '
            f'exchange the wrong joints: write the joints in the order of the annotations, with the keys 0 to {len(names) - 1}'
        )
    alone = [number for number, other in enumerate(flips) if flips[other] != number]
    if alone:
        first = alone[0]
        warn_in_terminal(
            f'{key}: in the metainfo, {names[first]} has swap={names[flips[first]]!r}, which has not swap={names[first]!r}, so '
            f'flipped samples teach wrong joints ({len(alone)} of {len(names)}): write each pair at both of its joints'
        )


def _warn_of_order(dataset: BaseDataset, key: str) -> None:
    """Warns if the file's own category names joints at other places than the metainfo, which MMPose never compares."""
    places = dataset.metainfo.get('keypoint_name2id') or {}
    categories = [] if _converts_joints(dataset) else dicts_in(dataset.metainfo.get('CLASSES'))
    for category in categories:
        for number, name in enumerate(list_in(category, 'keypoints')):
            if isinstance(name, str) and places.get(name, number) != number:
                warn_in_terminal(
                    f'{key}: {name} is joint {number} in the categories of {dataset.ann_file}, and joint {places[name]} in the '
                    'metainfo, whose order counts: if the annotations have the order of their file, every name is wrong, and a '
                    'flip exchanges the wrong joints. Write keypoint_info in the order of the file'
                )
                return


def _converts_joints(dataset: BaseDataset) -> bool:
    """Whether the pipeline makes other joints of the annotations' (KeypointConverter), or may: a transform of other code."""
    own = 'mmpose.', 'mmcv.', 'mmpose_dp.'
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    return any(isinstance(step, KeypointConverter) or not type(step).__module__.startswith(own) for step in steps)


def _warn_of_joints_without_place(samples: Sequence[_Sample], key: str) -> None:
    """Heatmaps leave such joints out. A head that gives coordinates multiplies them by the weight 0, which is NaN too."""
    lost = sum(not np.isfinite(sample.joints).all() for sample in samples)
    if lost:
        warn_in_terminal(
            f'{key}: {lost} of {len(samples)} annotations have a joint whose place is NaN, null or infinite. Heatmaps leave the '
            'joint out; a head that gives coordinates (RegressionHead, RLEHead, integral regression) learns nothing from the whole '
            'annotation. Write 0, 0, 0 for joints that are not known'
        )


def _refuse_useless_samples(samples: Sequence[_Sample], key: str) -> None:
    if any((sample.visible < 0).any() for sample in samples):
        raise DataError(
            f'{key}: an annotation has a visibility below 0, which is the weight of the joint in the loss: it would teach the '
            'model to be wrong there. Write 0 for joints that are not known'
        )
    if any((sample.visible > 1).any() for sample in samples):
        warn_in_terminal(
            f'{key}: an annotation has a visibility above 1, which is the weight of the joint in the loss: a joint with 2 weighs '
            'twice. Write 1 for joints that are known'
        )
    marked = [_marked(sample) for sample in samples]
    if all(not one.any() for one in marked):
        raise DataError(
            f'{key}: none of the {len(samples)} annotations has a joint that is marked visible, so there would be nothing to '
            "learn: write a visibility above 0 for known joints (the third number of each in COCO's keypoints, MPII's joints_vis)"
        )
    largest = max(float(np.abs(sample.joints[one]).max()) for sample, one in zip(samples, marked) if one.any())
    if largest <= 1:
        raise DataError(
            f'{key}: all joints are between 0 and 1, as fractions of a picture, so there would be nothing to learn: multiply '
            'them by the width and height of their picture'
        )
    usable = [(one & _near(sample)).any() for sample, one in zip(samples, marked)]
    if not any(usable):
        raise DataError(
            f'{key}: none of the {len(samples)} annotations has a keypoint in or near its box, so there would be nothing to learn: '
            'give joints and boxes in pixels of the same picture, and bbox as its format has it (COCO: [x, y, width, height])'
        )
    if sum(usable) < len(usable) / 2:
        warn_in_terminal(
            f'{key}: only {sum(usable)} of {len(usable)} annotations have a visible keypoint in or near their box; the others '
            'teach nothing but cost as much privacy'
        )


def _refuse_other_than_a_picture(info: dict, dataset: BaseDataset, key: str) -> None:
    path = info.get('img_path')
    if isinstance(path, str):
        return
    kind = type(dataset).__name__
    if isinstance(path, (list, tuple)):
        raise DataError(
            f'{key}: {kind} gives several pictures per sample (img_path is a list) and private training takes one: use a data set '
            'of single pictures'
        )
    raise DataError(f'{key}: {kind} has samples without a picture (img_path is {path!r}): use a data set of pictures')


def _sample(info: dict) -> _Sample | None:
    """None if a sample has no joints that can be read; whether it can be used is then left to the pipeline."""
    try:
        joints = np.asarray(info['keypoints'], dtype=float)
        visible = np.asarray(info['keypoints_visible'], dtype=float)
        joints = joints.reshape(-1, *joints.shape[-2:])[..., :2]
        visible = (visible[..., 0] if visible.ndim == 3 else visible).reshape(joints.shape[:2])
        boxes = None if info.get('bbox') is None else np.asarray(info['bbox'], dtype=float).reshape(-1, 4)
    except (KeyError, TypeError, ValueError):
        return None
    return _Sample(joints, visible, boxes)


def _marked(sample: _Sample) -> np.ndarray:
    """(people, joints), whether the joint is marked visible."""
    return (sample.visible > 0) & np.isfinite(sample.joints).all(-1)


def _near(sample: _Sample) -> np.ndarray:
    """(people, joints), whether a crop around the person can show the joint."""
    if sample.boxes is None or len(sample.boxes) != len(sample.joints):
        return np.ones(sample.visible.shape, dtype=bool)
    low, high = sample.boxes[:, None, :2], sample.boxes[:, None, 2:]
    sides = (high - low).max(-1)
    distance = np.abs(sample.joints - (low + high) / 2).max(-1)
    return (distance <= _REACH * sides) & (sides > 0)
