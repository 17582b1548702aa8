"""Makes a data set in MPII's layout from LSP, LSP-extended or COCO: one picture per person, cut out and reduced.

Joints that a source does not annotate have visibility 0. Must not put near copies of one picture into both splits, and must not
leave an incomplete set that looks complete.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.io import loadmat
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from mmpose_dp.datasets.mpii_files import JOINTS, estimated_head_boxes, write_mpii_split
from mmpose_dp.privacy.errors import ConfigError

LSP = (0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 8, 9)  # MPII's number of each joint of LSP
COCO = {5: 13, 6: 12, 7: 14, 8: 11, 9: 15, 10: 10, 11: 3, 12: 2, 13: 4, 14: 1, 15: 5, 16: 0}  # of those that MPII has
_MARGIN = 0.06  # of the joints' extent, on each side
_CONTEXT = 0.7  # half the side of a crop, in units of the person's size
_COPIES = 6  # pictures whose hashes differ in at most so many of 64 bits are near copies


@dataclass(frozen=True)
class Person:
    """One annotated person of a source.

    Attributes:
        picture: the file.
        joints: (16, 2) in pixels, counted from 0, in MPII's order.
        seen: (16,) whether each is annotated.
        box: x, y, width and height in pixels.
        key: what the source calls the picture; kept in the annotation.
    """

    picture: Path
    joints: np.ndarray
    seen: np.ndarray
    box: np.ndarray
    key: str


def lsp_people(source: Path, least_joints: int = 8) -> Iterator[Person]:
    """The people of LSP or LSP-extended, whose folder ``source`` has joints.mat and images/.

    Raises ConfigError if either is missing, or joints.mat has another form.
    """
    if not (source / 'joints.mat').exists() or not (source / 'images').is_dir():
        raise ConfigError(
            f'{source} has no joints.mat beside a folder images: give the folder that LSP was unpacked to'
        )
    joints = loadmat(source / 'joints.mat').get('joints', np.zeros(0))  # (14, 3, n) in LSP-extended, (3, 14, n) in LSP
    if joints.ndim != 3 or sorted(joints.shape[:2]) != [3, len(LSP)]:
        raise ConfigError(
            f"{source}/joints.mat: 'joints' has shape {joints.shape}, not (14, 3, people) or (3, 14, people)"
        )
    extended = joints.shape[0] == len(LSP)
    joints = joints if extended else joints.transpose(1, 0, 2)
    for number, person in enumerate(np.moveaxis(joints, 2, 0), 1):
        key = f'im{number:05d}' if extended else f'im{number:04d}'
        points, seen = np.zeros((len(JOINTS), 2)), np.zeros(len(JOINTS), bool)
        points[list(LSP)] = person[:, :2] - 1
        # LSP's third number is 1 for a joint that is hidden, LSP-extended's is 0 for one that is not annotated
        seen[list(LSP)] = person[:, 2] > 0 if extended else True
        yield from _if_usable(source / f'images/{key}.jpg', points, seen, None, key, least_joints)


def coco_people(annotations: Path, pictures: Path, least_joints: int = 6) -> Iterator[Person]:
    """The people of a COCO keypoint file, one by one, without crowds.

    Raises ConfigError if the file has no person keypoints.
    """
    content = json.loads(annotations.read_text())
    if not all(key in content for key in ('images', 'annotations')) or 'keypoints' not in str(
        content['annotations'][:1]
    ):
        raise ConfigError(f'{annotations} has no keypoints: give a file such as person_keypoints_val2017.json')
    names = {image['id']: image['file_name'] for image in content['images']}
    for person in sorted(content['annotations'], key=lambda p: p['image_id']):
        if person.get('iscrowd') or not person.get('num_keypoints'):
            continue
        found = np.array(person['keypoints'], float).reshape(-1, 3)
        points, seen = np.zeros((len(JOINTS), 2)), np.zeros(len(JOINTS), bool)
        for theirs, ours in COCO.items():
            points[ours], seen[ours] = found[theirs, :2], found[theirs, 2] > 0
        name = names[person['image_id']]
        yield from _if_usable(pictures / name, points, seen, np.array(person['bbox'], float), name, least_joints)


def _if_usable(
    picture: Path, joints: np.ndarray, seen: np.ndarray, box: np.ndarray | None, key: str, least: int
) -> Iterator[Person]:
    if seen.sum() < max(least, 1):
        return
    if box is None:
        low, high = joints[seen].min(0), joints[seen].max(0)
        margin = _MARGIN * max(high - low)
        box = np.concatenate([low - margin, high - low + 2 * margin])
    if box[2:].max() >= 32:  # smaller ones show no limbs
        yield Person(picture, joints, seen, box, key)


def write_people(
    people: list[Person], out: Path, longest_side: int = 112, val_share: float = 0.2, seed: int = 0, force: bool = False
) -> tuple[int, int]:
    """Writes a data set and returns how many people are in train and val.

    Args:
        people: in any order.
        out: the folder; images/ and annotations/ as in data/mpii.
        longest_side: people who are larger are reduced to it, in pixels; none is enlarged.
        val_share: of the people, in whole groups of near copies.
        seed: decides the groups.
        force: overwrites a data set in ``out``.

    Raises ConfigError for settings out of range, if ``out`` holds a data set, if a picture cannot be read, and if there are
    fewer than two groups of near copies.
    """
    if longest_side < 32 or not 0 < val_share < 1:
        raise ConfigError('--longest-side must be at least 32, and --val-share between 0 and 1')
    if len(people) < 2:
        raise ConfigError(
            f'the source has {len(people)} people with enough annotated joints, and at least two are needed'
        )
    if not force and (out / 'annotations/mpii_train.json').exists():
        raise ConfigError(f'--out {out} already holds a data set: choose another folder, or add --force')
    for folder in ('images', 'annotations'):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for old in (out / 'annotations').glob('mpii_*'):
        old.unlink()
    written = [_write_person(person, out, number, longest_side) for number, person in enumerate(people, 1)]
    validation = _validation([p.key for p in people], [hashed for _, hashed in written], val_share, seed)
    splits: dict[str, list[dict[str, Any]]] = {'train': [], 'val': []}
    for (annotation, _), held_out in zip(written, validation):
        splits['val' if held_out else 'train'].append(annotation)
    for split, found in splits.items():
        write_mpii_split(out, split, found, estimated_head_boxes(found))
    return len(splits['train']), len(splits['val'])


def _write_person(person: Person, out: Path, number: int, longest_side: int) -> tuple[dict[str, Any], np.ndarray]:
    """Writes the person's crop; returns the annotation and the crop's hash."""
    picture = cv2.imread(str(person.picture))
    if picture is None:
        raise ConfigError(f'{person.picture} is missing or no picture')
    size, middle = float(person.box[2:].max()), person.box[:2] + person.box[2:] / 2
    low = np.maximum(np.floor(middle - _CONTEXT * size), 0).astype(int)
    high = np.minimum(np.ceil(middle + _CONTEXT * size), picture.shape[1::-1]).astype(int)
    if (high <= low).any():
        raise ConfigError(f'{person.picture}: a person is annotated outside of the picture')
    crop = picture[low[1] : high[1], low[0] : high[0]]
    factor = min(1.0, longest_side / size)
    if factor < 1:
        shape = [max(round(side * factor), 1) for side in crop.shape[1::-1]]
        crop = cv2.resize(crop, shape, interpolation=cv2.INTER_AREA)
    scales = np.array(crop.shape[1::-1]) / (high - low)
    joints = np.where(person.seen[:, None], (person.joints - low + 0.5) * scales + 0.5, -1.0)  # counted from 1
    name = f'{number:06d}.jpg'
    cv2.imwrite(str(out / 'images' / name), crop, [cv2.IMWRITE_JPEG_QUALITY, 90])
    scale = size * factor / 200
    x, y = (middle - low) * scales + 1
    annotation = dict(
        image=name,
        center=[round(float(x), 2), round(float(y - 15 * scale), 2)],  # MpiiDataset moves every centre down by as much
        scale=round(scale, 5),
        joints=joints.round(2).tolist(),
        joints_vis=person.seen.astype(int).tolist(),
        source=person.key,
    )
    grey = cv2.resize(cv2.cvtColor(crop, cv2.COLOR_BGR2GRAY), (9, 8), interpolation=cv2.INTER_AREA).astype(int)
    return annotation, (grey[:, 1:] > grey[:, :-1]).ravel()


def _validation(keys: list[str], hashes: list[np.ndarray], share: float, seed: int) -> np.ndarray:
    """Whether each person is in the validation split: whole groups of one picture and its near copies, in random order."""
    groups = _groups(keys, np.array(hashes))
    order = np.random.default_rng(seed).permutation(groups.max() + 1)
    sizes = np.bincount(groups, minlength=len(order))
    most = max(round(share * len(keys)), 1)
    chosen, count = set(), 0
    for group in order:
        if count + sizes[group] <= most:
            chosen.add(int(group))
            count += int(sizes[group])
    if not chosen or len(chosen) == len(order):
        raise ConfigError(
            f'{len(keys)} people in {len(order)} groups of near copies cannot be divided: change --val-share, or add pictures'
        )
    return np.array([group in chosen for group in groups])


def _groups(keys: list[str], hashes: np.ndarray) -> np.ndarray:
    """A group's number for each person; people in one picture, or in pictures that look alike, have the same."""
    _, same = np.unique(keys, return_inverse=True)
    signs = np.where(hashes, 1.0, -1.0).astype(np.float32)
    pairs = [np.stack([np.arange(len(keys)), len(keys) + same])]
    for start in range(0, len(keys), 1024):
        alike = signs[start : start + 1024] @ signs.T >= signs.shape[1] - 2 * _COPIES
        found = np.nonzero(alike)
        pairs.append(np.stack([found[0] + start, found[1]]))
    rows, columns = np.concatenate(pairs, axis=1)
    size = len(keys) + int(same.max()) + 1
    graph = csr_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(size, size))
    labels = connected_components(graph, directed=False)[1][: len(keys)]
    return np.unique(labels, return_inverse=True)[1]
