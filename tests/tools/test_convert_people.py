"""LSP and COCO in MPII's layout, from small sources in their own formats."""

import json

import convert_people
import cv2
import numpy as np
import pytest
from mmpose.registry import DATASETS
from scipy.io import loadmat, savemat

from mmpose_dp.datasets.converting import COCO, LSP
from mmpose_dp.datasets.mpii_files import JOINTS, estimated_head_boxes

PEOPLE = 12


def picture(path, seed, quality=95):
    rng = np.random.default_rng(seed)
    cv2.imwrite(str(path), cv2.resize(rng.integers(0, 255, (8, 10, 3), np.uint8), (320, 240)), [1, quality])


@pytest.fixture(scope='module')
def lsp(tmp_path_factory):
    """LSP-extended's form: the last joint of the second person is not annotated; 2 and 3 are near copies; 4 has few joints."""
    folder = tmp_path_factory.mktemp('lsp')
    (folder / 'images').mkdir()
    joints = np.random.default_rng(0).uniform(40, 200, (14, 3, PEOPLE))
    joints[:, 2] = 1
    joints[13, :, 1] = 0
    joints[5:, 2, 3] = 0
    for i in range(PEOPLE):
        picture(folder / f'images/im{i + 1:05d}.jpg', 1 if i == 2 else i, quality=60 if i == 2 else 95)
    savemat(folder / 'joints.mat', dict(joints=joints))
    return folder, joints


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """COCO's form: two people per picture, one of whom is tiny in the first, and a crowd."""
    folder = tmp_path_factory.mktemp('coco')
    rng, people = np.random.default_rng(0), []
    for i in range(6):
        picture(folder / f'{i}.jpg', 100 + i)
        for j in range(2):
            points = np.concatenate([rng.uniform(60, 190, (17, 2)), np.full((17, 1), 2)], axis=1)
            points[15] = 0
            box = [50, 50, 20, 20] if (i, j) == (0, 1) else [50, 50, 150, 150]
            people.append(dict(image_id=i, keypoints=points.ravel().tolist(), num_keypoints=16, bbox=box, iscrowd=0))
    people.append(dict(people[0], iscrowd=1))
    content = dict(images=[dict(id=i, file_name=f'{i}.jpg') for i in range(6)], annotations=people)
    (folder / 'people.json').write_text(json.dumps(content))
    return folder, people


def load(out, split):
    more = dict(headbox_file=str(out / 'annotations/mpii_gt_val.mat'), test_mode=True) if split == 'val' else {}
    names = dict(ann_file=f'annotations/mpii_{split}.json', data_prefix=dict(img='images/'))
    return DATASETS.build(dict(type='MpiiDataset', data_root=str(out), **names, **more))


def both(out):
    return [a for s in ('train', 'val') for a in json.loads((out / f'annotations/mpii_{s}.json').read_text())]


def test_lsp(lsp, tmp_path, call):
    folder, joints = lsp
    done = call(convert_people, '--lsp', folder, '--out', tmp_path / 'out', '--val-share', 0.3)
    assert done.returncode == 0 and '8 + 3 people' in done.stdout, done.stderr + done.stdout
    train, val = load(tmp_path / 'out', 'train'), load(tmp_path / 'out', 'val')
    assert len(train) == 8 and len(val) == 3
    people = {p['source']: p for p in both(tmp_path / 'out')}
    assert 'im00004' not in people and people['im00002']['joints_vis'][LSP[13]] == 0
    in_val = {
        val_person['source'] for val_person in json.loads((tmp_path / 'out/annotations/mpii_val.json').read_text())
    }
    assert ('im00002' in in_val) == ('im00003' in in_val)
    for key, person in people.items():  # distances between joints survive, up to the reduction
        theirs = joints[:, :2, int(key[2:]) - 1]
        ours = np.array(person['joints'])[list(LSP)]
        seen = np.array(person['joints_vis'], bool)[list(LSP)]
        assert person['joints_vis'][JOINTS.index('pelvis')] == person['joints_vis'][JOINTS.index('thorax')] == 0
        assert 200 * person['scale'] <= 112.1
        extent = 1.12 * np.ptp(theirs[seen], axis=0).max()
        factor = np.ptp(ours[seen], axis=0) / np.ptp(theirs[seen], axis=0)
        np.testing.assert_allclose(factor, 200 * person['scale'] / extent, rtol=0.03)
    sample = val[0]
    points = sample['keypoints'][0][sample['keypoints_visible'][0] > 0]
    low, high = sample['bbox'][0][:2], sample['bbox'][0][2:]
    assert (points > low - 2).all() and (points < high + 2).all()  # the box holds the joints
    neck, head = (sample['keypoints'][0][JOINTS.index(name)] for name in ('neck', 'head'))
    if sample['keypoints_visible'][0][[8, 9]].all():
        assert sample['head_size'].item() == pytest.approx(np.linalg.norm(neck - head), rel=0.01)
    truth = loadmat(tmp_path / 'out/annotations/mpii_gt_val.mat')
    assert truth['headboxes_src'].shape == (2, 2, 3) and truth['pos_gt_src'].shape == (16, 2, 3)


def test_lsp_in_its_older_form(lsp, tmp_path, call):
    """Three rows of 14, names of four digits, and every joint annotated: the third row says hidden or not."""
    folder, joints = lsp
    older = tmp_path / 'lsp'
    (older / 'images').mkdir(parents=True)
    for i in range(PEOPLE):
        (older / f'images/im{i + 1:04d}.jpg').write_bytes((folder / f'images/im{i + 1:05d}.jpg').read_bytes())
    turned = np.concatenate([joints[:, :2], np.zeros_like(joints[:, 2:])], axis=1)
    savemat(older / 'joints.mat', dict(joints=turned.transpose(1, 0, 2)))
    assert call(convert_people, '--lsp', older, '--out', tmp_path / 'out').returncode == 0
    people = both(tmp_path / 'out')
    assert len(people) == PEOPLE and all(sum(p['joints_vis']) == 14 for p in people)


def test_coco(coco, tmp_path, call):
    folder, annotated = coco
    done = call(
        convert_people,
        '--coco',
        folder / 'people.json',
        '--images',
        folder,
        '--out',
        tmp_path / 'out',
        '--val-share',
        0.4,
    )
    assert done.returncode == 0, done.stderr
    people = both(tmp_path / 'out')
    assert len(people) == 11  # without the tiny one and the crowd
    splits = [
        {p['source'] for p in json.loads((tmp_path / f'out/annotations/mpii_{s}.json').read_text())}
        for s in ('train', 'val')
    ]
    assert splits[0] and splits[1] and not splits[0] & splits[1]  # both people of a picture are on one side
    person = next(p for p in people if p['source'] == '0.jpg')
    theirs = np.array(annotated[0]['keypoints']).reshape(17, 3)
    assert person['joints_vis'][COCO[15]] == 0 and sum(person['joints_vis']) == 11
    factor = 112 / 150
    difference = np.array(person['joints'])[COCO[16]] - np.array(person['joints'])[COCO[5]]
    np.testing.assert_allclose(difference, factor * (theirs[16, :2] - theirs[5, :2]), atol=1.0)


def test_what_is_refused(lsp, coco, tmp_path, call):
    folder, _ = lsp

    def refused(*arguments):
        done = call(convert_people, *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        return done.stderr

    assert '--images' in refused('--coco', coco[0] / 'people.json', '--out', tmp_path / 'a')
    assert 'joints.mat' in refused('--lsp', tmp_path, '--out', tmp_path / 'a')
    (tmp_path / 'used/annotations').mkdir(parents=True)
    (tmp_path / 'used/annotations/mpii_train.json').write_text('[]')
    assert 'already holds' in refused('--lsp', folder, '--out', tmp_path / 'used')
    assert '--val-share' in refused('--lsp', folder, '--out', tmp_path / 'b', '--val-share', 1.5)
    (tmp_path / 'boxes.json').write_text(json.dumps(dict(images=[], annotations=[dict(bbox=[0, 0, 1, 1])])))
    assert 'person_keypoints' in refused(
        '--coco', tmp_path / 'boxes.json', '--images', tmp_path, '--out', tmp_path / 'c'
    )
    people = coco[0] / 'people.json'
    assert 'no picture' in refused('--coco', people, '--images', tmp_path, '--out', tmp_path / 'd')
    assert '0 people' in refused('--coco', people, '--images', coco[0], '--out', tmp_path / 'e', '--least-joints', 13)
    one = json.loads(people.read_text())
    one['annotations'] = [a for a in one['annotations'] if a['image_id'] == 2]
    (tmp_path / 'one.json').write_text(json.dumps(one))
    assert 'cannot be divided' in refused('--coco', tmp_path / 'one.json', '--images', coco[0], '--out', tmp_path / 'e')


def test_the_estimated_head_size_falls_back():
    """Neck to head top; else of shoulders to hips; else of the size."""
    joints = np.zeros((16, 2))
    joints[JOINTS.index('head')] = 10, 0
    for name in ('l_hip', 'r_hip'):
        joints[JOINTS.index(name)] = 0, 60

    def size(*seen):
        person = dict(joints=joints.tolist(), joints_vis=[int(name in seen) for name in JOINTS], scale=0.5)
        ((low, high),) = estimated_head_boxes([person])
        return 0.6 * np.linalg.norm(high - low)

    assert size('neck', 'head') == pytest.approx(10)
    assert size('neck', 'l_shoulder', 'r_hip') == pytest.approx(30)
    assert size('l_hip') == pytest.approx(15)
