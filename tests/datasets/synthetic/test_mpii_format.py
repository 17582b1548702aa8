"""MMPose reads the synthetic set as MPII: its data set and metric run on it unchanged, and the seed decides everything."""

import json

import cv2
import numpy as np
import pytest
from mmpose.registry import DATASETS, METRICS

from mmpose_dp.datasets.synthetic import make_synthetic_mpii
from mmpose_dp.privacy.errors import PrivacyError


def val_set(root):
    return DATASETS.build(
        dict(
            type='MpiiDataset',
            data_root=str(root),
            data_mode='topdown',
            ann_file='annotations/mpii_val.json',
            headbox_file=f'{root}/annotations/mpii_gt_val.mat',
            data_prefix=dict(img='images/'),
            test_mode=True,
        )
    )


def pck(dataset, error):
    """MpiiPCKAccuracy of predictions that are off by ``error`` head sizes."""
    metric = METRICS.build(dict(type='MpiiPCKAccuracy'))
    metric.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        truth = dataset.get_data_info(i)
        shift = error * np.sqrt(2) * 0.6 * truth['head_size'] / np.sqrt(2)
        sample = dict(
            pred_instances=dict(keypoints=truth['keypoints'] + shift.reshape(1, 1, 1) * np.array([1.0, 0.0])),
            gt_instances={k: truth[k] for k in ('keypoints', 'keypoints_visible', 'head_size')},
        )
        metric.process({}, [sample])
    return metric.evaluate(len(dataset))['PCK']


def test_mmposes_data_set_and_metric_read_it(synthetic):
    dataset = val_set(synthetic)
    assert len(dataset) == 12
    assert pck(dataset, 0.0) == 100 and pck(dataset, 3.0) < 20


def test_annotations_lie_on_the_pictures(synthetic):
    for split, count in (('train', 40), ('val', 12)):
        people = json.loads((synthetic / f'annotations/mpii_{split}.json').read_text())
        assert len(people) == count
        for person in people:
            height, width = cv2.imread(str(synthetic / 'images' / person['image'])).shape[:2]
            joints, seen = np.array(person['joints']), np.array(person['joints_vis'], bool)
            assert joints.shape == (16, 2) and seen.sum() >= 4
            assert (joints[seen] >= 1).all() and (joints[seen] <= [width, height]).all()
            assert (joints[~seen] == -1).all()


def test_nobody_is_in_both_splits(synthetic):
    train, val = (json.loads((synthetic / f'annotations/mpii_{s}.json').read_text()) for s in ('train', 'val'))
    assert not {p['subject'] for p in train} & {p['subject'] for p in val}
    assert not {p['image'] for p in train} & {p['image'] for p in val}


def test_the_seed_decides_and_the_number_of_workers_does_not(tmp_path):
    def files(name, **settings):
        root = make_synthetic_mpii(tmp_path / name, 'private', 10, 4, image_size=96, **settings)
        return {
            p.relative_to(root): p.read_bytes() for p in sorted(root.rglob('*.jp*g')) + sorted(root.rglob('*.json'))
        }

    one = files('one', workers=1, seed=3)
    assert one == files('two', workers=2, seed=3)
    other = files('three', workers=2, seed=4)
    assert not any(one[p] == other.get(p) for p in one if p.suffix == '.jpg')


def test_the_domains_differ(synthetic, synthetic_public):
    """In the mean colour of their pictures, by several times the standard error."""

    def colours(root):
        return np.array([cv2.imread(str(p)).mean((0, 1)) for p in sorted((root / 'images').glob('*.jpg'))])

    a, b = colours(synthetic), colours(synthetic_public)
    gap = np.abs(a.mean(0) - b.mean(0)) / np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
    assert gap.max() > 4


def test_a_finished_set_is_kept_and_another_is_not_overwritten(tmp_path):
    root = make_synthetic_mpii(tmp_path / 'set', 'private', 6, 2, image_size=96, workers=1)
    picture = next((root / 'images').iterdir())
    written = picture.stat().st_mtime_ns
    make_synthetic_mpii(root, 'private', 6, 2, image_size=96, workers=1)
    assert picture.stat().st_mtime_ns == written
    with pytest.raises(PrivacyError, match='already holds another data set'):
        make_synthetic_mpii(root, 'public', 6, 2, image_size=96, workers=1)
    make_synthetic_mpii(root, 'public', 6, 2, image_size=96, workers=1, force=True)
    assert json.loads((root / 'synthetic.json').read_text())['domain'] == 'public'


@pytest.mark.parametrize('settings', [dict(domain='x'), dict(num_train=0), dict(image_size=8), dict(workers=0)])
def test_bad_arguments(tmp_path, settings):
    with pytest.raises(PrivacyError, match='--'):
        make_synthetic_mpii(tmp_path, **settings)
