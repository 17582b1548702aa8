"""The look of synthetic people and places: identities, clothes, and the two domains.

``public`` and ``private`` differ as COCO and MPII do: other places, light, clothes, poses and cameras, but the same bodies. Must
not draw.
"""

from dataclasses import dataclass

import numpy as np

from .body import Build

Colour = tuple[int, int, int]
SKIN = [(190, 214, 245), (160, 190, 232), (125, 160, 208), (90, 125, 180), (60, 90, 140), (42, 62, 100)]
HAIR = [(25, 25, 28), (40, 60, 95), (60, 110, 170), (110, 175, 215), (150, 150, 155), (45, 65, 150)]


@dataclass(frozen=True)
class Domain:
    """How the pictures of one data set look.

    Attributes:
        energy: 0..1, how far people's poses are from standing still.
        saturation, value: (least, most) of clothes and places, 0..255.
        camouflage: probability that clothes have a colour of the background.
        pattern: probability of patterned clothes.
        short: probability of short sleeves, and of shorts.
        light: (least, most) gain of the whole picture.
        cast: largest gain of one colour channel over another.
        noise: standard deviation of the camera's noise.
        blur: largest sigma of the camera's blur, in pixels.
        thickness: (least, most) factor of limb widths.
        clutter: (least, most) number of objects in the background.
        occluder: probability of an object in front of a person.
        facing: standard deviation of the yaw, degrees.
    """

    energy: float
    saturation: tuple[int, int]
    value: tuple[int, int]
    camouflage: float
    pattern: float
    short: float
    light: tuple[float, float]
    cast: float
    noise: float
    blur: float
    thickness: tuple[float, float]
    clutter: tuple[int, int]
    occluder: float
    facing: float


DOMAINS = {
    'public': Domain(
        energy=0.35,
        saturation=(90, 220),
        value=(110, 250),
        camouflage=0.05,
        pattern=0.25,
        short=0.5,
        light=(0.85, 1.2),
        cast=0.05,
        noise=3,
        blur=0.4,
        thickness=(0.9, 1.15),
        clutter=(2, 8),
        occluder=0.15,
        facing=55,
    ),
    'private': Domain(
        energy=0.5,
        saturation=(10, 130),
        value=(30, 200),
        camouflage=0.25,
        pattern=0.6,
        short=0.35,
        light=(0.5, 1.0),
        cast=0.25,
        noise=8,
        blur=0.8,
        thickness=(0.75, 1.05),
        clutter=(6, 14),
        occluder=0.2,
        facing=55,
    ),
}


@dataclass(frozen=True)
class Subject:
    """An identity, which looks the same in every picture."""

    build: Build
    skin: Colour
    hair: Colour
    hair_length: float
    eye_gap: float
    mouth: float
    beard: bool

    @classmethod
    def random(cls, rng: np.random.Generator) -> 'Subject':
        """A random person."""
        return cls(
            Build.random(rng),
            _jitter(SKIN[rng.integers(len(SKIN))], rng),
            _jitter(HAIR[rng.integers(len(HAIR))], rng),
            float(rng.uniform(0, 1)),
            float(rng.uniform(0.3, 0.5)),
            float(rng.uniform(0.2, 0.5)),
            bool(rng.random() < 0.25),
        )


@dataclass(frozen=True)
class Clothes:
    """What a person wears in one picture; ``pattern`` is None, 'stripes' or 'dots'."""

    shirt: Colour
    trousers: Colour
    shoes: Colour
    accent: Colour
    pattern: str | None
    short_sleeves: bool
    shorts: bool
    thickness: float

    @classmethod
    def random(cls, rng: np.random.Generator, domain: Domain, places: list[Colour]) -> 'Clothes':
        """Random clothes of the domain; ``places`` are the colours of the background, for camouflage."""

        def cloth() -> Colour:
            if rng.random() < domain.camouflage:
                return _jitter(places[rng.integers(len(places))], rng)
            return random_colour(rng, domain)

        return cls(
            cloth(),
            cloth(),
            random_colour(rng, domain),
            random_colour(rng, domain),
            ['stripes', 'dots'][rng.integers(2)] if rng.random() < domain.pattern else None,
            bool(rng.random() < domain.short),
            bool(rng.random() < domain.short),
            float(rng.uniform(*domain.thickness)),
        )


def random_colour(rng: np.random.Generator, domain: Domain) -> Colour:
    """A BGR colour of the domain's palette."""
    import cv2

    hsv = np.array([[[rng.integers(180), rng.integers(*domain.saturation), rng.integers(*domain.value)]]], np.uint8)
    blue, green, red = (int(v) for v in cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0])
    return blue, green, red


def _jitter(colour: Colour, rng: np.random.Generator) -> Colour:
    blue, green, red = (int(np.clip(v + rng.normal(0, 8), 0, 255)) for v in colour)
    return blue, green, red
