"""What is known of a data set from its annotations alone, before a picture is read or a step is paid for.

Refuses what cannot be trained on. Must not log: figures over private annotations go to the terminal only.
"""

import json
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from mmpose.datasets.datasets import MpiiDataset

from mmpose_dp.privacy.errors import PrivacyError

# joints further from the box's centre than this many longer sides of the box are in no crop, whatever the augmentation
_REACH = 1.5


class _Row(NamedTuple):
    """Where a row's joints are, (people, joints, 2), which are marked visible, (people, joints), and the boxes, (people, 4)."""

    joints: np.ndarray
    visible: np.ndarray
    boxes: np.ndarray | None


def refuse_unusable_file(path: str, cls: type, key: str) -> None:
    """Looks at a JSON annotation file before the data set is made of it; what cannot be parsed is left to the data set.

    Args:
        path: the annotation file.
        cls: the class of the data set.
        key: the config key of the data set, for messages.

    Raises:
        PrivacyError: an id that is missing, repeated or of a type that MMPose cannot use; no annotation has an image; a
            picture's name that MpiiDataset cannot turn into a number.
    """
    try:
        with open(path) as file:
            content = json.load(file)
    except (OSError, ValueError):
        return
    if isinstance(content, list) and issubclass(cls, MpiiDataset):
        _refuse_names_without_number(content, path, key)
    if isinstance(content, dict) and isinstance(content.get('annotations'), list):
        images, annotations = _dicts(content.get('images')), _dicts(content['annotations'])
        _refuse_ids(images, 'image', path, key)
        _refuse_ids(annotations, 'annotation', path, key)
        _refuse_lost_annotations(images, annotations, path, key)
        _tell_of_odd_boxes(images, annotations, path, key)


def _dicts(entries: Any) -> list[dict]:
    return [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []


def _refuse_names_without_number(entries: Sequence[Any], path: str, key: str) -> None:
    for name in (one['image'] for one in _dicts(entries) if isinstance(one.get('image'), str)):
        try:
            int(name.split('.')[0])
        except ValueError:
            raise PrivacyError(
                f'{key}: MpiiDataset takes the name of a picture as its number, and {name!r} in {path} is not a number. Rename '
                "the pictures to numbers (000001.jpg), or write the annotations in COCO's format and type='CocoDataset'"
            ) from None


def _refuse_ids(entries: Sequence[dict], what: str, path: str, key: str) -> None:
    seen = set()
    for entry in entries:
        found = entry.get('id')
        allowed = (Real,) if what == 'image' else (Real, str)  # MMPose computes with the ids of images
        if not isinstance(found, allowed):
            wanted = 'a whole number' if what == 'image' else 'a whole number or a text'
            raise PrivacyError(
                f'{key}: {path} has an {what} whose id is {found!r}. Give every {what} an id of its own, {wanted}'
                + (', and write it as image_id in its annotations' if what == 'image' else '')
            )
        if found in seen:
            effect = 'one annotation would stand in several rows' if what == 'annotation' else 'one image would be lost'
            raise PrivacyError(
                f'{key}: {path} has more than one {what} with the id {found!r}, and {effect}. Number the {what}s anew, from 1 '
                'over the whole file'
                + (', and write the new ids as image_id in the annotations' if what == 'image' else '')
            )
        seen.add(found)


def _refuse_lost_annotations(images: Sequence[dict], annotations: Sequence[dict], path: str, key: str) -> None:
    known = {image['id'] for image in images}
    lost = [
        ann for ann in annotations if not isinstance(ann.get('image_id'), (Real, str)) or ann['image_id'] not in known
    ]
    if annotations and len(lost) == len(annotations):
        raise PrivacyError(
            f'{key}: in {path} no annotation has the id of an image as its image_id (annotation {lost[0]["id"]!r} has '
            f'{lost[0].get("image_id")!r}): write image_id as the image has its id, numbers as numbers'
        )
    if lost:
        _tell(
            f'{key}: {len(lost)} of {len(annotations)} annotations in {path} name an image_id that no image has (annotation '
            f'{lost[0]["id"]!r} is one), and are not used'
        )


def _tell_of_odd_boxes(images: Sequence[dict], annotations: Sequence[dict], path: str, key: str) -> None:
    """Boxes written as two corners leave the picture when the corner is taken for a size."""
    sizes = {image['id']: (image.get('width'), image.get('height')) for image in images}
    pairs = [(ann.get('bbox'), sizes.get(ann.get('image_id'))) for ann in annotations]
    try:
        boxes = np.array([box for box, size in pairs if size is not None and box is not None], dtype=float).reshape(
            -1, 4
        )
        limits = np.array([size for box, size in pairs if size is not None and box is not None], dtype=float).reshape(
            -1, 2
        )
    except (TypeError, ValueError):
        return
    low, second = boxes[:, :2], boxes[:, 2:]
    leaves = (low + second > 1.02 * limits + 1).any(1)
    corners = (second > low).all(1) & (second <= limits + 1).all(1)
    if len(boxes) and leaves.mean() > 0.5 and corners.mean() > 0.98:
        _tell(
            f'{key}: {int(leaves.sum())} of {len(boxes)} boxes in {path} end outside their picture. bbox is [x, y, width, height] '
            "in COCO's format; are these [x1, y1, x2, y2]?"
        )


def look_at_annotations(dataset: BaseDataset, key: str) -> set[str]:
    """Looks at the annotations of all rows, and at no picture; returns the paths of the pictures.

    Every step would cost its budget, also where no row has a joint to learn from. One row without is no matter.

    Args:
        dataset: the private or the public data set.
        key: its config key, for messages.

    Raises:
        PrivacyError: no row has a joint that is visible and near its box, all joints are fractions of a picture, rows have
            different numbers of joints, or a row has no picture or several.
    """
    rows: list[_Row] = []
    paths = set()
    for number in range(len(dataset)):
        info = dataset.get_data_info(number)
        _refuse_other_than_a_picture(info, dataset, key)
        paths.add(info['img_path'])
        row = _row(info)
        if row is not None:
            rows.append(row)
            if row.joints.shape[1] != rows[0].joints.shape[1]:
                raise PrivacyError(
                    f'{key}: annotation {info.get("id", number)} has {row.joints.shape[1]} joints, and others have '
                    f'{rows[0].joints.shape[1]}: give every annotation the same joints, those that are not known with visibility 0'
                )
    if rows:  # else no data set of joints and boxes
        _refuse_useless_rows(rows, key)
    return paths


def _refuse_useless_rows(rows: Sequence[_Row], key: str) -> None:
    marked = [_marked(row) for row in rows]
    if all(not one.any() for one in marked):
        raise PrivacyError(
            f'{key}: none of the {len(rows)} annotations has a joint that is marked visible, so there would be nothing to learn: '
            "write a visibility above 0 for joints that are known (the third number of each in COCO's keypoints, MPII's joints_vis)"
        )
    largest = max(float(np.abs(row.joints[one]).max()) for row, one in zip(rows, marked) if one.any())
    if largest <= 1:
        raise PrivacyError(
            f'{key}: all joints are between 0 and 1, as fractions of a picture, so there would be nothing to learn: multiply '
            'them by the width and height of their picture'
        )
    usable = [(one & _near(row)).any() for row, one in zip(rows, marked)]
    if not any(usable):
        raise PrivacyError(
            f'{key}: none of the {len(rows)} annotations has a keypoint in or near its box, so there would be nothing to learn: '
            'give joints and boxes in pixels of the same picture, and a bbox as the format has it (COCO: [x, y, width, height])'
        )
    if sum(usable) < len(usable) / 2:
        _tell(
            f'{key}: only {sum(usable)} of {len(usable)} annotations have a keypoint that is visible and in or near its box; the '
            'others teach nothing, and are paid for'
        )


def _refuse_other_than_a_picture(info: dict, dataset: BaseDataset, key: str) -> None:
    path = info.get('img_path')
    if isinstance(path, str):
        return
    kind = type(dataset).__name__
    if isinstance(path, (list, tuple)):
        raise PrivacyError(
            f'{key}: {kind} gives several pictures a row (img_path is a list), and private training takes one: give a data set '
            'of single pictures'
        )
    raise PrivacyError(f'{key}: {kind} has rows without a picture (img_path is {path!r}): give a data set of pictures')


def _row(info: dict) -> _Row | None:
    """None where a row has no joints that can be looked at; what a pipeline makes of it then decides."""
    try:
        joints = np.asarray(info['keypoints'], dtype=float)
        visible = np.asarray(info['keypoints_visible'], dtype=float)
        joints = joints.reshape(-1, *joints.shape[-2:])[..., :2]
        visible = (visible[..., 0] if visible.ndim == 3 else visible).reshape(joints.shape[:2])
        boxes = None if info.get('bbox') is None else np.asarray(info['bbox'], dtype=float).reshape(-1, 4)
    except (KeyError, TypeError, ValueError):
        return None
    return _Row(joints, visible, boxes)


def _marked(row: _Row) -> np.ndarray:
    return (row.visible > 0) & np.isfinite(row.joints).all(-1)


def _near(row: _Row) -> np.ndarray:
    """(people, joints), whether a crop around the person can show the joint."""
    if row.boxes is None or len(row.boxes) != len(row.joints):
        return np.ones(row.visible.shape, dtype=bool)
    low, high = row.boxes[:, None, :2], row.boxes[:, None, 2:]
    sides = (high - low).max(-1)
    distance = np.abs(row.joints - (low + high) / 2).max(-1)
    return (distance <= _REACH * sides) & (sides > 0)


def _tell(message: str) -> None:
    """To the terminal: warnings can be switched off, and a log is kept and handed on."""
    if is_main_process():
        print(f'WARNING: {message}', file=sys.stderr)
