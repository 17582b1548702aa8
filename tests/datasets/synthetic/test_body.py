"""Bodies keep their bones and their joint limits in every pose."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpose_dp.datasets.synthetic.body import INDEX, JOINTS, LIMITS, Build, pose_joints, random_angles

BONES = [
    (f'{s}_{a}', f'{s}_{b}', bone)
    for s in 'lr'
    for a, b, bone in (
        ('shoulder', 'elbow', 'upper_arm'),
        ('elbow', 'wrist', 'forearm'),
        ('hip', 'knee', 'thigh'),
        ('knee', 'ankle', 'shin'),
    )
] + [('neck', 'head', 'head'), ('pelvis', 'thorax', 'torso')]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), energy=st.floats(0, 1), yaw=st.floats(-180, 180), pitch=st.floats(-20, 20))
def test_bones_are_rigid_and_joints_stay_in_their_limits(seed, energy, yaw, pitch):
    rng = np.random.default_rng(seed)
    build, angles = Build.random(rng), random_angles(rng, energy)
    for name, angle in angles.items():
        low, high = LIMITS[name.split('_', 1)[1] if name[:2] in ('l_', 'r_') else name]
        assert low <= angle <= high
    joints = pose_joints(build, angles, yaw, pitch)
    assert joints.shape == (16, 3) and np.isfinite(joints).all()
    for a, b, bone in BONES:
        assert np.isclose(np.linalg.norm(joints[INDEX[a]] - joints[INDEX[b]]), getattr(build, bone))


def test_mpiis_joint_order():
    assert len(JOINTS) == 16 and JOINTS[:3] == ['r_ankle', 'r_knee', 'r_hip'] and JOINTS[8:10] == ['neck', 'head']


def test_standing_still_faces_the_camera():
    joints = pose_joints(Build(), dict.fromkeys(random_angles(np.random.default_rng(0), 0), 0.0), 0, 0)
    y = {name: joints[INDEX[name], 1] for name in JOINTS}
    assert y['head'] < y['neck'] < y['thorax'] < y['pelvis'] < y['l_knee'] < y['l_ankle']
    assert joints[INDEX['l_shoulder'], 0] > joints[INDEX['r_shoulder'], 0]  # their left is on the picture's right
