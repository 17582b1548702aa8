"""Checks of an annotation file, and what in it a data set could not read or does not use: MMPose says neither.

Must not log: figures over private annotations go to the terminal only.
"""

import codecs
import json
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
from mmpose.datasets.datasets import MpiiDataset

from mmpose_dp.messages import warn_in_terminal
from mmpose_dp.privacy.errors import DataError


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
    content = content_of(path)
    if isinstance(content, list) and issubclass(cls, MpiiDataset):
        _refuse_names_without_number(content, path, key)
    if isinstance(content, dict) and isinstance(content.get('annotations'), list):
        images, annotations = dicts_in(content.get('images')), dicts_in(content['annotations'])
        _refuse_ids(images, 'image', path, key)
        _refuse_ids(annotations, 'annotation', path, key)
        _refuse_lost_annotations(images, annotations, path, key)
        _warn_of_odd_boxes(images, annotations, path, key)


def faults_in_words(path: str, error: BaseException) -> str:
    """What of a COCO-style file a data set probably could not read: an image or annotation by its id, and a key; else empty.

    MMPose's own ``error`` names neither. No value is named.
    """
    content = content_of(path)
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return _coding(path)
    for part in ('images', 'annotations', 'categories'):
        given = content.get(part, []) if isinstance(content, dict) else []
        if not isinstance(given, list):
            return f'{part} is no list'
        for number, one in enumerate(given):
            if not isinstance(one, dict):
                return f'{part}[{number}] is no object'
    for number, one in enumerate(list_in(content, 'categories')):
        if 'id' not in one:
            return f'categories[{number}] has no id'
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
    return _missing_key(images, annotations, error)


def _coding(path: str) -> str:
    """Why a file cannot be read as JSON."""
    with open(path, 'rb') as file:
        begin = file.read(3)
    if begin.startswith(codecs.BOM_UTF8):
        return 'the file begins with a byte order mark: save it as UTF-8 without one'
    if begin[:2] in (b'\x1f\x8b', b'PK', b'BZ'):
        return 'the file is compressed: unpack it'
    return 'the file is not JSON in UTF-8'


def missing_key_in_words(path: str, error: BaseException) -> str:
    """The annotation of a COCO-style file that has not the key of a KeyError, in words; empty if all have it, or images do."""
    return _missing_key(*_entries_of(content_of(path)), error)


def _missing_key(images: list[dict], annotations: list[dict], error: BaseException) -> str:
    lost = error.args[0] if isinstance(error, KeyError) and error.args else None
    lacking = [one for one in annotations if lost not in one]
    if isinstance(lost, str) and lacking and not any(lost in one for one in images):
        return f'annotation {lacking[0].get("id")!r} has no {lost}'
    return ''


def unused_in_words(path: str) -> str:
    """Why MMPose leaves out each annotation of a COCO-style file, with how many it is; empty for another file."""
    images, annotations = _entries_of(content_of(path))
    if images and not annotations:
        return 'the file has no annotations'
    sizes = {image.get('id'): (image.get('width'), image.get('height')) for image in images}
    reasons = {
        'without keypoints': lambda one: not isinstance(one.get('keypoints'), list) or not any(one['keypoints']),
        'with num_keypoints=0': lambda one: one.get('num_keypoints') == 0,
        'with iscrowd=1': lambda one: bool(one.get('iscrowd')) and not isinstance(one['iscrowd'], str),
        'with an iscrowd that is text, which counts as 1': lambda one: isinstance(one.get('iscrowd'), str),
        'without bbox': lambda one: not one.get('bbox'),
        'with a box whose width or height is 0 or less': lambda one: (
            _is_numbers(one.get('bbox'), 4) and min(one['bbox'][2:]) <= 0
        ),
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


def declared_sizes(path: str) -> dict[str, tuple[int, int]]:
    """The height and width that a COCO-style file gives each picture, by its ``file_name``."""
    sizes: dict[Any, tuple[Any, Any]] = {
        one.get('file_name'): (one.get('height'), one.get('width')) for one in _entries_of(content_of(path))[0]
    }
    whole = {name: size for name, size in sizes.items() if isinstance(name, str) and all(map(_is_whole, size))}
    return {name: (int(height), int(width)) for name, (height, width) in whole.items()}


def content_of(path: str) -> Any:
    """What a JSON file holds; None if it cannot be read."""
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def list_in(content: Any, name: str) -> list:
    """A list of a COCO-style file; an empty one where there is none."""
    found = content.get(name) if isinstance(content, dict) else None
    return found if isinstance(found, list) else []


def _entries_of(content: Any) -> tuple[list[dict], list[dict]]:
    """The images and annotations in what a COCO-style file holds; none of something else."""
    return dicts_in(list_in(content, 'images')), dicts_in(list_in(content, 'annotations'))


def dicts_in(entries: Any) -> list[dict]:
    """The objects in a list of a JSON file; none in something else."""
    return [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []


def _refuse_names_without_number(entries: Sequence[Any], path: str, key: str) -> None:
    for name in (one['image'] for one in dicts_in(entries) if isinstance(one.get('image'), str)):
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
    if annotations and not images:
        raise DataError(
            f'{key}: {path} has no list of images, to which annotations belong: write images=[...], each with id, file_name, width '
            'and height'
        )
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
