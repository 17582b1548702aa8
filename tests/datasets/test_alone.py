"""One record in the sample of another: through a cache in a transform, or a data set that looks at a neighbour."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmcv.transforms import BaseTransform
from mmpose.codecs import SimCCLabel
from mmpose.datasets.datasets import CocoDataset, MpiiDataset
from mmpose.registry import DATASETS, KEYPOINT_CODECS, TRANSFORMS

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.privacy.errors import DataError
from tests.support.datasets import PIPELINE, coco_style, mpii
from tests.support.runs import config


@TRANSFORMS.register_module()
class Blended(BaseTransform):
    """Blends the picture with one of the data set that the annotation, or the config, gives it."""

    def __init__(self, ann_file=None):
        self.ann_file = ann_file

    def transform(self, results):
        given = results.pop('dataset', None)
        if given is not None:
            other = cv2.imread(given.get_data_info(np.random.randint(len(given)))['img_path'])
            size = results['img'].shape[1::-1]
            results['img'] = cv2.addWeighted(results['img'], 0.5, cv2.resize(other, size), 0.5, 0)
        return results


@TRANSFORMS.register_module()
class Stateful(BaseTransform):
    """Keeps what it sees, and uses it as ``how`` says."""

    def __init__(self, how):
        self.how, self.seen, self.random = how, [], np.random.RandomState(0)

    def transform(self, results):
        image, before = results['img'], list(self.seen)
        self.seen = [*self.seen, image.copy()][-20:]
        if self.how == 'mean':
            results['img'] = np.clip(image - image.mean() + np.mean([x.mean() for x in self.seen]), 0, 255).astype(
                np.uint8
            )
        if self.how == 'late' and len(before) > 8:  # as mmdet's CachedMosaic waits
            results['img'] = cv2.addWeighted(image, 0.5, before[np.random.randint(len(before))], 0.5, 0)
        if self.how == 'seldom' and before and np.random.rand() < 0.3:
            results['img'] = cv2.addWeighted(image, 0.5, before[-1], 0.5, 0)
        if self.how == 'label' and before:
            results['keypoints_visible'] = results['keypoints_visible'] * float(before[-1].mean() / 255)
        if self.how == 'own generator':
            results['img'] = np.roll(image, self.random.randint(1, 20), 0)
        if self.how == 'random':
            results['img'] = np.roll(image, np.random.randint(20), 0)
        if self.how == 'new generator':
            results['img'] = np.roll(image, np.random.default_rng().integers(20), 0)
        return results


@KEYPOINT_CODECS.register_module()
class Centred(SimCCLabel):
    """Moves people to the mean of those that it has encoded, or to one place."""

    remembers = True

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.seen = []

    def encode(self, keypoints, keypoints_visible=None):
        self.seen = [*(self.seen if self.remembers else ()), keypoints.mean(1, keepdims=True)]
        return super().encode(keypoints - self.seen[-1] + np.mean(self.seen, 0), keypoints_visible)


@DATASETS.register_module()
class Neighbour(MpiiDataset):
    """Gives a record the picture or the box of the next one, or something that is its own."""

    how = 'img_path'

    def load_data_list(self):
        people = super().load_data_list()
        if self.how == 'joints':
            for person, other in zip(people, people[1:] + people[:1]):
                person['others'] = dict(joints=other['keypoints'])
        if self.how == 'mean':
            mean = np.mean([person['bbox_scale'] for person in people])
            for person in people:
                person['size'] = person['bbox_scale'] / mean
        if self.how == 'weights':
            spread = np.std([person['keypoints'][0, :, 0] for person in people], 0)
            self._metainfo['dataset_keypoint_weights'] = (1 / (1 + spread)).astype(np.float32)
        for person, other in zip(people, people[1:] + people[:1]) if self.how.startswith('loaded') else ():
            path = other['img_path']
            person['frames'] = dict(before=[path if self.how == 'loaded' else Path(path).name])
        return people

    def get_data_info(self, idx):
        info, other = super().get_data_info(idx), super().get_data_info((idx + 1) % len(self))
        if self.how == 'img_path':
            info['img_path'] = other['img_path']
        if self.how == 'previous':
            info['previous_img'] = super().get_data_info(idx - 1)['img_path']
        if self.how == 'itself':
            info['dataset'] = self
        if self.how == 'own':
            info['number'], info['same'] = idx, super().get_data_info(idx)['bbox_scale'] * 2
            info['weight'], info['many'] = float(info['bbox'].sum()), len(self) > 0
        return info


@DATASETS.register_module()
class Crowd(CocoDataset):
    """Gives a record the joints of the others in its picture."""

    how = 'neighbours'

    def load_data_list(self):
        people = super().load_data_list()
        for person in people:
            others = [one['keypoints'] for one in people if one['img_id'] == person['img_id'] and one is not person]
            person['others'] = others if self.how == 'neighbours' else []
        return people


def built(data, tmp_path, *steps, method='dpsgd', kind=None, **settings):
    dataset = config(data, tmp_path, method).train_dataloader.dataset
    pipeline = dataset.private.pipeline
    place = next(i for i, step in enumerate(pipeline) if step['type'] == 'TopdownAffine') + 1
    pipeline[place:place] = steps
    if kind:
        dataset.private.type = kind
    return PublicPrivateDataset(**{key: value for key, value in {**dataset, **settings}.items() if key != 'type'})


@pytest.mark.parametrize('how', ['mean', 'late', 'seldom', 'label', 'own generator'])
def test_a_transform_that_keeps_something_of_other_records_is_refused(synthetic, tmp_path, how):
    with pytest.raises(
        DataError, match=r'private.pipeline: a sample is not the same .*test_alone.Stateful keeps something'
    ):
        built(synthetic, tmp_path, dict(type='Stateful', how=how))


def test_it_is_refused_inside_another_one_and_in_a_pipeline_that_a_hook_switches_to(synthetic, tmp_path):
    inside = dict(type='RandomApply', transforms=[dict(type='Stateful', how='mean')], prob=0.5)
    with pytest.raises(DataError, match='Stateful'):
        built(synthetic, tmp_path, inside, method='feature')
    dataset = built(synthetic, tmp_path)
    with pytest.raises(DataError, match='Stateful'):
        dataset.pipeline = [*dataset.pipeline.transforms[:-1], Stateful('mean'), dataset.pipeline.transforms[-1]]


@pytest.mark.parametrize('several', [False, True])
def test_a_codec_that_keeps_something_of_other_records_is_refused(synthetic, tmp_path, monkeypatch, several):
    """It makes the targets, and is no transform, but inside one."""
    cfg = config(synthetic, tmp_path, 'dpsgd')
    step = next(step for step in cfg.train_dataloader.dataset.private.pipeline if step['type'] == 'GenerateTarget')
    step['encoder'] = dict(step['encoder'], type='Centred')
    if several:
        step.update(encoder=[step['encoder'], dict(step['encoder'])], multilevel=True)
    settings = {key: value for key, value in cfg.train_dataloader.dataset.items() if key != 'type'}
    with pytest.raises(
        DataError, match=r'private.pipeline: a sample is not the same .*test_alone.Centred keeps something'
    ):
        PublicPrivateDataset(**settings)
    monkeypatch.setattr(Centred, 'remembers', False)
    assert len(PublicPrivateDataset(**settings))


@pytest.mark.parametrize('how', ['nothing', 'random', 'new generator'])
def test_what_treats_each_sample_by_itself_is_not(synthetic, tmp_path, how):
    assert len(built(synthetic, tmp_path, dict(type='Stateful', how=how)))


@pytest.mark.parametrize('how', ['loaded', 'loaded by name'])
def test_a_data_set_that_loads_a_neighbours_picture_is_refused(synthetic, tmp_path, monkeypatch, how):
    """As data sets of videos do: a transform may read it. Frames of one subject are one record."""
    monkeypatch.setattr(Neighbour, 'how', how)
    with pytest.raises(DataError, match=r'private.type=Neighbour: .* names a picture of another record'):
        built(synthetic, tmp_path, kind='Neighbour')
    file = tmp_path / 'subjects.json'
    people = json.loads((synthetic / 'annotations/mpii_train.json').read_text())
    file.write_text(json.dumps({person['image']: 'the same' for person in people}))
    assert built(synthetic, tmp_path, kind='Neighbour', privacy_unit='subject', subjects=str(file)).num_records == 1


@pytest.mark.parametrize('how', ['img_path', 'previous', 'own'])
def test_a_data_set_that_looks_at_a_neighbour_is_refused(synthetic, tmp_path, monkeypatch, how):
    monkeypatch.setattr(Neighbour, 'how', how)
    if how == 'own':
        assert len(built(synthetic, tmp_path, kind='Neighbour'))
        return
    with pytest.raises(
        DataError, match=r'private.type=Neighbour: get_data_info gives a record something of another one'
    ):
        built(synthetic, tmp_path, kind='Neighbour')


@pytest.mark.parametrize('how', ['joints', 'mean', 'weights', 'itself'])
def test_a_data_set_that_gives_a_record_something_of_the_others_is_refused(synthetic, tmp_path, monkeypatch, how):
    """Of the annotation file: nothing but another file shows it."""
    monkeypatch.setattr(Neighbour, 'how', how)
    with pytest.raises(
        DataError, match=r'private.type=Neighbour: a record is not the same if all others are copies of it'
    ):
        built(synthetic, tmp_path, dict(type='Blended'), kind='Neighbour')


@pytest.mark.parametrize('unit', ['instance', 'image'])
@pytest.mark.parametrize('how', ['neighbours', 'own'])
def test_what_it_gives_a_record_of_its_own_picture(synthetic, monkeypatch, how, unit):
    """Of COCO's annotations: the joints of all in the picture are one record if the picture is."""
    file = synthetic / coco_style(synthetic, 'Crowd', 16)
    content = json.loads(file.read_text())
    content['annotations'] += [
        dict(one, id=10 + one['id'], keypoints=one['keypoints'][::-1]) for one in content['annotations']
    ]
    file.write_text(json.dumps(content))
    monkeypatch.setattr(Crowd, 'how', how)
    settings = dict(mpii(synthetic), type='Crowd', ann_file=str(file), metainfo=dict(MpiiDataset.METAINFO))
    if how == 'own' or unit == 'image':
        assert PublicPrivateDataset(settings, privacy_unit=unit).num_records == (8 if unit == 'instance' else 4)
        return
    with pytest.raises(DataError, match=r'private.type=Crowd: a record is not the same if all others are copies of it'):
        PublicPrivateDataset(settings, privacy_unit=unit)


def test_a_transform_that_is_given_the_private_annotations_is_refused(synthetic, tmp_path):
    file = str(synthetic / 'annotations/mpii_train.json')
    with pytest.raises(DataError, match='Blended has the path of mpii_train.json, a file of the private set'):
        built(synthetic, tmp_path, dict(type='Blended', ann_file=file))


@pytest.mark.parametrize('kind', ['HistogramMatching', 'FDA'])
@pytest.mark.parametrize('how', ['a path', 'a copy', 'within OneOf', 'in the public part'])
def test_a_transform_that_is_given_a_private_picture_is_refused(synthetic, synthetic_public, tmp_path, kind, how):
    """Albumentations takes styles from other pictures: one person's picture would be in the samples of all."""
    images = sorted((synthetic / 'images').glob('*.jpg'))[3:5]
    copied = tmp_path / 'style.jpg'
    copied.write_bytes(images[0].read_bytes())
    style = dict(type=kind, reference_images=[str(copied)] if how == 'a copy' else [*map(str, images)], p=1.0)
    if how == 'within OneOf':
        style = dict(type='OneOf', transforms=[style, dict(type='Blur')])
    settings, public = mpii(synthetic), mpii(synthetic_public)
    changed = public if how == 'in the public part' else settings
    changed['pipeline'] = [*PIPELINE[:-2], dict(type='Albumentation', transforms=[style]), *PIPELINE[-2:]]
    with pytest.raises(DataError, match='Albumentation has the path of .*jpg, a file of the private set'):
        PublicPrivateDataset(settings, public=public)


def test_a_transform_may_be_given_public_pictures(synthetic, synthetic_public):
    images = [*map(str, sorted((synthetic_public / 'images').glob('*.jpg'))[:2])]
    style = dict(type='HistogramMatching', reference_images=images, p=1.0)
    settings = mpii(synthetic)
    settings['pipeline'] = [*PIPELINE[:-2], dict(type='Albumentation', transforms=[style]), *PIPELINE[-2:]]
    assert PublicPrivateDataset(settings)[0]


@pytest.mark.parametrize('name', ['CachedMosaic', 'CachedMixUp'])
def test_a_cache_of_mmdet_is_refused_by_its_name(synthetic, name):
    settings = mpii(synthetic)
    settings['pipeline'] = [*PIPELINE[:-2], dict(type=f'mmdet.{name}', img_scale=(64, 64)), *PIPELINE[-2:]]
    with pytest.raises(DataError, match=f'private.pipeline: {name} mixes several records'):
        PublicPrivateDataset(settings)
