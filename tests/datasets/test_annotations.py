"""Annotation files as annotation tools write them: what plain MMPose can use is used, the rest is refused in one sentence."""

import copy
import gzip
import json
import re
import shutil

import cv2
import numpy as np
import pytest

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.privacy.errors import DataError
from tests.support.coco_data import META, PIPELINE, content, write
from tests.support.datasets import mpii


def each(change):
    def changed(data):
        for image, ann in zip(data['images'], data['annotations']):
            change(image, ann)

    return changed


def _joints(change):
    def changed(image, ann):
        joints = np.array(ann['keypoints'], dtype=float).reshape(-1, 3)
        change(joints)
        ann['keypoints'] = joints.flatten().tolist()

    return each(changed)


def _texts(image, ann):
    image['id'] = ann['image_id'] = f'a3f0-{image["id"]:04d}'


REFUSED = {
    'one id in every picture': (each(lambda i, a: a.update(id=1)), 'more than one annotation with the id 1,.*Renumber'),
    'an id twice': (lambda d: d['annotations'][5].update(id=3), 'more than one annotation with the id 3'),
    'an annotation twice': (lambda d: d['annotations'].append(dict(d['annotations'][2])), 'annotation with the id 3'),
    'an id as 3 and 3.0': (lambda d: d['annotations'][5].update(id=3.0), 'more than one annotation with the id 3.0'),
    'no id': (lambda d: d['annotations'][4].pop('id'), 'an annotation whose id is None.*a different id'),
    'an id that is a list': (lambda d: d['annotations'][4].update(id=[1]), r'annotation whose id is \[1\]'),
    'an image id twice': (lambda d: d['images'][1].update(id=1), 'more than one image with the id 1'),
    'an image without id': (lambda d: d['images'][1].pop('id'), 'an image whose id is None'),
    'image ids that are texts': (each(_texts), "an image whose id is 'a3f0-0001'.*a whole number"),
    'image_id as text': (each(lambda i, a: a.update(image_id=str(i['id']))), "no annotation has the id of an image.*'1'"),
    'no image_id': (each(lambda i, a: a.pop('image_id')), 'no annotation has the id of an image'),
    'joints in 0 to 1': (_joints(lambda j: np.divide(j[:, :2], 50, out=j[:, :2])), 'between 0 and 1.*multiply'),
    'joints of larger pictures': (_joints(lambda j: np.multiply(j[:, :2], 10, out=j[:, :2])), 'in or near its box'),
    'joints that are all invisible': (_joints(lambda j: j[:, 2].fill(0)), 'marked visible'),
    'a joint below 0': (_joints(lambda j: j[:1, 2].fill(-1)), 'a visibility below 0.* Write 0 for joints'),
    'joints that are not finite': (_joints(lambda j: j[:, :2].fill(np.nan)), 'marked visible'),
    'boxes elsewhere': (each(lambda i, a: a.update(bbox=[0.0, 0.0, 2.0, 2.0])), 'in or near its box'),
    'boxes of no size': (each(lambda i, a: a.update(bbox=[12.0, 8.0, 0.0, 0.0])), 'holds no annotated person'),
    'boxes that go left': (each(lambda i, a: a.update(bbox=[36.0, 8.0, -24.0, 24.0])), '8 with a box whose width or height is 0'),
    'nobody with keypoints': (each(lambda i, a: a.pop('keypoints')), 'leaves out annotations: 8 without keypoints'),
    'crowds as text': (each(lambda i, a: a.update(iscrowd='0')), '8 with an iscrowd that is text, which counts as 1'),
    'boxes outside': (each(lambda i, a: a.update(bbox=[500.0, 9.0, 9.0, 9.0])), '8 with a box outside of its picture'),
    'no annotations': (lambda d: d.update(annotations=[]), r'\(the file has no annotations\)'),
    'an annotation that is null': (lambda d: d['annotations'].append(None), r'annotations\[8\] is no object'),
    'boxes with a score': (each(lambda i, a: a['bbox'].append(0.9)), 'annotation 1 has no list of four numbers'),
    'image ids with a fraction': (
        each(lambda i, a: (i.update(id=i['id'] + 0.5), a.update(image_id=i['id']))), r'image whose id is 1\.5.*a whole number',
    ),
    'an image id that is true': (lambda d: d['images'][0].update(id=True), 'image whose id is True.*a whole number'),
    'crowds': (each(lambda i, a: a.update(iscrowd=1)), 'leaves out annotations: 8 with iscrowd=1'),
    'no boxes': (each(lambda i, a: a.pop('bbox')), 'leaves out annotations: 8 without bbox'),
    'num_keypoints of 0': (each(lambda i, a: a.update(num_keypoints=0)), 'leaves out annotations: 8 with num_keypoints=0'),
    'a box that is not finite': (
        lambda d: d['annotations'][3].update(bbox=[np.nan] * 4),
        'annotation 4 has a box with NaN or infinity.*write its box',
    ),
    'categories by number': (lambda d: d.update(categories={'1': 'person'}), 'Probably since categories is no list'),
    'categories that are names': (lambda d: d.update(categories=['person']), r'Probably since categories\[0\] is no object'),
    'a category without id': (lambda d: d['categories'][0].pop('id'), r'Probably since categories\[0\] has no id'),
    'annotations by number': (
        lambda d: d.update(annotations={str(a['id']): a for a in d['annotations']}), 'Probably since annotations is no list',
    ),
    'a box that is null': (lambda d: d['annotations'][3].update(bbox=None), 'annotation 4 has no list of four numbers'),
    'a box of three': (lambda d: d['annotations'][3].update(bbox=[1, 2, 3]), 'annotation 4 has no list of four numbers'),
    'keypoints that are null': (lambda d: d['annotations'][2].update(keypoints=None), 'annotation 3 has no flat list'),
    'no category_id': (lambda d: d['annotations'][0].pop('category_id'), 'annotation 1 has no category_id'),
    'a width as text': (lambda d: d['images'][5].update(width='48'), 'Probably since image 6 has a width that is no number'),
    'no width': (lambda d: d['images'][5].pop('width'), 'Probably since image 6 has no width'),
    'a person with fewer joints': (
        lambda d: d['annotations'][3].update(keypoints=[20.0, 20.0, 2.0]),
        'annotation 4 has 1 joints and others have 5',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_refused_before_training(tmp_path, name):
    change, message = REFUSED[name]
    data = content()
    change(data)
    with pytest.raises(DataError, match=f'(?s)dataset.private.*{message}'):
        PublicPrivateDataset(write(tmp_path, data))


@pytest.mark.parametrize(
    ('coded', 'message'),
    [
        (lambda text: text.encode('utf-8-sig'), 'the file begins with a byte order mark: save it as UTF-8 without one'),
        (lambda text: gzip.compress(text.encode()), 'the file is compressed: unpack it'),
        (lambda text: text.encode('utf-16'), 'the file is not JSON in UTF-8'),
    ],
    ids=['byte order mark', 'gzip', 'utf-16'],
)
def test_files_in_another_coding(tmp_path, coded, message):
    cfg = write(tmp_path)
    path = tmp_path / 'own.json'
    path.write_bytes(coded(path.read_text()))
    with pytest.raises(DataError, match=f'Probably since {message}'):
        PublicPrivateDataset(cfg)


def test_files_of_another_format(tmp_path):
    """MMPose's words were "string indices must be integers" and "annotation file format <class 'list'> not supported"."""
    cfg = write(tmp_path)
    for text, message in (
        ('[{"joints": [[1, 2]]}]', "the file has MPII's format: write type='MpiiDataset'"),
        ('[1]', "the file is a list, and COCO's format is an object with images, annotations and categories"),
    ):
        (tmp_path / 'own.json').write_text(text)
        with pytest.raises(DataError, match=f'Probably since {message}'):
            PublicPrivateDataset(cfg)


@pytest.mark.parametrize('place', [float('nan'), None])
def test_joints_without_a_place_are_told(tmp_path, capfd, place):
    """A regression head lost each such record, and the message named no annotation."""
    data = content()
    PublicPrivateDataset(write(tmp_path, data))
    assert 'NaN' not in capfd.readouterr().err
    data['annotations'][3]['keypoints'][:3] = [place, place, 0]
    PublicPrivateDataset(write(tmp_path, data))
    assert '1 of 8 annotations have a joint whose place is NaN, null or infinite' in capfd.readouterr().err


def test_a_home_folder_is_not_looked_up(tmp_path):
    """MMPose reads ~ as the name of a folder."""
    with pytest.raises(
        DataError, match=r'~/own/own.json does not exist. MMPose does not replace ~.* write the whole path'
    ):
        PublicPrivateDataset(dict(write(tmp_path), data_root='~/own/'))


SETTINGS = {
    'no ann_file': (dict(ann_file=''), 'private has no ann_file: write the path'),
    'a folder': (dict(ann_file='img'), "private.ann_file='img' is the folder .*/img: write the path of a file"),
    'a prefix of another name': (dict(data_prefix=dict(images='img/')), r"write data_prefix=dict\(img='...'\)"),
    'a data set of other keys': (
        dict(type='CocoWholeBodyDataset'),
        r"annotation 1 has no foot_kpts.*write type='CocoDataset' and.*from_file='configs/_base_/datasets/coco_wholebody.py'\)",
    ),
    'a data set of another format': (dict(type='MpiiDataset'), "the file has COCO's format: write type='CocoDataset'"),
    'a metainfo that is not there': (
        dict(metainfo=dict(from_file='own_joints.py')),
        r'since FileNotFoundError: .*own_joints.py.* does not exist.*: write metainfo=dict\(from_file=...\) with a path from',
    ),
    'a transform': (
        dict(pipeline=[PIPELINE[0], dict(type='TopdownAffine', input_size=32), *PIPELINE[2:]]),
        r'private\.pipeline\[1\]: TopdownAffine cannot be built: AssertionError: Invalid input_size 32',
    ),
    'no transform': (dict(pipeline=['LoadImage', *PIPELINE[1:]]), r"private\.pipeline\[0\]: 'LoadImage' cannot be built"),
    'a picture': (dict(ann_file='img/00.png'), 'the file is not JSON in UTF-8'),
    'a metainfo without joints': (dict(metainfo=dict(classes=['person'])), 'skeleton_info, joint_weights and sigmas, or'),
    'numbers of joints as text': (
        dict(metainfo=dict(META, keypoint_info={str(i): one for i, one in META['keypoint_info'].items()})),
        r"has the keys '0', '1', ..., which are text and must be numbers.*metainfo=dict\(from_file=...\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', SETTINGS)
def test_settings_that_name_no_annotations(tmp_path, name):
    changes, message = SETTINGS[name]
    with pytest.raises(DataError, match=message):
        PublicPrivateDataset(dict(write(tmp_path), **changes))


def test_a_data_set_without_samples_in_bytes(tmp_path):
    data = content()
    each(lambda image, ann: ann.update(bbox=[12.0, 8.0, 24.0, 0.0]))(data)
    with pytest.raises(DataError, match='own.json holds no annotated person whose box has a size'):
        PublicPrivateDataset(dict(write(tmp_path, data), serialize_data=True))


def _as_corners(image, ann):
    x, y, w, h = ann['bbox']
    ann['bbox'] = [x + 2, y + 2, x + w + 10, y + h + 6]


WARNINGS = {
    'boxes as two corners': (each(_as_corners), r'8 of 8 boxes.*are these \[x1, y1, x2, y2\]'),
    'an annotation of no image': (lambda d: d['annotations'][6].update(image_id=99), '1 of 8 annotations'),
    'joints in another order': (
        lambda d: d['categories'][0].update(keypoints=['head', 'right_hand', 'left_hand', 'left_foot', 'right_foot']),
        'right_hand is joint 1 in the categories of .*own.json, and joint 2 in the metainfo',
    ),
    'pictures that lie on their side': (
        each(lambda image, ann: image.update(width=40, height=48)),
        r'00.png has a height and width of 40 and 48 pixels, and .*own.json says 48 and 40, .*cuts boxes',
    ),
    'most have no joint': (
        lambda d: [ann.update(keypoints=[400.0, 400.0, 2.0] * 5) for ann in d['annotations'][:6]],
        'only 2 of 8 annotations',
    ),
}


@pytest.mark.parametrize('name', WARNINGS)
def test_warnings_go_to_the_terminal_only(tmp_path, capfd, name):
    change, message = WARNINGS[name]
    data = content()
    change(data)
    PublicPrivateDataset(write(tmp_path, data))
    assert re.search(f'WARNING: train_dataloader.dataset.private: .*{message}', capfd.readouterr().err)


@pytest.mark.parametrize('images', [{}, {'1': dict(id=1)}, None])
def test_a_file_without_a_list_of_images(tmp_path, images):
    """The message was that each image_id should be written as the id of its image."""
    data = content()
    cfg = write(tmp_path, data)
    (tmp_path / 'own.json').write_text(json.dumps(dict(data, images=images)))
    with pytest.raises(DataError, match='own.json has no list of images, to which annotations belong'):
        PublicPrivateDataset(cfg)


def test_pictures_of_12_bits_are_nearly_black(tmp_path, capfd):
    """MMPose keeps the upper 8 of the 16 bits of a file, and trained on black pictures without a word."""
    cfg = write(tmp_path)
    for at_most in (4095, 60_000):
        for path in (tmp_path / 'img').iterdir():
            cv2.imwrite(str(path), np.random.default_rng(0).integers(0, at_most, (40, 48), np.uint16))
        PublicPrivateDataset(cfg)
        said = capfd.readouterr().err
        assert ('the first pictures are nearly black, with no value above 15 of 255' in said) == (at_most == 4095)


def test_a_visibility_of_2_in_mpiis_format(synthetic, tmp_path, capfd):
    """COCO's 2 is one weight in COCO's format, and two in MPII's."""
    shutil.copytree(synthetic, tmp_path / 'own')
    path = tmp_path / 'own/annotations/mpii_train.json'
    people = json.loads(path.read_text())
    for person in people:
        person['joints_vis'] = [2 * bool(x) for x in person['joints_vis']]
    path.write_text(json.dumps(people))
    PublicPrivateDataset(mpii(tmp_path / 'own'))
    assert 'a visibility above 1, which is the weight of the joint' in capfd.readouterr().err


def test_who_would_stay_visible_since_a_size_is_wrong(tmp_path):
    """MMPose cuts boxes to the size that the file says, and a view hid what was left of them."""
    data = content()
    data['images'][6].update(width=20)
    dataset = PublicPrivateDataset(write(tmp_path, data), public_view=dict(type='PublicView', mode='person'))
    with pytest.warns(
        UserWarning, match='06.png contributes nothing.*a height and width of 40 and 48 .* says 40 and 20'
    ):
        assert [len(dataset[8 + sample]) for sample in range(8)] == [1] * 6 + [0, 1]
    assert len(dataset[6]) == 1
    each(lambda image, ann: image.update(width=20))(data)
    cfg = write(tmp_path, data)
    with pytest.raises(DataError, match='public_view.* to which MMPose cuts boxes.* People would stay visible'):
        PublicPrivateDataset(cfg, public_view=dict(type='PublicView', mode='person'))
    assert len(PublicPrivateDataset(cfg, public_view=dict(type='PublicView'))[8]) == 1  # a blur hides nobody by a box


def _of_joints(change):
    meta = copy.deepcopy(META)
    change(meta['keypoint_info'])
    return meta


def test_joints_that_are_not_numbered_in_order_are_refused(tmp_path):
    """MMPose takes the indices of a flip from the order, and the names from the numbers."""
    reordered = _of_joints(lambda info: info.update({0: info.pop(0)}))
    counted_from_1 = _of_joints(lambda info: [info.update({i + 1: info.pop(i)}) for i in reversed(range(5))])
    for meta, message in ((reordered, 'keys 1, 2, 3, 4'), (counted_from_1, 'keys 5, 4, 3, 2')):
        with pytest.raises(DataError, match=f'{message}, ...,.* in the order of the annotations, with the keys 0 to 4'):
            PublicPrivateDataset(dict(write(tmp_path), metainfo=meta))


def test_a_joint_that_the_metainfo_does_not_name(tmp_path):
    meta = _of_joints(lambda info: info[2].update(swap='tail'))
    with pytest.raises(
        DataError, match="KeyError: 'tail'.* since metainfo cannot be read .*names in swap and skeleton_info"
    ):
        PublicPrivateDataset(dict(write(tmp_path), metainfo=meta))


def test_a_pair_that_is_written_at_one_joint_is_warned_of(tmp_path, capfd):
    PublicPrivateDataset(dict(write(tmp_path), metainfo=_of_joints(lambda info: info[2].update(swap=''))))
    said = capfd.readouterr().err
    assert "left_hand has swap='right_hand', which has not swap='left_hand'" in said and '(1 of 5)' in said


def test_what_plain_mmpose_can_use_is_used(tmp_path, capfd):
    data = content()
    for ann in data['annotations']:
        ann['id'] = f'x{ann["id"]}'  # MMPose asks for numbers only of images
        ann['owner'] = f'p{ann["image_id"] // 2}'
    dataset = PublicPrivateDataset(write(tmp_path, data), privacy_unit='subject', subjects='owner')
    assert (len(dataset), dataset.num_records) == (8, 5)
    assert all(len(dataset[index]) == 1 for index in range(8))
    assert 'WARNING' not in capfd.readouterr().err


def test_one_person_annotated_twice_is_one_record(tmp_path):
    data = content()
    data['annotations'].append(dict(data['annotations'][2], id=9))
    data['annotations'].append(dict(data['annotations'][2], id=10, bbox=[11.0, 8.0, 24.0, 24.0]))
    dataset = PublicPrivateDataset(write(tmp_path, data))
    assert (len(dataset), dataset.num_records) == (10, 9)
    (doubled,) = [dataset.samples_of(r) for r in range(9) if len(dataset.samples_of(r)) > 1]
    assert (
        len(doubled) == 2 and len({dataset[index][0]['data_samples'].metainfo['dp_record'] for index in doubled}) == 1
    )


def test_an_image_under_two_ids_is_one_record(tmp_path):
    data = content()
    data['images'][3]['file_name'] = './' + data['images'][2]['file_name']
    dataset = PublicPrivateDataset(write(tmp_path, data), privacy_unit='image')
    assert (len(dataset), dataset.num_records) == (8, 7)


def test_annotations_with_whole_paths_need_no_data_root(tmp_path):
    data = content()
    for image in data['images']:
        image['file_name'] = f'{tmp_path}/img/{image["file_name"]}'
    cfg = write(tmp_path, data)
    for root, prefix in (('', ''), (None, ''), (f'{tmp_path}/', 'nowhere/')):
        own = dict(cfg, data_root=root, ann_file=f'{tmp_path}/own.json', data_prefix=dict(img=prefix))
        for view in (None, dict(type='PublicView')):
            dataset = PublicPrivateDataset(own, public_view=view)
            assert dataset.num_records == 8 and len(dataset[0]) == 1
    mapping = tmp_path / 'owners.json'
    names = [image['file_name'] for image in data['images']]
    mapping.write_text(json.dumps({name: i // 2 for i, name in enumerate(names)}))
    dataset = PublicPrivateDataset(own, privacy_unit='subject', subjects=str(mapping))
    assert dataset.num_records == 4


def test_images_of_one_name_have_values_by_their_paths(tmp_path):
    data = content()
    for i, image in enumerate(data['images']):
        image['file_name'] = f'{"ab"[i % 2]}/{i // 2}.png'
        (tmp_path / 'img' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
    cfg, mapping = write(tmp_path, data), tmp_path / 'wishes.json'
    mapping.write_text(json.dumps({image['file_name']: 1.0 + i for i, image in enumerate(data['images'])}))
    dataset = PublicPrivateDataset(cfg, personal_epsilon=str(mapping))
    assert sorted(dataset.personal_epsilons) == [(1.0 + i,) for i in range(8)]
    for others in ({'c/0.png': 1.0}, {'a/0.png': None}):
        mapping.write_text(json.dumps(others))
        with pytest.raises(DataError, match=f"it names '{[*others][0]}', for example, and an image is '0.png'"):
            PublicPrivateDataset(cfg, personal_epsilon=str(mapping))
    mapping.write_text(json.dumps({'0.png': 1.0}))
    with pytest.raises(DataError, match=r'b/0\.png and .*a/0\.png have the same one: write their paths'):
        PublicPrivateDataset(cfg, personal_epsilon=str(mapping))


@pytest.mark.parametrize('name', ['0.png', 'c/0.png', 'img/0.png', '../img/a/9.png'])
def test_a_personal_budget_of_no_image_is_refused(tmp_path, name):
    """A misspelled name left its owner with the budget of all others, without a word."""
    data = content()
    for i, image in enumerate(data['images']):
        image['file_name'] = f'a/{i + 1}.png'
    (tmp_path / 'img/a').mkdir(parents=True)
    data['annotations'] = data['annotations'][1:]  # nobody in the first picture
    cfg, mapping = write(tmp_path, data), tmp_path / 'wishes.json'
    right = {'a/1.png': 1.0, '2.png': 1.0, f'{tmp_path}/img/a/3.png': 1.0, './a/4.png': 1.0}
    mapping.write_text(json.dumps(right))
    assert PublicPrivateDataset(cfg, personal_epsilon=str(mapping)).personal_epsilons.count((1.0,)) == 3
    mapping.write_text(json.dumps({**right, name: 0.5}))
    with pytest.raises(DataError, match=f"names 1 images that .* does not have, for example '{name}'"):
        PublicPrivateDataset(cfg, personal_epsilon=str(mapping))


def test_names_that_are_no_numbers_in_mpiis_format(synthetic, tmp_path):
    shutil.copytree(synthetic, tmp_path / 'own')
    path = tmp_path / 'own/annotations/mpii_train.json'
    people = json.loads(path.read_text())
    old = people[0]['image']
    people[0]['image'] = 'train000.jpg'
    shutil.copy(tmp_path / 'own/images' / old, tmp_path / 'own/images/train000.jpg')
    path.write_text(json.dumps(people))
    with pytest.raises(DataError, match="'train000.jpg' in .*is not a number. Rename.*type='CocoDataset'"):
        PublicPrivateDataset(mpii(tmp_path / 'own'))


def test_a_person_twice_in_a_list_is_one_record(synthetic, tmp_path):
    shutil.copytree(synthetic, tmp_path / 'own')
    path = tmp_path / 'own/annotations/mpii_train.json'
    people = json.loads(path.read_text())
    path.write_text(json.dumps([*people, people[7]]))
    dataset = PublicPrivateDataset(mpii(tmp_path / 'own'))
    assert (len(dataset), dataset.num_records) == (41, 40)


def test_annotations_of_other_joints_than_the_metainfo_names(tmp_path):
    """One forgets the metainfo of one's own data set easily: a flip would exchange the wrong joints, or fail."""
    cfg = write(tmp_path)
    with pytest.raises(DataError, match='the annotations have 5 joints and the metainfo of CocoDataset names 17: give'):
        PublicPrivateDataset({key: value for key, value in cfg.items() if key != 'metainfo'})


@pytest.mark.parametrize('prefix', [None, 'img/'])
def test_a_data_prefix_that_is_no_dict(tmp_path, prefix):
    with pytest.raises(DataError, match='data_prefix=.* must be a dict, such as'):
        PublicPrivateDataset(dict(write(tmp_path), data_prefix=prefix))
