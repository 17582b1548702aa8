"""A body as a kinematic chain: bone lengths, joint limits, and the 16 MPII joints of a random pose.

Pure geometry; must not draw.
"""

from dataclasses import dataclass

import numpy as np

from mmpose_dp.datasets.mpii_files import JOINTS

INDEX = {name: i for i, name in enumerate(JOINTS)}

# degrees; (least, most) of each joint angle at full range of motion
LIMITS = {
    'lean': (-30, 50),
    'tilt': (-25, 25),
    'head_pitch': (-25, 35),
    'head_roll': (-25, 25),
    'arm_raise': (-40, 170),  # shoulder, forwards from hanging
    'arm_spread': (-10, 120),  # shoulder, sideways
    'elbow': (0, 145),
    'elbow_turn': (-70, 110),  # towards the body's middle
    'thigh_raise': (-25, 110),
    'thigh_spread': (-5, 45),
    'knee': (0, 135),
}


@dataclass(frozen=True)
class Build:
    """Bone lengths in units of the standing height."""

    torso: float = 0.30
    neck: float = 0.045
    head: float = 0.135
    shoulder: float = 0.115  # half width
    hip: float = 0.065
    upper_arm: float = 0.17
    forearm: float = 0.15
    thigh: float = 0.24
    shin: float = 0.23

    @classmethod
    def random(cls, rng: np.random.Generator) -> 'Build':
        """Random proportions, which vary by up to about 10 percent."""
        return cls(*(float(v * rng.uniform(0.9, 1.1)) for v in cls().__dict__.values()))


def random_angles(rng: np.random.Generator, energy: float) -> dict[str, float]:
    """Random joint angles in degrees. ``energy`` 0 is standing still, 1 uses the whole range of motion."""

    def angle(name: str) -> float:
        low, high = LIMITS[name]
        rest = float(np.clip(0, low, high))
        reach = rng.beta(1.0, 2.2) if rng.random() > 0.35 * energy else rng.random()
        end = high if rng.random() < high / (high - low) else low
        return rest + (end - rest) * reach * min(1.0, 0.35 + energy)

    angles = {name: angle(name) for name in ('lean', 'tilt', 'head_pitch', 'head_roll')}
    for side in ('r', 'l'):
        for name in ('arm_raise', 'arm_spread', 'elbow', 'elbow_turn', 'thigh_raise', 'thigh_spread', 'knee'):
            angles[f'{side}_{name}'] = angle(name)
    if rng.random() < 0.15 + 0.25 * energy:  # sitting or squatting: both legs together
        for name in ('thigh_raise', 'knee'):
            angles[f'l_{name}'] = angles[f'r_{name}'] = float(rng.uniform(0.4, 0.9) * LIMITS[name][1])
    return angles


def _rotation(axis: str, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = {'x': (1, 2), 'y': (2, 0), 'z': (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def pose_joints(build: Build, angles: dict[str, float], yaw: float, pitch: float) -> np.ndarray:
    """(16, 3) joint positions: x to the right of the picture, y down, z towards the camera; unit: standing height.

    The body's own axes are x to its left, y up, z forwards; ``yaw`` 0 faces the camera.
    """
    p: dict[str, np.ndarray] = {'pelvis': np.zeros(3)}
    trunk = _rotation('x', angles['lean']) @ _rotation('z', angles['tilt'])
    p['thorax'] = trunk @ [0, build.torso, 0]
    p['neck'] = p['thorax'] + trunk @ [0, build.neck, 0]
    skull = trunk @ _rotation('x', angles['head_pitch']) @ _rotation('z', angles['head_roll'])
    p['head'] = p['neck'] + skull @ [0, build.head, 0]
    for side, sign in (('l', 1), ('r', -1)):
        p[f'{side}_shoulder'] = p['thorax'] + trunk @ [sign * build.shoulder, -0.015, 0]
        p[f'{side}_hip'] = trunk @ [sign * build.hip, 0, 0] * np.array([1, 0.3, 1])
        arm = trunk @ _rotation('z', sign * angles[f'{side}_arm_spread']) @ _rotation('x', -angles[f'{side}_arm_raise'])
        p[f'{side}_elbow'] = p[f'{side}_shoulder'] + arm @ [0, -build.upper_arm, 0]
        fore = arm @ _rotation('y', -sign * angles[f'{side}_elbow_turn']) @ _rotation('x', -angles[f'{side}_elbow'])
        p[f'{side}_wrist'] = p[f'{side}_elbow'] + fore @ [0, -build.forearm, 0]
        leg = _rotation('z', sign * angles[f'{side}_thigh_spread']) @ _rotation('x', -angles[f'{side}_thigh_raise'])
        p[f'{side}_knee'] = p[f'{side}_hip'] + leg @ [0, -build.thigh, 0]
        shin = leg @ _rotation('x', angles[f'{side}_knee'])
        p[f'{side}_ankle'] = p[f'{side}_knee'] + shin @ [0, -build.shin, 0]
    world = _rotation('x', pitch) @ _rotation('y', yaw) @ np.stack([p[name] for name in JOINTS]).T
    return world.T * [1, -1, 1]
