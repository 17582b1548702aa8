"""A pipeline that makes other joints of the annotated ones: flips, the checkpoint's names and views go by the metainfo."""

import copy

import cv2
import numpy as np
import pytest
from mmcv.transforms import BaseTransform
from mmpose.datasets.datasets import CocoDataset
from mmpose.registry import DATASETS, TRANSFORMS

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.engine.val_trial import warn_of_other_order
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.coco_data import META, PIPELINE, content, write

ORDER = [1, 0, 2, 3, 4]  # of what the converter gives: left_hand, head, right_hand, ...
CONVERTER = dict(type='KeypointConverter', num_keypoints=5, mapping=[(old, new) for new, old in enumerate(ORDER)])
FEWER = dict(type='KeypointConverter', num_keypoints=3, mapping=[(0, 0), (1, 1), (2, 2)])
LOAD, BOX, FLIP, *REST = PIPELINE


def metainfo_of(numbers):
    joints = META['keypoint_info']
    info = {new: dict(joints[old], id=new) for new, old in enumerate(numbers)}
    return dict(META, keypoint_info=info, joint_weights=[1.0] * len(info), sigmas=[0.05] * len(info))


def named(names):
    info = {i: dict(name=name, id=i, color=[0, 0, 0], type='upper', swap='') for i, name in enumerate(names)}
    return dict(META, keypoint_info=info)


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    return write(tmp_path_factory.mktemp('own'))


@DATASETS.register_module()
class OwnJoints(CocoDataset):
    METAINFO = META


@TRANSFORMS.register_module()
class FirstJoints(BaseTransform):
    """Keeps the first three joints, as a transform of a user's own may."""

    def transform(self, results):
        for key in ('keypoints', 'keypoints_visible'):
            results[key] = results[key][:, :3]
        results['flip_indices'] = [0, 2, 1]
        return results


NUMBER = 'private: the pipeline gives 3 joints, and the metainfo of CocoDataset names 5.* write metainfo=.* of those 3 joints'
REFUSED = {
    'fewer joints': (META, [LOAD, FEWER, BOX, FLIP, *REST], NUMBER),
    'fewer joints of other code': (META, [LOAD, dict(type='FirstJoints'), BOX, FLIP, *REST], NUMBER),
    'a flip before': (metainfo_of(ORDER), [LOAD, BOX, FLIP, CONVERTER, *REST], 'RandomFlip comes before KeypointConverter'),
    'the joints of the class': (None, [LOAD, CONVERTER, BOX, FLIP, *REST], 'metainfo of OwnJoints has those before.* flip'),
}  # fmt: skip


@pytest.mark.parametrize('part', ['private', 'public'])
@pytest.mark.parametrize('name', REFUSED)
def test_other_joints_than_the_metainfo_names(own, tmp_path, name, part):
    """Flips exchanged the wrong joints, and the published model named joints that it did not have."""
    metainfo, steps, message = REFUSED[name]
    cfg = dict(copy.deepcopy(own), pipeline=steps)
    if metainfo is None:
        cfg['type'] = cfg.pop('metainfo') and 'OwnJoints'
    else:
        cfg['metainfo'] = metainfo
    parts = dict(private=cfg) if part == 'private' else dict(private=own, public=dict(cfg, **_elsewhere(tmp_path)))
    with pytest.raises(PrivacyError, match=f'(?s){message}'.replace('private', part)):
        PublicPrivateDataset(**parts)


def _elsewhere(folder):
    """A part of a config: other people than the private ones."""
    data = content(9)
    for image in data['images']:
        image['file_name'] = f'of_others_{image["file_name"]}'
    (folder / 'img').mkdir()
    for number, image in enumerate(data['images']):
        picture = np.random.default_rng(100 + number).integers(0, 255, (40, 48, 3), np.uint8)
        cv2.imwrite(str(folder / 'img' / image['file_name']), picture)
    cfg = write(folder, data)
    return {key: cfg[key] for key in ('data_root', 'ann_file', 'data_prefix')}


def test_converted_joints_with_their_own_metainfo(own):
    cases = [
        (metainfo_of(ORDER), [LOAD, CONVERTER, BOX, FLIP, *REST]),
        (metainfo_of([0, 1, 2]), [LOAD, FEWER, BOX, FLIP, *REST]),
        (metainfo_of([0, 1, 2]), [LOAD, dict(type='FirstJoints'), BOX, FLIP, *REST]),
    ]
    for metainfo, steps in cases:
        dataset = PublicPrivateDataset(
            dict(own, metainfo=metainfo, pipeline=steps), public_view=dict(type='PublicView')
        )
        assert len(dataset[0]) == len(dataset[8]) == 1


def test_heads_are_not_found_by_converted_joints(own):
    """The names were right and the numbers were those of other joints: heads stayed visible, and the statement said otherwise."""
    annotated, given = ['neck', 'head_top', 'hip', 'knee', 'foot'], ['hip', 'knee', 'neck', 'head_top', 'foot']
    mapping = [(annotated.index(name), given.index(name)) for name in annotated]
    converter = dict(type='KeypointConverter', num_keypoints=5, mapping=mapping)
    converted = dict(own, metainfo=named(given), pipeline=[LOAD, BOX, converter, FLIP, *REST])
    face = dict(type='PublicView', mode='face', head_keypoints=(2, 3))
    with pytest.raises(PrivacyError, match='by the annotated joints.* convert the annotation file'):
        PublicPrivateDataset(converted, public_view=face)
    PublicPrivateDataset(converted, public_view=dict(type='PublicView', mode='person'))
    PublicPrivateDataset(dict(own, metainfo=named(annotated)), public_view=dict(face, head_keypoints=(0, 1)))


def test_validation_with_the_joints_in_another_order(capfd):
    def names(numbers):
        info = metainfo_of(numbers)['keypoint_info']
        return dict(
            keypoint_id2name={number: one['name'] for number, one in info.items()},
            keypoint_name2id={one['name']: number for number, one in info.items()},
        )

    for validated, told in (([0, 1, 2, 3, 4], False), ([0, 1], False), (ORDER, True)):
        warn_of_other_order(names([0, 1, 2, 3, 4]), names(validated))
        assert ('left_hand is joint 0 in its metainfo, and joint 1 in that of' in capfd.readouterr().err) == told
    warn_of_other_order({}, {})
