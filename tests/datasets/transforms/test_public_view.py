"""The public view: what it removes is gone, on synthetic and on real people."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmpose.datasets.datasets import CocoDataset
from mmpose.registry import DATASETS, TRANSFORMS
from mmpose.structures import PoseDataSample

from mmpose_dp.datasets import PublicPrivateDataset, View
from mmpose_dp.datasets.transforms.public_view import GREY, MODES, REGION_MODES, PublicView, window
from mmpose_dp.datasets.transforms.view_axes import SPACING, ViewAxis
from mmpose_dp.privacy.errors import ConfigError, PrivacyError
from tests.support import coco_data
from tests.support.paths import shared

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


@pytest.fixture(scope='module', params=['synthetic', 'real'])
def people(request):
    """A data set config: synthetic people, or the five of MMPose's own test data if it is there."""
    if request.param == 'synthetic':
        return mpii(request.getfixturevalue('synthetic'))
    return mpii(shared('mpii'), 'test_mpii.json', '')


def views(people, **view):
    dataset = PublicPrivateDataset(people, public_view=dict(type='PublicView', **view))
    return dataset, [dataset[i][0]['results'] for i in dataset.public_samples]


@pytest.mark.parametrize('mode', MODES)
def test_one_view_per_record_however_often_it_is_sampled(people, mode):
    dataset, seen = views(people, mode=mode)
    for index, result in zip(list(dataset.public_samples)[:5], seen):
        assert np.array_equal(dataset[index][0]['results']['img'], result['img'])


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


@pytest.mark.parametrize('mode', ['face', 'person'])
@pytest.mark.parametrize('kind', ['CocoDataset', 'OwnReader'])
def test_neighbours_and_those_who_are_no_records_are_hidden_alike(mode, kind, tmp_path):
    """A tall person, a small one, a crowd and somebody without joints, with another padding than MMPose's default."""
    data = coco_data.content(4)
    boxes = [6.0, 4.0, 4.0, 16.0], [20.0, 20.0, 10.0, 10.0], [36.0, 4.0, 8.0, 6.0], [4.0, 32.0, 6.0, 4.0]
    for annotation, box in zip(data['annotations'], boxes):
        annotation.update(image_id=1, bbox=box)
    data['annotations'][2].update(iscrowd=1)
    data['annotations'][3].update(num_keypoints=0, keypoints=[0.0] * 15)
    pipeline = [dict(type='LoadImage'), dict(type='GetBBoxCenterScale', padding=2.0), dict(type='KeepImage')]
    cfg = dict(coco_data.write(tmp_path, data), type=kind, pipeline=pipeline)
    cfg['metainfo']['keypoint_info'][3].update(name='neck', swap='')
    cfg['metainfo']['keypoint_info'][4].update(swap='')
    dataset, seen = views(cfg, mode=mode, head_keypoints=(0, 3))
    assert len(seen) == 2
    windows = [window(r['bbox_center'][0], max(r['bbox_scale'][0]), r['img'].shape) for r in seen]
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(*windows))
    one, other = (r['img'][both] for r in seen)
    assert np.array_equal(one, other) and (one != GREY).any()
    if kind == 'OwnReader':  # nobody knows where its people are
        assert dataset.view_description.endswith('of those people alone who are records')
    else:
        assert (seen[0]['img'][1:13, 34:46] == GREY).all() and (seen[0]['img'][30:38, 3:11] == GREY).all()


@DATASETS.register_module()
class OwnReader(CocoDataset):
    """A user's own, which reads its annotations by itself."""

    def load_data_list(self):
        return CocoDataset.load_data_list(CocoDataset(**self.given))

    def __init__(self, **given):
        self.given = dict(given, pipeline=[], lazy_init=True)
        super().__init__(**given)

    def _load_annotations(self):
        raise NotImplementedError


@pytest.mark.parametrize(('mode', 'least'), [('blur', 6), ('blur_full_resolution', 6), ('pixelate', 4)])
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


@pytest.mark.parametrize(
    'settings',
    [
        dict(mode='none'),
        dict(sigma=0),
        dict(sigma=float('inf')),
        dict(mode='blur_full_resolution', kernel_size=1),
        dict(block=1),
    ],
)
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
    PublicView('face', head_keypoints=(12, 13)).check_joints({12: 'HeadTop', 13: 'Neck'})
    with pytest.raises(PrivacyError, match="c7 and vertex.*each name with 'neck' or 'head'"):
        PublicView('face', head_keypoints=(1, 0)).check_joints({0: 'vertex', 1: 'c7'})  # right, by other names
    PublicView('person').check_joints(coco)
    with pytest.raises(PrivacyError, match='right_elbow|r_|l_'):
        views(mpii(synthetic), mode='face', head_keypoints=(10, 11))


BLURS = [mode for mode in MODES if mode not in REGION_MODES]


def noise(height=200, width=260, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def view_of(image, center, box, mode='blur', **more):
    """The view of a person in ``image``."""
    record = dict(bbox_center=np.array([center], float), bbox_scale=np.array([[box, box]], float), img=image, **more)
    record.update(keypoints=np.zeros((1, 16, 2)), keypoints_visible=np.zeros((1, 16)))
    return PublicView(mode).transform(record)['img']


def test_the_default_holds_one_byte_per_three_sigmas():
    """The view is a function of so many 8-bit samples: 14 x 14 for a box of 256 pixels, as the statement says."""
    assert 'one 8-bit sample per 18 pixels' in PublicView().description and 'sigma 6' in PublicView().description
    axis = ViewAxis.sampled_blur(256, 0, 256, 6.0)
    assert axis.keep.shape == (14, 256) and SPACING >= 1
    assert np.allclose(axis.keep.sum(1), 1) and np.allclose(axis.show.sum(1), 1)
    view = view_of(noise(256, 256), (128, 128), 256).astype(float)
    inverse = np.linalg.pinv(axis.show)
    samples = np.einsum('rh,hwc,sw->rsc', inverse, view, inverse).round()
    shown = np.einsum('hr,rsc,ws->hwc', axis.show, samples, axis.show)
    assert np.abs(shown.round().clip(0, 255) - view).max() <= 1


def test_its_blur_is_no_box_filter():
    """Beyond the samples' own band next to nothing is left, also at the frequency where a box filter lets a tenth through."""
    keep = ViewAxis.sampled_blur(256, 0, 256, 6.0).keep[7]
    left = np.abs(np.fft.rfft(keep))
    assert left[20:].max() < 0.02 and left[32:].max() < 1e-3


@pytest.mark.parametrize('mode', BLURS)
def test_a_view_never_needs_more_than_the_picture(mode):
    for center, box in (((0, 0), 8), ((-50, 5), 30), ((30, 20), 3000), ((59, 39), 1.5), ((55, 35), 40), ((2, 2), 2)):
        flat = view_of(np.full((40, 60, 3), 7, np.uint8), center, box, mode)
        assert set(np.unique(flat)) <= {7, GREY}, (center, box)
    for image in (noise(1, 1), noise(30, 30)[..., 0], noise(30, 30)[..., :1]):  # grey pictures too
        assert view_of(image, (0.5, 0.5), 4, mode).shape == image.shape


@pytest.mark.parametrize('mode', BLURS)
def test_two_people_of_one_picture_share_one_view(mode):
    """Where the windows of two boxes overlap, a few samples inside their edges, both show the same."""
    for seed in range(20):  # in single precision, up to one pixel in 10,000 differed, on some machines
        image = noise(seed=seed)
        one = view_of(image, (90.3, 100.1), 60.7, mode, view_box=64.0)
        other = view_of(image, (140.9, 80.7), 44.2, mode, view_box=64.0)
        assert np.array_equal(one[80:112, 110:140], other[80:112, 110:140])
    assert not np.array_equal(one, other)  # each shows its own window alone
    smaller = view_of(image, (140.9, 80.7), 44.2, mode)
    assert not np.array_equal(one[80:112, 110:140], smaller[80:112, 110:140])


@pytest.mark.parametrize('unit', ['instance', 'image', 'subject'])
def test_a_picture_has_one_view(people, unit, tmp_path):
    """A small neighbour's view shows a large person no more sharply than that person's own."""
    settings = dict(people, pipeline=PIPELINE)
    names = {name: 'somebody' for name in _images(settings)}
    (tmp_path / 'subjects.json').write_text(json.dumps(names))
    unit_settings = dict(privacy_unit=unit, subjects=str(tmp_path / 'subjects.json') if unit == 'subject' else None)
    dataset = PublicPrivateDataset(settings, public_view=dict(type='PublicView'), **unit_settings)
    results = [dataset[i][0]['results'] for i in dataset.public_samples]
    for path in {r['img_path'] for r in results}:
        together = [r for r in results if r['img_path'] == path]
        largest = max(float(max(r['bbox_scale'][0])) for r in together)
        for r in together:
            assert r['view_box'] == largest
    assert 'one view per image' in dataset.view_description


def _images(cfg):
    return {path.rpartition('/')[2] for path in PublicPrivateDataset(cfg).images}


def test_pictures_of_floats_are_rounded_first():
    """Without quantisation a blur can be undone; LoadImage(to_float32=True) gives floats."""
    image = noise()
    plain = view_of(image, (120, 100), 100)
    for kind in (np.float32, np.float64, np.float16):
        seen = view_of(image.astype(kind), (120, 100), 100)
        assert seen.dtype == kind and np.array_equal(seen, plain)
    finer = np.clip(image + 0.3, 0, 255)
    for mode in MODES:
        assert (view_of(finer, (120, 100), 100, mode) % 1 == 0).all()


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(
    'image', [noise().astype(np.uint16), noise().astype(int), noise() * 2.0, noise() - 100.0, noise() * float('nan')]
)
def test_other_pictures_are_refused(image, mode):
    with pytest.raises(PrivacyError, match='8 bits.*Convert the pictures'):
        view_of(image, (120, 100), 100, mode)


def test_a_kernel_size_belongs_to_the_full_resolution():
    with pytest.raises(PrivacyError, match="kernel_size=25 has no meaning.*mode='blur_full_resolution'"):
        PublicView('blur', kernel_size=25)
    assert 'full resolution, kernel 25, sigma 10' in PublicView('blur_full_resolution').description


@pytest.mark.parametrize(('size', 'start', 'stop', 'kernel', 'sigma'), [(60, 0, 60, 25, 10.0), (90, 31, 70, 7, 2.8)])
def test_the_full_resolution_blur_is_cv2s(size, start, stop, kernel, sigma):
    """The matrix that inverts it is the blur that is published."""
    image = noise(size, 1)
    axis = ViewAxis.full_blur(size, start, stop, kernel, sigma)
    ours = axis.keep @ image[axis.read, 0].astype(float)
    assert np.abs(ours - cv2.GaussianBlur(image, (1, kernel), sigma, sigmaY=sigma)[start:stop, 0]).max() <= 1


# ---- a view of one's own (a whole one: tests/test_contributing.py) ---------------------------------------------------
@TRANSFORMS.register_module()
class Noisy(View):
    """Two views of one picture would hold more than one."""

    description = 'the picture with noise'

    def transform(self, results):
        noise = np.random.default_rng(int(np.random.randint(1 << 30))).integers(0, 9, results['img'].shape)
        results['img'] = results['img'] // 2 + noise.astype(np.uint8)
        return results


@TRANSFORMS.register_module()
class Silent:
    """A transform that does not say what it keeps."""

    def __call__(self, results):
        results['img'] = results['img'] // 64 * 64
        return results


@TRANSFORMS.register_module()
class Described(Silent):
    """One that says so without being a View."""

    description = 'four levels of each colour'


@TRANSFORMS.register_module()
class Sized(Described, View):
    """One whose strength follows the box, and which needs a joint that is not there."""

    follows_box = True
    transform = Silent.__call__

    def __init__(self, joint='head_top'):
        self.joint = joint

    def check_joints(self, names):
        if self.joint not in names.values():
            raise ConfigError(f'no {self.joint}')


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        (dict(type='Noisy'), 'public_view: Noisy is random and could give a record more than one public view'),
        (dict(type='Silent'), r'public_view.type=Silent does not say what it keeps.*datasets\.View'),
        (dict(type='Sized', joint='tail'), 'no tail'),
    ],
)
def test_a_view_of_ones_own_that_cannot_be_one_is_refused(synthetic, kind, message):
    with pytest.raises(PrivacyError, match=message):
        PublicPrivateDataset(mpii(synthetic), public_view=kind)


def test_a_view_of_ones_own_is_in_the_statement_as_it_says(synthetic):
    for unit in ('instance', 'image'):
        described, sized = (
            PublicPrivateDataset(mpii(synthetic), public_view=dict(type=kind), privacy_unit=unit).view_description
            for kind in ('Described', 'Sized')
        )
        assert described == 'four levels of each colour'
        assert sized == f'{described}, one view per image, sized for its largest box'
