"""People with five joints, annotated in COCO's format."""

from mmpose.datasets.datasets.base import BaseCocoStyleDataset
from mmpose.registry import DATASETS

JOINTS = ('head', 'left_hand', 'right_hand', 'left_foot', 'right_foot')
SWAP = dict(left='right', right='left')  # what mirroring a picture does


def _mirrored(joint: str) -> str:
    side, _, part = joint.partition('_')
    return f'{SWAP[side]}_{part}' if part else ''


@DATASETS.register_module()
class FiveJointsDataset(BaseCocoStyleDataset):
    """MMPose's data set of COCO's format, with other joints."""

    METAINFO = dict(
        dataset_name='five_joints',
        keypoint_info={
            i: dict(name=joint, id=i, color=[255, 128, 0], type='upper', swap=_mirrored(joint))
            for i, joint in enumerate(JOINTS)
        },
        skeleton_info={i: dict(link=('head', joint), id=i, color=[0, 128, 255]) for i, joint in enumerate(JOINTS[1:])},
        joint_weights=[1.0] * 5,
        sigmas=[0.05] * 5,
    )
