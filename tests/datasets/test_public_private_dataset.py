"""The data set of two parts: samples are what they say, and public data is public."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.runner import set_random_seed
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.registry import DATASETS, TRANSFORMS

from mmpose_dp.datasets import PublicPrivateDataset, collate_samples
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.datasets import PIPELINE, coco_style, mpii

VIEW = dict(type='PublicView', mode='blur')


def test_parts_and_metainfo(synthetic):
    dataset = PublicPrivateDataset(mpii(synthetic), public_view=VIEW)
    assert (dataset.num_records, dataset.num_public, len(dataset)) == (40, 40, 80)
    (private,), (public,) = dataset[3], dataset[43]
    assert private['data_samples'].metainfo['dp_record'] == 3
    assert public['data_samples'].metainfo['dp_record'] is None
    assert private['data_samples'].metainfo['img_path'] == public['data_samples'].metainfo['img_path']
    # Means over many people: each sample is a crop of its own, and one may be as smooth as another's view.
    assert _sharpness(dataset, range(40, 80)) < 0.6 * _sharpness(dataset, range(40))
    assert dataset.view_description.startswith('Gaussian blur') and dataset.public_description is None


def test_without_public_part_and_with_another_set(synthetic, synthetic_public):
    plain = PublicPrivateDataset(mpii(synthetic))
    assert (plain.num_public, plain.view_description, plain.public_description) == (0, None, None)
    other = PublicPrivateDataset(mpii(synthetic), public=mpii(synthetic_public))
    assert other.num_public == 40 and 'mpii_train.json' in other.public_description
    assert other.view_description is None
    assert other[40][0]['data_samples'].metainfo['img_path'].startswith(str(synthetic_public))


def test_views_and_public_pictures_beside_them(synthetic, synthetic_public):
    dataset = PublicPrivateDataset(mpii(synthetic), public_view=VIEW, public=mpii(synthetic_public))
    assert (dataset.num_records, dataset.num_public, len(dataset)) == (40, 80, 120)
    samples = [dataset[index][0] for index in (3, 43, 83)]
    meta = [packed['data_samples'].metainfo for packed in samples]
    assert [m['dp_record'] for m in meta] == [3, None, None]
    roots = (synthetic, synthetic, synthetic_public)
    assert all(m['img_path'].startswith(str(root)) for m, root in zip(meta, roots))
    private, view, public = (_sharpness(dataset, part) for part in (range(40), range(40, 80), range(80, 120)))
    assert view < 0.6 * private and view < 0.6 * public  # the public pictures are not blurred
    assert 'blur' in dataset.view_description and 'mpii_train.json' in dataset.public_description
    with pytest.raises(PrivacyError, match='shares|has the private annotation'):
        PublicPrivateDataset(mpii(synthetic), public_view=VIEW, public=mpii(synthetic))


def _sharpness(dataset, indices):
    pictures = (dataset[index][0]['inputs'].numpy().astype(float) for index in indices)
    return np.mean([np.abs(np.diff(picture)).mean() for picture in pictures])


def test_missing_public_pictures_are_refused_beside_views_too(synthetic, synthetic_public, tmp_path):
    shutil.copytree(synthetic_public / 'annotations', tmp_path / 'annotations')
    (tmp_path / 'images').mkdir()
    for view in (None, VIEW):
        with pytest.raises(PrivacyError, match=r'dataset\.public: the pipeline fails on its first samples'):
            PublicPrivateDataset(mpii(synthetic), public_view=view, public=mpii(tmp_path))


def test_a_pipeline_that_packs_nothing_is_refused(synthetic):
    settings = dict(mpii(synthetic), pipeline=PIPELINE[:-1])
    with pytest.raises(PrivacyError, match=r'dataset\.private: the pipeline.*does not end with PackPoseInputs'):
        PublicPrivateDataset(settings)


def test_nothing_random_stands_before_the_view(synthetic):
    """Each record would have had a view of every strength of it."""
    settings = mpii(synthetic)
    settings['pipeline'] = [PIPELINE[0], dict(type='PhotometricDistortion'), *PIPELINE[1:]]
    with pytest.raises(PrivacyError, match='PhotometricDistortion.*before GetBBoxCenterScale.*move it behind'):
        PublicPrivateDataset(settings, public_view=VIEW)


def test_joints_are_as_annotated_where_a_view_hides_heads(synthetic):
    """Joints 8 and 9 of MPII are neck and head; of COCO they are elbow and wrist, around which heads would stay visible."""
    to_coco = dict(type='KeypointConverter', num_keypoints=17, mapping=[(10, 10), (11, 8), (12, 6), (13, 5)])
    faces, settings, (load, box, _, *rest) = dict(VIEW, mode='face'), mpii(synthetic), PIPELINE  # without a flip
    settings.update(pipeline=[load, to_coco, box, *rest], metainfo=dict(from_file='configs/_base_/datasets/coco.py'))
    with pytest.raises(PrivacyError, match='changes keypoints before GetBBoxCenterScale.*KeypointConverter.*behind'):
        PublicPrivateDataset(settings, public_view=faces)
    PublicPrivateDataset(settings, public_view=VIEW)  # a blur reads no joints
    dataset = PublicPrivateDataset(dict(settings, pipeline=[load, box, to_coco, *rest]), public_view=faces)
    load, box, view = dataset.views.pipeline.transforms[:3]
    for sample in range(40):
        info = dataset.view_info(sample)
        x, y = info['keypoints'][0][[8, 9]].mean(0).astype(int)
        assert (view(box(load(info)))['img'][y, x] == 127).all()


@TRANSFORMS.register_module()
class OfHalfSize(BaseTransform):
    """Halves a picture and its box."""

    def transform(self, results):
        results['img'] = np.ascontiguousarray(results['img'][::2, ::2])
        results['bbox'] = results['bbox'] / 2
        return results


def test_boxes_are_as_annotated_before_a_view(synthetic):
    settings = dict(mpii(synthetic), pipeline=[PIPELINE[0], dict(type='OfHalfSize'), *PIPELINE[1:]])
    with pytest.raises(PrivacyError, match='changes bbox before GetBBoxCenterScale'):
        PublicPrivateDataset(settings, public_view=VIEW)


def test_image_unit_groups_the_people_of_an_image(synthetic):
    people = json.loads((synthetic / 'annotations/mpii_train.json').read_text())
    dataset = PublicPrivateDataset(mpii(synthetic), privacy_unit='image')
    assert dataset.num_records == len({p['image'] for p in people}) < 40
    samples = sorted(sample for r in range(dataset.num_records) for sample in dataset.samples_of(r))
    assert samples == list(range(40))
    for r in range(dataset.num_records):
        assert len({people[sample]['image'] for sample in dataset.samples_of(r)}) == 1
        assert {dataset[i][0]['data_samples'].metainfo['dp_record'] for i in dataset.samples_of(r)} == {r}


def test_a_rejected_sample_is_left_out_not_replaced(synthetic):
    dataset = PublicPrivateDataset(mpii(synthetic))
    pipeline = dataset.private.pipeline
    dataset.private.pipeline = lambda info: None if info['sample_idx'] == 0 else pipeline(info)
    assert dataset[0] == [] and len(dataset[1]) == 1
    assert collate_samples([[], []]) == dict(inputs=[], data_samples=[])
    one, other = (dict(inputs=torch.zeros(3, size, 8), data_samples=None) for size in (8, 9))
    assert len(collate_samples([[], [one], [one]])['inputs']) == 2
    with pytest.raises(PrivacyError, match='different sizes.*TopdownAffine'):  # padding would show the others' size
        collate_samples([[one], [other]])


def test_missing_data_shows_the_layout_and_the_command(tmp_path):
    with pytest.raises(PrivacyError, match=r'(?s)mpii_train.json does not exist.*images/.*make_synthetic_mpii.py'):
        PublicPrivateDataset(mpii(tmp_path))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(privacy_unit='family'), 'privacy_unit'),
        (dict(public_view=VIEW, public={}), 'public={} must be a config'),
        (dict(augmentations=0), 'augmentations=0 must be'),
    ],
)
def test_bad_settings(synthetic, settings, message):
    with pytest.raises(PrivacyError, match=message):
        PublicPrivateDataset(mpii(synthetic), **settings)


def test_mixing_and_repeating_are_refused(synthetic):
    mixed = mpii(synthetic)
    mixed['pipeline'] = [dict(type='Mosaic', img_scale=(64, 64)), *PIPELINE]
    with pytest.raises(PrivacyError, match='private.pipeline: Mosaic mixes several records'):
        PublicPrivateDataset(mixed)
    repeated = dict(type='RepeatDataset', times=2, dataset=mpii(synthetic))
    with pytest.raises(PrivacyError, match='RepeatDataset'):
        PublicPrivateDataset(repeated)


def test_it_is_registered():
    assert DATASETS.get('PublicPrivateDataset') is PublicPrivateDataset


def test_augmentation_does_not_follow_mmengines_seed(synthetic):
    """By that seed, which checkpoints hold, one more record would change how all others look; and it is left as it was."""
    dataset = PublicPrivateDataset(mpii(synthetic), public_view=VIEW)
    for index in (3, 43):
        seen = []
        for _ in range(6):
            set_random_seed(7)
            seen.append(dataset[index][0]['inputs'].numpy().tobytes())
            after = (random.random(), np.random.rand(), float(torch.rand(1)))
            set_random_seed(7)
            assert after == (random.random(), np.random.rand(), float(torch.rand(1)))
        assert len(set(seen)) > 3
    again = [PublicPrivateDataset(mpii(synthetic), debug_seed=1)[3][0]['inputs'] for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize('wrapper', ['RandomApply', 'RandomChoice'])
def test_mixing_transforms_within_others_are_refused(synthetic, wrapper):
    mosaic = dict(type='Mosaic', img_scale=(96, 96), prob=1.0, pre_transform=[dict(type='LoadImage')])
    inner = [mosaic] if wrapper == 'RandomApply' else [[mosaic]]
    settings = mpii(synthetic)
    settings['pipeline'] = [PIPELINE[0], dict(type=wrapper, transforms=inner), *PIPELINE[1:]]
    with pytest.raises(PrivacyError, match='Mosaic mixes'):
        PublicPrivateDataset(settings)


def test_a_pipeline_is_given_no_other_record(synthetic):
    dataset = PublicPrivateDataset(mpii(synthetic))
    seen = []
    dataset.private.pipeline.transforms.insert(0, lambda results: seen.append(set(results)) or results)
    dataset[3]
    assert seen and 'dataset' not in seen[0]


def test_copies_of_a_picture_have_one_view(synthetic, tmp_path, capsys):
    """Data sets that keep a picture for each person in it: in the view of one, the others stayed visible."""
    people = json.loads((synthetic / 'annotations/mpii_train.json').read_text())
    pictures = {}
    for person in people:
        pictures.setdefault(person['image'], []).append(person)
    shutil.copytree(synthetic / 'images', tmp_path / 'images')
    (tmp_path / 'annotations').mkdir()
    image, (one, other, *_) = next((name, group) for name, group in pictures.items() if len(group) > 1)
    shutil.copy(synthetic / 'images' / image, tmp_path / 'images/999999.jpg')
    apart = [
        dict(one),
        dict(other, image='999999.jpg', scale=2 * other['scale']),
        *(p for p in people if p['image'] != image),
    ]
    (tmp_path / 'annotations/mpii_train.json').write_text(json.dumps(apart))
    for mode in ('person', 'blur'):
        dataset = PublicPrivateDataset(mpii(tmp_path), public_view=dict(VIEW, mode=mode))
        mine, copy = (dataset.view_info(number) for number in range(2))
        assert len(mine['people']) == len(copy['people']) == 1 and mine['view_box'] == copy['view_box']
        views = [
            dataset.public_view.transform(
                dataset.views.pipeline.transforms[1](dataset.views.pipeline.transforms[0](info))
            )['img']
            for info in (mine, copy)
        ]
        shown = (views[0] != 127) & (views[1] != 127)
        assert shown.any() and (views[0][shown] == views[1][shown]).all()
    assert 'pictures are copies of others, such as 999999.jpg of' in capsys.readouterr().err
    PublicPrivateDataset(mpii(tmp_path))
    assert 'copies' not in capsys.readouterr().err  # which harms views alone


@pytest.mark.parametrize(('mode', 'follows'), [('blur', 'boxes'), ('face', 'boxes and joints')])
def test_what_a_view_follows_is_told_apart(synthetic, mode, follows):
    """By their content: whatever the file is called, and in whatever order it has the people."""
    people = json.loads((synthetic / 'annotations/mpii_train.json').read_text())[:4]

    def followed(changed, pipeline=PIPELINE):
        (synthetic / 'annotations/changed.json').write_text(json.dumps(changed))
        settings = dict(mpii(synthetic), ann_file='annotations/changed.json', pipeline=pipeline)
        return PublicPrivateDataset(settings, public_view=dict(VIEW, mode=mode)).view_source

    usual, first = followed(people), people[0]
    assert usual.startswith(f'{follows} (sha256 ') and followed(people[::-1]) == usual
    assert followed([dict(first, scale=2 * first['scale']), *people[1:]]) != usual
    moved = followed([dict(first, joints=[[1.0, 1.0], *first['joints'][1:]]), *people[1:]])
    assert (moved == usual) == (mode == 'blur')
    assert followed(people, [dict(PIPELINE[0], imdecode_backend='cv2'), *PIPELINE[1:]]) == usual  # which is the default
    assert followed(people, [dict(PIPELINE[0], color_type='grayscale'), *PIPELINE[1:]]) != usual
    assert PublicPrivateDataset(mpii(synthetic)).view_source is None


def test_the_description_distinguishes_views_of_other_boxes(synthetic):
    """A blur's size follows the padded box: with a tighter one, more of the picture is left."""
    tight = mpii(synthetic)
    tight['pipeline'] = [
        dict(step, padding=1.0) if step['type'] == 'GetBBoxCenterScale' else step for step in tight['pipeline']
    ]
    usual, other = (
        PublicPrivateDataset(cfg, dict(type='PublicView')).view_description for cfg in (mpii(synthetic), tight)
    )
    assert 'padded' not in usual and other.replace(', boxes padded by 1', '') == usual != other


@pytest.mark.parametrize(('name', 'part'), [('CocoWholeBodyHandDataset', 'hand'), ('CocoWholeBodyFaceDataset', 'face')])
def test_a_view_that_hides_a_part_of_each_person_does_not_claim_to_hide_people(synthetic, name, part):
    """The statement said: everything but the squares around annotated people."""
    number = parse_pose_metainfo(DATASETS.get(name).METAINFO)['num_keypoints']
    cfg = dict(mpii(synthetic), type=name, ann_file=coco_style(synthetic, name, number))
    words = [
        PublicPrivateDataset(cfg, dict(type='PublicView', mode=mode), privacy_unit='image').view_description
        for mode in ('person', 'blur')
    ]
    assert f'whose boxes are of {part}s alone: the rest of them is visible' in words[0] and 'alone' not in words[1]
    usual = PublicPrivateDataset(mpii(synthetic), dict(type='PublicView', mode='person')).view_description
    assert usual == 'everything but the squares around annotated people'
