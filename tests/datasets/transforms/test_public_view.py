"""The public view: what it removes is gone, on drawn and on real people."""

import cv2
import numpy as np
import pytest
import torch
from mmpose.registry import TRANSFORMS
from mmpose.structures import PoseDataSample
from shared_data import shared

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.datasets.transforms.public_view import GREY, MODES, PublicView
from mmpose_dp.privacy import PrivacyError

PIPELINE = [dict(type='LoadImage'), dict(type='GetBBoxCenterScale'), dict(type='KeepImage')]


@TRANSFORMS.register_module()
class KeepImage:
    """Ends a pipeline with the picture as it is."""

    def __call__(self, results):
        # pictures of all sizes: not as inputs, which are stacked
        return dict(inputs=torch.zeros(3, 1, 1), data_samples=PoseDataSample(), results=results)


def mpii(root, ann_file='annotations/mpii_train.json', img='images/'):
    data = dict(data_root=str(root), ann_file=ann_file, data_prefix=dict(img=img), data_mode='topdown')
    return dict(type='MpiiDataset', pipeline=PIPELINE, **data)


@pytest.fixture(scope='module', params=['drawn', 'real'])
def people(request):
    """A data set config: drawn people, and the five of MMPose's own test data where they are there."""
    if request.param == 'drawn':
        return mpii(request.getfixturevalue('synthetic'))
    return mpii(shared('mpii'), 'test_mpii.json', '')


def views(people, **view):
    dataset = PublicPrivateDataset(people, public_view=dict(type='PublicView', **view))
    return dataset, [dataset[i][0]['results'] for i in dataset.public_rows]


@pytest.mark.parametrize('mode', MODES)
def test_one_view_a_record_however_often_it_is_drawn(people, mode):
    dataset, seen = views(people, mode=mode)
    for row, result in zip(list(dataset.public_rows)[:5], seen):
        assert np.array_equal(dataset[row][0]['results']['img'], result['img'])


@pytest.mark.parametrize('mode', ['face', 'person'])
def test_no_view_shows_what_another_hides(people, mode):
    """Change only what the view hides, of everybody in the picture: every view stays bit for bit the same."""
    dataset, seen = views(people, mode=mode)
    for result in seen:
        original = dataset.private[result['sample_idx']]['results']['img']
        hidden = np.zeros(original.shape[:2], np.uint8)
        everybody = [r for r in seen if r['img_path'] == result['img_path']]
        for person in everybody:
            (x, y), box = person['bbox_center'][0], max(person['bbox_scale'][0])
            joints, known = person['keypoints'][0][8:10], person['keypoints_visible'][0][8:10].all()
            if mode == 'face' and known and (joints > 0).all():
                radius = 0.8 * np.linalg.norm(joints[0] - joints[1])
                cv2.circle(hidden, [int(v) for v in joints.mean(0)], int(radius), 1, -1)
            else:
                low = np.maximum([x - box / 2, y - box / 2], 0).astype(int)
                hidden[low[1] : max(int(y + box / 2), 0), low[0] : max(int(x + box / 2), 0)] = 1
        assert (result['img'][hidden > 0] == GREY).all()


@pytest.mark.parametrize(('mode', 'least'), [('blur', 6), ('pixelate', 4)])
def test_detail_is_gone(people, mode, least):
    """A pattern finer than the view's scale, laid over the person, leaves less than 1 part in ``least`` in the view."""
    dataset, seen = views(people, mode=mode)
    view = PublicView(mode)
    for result in seen[:8]:
        image = dataset.private[result['sample_idx']]['results']['img']
        period = 2 * max(round(max(result['bbox_scale'][0]) / 256 * 2), 1)
        stripes = np.arange(image.shape[1]) // (period // 2) % 2 * 40
        patterned = np.clip(image.astype(int) // 2 + stripes[None, :, None], 0, 255).astype(np.uint8)
        plain = np.clip(image.astype(int) // 2 + 20, 0, 255).astype(np.uint8)
        seen_pattern = view.transform(dict(result_without_augmentation(result), img=patterned))['img'].astype(int)
        seen_plain = view.transform(dict(result_without_augmentation(result), img=plain))['img'].astype(int)
        (x, y), box = result['bbox_center'][0], max(result['bbox_scale'][0])
        low = np.maximum([x - box / 4, y - box / 4], 0).astype(int)
        window = np.s_[low[1] : int(y + box / 4), low[0] : int(x + box / 4)]
        left = np.abs((seen_pattern - seen_plain)[window]).mean()
        assert left < 20 / least, (left, period)


def result_without_augmentation(result):
    return {k: result[k] for k in ('bbox_center', 'bbox_scale', 'keypoints', 'keypoints_visible')}


def test_nothing_outside_the_persons_surroundings_is_shown(synthetic):
    result = result_without_augmentation(views(mpii(synthetic))[1][0])
    result.update(img=np.full((400, 600, 3), 7, np.uint8), bbox_center=np.array([[300.0, 200.0]]))
    result['bbox_scale'] = np.array([[60.0, 60.0]])
    view = PublicView().transform(result)['img']
    assert (view[200, 300] == 7).all() and (view[5, 5] == GREY).all() and (view[200, 550] == GREY).all()


def test_a_head_without_annotation_hides_the_whole_box(synthetic):
    result = result_without_augmentation(views(mpii(synthetic))[1][0])
    result.update(img=np.full((200, 200, 3), 7, np.uint8), bbox_center=np.array([[100.0, 100.0]]))
    result.update(bbox_scale=np.array([[80.0, 80.0]]), keypoints_visible=np.zeros((1, 16)))
    view = PublicView('face').transform(result)['img']
    assert (view[61:139, 61:139] == GREY).all() and (view[30, 30] == 7).all()


def test_it_stands_before_anything_random(synthetic):
    result = dict(result_without_augmentation(views(mpii(synthetic))[1][0]), img=np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(PrivacyError, match='right after GetBBoxCenterScale'):
        PublicView().transform(dict(result, flip=True))
    del result['bbox_scale']
    with pytest.raises(PrivacyError, match='after GetBBoxCenterScale'):
        PublicView().transform(result)


@pytest.mark.parametrize('settings', [dict(mode='none'), dict(sigma=0), dict(kernel_size=1), dict(block=1)])
def test_a_view_that_hides_nothing_is_refused(settings):
    with pytest.raises(PrivacyError, match='public_view'):
        PublicView(**settings)


def test_a_face_is_where_the_data_set_has_its_head(synthetic):
    """MPII's joint numbers on COCO are an elbow and a wrist: the face would stay visible and the statement say otherwise."""
    coco = {0: 'nose', 8: 'right_elbow', 9: 'left_wrist'}
    with pytest.raises(PrivacyError, match=r"\(8, 9\) are right_elbow and left_wrist.*mode='person'"):
        PublicView('face').check_joints(coco)
    with pytest.raises(PrivacyError, match='no joint'):
        PublicView('face', head_keypoints=(12, 13)).check_joints(coco)
    PublicView('face', head_keypoints=(12, 13)).check_joints({12: 'top_head', 13: 'neck'})
    PublicView('person').check_joints(coco)
    with pytest.raises(PrivacyError, match='right_elbow|r_|l_'):
        views(mpii(synthetic), mode='face', head_keypoints=(10, 11))
