"""Joints of a checkpoint and of a data set: what is kept, and what a user is advised to write."""

import re

import pytest
import torch

from mmpose_dp.models import fit_joints, weights_of

NAMES = ['nose', 'left_knee', 'right_knee', 'left_ankle']


@pytest.mark.parametrize(
    ('own', 'words'),
    [
        (['nose', 'knee_l', 'right_knee'], 'named left_knee, left_ankle. To keep the weights of one of these, give'),
        (NAMES[:3], None),
        ([*NAMES, 'tail'], None),
        (NAMES, None),
        (['snout', *NAMES[1:]], None),
        (
            ['right_knee', 'left_knee', 'nose', 'left_ankle'],
            '2 joints .* such as right_knee: number 2 there and 0 here',
        ),
    ],
    ids=['renamed', 'fewer', 'more', 'the same', 'as many, renamed', 'as many, in another order'],
)
def test_advice(own, words):
    saved, wanted = {'out': torch.arange(4.0)[:, None]}, {'out': -torch.ones(len(own), 1)}
    lines = fit_joints(saved, wanted, NAMES, own)
    if len(own) != 4:
        assert saved['out'].flatten().tolist() == [NAMES.index(name) if name in NAMES else -1 for name in own]
        assert f'new for {", ".join(name for name in own if name not in NAMES) or "none"}' in lines.pop(0)
    if words is None:
        assert not lines
    else:
        (line,) = lines
        assert re.search(words, line)


def test_the_names_of_mmpose_before_1_0():
    """check_config.py called the head of such a checkpoint new, which MMPose loads under its new name."""
    weights = {f'module.{part}.weight': torch.ones(2) for part in ('backbone.conv1', 'keypoint_head.final_layer')}
    assert [*weights_of(dict(state_dict=weights), '')] == ['backbone.conv1.weight', 'head.final_layer.weight']
    assert [*weights_of({'head.keypoint_head.weight': torch.ones(2)}, '')] == ['head.keypoint_head.weight']
