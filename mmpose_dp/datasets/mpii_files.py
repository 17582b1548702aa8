"""Writes annotations in the MPII format, as MMPose's MpiiDataset and MpiiPCKAccuracy read them.

Coordinates in the files are MATLAB's, counted from 1. Must not read or write pictures.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import savemat

# MPII's order of joints
JOINTS = (
    'r_ankle r_knee r_hip l_hip l_knee l_ankle pelvis thorax neck head r_wrist r_elbow r_shoulder l_shoulder l_elbow l_wrist'
).split()
# medians of Leeds Sports Pose Extended: the head, of shoulders to hips and of the person
HEAD_PER_TORSO, HEAD_PER_SIZE = 0.5, 0.15
BIAS = 0.6  # MPII's head size is this part of the head box's diagonal


def write_mpii_split(out: Path, split: str, people: list[dict[str, Any]], boxes: Sequence[np.ndarray] = ()) -> None:
    """Writes annotations/mpii_<split>.json, and for 'val' the ground truth that MPII's evaluation reads.

    Args:
        out: the data set's folder, which has a folder ``annotations``.
        people: dicts with ``image``, ``center``, ``scale``, ``joints`` (16, 2) and ``joints_vis`` (16), of plain numbers.
        boxes: for 'val', the head box of each person: (2, 2), its upper left and lower right corner.
    """
    (out / f'annotations/mpii_{split}.json').write_text(json.dumps(people))
    if split == 'val':
        truth = dict(
            dataset_joints=np.array([JOINTS], dtype=object),
            headboxes_src=np.stack(boxes, axis=2),
            jnt_missing=1.0 - np.array([p['joints_vis'] for p in people]).T,
            pos_gt_src=np.stack([np.array(p['joints']) for p in people], axis=2),
        )
        savemat(out / 'annotations/mpii_gt_val.mat', truth)


def estimated_head_boxes(people: list[dict[str, Any]]) -> list[np.ndarray]:
    """A head box (2, 2) of each person, where the source has none; PCKh by it is PCKh by an *estimated* head size.

    The size is the distance from neck to head top if both are visible, else a part of the distance from shoulders to hips, else a
    part of the person's size; at least a twentieth of the person's size.
    """
    boxes = []
    for person in people:
        joints, seen = np.array(person['joints'], float), np.array(person['joints_vis'], bool)
        head = joints[JOINTS.index('head')]
        side = _head_size(joints, seen, 200.0 * person['scale']) / BIAS / np.sqrt(2)
        boxes.append(np.stack([head, head + side]))
    return boxes


def _head_size(joints: np.ndarray, seen: np.ndarray, size: float) -> float:
    def middle(*names: str) -> np.ndarray | None:
        found = [joints[i] for i in map(JOINTS.index, names) if seen[i]]
        return np.mean(found, axis=0) if found else None

    neck, head = middle('neck'), middle('head')
    shoulders, hips = middle('l_shoulder', 'r_shoulder'), middle('l_hip', 'r_hip')
    estimate = HEAD_PER_SIZE * size
    if neck is not None and head is not None:
        estimate = float(np.linalg.norm(neck - head))
    elif shoulders is not None and hips is not None:
        estimate = HEAD_PER_TORSO * float(np.linalg.norm(shoulders - hips))
    return max(estimate, 0.05 * size)
