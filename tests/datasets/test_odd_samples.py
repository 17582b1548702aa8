"""One odd record contributes nothing and ends nothing; data that is gone, or that no step could use, stops training."""

import shutil
import warnings

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmpose.registry import TRANSFORMS

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.privacy.errors import DataError
from tests.support.coco_data import PIPELINE, content, write

LAST = 7  # a sample that decides nothing
UNCHANGED = [dict(type='LoadImage', color_type='unchanged'), *PIPELINE[1:]]
RNG = np.random.default_rng(0)


@TRANSFORMS.register_module()
class Spoil(BaseTransform):
    """Does something odd to the packed samples numbered in ``samples``."""

    def __init__(self, what, samples):
        self.what, self.samples = what, samples

    def transform(self, packed):
        sample = packed['data_samples']
        if int(sample.metainfo['img_path'][-6:-4]) not in self.samples:
            return packed
        labels = sample.gt_instance_labels
        if self.what == 'raises':
            raise OSError('a damaged file')
        elif self.what == 'nothing':
            return None
        elif self.what == 'not finite':
            labels.keypoint_weights = labels.keypoint_weights / 0
        elif self.what == 'heatmaps not finite':
            sample.gt_fields.heatmaps[0, 0, 0] = torch.nan
        elif self.what == 'picture not finite':
            packed['inputs'] = packed['inputs'] * torch.inf
        elif self.what == 'another label':
            labels.another = torch.zeros(1, 2)
        elif self.what == 'another shape':
            labels.keypoint_weights = torch.ones(1, 4)
        elif self.what == 'another size':
            packed['inputs'] = packed['inputs'][:, :-1]
        elif self.what == 'two pictures':
            packed['inputs'] = [packed['inputs']] * 2
        elif self.what == '16 bits':
            packed['inputs'] = packed['inputs'].to(torch.uint16)
        return packed


WAYS = [
    'raises', 'nothing', 'not finite', 'heatmaps not finite', 'picture not finite', 'another label', 'another shape',
    'another size', 'two pictures', '16 bits',
]  # fmt: skip


def sizes(dataset, indices):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return [len(dataset[index]) for index in indices]


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    return write(tmp_path_factory.mktemp('own'))


@pytest.mark.parametrize('what', WAYS)
def test_one_odd_sample_contributes_nothing(own, what):
    cfg = dict(own, pipeline=[*PIPELINE, dict(type='Spoil', what=what, samples=[LAST])])
    dataset = PublicPrivateDataset(cfg, public_view=dict(type='PublicView'), augmentations=2)
    assert sizes(dataset, range(16)) == [2] * 7 + [0] + [1] * 7 + [0]
    if what != 'nothing':
        with pytest.warns(UserWarning, match='07.png contributes nothing'):
            dataset[LAST]


@pytest.mark.parametrize('what', WAYS)
def test_what_is_odd_in_the_first_samples_is_refused_before_training(own, what):
    cfg = dict(own, pipeline=[*PIPELINE, dict(type='Spoil', what=what, samples=range(8))])
    if what.startswith('another'):  # accepted if all are alike
        cfg['pipeline'][-1]['samples'] = [1]
        with pytest.raises(
            DataError,
            match='dataset.private: the pipeline gives (samples of different form|images that cannot be stacked)',
        ):
            PublicPrivateDataset(cfg)
        return
    with pytest.raises(DataError, match='dataset.private: the pipeline fails on its first samples') as error:
        PublicPrivateDataset(cfg)
    assert (what == 'raises') == str(error.value).endswith('OSError: a damaged file, in Spoil')


@pytest.mark.parametrize(
    'picture',
    [RNG.integers(0, 255, (40, 48, 4), np.uint8), RNG.integers(0, 255, (40, 48), np.uint8),
     RNG.integers(0, 6e4, (40, 48, 3), np.uint16)],
    ids=['four channels', 'grey', '16 bits'],
)  # fmt: skip
def test_a_picture_of_another_kind(tmp_path, picture):
    cfg = dict(write(tmp_path), pipeline=UNCHANGED)
    cv2.imwrite(str(tmp_path / 'img/07.png'), picture)
    assert sizes(PublicPrivateDataset(cfg), range(8)) == [1] * 7 + [0]
    assert (
        sizes(PublicPrivateDataset(dict(cfg, pipeline=PIPELINE)), range(8)) == [1] * 8
    )  # as LoadImage reads by default
    cv2.imwrite(str(tmp_path / 'img/01.png'), picture)
    with pytest.raises(DataError, match="channels.*color_type='color'|first samples"):
        PublicPrivateDataset(cfg)
        for path in (tmp_path / 'img').iterdir():
            cv2.imwrite(str(path), picture)
        assert picture.dtype == np.uint16
        PublicPrivateDataset(cfg)


@pytest.mark.parametrize('content', [b'', b'DICM' * 40], ids=['nothing', 'another format'])
def test_pictures_that_opencv_does_not_read(tmp_path, content):
    """MMPose asks to check whether the file exists."""
    cfg = write(tmp_path)
    for path in (tmp_path / 'img').iterdir():
        path.write_bytes(content)
    with pytest.raises(
        DataError, match=r'img/\d+.png is there, but is no picture that OpenCV reads: save it as PNG or'
    ):
        PublicPrivateDataset(cfg)


def test_parts_of_different_form_are_refused(own, tmp_path):
    smaller = [dict(step, input_size=(16, 16)) if step['type'] == 'TopdownAffine' else step for step in PIPELINE[:4]]
    public = dict(write(tmp_path, content(6)), pipeline=[*smaller, *PIPELINE[5:]])
    for path in (tmp_path / 'img').iterdir():  # no copies of the private ones
        cv2.imwrite(str(path), RNG.integers(0, 255, (40, 48, 3), np.uint8))
    with pytest.raises(
        DataError,
        match='dataset.public: the pipeline gives images that cannot be stacked into a batch, since the image is 3x16x16',
    ):
        PublicPrivateDataset(own, public=public)


@pytest.mark.parametrize('view', [None, dict(type='PublicView')], ids=['private', 'views'])
@pytest.mark.parametrize('left', [True, False], ids=['an empty folder', 'no folder'])
def test_a_lost_disk_stops_training(tmp_path, view, left):
    dataset = PublicPrivateDataset(write(tmp_path), public_view=view)
    shutil.rmtree(tmp_path / 'img')
    if left:
        (tmp_path / 'img').mkdir()
    for index in (LAST, len(dataset) - 1):
        with pytest.raises(DataError, match=r'can no longer|no longer can.*img/ still there.*not counted.*--resume'):
            dataset[index]


def test_one_lost_file_does_not_whichever_it_is(tmp_path):
    dataset = PublicPrivateDataset(write(tmp_path))
    for index in range(8):
        path = tmp_path / f'img/{index:02d}.png'
        path.rename(tmp_path / 'elsewhere.png')
        assert sizes(dataset, range(8)) == [other != index for other in range(8)]
        (tmp_path / 'elsewhere.png').rename(path)


def test_a_data_set_of_one_picture(tmp_path):
    dataset = PublicPrivateDataset(write(tmp_path, content(1)))
    (tmp_path / 'img/00.png').unlink()
    assert sizes(dataset, [0]) == [0]  # one record decides nothing
