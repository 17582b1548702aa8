"""Configs as people write them: types as names, scoped names and classes, loaders of their own, pictures elsewhere."""

import http.server
import random
import shutil
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset, RepeatDataset
from mmpose.datasets.datasets import CocoDataset
from mmpose.datasets.transforms import GetBBoxCenterScale, LoadImage, Mosaic
from mmpose.registry import DATASETS, TRANSFORMS

from mmpose_dp.datasets import PublicPrivateDataset, PublicView, refuse_private_validation
from mmpose_dp.datasets.building import build_part
from mmpose_dp.datasets.resolving import is_kind, resolved, type_name
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.coco_data import PIPELINE, write

VIEW = dict(type='PublicView')


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    return write(tmp_path_factory.mktemp('own'))


def renamed(step, rename):
    return dict(step, type=rename(step['type']))


@pytest.mark.parametrize(
    'rename',
    [lambda name: f'mmpose.{name}', TRANSFORMS.get, lambda name: f'mmpose.datasets.transforms.{name}'],
    ids=['scoped', 'classes', 'paths'],
)
def test_a_type_is_what_it_stands_for(own, rename):
    cfg = dict(own, pipeline=[renamed(step, rename) for step in PIPELINE])
    for kind in ('mmpose.CocoDataset', CocoDataset):
        for view in (None, dict(type='mmpose.PublicView'), dict(type=PublicView)):
            dataset = PublicPrivateDataset(dict(cfg, type=kind), public_view=view)
            assert [len(dataset[index]) for index in (0, len(dataset) - 1)] == [1, 1]


@pytest.mark.parametrize('kind', ['Mosaic', 'mmpose.Mosaic', 'mmdet.Mosaic', Mosaic, type('OwnMosaic', (Mosaic,), {})])
def test_mixing_is_found_by_any_name(own, kind):
    with pytest.raises(PrivacyError, match='private.pipeline: (Own)?Mosaic mixes'):
        PublicPrivateDataset(dict(own, pipeline=[dict(type=kind, img_scale=(32, 32)), *PIPELINE]))


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (dict(type='RepeatDataset', times=2), 'RepeatDataset: a wrapper that joins or repeats'),
        (dict(type='mmengine.RepeatDataset', times=2), 'RepeatDataset: a wrapper that joins or repeats'),
        (dict(type=RepeatDataset, times=2, dataset={}), 'RepeatDataset: a wrapper that joins or repeats'),
        (dict(type='ConcatDataset', datasets=[]), 'ConcatDataset: a wrapper that joins or repeats'),
        (dict(type='CombinedDataset', datasets=[]), 'CombinedDataset: a wrapper that joins or repeats'),
        (dict(type='NoSuchDataset'), "type='NoSuchDataset' is not registered.*custom_imports"),
        (dict(type=dict), "dict is not derived from mmengine's BaseDataset"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_the_reason_is_the_right_one(cfg, message):
    with pytest.raises(PrivacyError, match=message):
        PublicPrivateDataset(cfg)


def test_resolving():
    assert resolved(TRANSFORMS, 'LoadImage') is resolved(TRANSFORMS, LoadImage) is LoadImage
    assert resolved(TRANSFORMS, 'no.such.module') is None and resolved(TRANSFORMS, 'Nowhere') is None
    assert is_kind(TRANSFORMS, dict(type='mmpose.GetBBoxCenterScale'), GetBBoxCenterScale)
    assert not is_kind(TRANSFORMS, dict(), LoadImage) and is_kind(TRANSFORMS, LoadImage(), LoadImage)
    assert [type_name(kind) for kind in ('mmpose.A', 'A', LoadImage)] == ['A', 'A', 'LoadImage']


# ---- transforms before GetBBoxCenterScale --------------------------------------------------------------------------
@TRANSFORMS.register_module()
class LoadOwn(BaseTransform):
    """A loader of a user's own."""

    def transform(self, results):
        results['img'] = cv2.imread(results['img_path'])
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results


class Step(BaseTransform):
    def __init__(self, number=None, prob=1.0):
        self.number = number

    def transform(self, results):
        results['img'] = cv2.convertScaleAbs(results['img'], alpha=0.5)
        if self.number is not None and self.number() < 1e-9:
            results['img'][:] = 0
        return results


class Unseeded(Step):
    """Random by a generator of its own."""

    def transform(self, results):
        results['img'] = np.random.default_rng().integers(0, 255, results['img'].shape, np.uint8)
        return results


def test_loaders_and_fixed_steps_may_come_before_the_view(own):
    for before in ([dict(type='LoadOwn')], [dict(type='LoadOwn'), dict(type=Step)], [dict(type='LoadImage'), Step()]):
        dataset = PublicPrivateDataset(dict(own, pipeline=[*before, *PIPELINE[1:]]), public_view=VIEW)
        assert len(dataset[0]) == len(dataset[8]) == 1 and dataset.view_description


@pytest.mark.parametrize(
    'step',
    [
        dict(type='PhotometricDistortion'),
        dict(type='RandomApply', prob=1e-9, transforms=[dict(type=Step)]),
        dict(type='mmcv.KeyMapper', transforms=[dict(type='PhotometricDistortion')]),
        dict(type=Step, number=random.random),
        dict(type=Step, number=np.random.rand),
        dict(type=Step, number=lambda: float(torch.rand(1))),
        dict(type=Unseeded),
    ],
    ids=['declared', 'rare', 'within', 'random', 'numpy', 'torch', 'of its own'],
)
def test_what_is_random_may_not(own, step):
    cfg = dict(own, pipeline=[PIPELINE[0], step, *PIPELINE[1:]])
    PublicPrivateDataset(cfg)  # without a view it may
    with pytest.raises(PrivacyError, match='before GetBBoxCenterScale, which is random.*move it behind'):
        PublicPrivateDataset(cfg, public_view=VIEW)


# ---- transforms behind the view ------------------------------------------------------------------------------------
class Keep(BaseTransform):
    """Keeps the picture for later."""

    def transform(self, results):
        return dict(results, kept=results['img'].copy())


class Restore(BaseTransform):
    def transform(self, results):
        return dict(results, img=results['kept'])


class Depth(BaseTransform):
    """Adds what a file beside the picture holds."""

    def transform(self, results):
        depth = cv2.imread(results['img_path'].replace('/img/', '/depth/'), cv2.IMREAD_GRAYSCALE)
        return dict(results, img=results['img'] // 2 + depth[..., None] // 2)


@pytest.mark.parametrize(
    ('before', 'behind'),
    [
        ([], dict(type='mmcv.LoadImageFromFile')),
        ([], dict(type='RandomApply', prob=0.9, transforms=[dict(type='LoadOwn')])),
        ([dict(type=Keep)], dict(type=Restore)),
        ([], dict(type=Depth)),
    ],
    ids=['loaded again', 'within', 'kept', 'file beside it'],
)
def test_the_private_picture_itself_may_not_be_read_behind_the_view(own, before, behind):
    """Sharp pictures were in the public part, which no noise covers."""
    folder = Path(own['data_root'])
    (folder / 'depth').mkdir(exist_ok=True)
    for picture in (folder / 'img').iterdir():
        shutil.copy(picture, folder / 'depth')
    cfg = dict(own, pipeline=[PIPELINE[0], *before, PIPELINE[1], behind, *PIPELINE[2:]])
    assert len(PublicPrivateDataset(cfg)[0]) == 1  # without a view it may
    with pytest.raises(PrivacyError, match='reads the private picture itself.*move it before GetBBoxCenterScale'):
        PublicPrivateDataset(cfg, public_view=VIEW)


@pytest.mark.parametrize('mode', ['blur', 'pixelate', 'person'])
def test_five_joints_under_each_view(own, mode):
    dataset = PublicPrivateDataset(own, public_view=dict(type='PublicView', mode=mode))
    assert [len(dataset[index]) for index in range(16)] == [1] * 16


def test_faces_need_joints_of_heads(own):
    for joints in ((8, 9), (0, 1), (-1, 0)):
        view = dict(type='PublicView', mode='face', head_keypoints=joints)
        with pytest.raises(PrivacyError, match="public_view.head_keypoints.*mode='person'"):
            PublicPrivateDataset(own, public_view=view)
    for joints in ((0, 0), (0,), 0, (0, 1, 2)):
        with pytest.raises(PrivacyError, match='must be the numbers of two joints, neck and head top'):
            PublicPrivateDataset(own, public_view=dict(type='PublicView', mode='face', head_keypoints=joints))


def test_public_people_with_mpiis_joints_beside_a_private_set_with_others(own, tmp_path):
    """The recipes' own public data: the advice was to generate them, and they were refused afterwards."""
    public = dict(type='MpiiDataset', data_root=str(tmp_path), ann_file='annotations/mpii_train.json')
    fit = r"would not fit: MpiiDataset has MPII's 16 joints, and the private set has 5\. Write .*public="
    with pytest.raises(PrivacyError, match=fit):
        PublicPrivateDataset(own, public=dict(public, pipeline=PIPELINE))
    converter = dict(type='KeypointConverter', num_keypoints=5, mapping=[(i, i) for i in range(5)])
    with pytest.raises(PrivacyError, match='make_synthetic_mpii'):
        PublicPrivateDataset(own, public=dict(public, pipeline=[converter, *PIPELINE]))


@pytest.mark.parametrize('part', ['private', 'public'])
def test_weights_of_zero_for_every_joint_are_refused(own, part):
    """Training went through all its steps on a loss of 0."""
    steps = [dict(s, use_dataset_keypoint_weights=True) if s['type'] == 'GenerateTarget' else s for s in PIPELINE]
    for weights, used, right in (
        ([0.0] * 5, True, False),
        ([0.0] * 5, False, True),
        ([1.0, 0.0, 0.0, 0.0, 0.0], True, True),
    ):
        metainfo = dict(own['metainfo'], joint_weights=weights)
        cfg = dict(own, metainfo=metainfo, pipeline=steps if used else PIPELINE)
        with (
            nullcontext()
            if right
            else pytest.raises(PrivacyError, match=rf'{part}\.metainfo: joint_weights are all 0, and')
        ):
            build_part(cfg, part)


# ---- samples that are not one picture here -------------------------------------------------------------------------
class Samples(BaseDataset):
    METAINFO = dict()
    given = dict(img_path=['a.png', 'b.png'])

    def load_data_list(self):
        return [dict(self.given, bbox=np.ones((1, 4))) for _ in range(3)]


def test_videos_and_samples_without_picture(own, monkeypatch):
    monkeypatch.setitem(DATASETS.module_dict, 'Samples', Samples)
    cfg = dict(type='Samples', ann_file=f'{own["data_root"]}own.json', pipeline=PIPELINE, serialize_data=False)
    with pytest.raises(PrivacyError, match=r'Samples gives several pictures per sample \(img_path is a list\)'):
        PublicPrivateDataset(cfg)
    video, private = DATASETS.build(dict(cfg, ann_file='')), PublicPrivateDataset(own)
    refuse_private_validation(private.private, private.images, video)  # such may be validated on
    monkeypatch.setattr(Samples, 'given', dict(img_path=None))
    with pytest.raises(PrivacyError, match='Samples has samples without a picture'):
        PublicPrivateDataset(cfg)
    refuse_private_validation(private.private, private.images, DATASETS.build(cfg | dict(ann_file='')))


def test_bottom_up_data_is_refused(own):
    with pytest.raises(
        PrivacyError, match="private.data_mode='bottomup': a sample is one person here; write data_mode='topdown'"
    ):
        PublicPrivateDataset(dict(own, data_mode='bottomup'))


def test_pictures_elsewhere(own, monkeypatch):
    """Pictures may be read through mmengine's file backends; annotations may not."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=own['data_root']))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    try:
        dataset = PublicPrivateDataset(dict(own, data_prefix=dict(img=f'{address}/img/')), public_view=VIEW)
        assert [len(dataset[index]) for index in range(16)] == [1] * 16
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(PrivacyError, match='no longer can'):  # also there
        dataset[0]
    for cfg in (dict(own, data_root=f'{address}/'), dict(own, ann_file='s3://bucket/own.json')):
        with pytest.raises(PrivacyError, match='private: the annotation file .* must be on this machine'):
            PublicPrivateDataset(cfg)
