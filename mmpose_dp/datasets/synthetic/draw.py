"""Draws people and places with OpenCV at twice the size, then halves it, which smooths every edge. Must not write files."""

from collections.abc import Callable
from functools import partial

import cv2
import numpy as np

from .appearance import Clothes, Colour, Domain, Subject, random_colour
from .body import INDEX

_SHIFT = 4  # fractional bits of OpenCV's coordinates


def _fixed(point: np.ndarray) -> tuple[int, int]:
    return int(round(float(point[0]) * 2**_SHIFT)), int(round(float(point[1]) * 2**_SHIFT))


def _darker(colour: Colour, factor: float) -> Colour:
    blue, green, red = colour
    return int(blue * factor), int(green * factor), int(red * factor)


def _limb(image: np.ndarray, a: np.ndarray, b: np.ndarray, wide: float, narrow: float, colour: Colour) -> None:
    """A tapered limb with a darker edge."""
    along = b - a
    length = float(np.linalg.norm(along))
    side = np.array([-along[1], along[0]]) / length if length > 1e-3 else np.array([1.0, 0.0])
    corners = np.stack([a + side * wide, b + side * narrow, b - side * narrow, a - side * wide])
    edge = _darker(colour, 0.8)
    for shade, grow in ((edge, 1.0), (colour, 0.82)):
        middle = corners.mean(0)
        polygon = ((corners - middle) * grow + middle) * 2**_SHIFT
        cv2.fillConvexPoly(image, polygon.round().astype(np.int32), shade, shift=_SHIFT)
        cv2.circle(image, _fixed(a), _fixed(np.array([wide * grow, 0]))[0], shade, -1, shift=_SHIFT)
        cv2.circle(image, _fixed(b), _fixed(np.array([narrow * grow, 0]))[0], shade, -1, shift=_SHIFT)


def _torso(image: np.ndarray, j: np.ndarray, size: float, clothes: Clothes) -> None:
    hips, shoulders = ((j[INDEX['r_hip']], j[INDEX['l_hip']]), (j[INDEX['l_shoulder']], j[INDEX['r_shoulder']]))
    grow = 0.035 * size * clothes.thickness
    points = np.stack([*hips, *shoulders])
    hull = cv2.convexHull(points.astype(np.float32))[:, 0]
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.fillConvexPoly(mask, hull.round().astype(np.int32), (255,))
    cv2.polylines(mask, [hull.round().astype(np.int32)], True, (255,), max(int(2 * grow), 1))
    x0, y0 = np.maximum(np.floor(hull.min(0) - 2 * grow), 0).astype(int)
    x1, y1 = np.ceil(hull.max(0) + 2 * grow).astype(int)
    if x1 <= x0 or y1 <= y0:
        return
    patch, inside = image[y0:y1, x0:x1], mask[y0:y1, x0:x1] > 0
    cloth = np.empty_like(patch)
    cloth[:] = clothes.shirt
    step = max(int(0.05 * size), 3)
    if clothes.pattern == 'stripes':
        cloth[np.arange(len(cloth)) // step % 2 == 0] = clothes.accent
    elif clothes.pattern == 'dots':
        yy, xx = np.mgrid[: patch.shape[0], : patch.shape[1]]
        cloth[(yy % (2 * step) < step) & (xx % (2 * step) < step)] = clothes.accent
    patch[inside] = cloth[inside]


def _head(image: np.ndarray, j: np.ndarray, size: float, subject: Subject, yaw: float) -> None:
    neck, top = j[INDEX['neck']], j[INDEX['head']]
    up = (top - neck) / max(float(np.linalg.norm(top - neck)), 1e-3)
    side = np.array([up[1], -up[0]]) * -1.0  # to the right of the picture for an upright head
    middle, tall = neck * 0.45 + top * 0.55, float(np.linalg.norm(top - neck)) * 0.5 + 0.012 * size
    wide, angle = tall * 0.78, float(np.degrees(np.arctan2(up[0], -up[1])))
    facing, turn = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))

    def ellipse(
        center: np.ndarray, axes: tuple[float, float], colour: Colour, start: float = 0, stop: float = 360
    ) -> None:
        across, along = (max(int(a * 2**_SHIFT), 1) for a in axes)
        cv2.ellipse(image, _fixed(center), (across, along), angle, start, stop, colour, -1, shift=_SHIFT)

    if subject.hair_length > 0.6:  # long hair falls behind the face
        ellipse(middle - up * tall * 0.35, (wide * 1.1, tall * 1.2), subject.hair)
    ellipse(middle, (wide, tall), subject.skin)
    if facing > 0.15:
        face = middle + side * wide * 0.45 * turn
        dark = _darker(subject.skin, 0.35)
        for sign in (-1, 1):
            eye = face + side * sign * wide * subject.eye_gap * facing + up * tall * 0.12
            ellipse(eye, (wide * 0.14, tall * 0.09), (245, 245, 245))
            ellipse(eye, (wide * 0.07, tall * 0.07), (30, 20, 20))
        if subject.beard:
            ellipse(face - up * tall * 0.55, (wide * 0.6, tall * 0.35), subject.hair)
        ellipse(face - up * tall * 0.42, (wide * subject.mouth * facing, tall * 0.07), (60, 50, 150))
        ellipse(face - up * tall * 0.12, (wide * 0.1, tall * 0.16), dark)
        ellipse(middle + up * tall * 0.12, (wide * 1.04, tall * 0.98), subject.hair, 190, 350)
    else:  # from behind: hair all over
        ellipse(middle + up * tall * 0.1, (wide * 1.02, tall * (0.85 + 0.2 * subject.hair_length)), subject.hair)


def draw_person(
    image: np.ndarray, joints: np.ndarray, size: float, subject: Subject, clothes: Clothes, yaw: float
) -> None:
    """Draws one person in place, the parts that are furthest from the camera first.

    Args:
        joints: (16, 3), x and y in pixels, z (any unit) towards the camera.
        size: standing height in pixels.
    """
    j, depth, w = joints[:, :2], joints[:, 2], size * clothes.thickness
    skin = subject.skin
    parts: list[tuple[float, Callable[[], None]]] = []  # how near to the camera, and what draws the part

    def limb(a: str, b: str, wide: float, narrow: float, colour: Colour) -> None:
        i, k = INDEX[a], INDEX[b]
        parts.append(((depth[i] + depth[k]) / 2, lambda: _limb(image, j[i], j[k], wide * w, narrow * w, colour)))

    for s in ('l', 'r'):
        limb(f'{s}_hip', f'{s}_knee', 0.05, 0.036, clothes.trousers)
        limb(f'{s}_knee', f'{s}_ankle', 0.034, 0.022, skin if clothes.shorts else clothes.trousers)
        limb(f'{s}_shoulder', f'{s}_elbow', 0.034, 0.025, clothes.shirt)
        limb(f'{s}_elbow', f'{s}_wrist', 0.023, 0.015, skin if clothes.short_sleeves else clothes.shirt)
        wrist, elbow = j[INDEX[f'{s}_wrist']], j[INDEX[f'{s}_elbow']]
        hand = wrist + (wrist - elbow) * 0.18
        parts.append((depth[INDEX[f'{s}_wrist']], partial(_limb, image, wrist, hand, 0.017 * w, 0.015 * w, skin)))
        ankle = j[INDEX[f'{s}_ankle']]
        toe = ankle + np.array([np.sin(np.radians(yaw)) * 0.08, 0.03]) * size
        parts.append(
            (depth[INDEX[f'{s}_ankle']], partial(_limb, image, ankle, toe, 0.022 * w, 0.018 * w, clothes.shoes))
        )
    parts.append((float(depth[[2, 3, 12, 13]].mean()), lambda: _torso(image, j, size, clothes)))
    i, k = INDEX['thorax'], INDEX['neck']
    parts.append((float(depth[k]) - 0.01, lambda: _limb(image, j[i], j[k], 0.028 * w, 0.026 * w, skin)))
    parts.append((float(depth[INDEX['head']]), lambda: _head(image, j, size, subject, yaw)))
    for _, draw_part in sorted(parts, key=lambda part: part[0]):
        draw_part()


def draw_place(rng: np.random.Generator, shape: tuple[int, int], domain: Domain) -> tuple[np.ndarray, list[Colour]]:
    """A textured, cluttered background, (H, W, 3) uint8, and its main colours."""
    height, width = shape
    colours = [random_colour(rng, domain) for _ in range(4)]
    ramp = np.linspace(0, 1, height)[:, None, None]
    image = ((1 - ramp) * colours[0] + ramp * np.asarray(colours[1])) * np.ones((1, width, 1))
    for cells in (6, 24):  # soft texture at two scales
        texture = rng.normal(0, 12, (cells, cells, 1)).repeat(3, 2)
        image = image + cv2.resize(texture, (width, height), interpolation=cv2.INTER_CUBIC)
    image = np.clip(image, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(*domain.clutter)):
        draw_thing(image, rng, random_colour(rng, domain) if rng.random() < 0.5 else colours[rng.integers(4)])
    return image, colours


def draw_thing(image: np.ndarray, rng: np.random.Generator, colour: Colour, center: np.ndarray | None = None) -> None:
    """Draws a box, disc or pole in place, at ``center`` or anywhere."""
    height, width = image.shape[:2]
    x, y = (rng.uniform(0, width), rng.uniform(0, height)) if center is None else center
    reach = rng.uniform(0.04, 0.16) * height
    kind = rng.integers(4)
    if kind == 0:
        box = cv2.boxPoints(((float(x), float(y)), (reach * rng.uniform(0.5, 2), reach), float(rng.uniform(0, 90))))
        cv2.fillConvexPoly(image, box.round().astype(np.int32), colour)
    elif kind == 1:
        cv2.circle(image, (int(x), int(y)), int(reach / 2), colour, -1, cv2.LINE_AA)
    else:  # poles look like limbs
        angle = rng.uniform(0, np.pi)
        end = np.array([x, y]) + reach * rng.uniform(1, 3) * np.array([np.cos(angle), np.sin(angle)])
        cv2.line(image, (int(x), int(y)), tuple(int(v) for v in end), colour, max(int(reach * 0.12), 2), cv2.LINE_AA)


def photograph(image: np.ndarray, rng: np.random.Generator, domain: Domain) -> np.ndarray:
    """Halves the size and adds light, colour cast, blur and noise."""
    image = cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_AREA)
    sigma = rng.uniform(0, domain.blur)
    if sigma > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    gain = rng.uniform(*domain.light) * (1 + rng.uniform(-domain.cast, domain.cast, 3))
    noise = rng.normal(0, domain.noise, image.shape).astype(np.float32)
    return np.clip(image * gain.astype(np.float32) + noise, 0, 255).astype(np.uint8)
