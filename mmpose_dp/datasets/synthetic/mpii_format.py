"""Writes synthetic people as an MPII data set that MMPose's MpiiDataset and MpiiPCKAccuracy read unchanged.

Coordinates in the files are MATLAB's, counted from 1. Must write the same files for any number of workers, and must not leave an
incomplete set that looks complete.
"""

import json
import multiprocessing
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import track

from mmpose_dp.datasets.mpii_files import write_mpii_split
from mmpose_dp.privacy.errors import ConfigError

from .appearance import DOMAINS, Clothes, Subject
from .body import INDEX, pose_joints, random_angles
from .draw import draw_person, draw_place, draw_thing, photograph

VERSION = 2  # of the pictures: raise it if they change
_CROWD = 0.25  # share of images with several people
_SPLITS = {'train': 0, 'val': 1}


def make_synthetic_mpii(
    out: str | Path,
    domain: str = 'private',
    num_train: int = 6000,
    num_val: int = 1000,
    seed: int = 0,
    image_size: int = 192,
    workers: int = 2,
    force: bool = False,
) -> Path:
    """Generates a data set of exactly ``num_train`` and ``num_val`` synthetic people.

    Args:
        out: the folder, in which images/ and annotations/ are arranged as MMPose's docs say of MPII.
        domain: 'public' or 'private'.
        seed: decides everything.
        image_size: height of the pictures in pixels; widths vary.
        workers: number of processes.
        force: overwrites another data set in ``out``.

    If an identical set exists, it is kept. Raises ConfigError for settings out of range and if ``out`` holds anything else, so
    that a real data set is not overwritten by accident.
    """
    if domain not in DOMAINS:
        raise ConfigError(f'--domain {domain} is unknown; write one of {tuple(DOMAINS)}')
    if num_train < 1 or num_val < 1 or image_size < 64 or workers < 1:
        raise ConfigError('--train, --val and --workers must be at least 1, --image-size at least 64')
    out = Path(out)
    settings = dict(
        version=VERSION, domain=domain, num_train=num_train, num_val=num_val, seed=seed, image_size=image_size
    )
    record = out / 'synthetic.json'
    if record.exists() and json.loads(record.read_text()) == settings:
        return out
    if not force and (out / 'annotations').exists():
        raise ConfigError(f'--out {out} already holds another data set: choose another folder, or add --force')
    for folder in ('images', 'annotations'):
        (out / folder).mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    for split, count in (('train', num_train), ('val', num_val)):
        jobs = _share_people(count, np.random.default_rng([seed, list(DOMAINS).index(domain), _SPLITS[split]]))
        draw_one = partial(_draw_image, out=out, domain=domain, split=split, seed=seed, height=image_size)
        with multiprocessing.Pool(workers) as pool:
            images = track(
                pool.imap(draw_one, jobs, chunksize=32), f'{split} pictures', len(jobs), console=Console(stderr=True)
            )
            people = [person for image in images for person in image]
        heads = [person.pop('headbox') for person in people]
        write_mpii_split(out, split, people, heads)
    record.write_text(json.dumps(settings))  # last: a set without it is incomplete
    return out


def _share_people(count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(image number, people in it) so that there are ``count`` people."""
    jobs: list[tuple[int, int]] = []
    while count:
        people = min(count, 1 if rng.random() > _CROWD else int(rng.integers(2, 4)))
        jobs.append((len(jobs), people))
        count -= people
    return jobs


def _subject(number: int, domain: str, seed: int) -> Subject:
    return Subject.random(np.random.default_rng([seed, list(DOMAINS).index(domain), 2, number]))


def _draw_image(
    job: tuple[int, int], out: Path, domain: str, split: str, seed: int, height: int
) -> list[dict[str, Any]]:
    number, count = job
    cv2.setNumThreads(0)
    rng = np.random.default_rng([seed, list(DOMAINS).index(domain), _SPLITS[split], 1000 + number])
    style = DOMAINS[domain]
    width = int(height * rng.uniform(0.9, 1.4)) + (height // 3) * (count - 1)
    canvas, places = draw_place(rng, (2 * height, 2 * width), style)
    name = f'{number + 1 + 500_000 * _SPLITS[split]:09d}.jpg'
    people = []
    columns = (rng.permutation(count) + 0.5) / count
    for column in columns:
        identity = int(rng.integers(500) + 500 * _SPLITS[split])  # nobody is in both splits
        subject, clothes = _subject(identity, domain, seed), Clothes.random(rng, style, places)
        yaw = float(np.clip(rng.normal(0, style.facing), -180, 180))
        joints = pose_joints(subject.build, random_angles(rng, style.energy), yaw, float(rng.uniform(-5, 20)))
        size = 2 * height * rng.uniform(0.55, 0.85) * (0.9 if count > 1 else 1.0)
        pixels = _place(joints, size, np.array([column * 2 * width, height]), rng)
        draw_person(canvas, pixels, size, subject, clothes, yaw)
        if rng.random() < style.occluder:
            draw_thing(canvas, rng, places[rng.integers(len(places))], pixels[rng.integers(16), :2])
        people.append(_annotation(name, identity, pixels[:, :2] / 2, subject.build.head * size / 2, (height, width)))
    cv2.imwrite(str(out / 'images' / name), photograph(canvas, rng, style), [cv2.IMWRITE_JPEG_QUALITY, 92])
    return people


def _place(joints: np.ndarray, size: float, center: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(16, 3) joints in body heights -> pixels, the body's middle near ``center``."""
    pixels = joints * size
    middle = (pixels[:, :2].min(0) + pixels[:, :2].max(0)) / 2
    pixels[:, :2] += center + rng.normal(0, 0.03, 2) * size - middle
    return pixels


def _annotation(name: str, identity: int, joints: np.ndarray, head: float, shape: tuple[int, int]) -> dict[str, Any]:
    inside = ((joints >= 0) & (joints <= np.array(shape[::-1]) - 1)).all(1)
    low, high = joints.min(0), joints.max(0)
    center, extent = (low + high) / 2, float((high - low).max()) + head  # hands, feet and hair reach beyond the joints
    scale = extent / 200.0
    center[1] -= 15 * scale  # MpiiDataset moves every centre down by the same amount
    middle = joints[INDEX['neck']] * 0.45 + joints[INDEX['head']] * 0.55
    box = np.stack([middle - 0.6 * head, middle + 0.6 * head]) + 1
    return dict(
        image=name,
        center=[round(float(v) + 1, 3) for v in center],
        scale=round(scale, 6),
        joints=[
            [round(float(v) + 1, 3) for v in joint] if seen else [-1.0, -1.0] for joint, seen in zip(joints, inside)
        ],
        joints_vis=[int(seen) for seen in inside],
        subject=identity,
        headbox=box,
    )
