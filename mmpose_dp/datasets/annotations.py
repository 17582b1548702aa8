"""Checks of a data set's annotations, before any picture is read and before any privacy is spent.

Refuses what cannot be trained on. Must not log: figures over private annotations go to the terminal only.
"""

import json
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from mmengine.dataset import BaseDataset
from mmpose.datasets.datasets import MpiiDataset
from mmpose.datasets.transforms import KeypointConverter

from mmpose_dp.messages import warn_in_terminal
from mmpose_dp.privacy.errors import DataError

# in longer sides of the box: no crop shows a joint that is further from the box's centre, whatever the augmentation
_REACH = 1.5


class _Sample(NamedTuple):
    """A sample's joints (people, joints, 2), their visibility (people, joints), and its boxes (people, 4)."""

    joints: np.ndarray
    visible: np.ndarray
    boxes: np.ndarray | None


def refuse_unusable_file(path: str, cls: type, key: str) -> None:
    """Checks a JSON annotation file before the data set is built from it. What cannot be parsed is left to the data set.

    Args:
        path: the annotation file.
        cls: the class of the data set.
        key: the config key of the data set, for messages.

    Raises:
        DataError: if an id is missing, is repeated or has a type that MMPose cannot use, if no annotation has an image, or
            if MpiiDataset cannot turn a picture's name into a number.
    """
    content = _content(path)
    if isinstance(content, list) and issubclass(cls, MpiiDataset):
        _refuse_names_without_number(content, path, key)
    if isinstance(content, dict) and isinstance(content.get('annotations'), list):
        images, annotations = _dicts(content.get('images')), _dicts(content['annotations'])
        _refuse_ids(images, 'image', path, key)
        _refuse_ids(annotations, 'annotation', path, key)
        _refuse_lost_annotations(images, annotations, path, key)
        _warn_of_odd_boxes(images, annotations, path, key)


def faults_in_words(path: str, error: BaseException) -> str:
    """What of a COCO-style file a data set probably could not read: an image or annotation by its id, and a key; else empty.

    MMPose's own ``error`` names neither. No value is named.
    """
    content = _content(path)
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return 'the file is not JSON in UTF-8'
    for part in ('images', 'annotations'):
        for number, one in enumerate(_listed(content, part)):
            if not isinstance(one, dict):
                return f'{part}[{number}] is no object'
    images, annotations = _entries_of(content)
    for image in images:
        for name, kind, what in (('file_name', str, 'text'), ('width', Real, 'number'), ('height', Real, 'number')):
            if image.get(name) is None:
                return f'image {image.get("id")!r} has no {name}'
            if not isinstance(image[name], kind):
                return f'image {image.get("id")!r} has a {name} that is no {what}'
    for annotation in annotations:
        for name, fits, what in _ANNOTATION_KEYS:
            if not fits(annotation.get(name)):
                return f'annotation {annotation.get("id")!r} has {what}'
    lost = error.args[0] if isinstance(error, KeyError) and error.args else None
    lacking = [one for one in annotations if lost not in one]
    if isinstance(lost, str) and lacking and not any(lost in one for one in images):
        return f'annotation {lacking[0].get("id")!r} has no {lost}'
    return ''


def unused_in_words(path: str) -> str:
    """Why MMPose leaves out each annotation of a COCO-style file, with how many it is; empty for another file."""
    images, annotations = _entries_of(_content(path))
    if images and not annotations:
        return 'the file has no annotations'
    sizes = {image.get('id'): (image.get('width'), image.get('height')) for image in images}
    reasons = {
        'without keypoints': lambda one: not isinstance(one.get('keypoints'), list) or not any(one['keypoints']),
        'with num_keypoints=0': lambda one: one.get('num_keypoints') == 0,
        'with iscrowd=1': lambda one: bool(one.get('iscrowd')) and not isinstance(one['iscrowd'], str),
        'with an iscrowd that is text, which counts as 1': lambda one: isinstance(one.get('iscrowd'), str),
        'without bbox': lambda one: not one.get('bbox'),
        'with a box outside of its picture': lambda one: _is_outside(one.get('bbox'), sizes.get(one.get('image_id'))),
    }
    counts = {words: sum(map(applies, annotations)) for words, applies in reasons.items()}
    unused = ', '.join(f'{count} {words}' for words, count in counts.items() if count)
    return f'MMPose leaves out annotations: {unused}' if unused else ''


def _is_outside(box: Any, size: Any) -> bool:
    """Whether a COCO box of a size has none inside a picture of ``size``, width and height."""
    if not _is_numbers(box, 4) or not size or not all(isinstance(x, Real) for x in size):
        return False
    return any(
        low + length <= 0 or low >= limit - 1 for low, length, limit in zip(box[:2], box[2:], size) if length > 0
    )


def _is_numbers(value: Any, count: int = 0) -> bool:
    """Whether a value is a flat list of numbers; ``count``: of so many."""
    return (
        isinstance(value, list)
        and all(isinstance(x, Real) for x in value)
        and len(value) in (count, count or len(value))
    )


_ANNOTATION_KEYS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ('category_id', lambda x: x is not None, 'no category_id'),
    ('bbox', lambda x: _is_numbers(x, 4), 'no list of four numbers as its bbox'),
    (
        'keypoints',
        lambda x: _is_numbers(x) and len(x) % 3 == 0,
        'no flat list of numbers, three per joint, as its keypoints',
    ),
)


def _content(path: str) -> Any:
    """What a JSON file holds; None if it cannot be read."""
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _listed(content: Any, name: str) -> list:
    """A list of a COCO-style file; an empty one where there is none."""
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, list) else []


def _entries_of(content: Any) -> tuple[list[dict], list[dict]]:
    """The images and annotations in what a COCO-style file holds; none of something else."""
    return _dicts(_listed(content, 'images')), _dicts(_listed(content, 'annotations'))


def _dicts(entries: Any) -> list[dict]:
    return [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []


def _refuse_names_without_number(entries: Sequence[Any], path: str, key: str) -> None:
    for name in (one['image'] for one in _dicts(entries) if isinstance(one.get('image'), str)):
        try:
            int(name.split('.')[0])
        except ValueError:
            raise DataError(
                f'{key}: MpiiDataset reads the name of a picture as its number, but {name!r} in {path} is not a number. Rename '
                "the pictures to numbers (000001.jpg), or write the annotations in COCO's format and type='CocoDataset'"
            ) from None


def _refuse_ids(entries: Sequence[dict], what: str, path: str, key: str) -> None:
    seen = set()
    for entry in entries:
        found = entry.get('id')
        # MMPose computes with the ids of images, and leaves out those with a fraction
        allowed = _is_whole(found) if what == 'image' else isinstance(found, (Real, str))
        if not allowed:
            wanted = 'a whole number' if what == 'image' else 'a whole number or a string'
            raise DataError(
                f'{key}: {path} has an {what} whose id is {found!r}. Give every {what} a different id, {wanted}'
                + (', and write it as image_id in its annotations' if what == 'image' else '')
            )
        if found in seen:
            effect = 'one annotation would be in several samples' if what == 'annotation' else 'one image would be lost'
            raise DataError(
                f'{key}: {path} has more than one {what} with the id {found!r}, so {effect}. Renumber the {what}s, from 1 '
                'over the whole file'
                + (', and write the new ids as image_id in the annotations' if what == 'image' else '')
            )
        seen.add(found)


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and (isinstance(value, int) or isinstance(value, float) and value.is_integer())


def _refuse_lost_annotations(images: Sequence[dict], annotations: Sequence[dict], path: str, key: str) -> None:
    known = {image['id'] for image in images}
    lost = [
        ann for ann in annotations if not isinstance(ann.get('image_id'), (Real, str)) or ann['image_id'] not in known
    ]
    if annotations and len(lost) == len(annotations):
        raise DataError(
            f'{key}: in {path} no annotation has the id of an image as its image_id (annotation {lost[0]["id"]!r} has '
            f'{lost[0].get("image_id")!r}): write each image_id exactly as the id of its image, and numbers without quotes'
        )
    if lost:
        warn_in_terminal(
            f'{key}: {len(lost)} of {len(annotations)} annotations in {path} have an image_id that no image has, for example '
            f'annotation {lost[0]["id"]!r}. They are not used'
        )


def _warn_of_odd_boxes(images: Sequence[dict], annotations: Sequence[dict], path: str, key: str) -> None:
    """Warns of boxes that seem to be two corners: read as width and height, the second corner leaves the picture."""
    sizes = {image['id']: (image.get('width'), image.get('height')) for image in images}
    pairs = [(ann.get('bbox'), sizes.get(ann.get('image_id'))) for ann in annotations]
    try:
        boxes = np.array([box for box, size in pairs if size is not None and box is not None], dtype=float)
        limits = np.array([size for box, size in pairs if size is not None and box is not None], dtype=float)
    except (TypeError, ValueError):
        return
    if boxes.shape != (len(boxes), 4) or limits.shape != (len(boxes), 2):
        return  # boxes of other than four numbers, which the data set names
    low, second = boxes[:, :2], boxes[:, 2:]
    leaves = (low + second > 1.02 * limits + 1).any(1)
    corners = (second > low).all(1) & (second <= limits + 1).all(1)
    if len(boxes) and leaves.mean() > 0.5 and corners.mean() > 0.98:
        warn_in_terminal(
            f'{key}: {int(leaves.sum())} of {len(boxes)} boxes in {path} end outside their picture. bbox is [x, y, width, height] '
            "in COCO's format; are these [x1, y1, x2, y2]?"
        )


def look_at_annotations(dataset: BaseDataset, key: str) -> set[str]:
    """Checks the annotations of all samples without reading a picture, and returns the paths of the pictures.

    A step costs its budget even if no sample has a joint to learn from. A single sample without joints is accepted.

    Args:
        dataset: the private or the public data set.
        key: its config key, for messages.

    Raises:
        DataError: if samples have another number of joints than the data set's metainfo or than each other, if no sample has a
            joint that is visible and near its box, if all joints are fractions of a picture, or if a sample has no picture or
            several.
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
            if sample.joints.shape[1] != samples[0].joints.shape[1]:
                raise DataError(
                    f'{key}: annotation {info.get("id", index)} has {sample.joints.shape[1]} joints and others have '
                    f'{samples[0].joints.shape[1]}: give every annotation the same joints, with visibility 0 for unknown ones'
                )
    if samples:  # empty if the data set has no joints and boxes
        _refuse_other_joints(samples[0].joints.shape[1], dataset, key)
        _check_flips(dataset.metainfo, key)
        _warn_of_order(dataset, key)
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
    categories = [] if _converts_joints(dataset) else _dicts(dataset.metainfo.get('CLASSES'))
    for category in categories:
        for number, name in enumerate(_listed(category, 'keypoints')):
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


def _refuse_useless_samples(samples: Sequence[_Sample], key: str) -> None:
    if any((sample.visible < 0).any() for sample in samples):
        raise DataError(
            f'{key}: an annotation has a visibility below 0, which is the weight of the joint in the loss: it would teach the '
            'model to be wrong there. Write 0 for joints that are not known'
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
