"""Which samples make up a record, and which budget counts in it."""

import json
from contextlib import nullcontext

import pytest
from mmengine.dataset import BaseDataset

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.datasets.privacy_units import annotated, group_samples, personal_epsilons
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.datasets import mpii


class Listed(BaseDataset):
    """Samples in COCO's annotation format; some data sets renumber them."""

    def __init__(self, folder, samples, annotations):
        self.ann_file, self.samples = str(folder / 'annotations.json'), samples
        (folder / 'annotations.json').write_text(json.dumps(dict(annotations=annotations)))

    def __len__(self):
        return len(self.samples)

    def get_data_info(self, index):
        number, image = self.samples[index]
        return dict(id=number, img_path=image)


class CocoWholeBodyHandDataset(Listed):
    """Like MMPose's: a sample for each hand, renumbered."""


def test_of_several_people_the_smallest_budget_counts(tmp_path):
    """Somebody without a budget was promised target_epsilon, even beside somebody who allows more."""
    people = [dict(id=7, wish=5.0), dict(id=8), dict(id=9, wish=0.5), dict(id=10)]
    dataset = Listed(tmp_path, [(7, 'a'), (8, 'a'), (9, 'b'), (10, 'c')], people)
    named = personal_epsilons(dataset, [[0, 1], [2], [3]], 'wish')
    assert [set(epsilons) for epsilons in named] == [{5.0, None}, {0.5}, {None}]


def test_images_of_one_name_have_no_value_by_name(tmp_path):
    path = tmp_path / 'subjects.json'
    path.write_text(json.dumps({'1.jpg': 'anna', '2.jpg': 'ben'}))
    apart = Listed(tmp_path, [(0, '/x/a/1.jpg'), (1, '/x/a/2.jpg'), (2, '/x/a/1.jpg')], [])
    assert annotated(apart, str(path), 'subjects') == ['anna', 'ben', 'anna']
    assert group_samples(apart, 'subject', str(path)) == [[0, 2], [1]]
    alike = Listed(tmp_path, [(0, '/x/a/1.jpg'), (1, '/x/b/1.jpg')], [])
    with pytest.raises(
        PrivacyError,
        match=r'subjects\.json names images by file name, but /x/b/1\.jpg and /x/a/1\.jpg have the same one',
    ):
        annotated(alike, str(path), 'subjects')


def test_samples_that_are_renumbered_have_no_annotation(tmp_path):
    people = [dict(id=0, wish=1.0), dict(id=1, wish=2.0), dict(id=2, wish=3.0)]
    hands = CocoWholeBodyHandDataset(tmp_path, [(0, 'a'), (1, 'a'), (2, 'b')], people)
    with pytest.raises(
        PrivacyError, match='does not say which annotation a sample comes from. Write the path of a JSON file'
    ):
        annotated(hands, 'wish', 'personal_epsilon')
    with pytest.raises(PrivacyError, match="a sample for each hand.*privacy_unit='image'"):
        group_samples(hands, 'instance', None)
    assert group_samples(hands, 'image', None) == [[0, 1], [2]]
    with pytest.raises(PrivacyError, match='does not say which annotation'):
        annotated(Listed(tmp_path, [(0, 'a'), (5, 'a')], people), 'wish', 'personal_epsilon')


@pytest.mark.parametrize('form', ['MPII', 'COCO'])
def test_samples_that_a_data_set_of_ones_own_numbers_anew(tmp_path, form):
    """It leaves people out and numbers the others 0, 1, ...: each had the subject of somebody else, without a word."""
    people = [dict(id=i, image_id=i, image=f'{i}.jpg', who=who) for i, who in enumerate('abc')]
    images = [dict(id=i, file_name=f'folder/{i}.jpg') for i in range(3)]
    if form == 'COCO':
        people = [{key: value for key, value in person.items() if key != 'image'} for person in people]
    for samples, right in (([(0, '/x/0.jpg'), (1, '/x/2.jpg')], False), ([(0, '/x/0.jpg'), (2, '/x/2.jpg')], True)):
        dataset = Listed(tmp_path, samples, people)
        content = people if form == 'MPII' else dict(images=images, annotations=people)
        (tmp_path / 'annotations.json').write_text(json.dumps(content))
        with nullcontext() if right else pytest.raises(PrivacyError, match='does not say which annotation a sample'):
            assert annotated(dataset, 'who', 'subjects') == ['a', 'c']
    with pytest.raises(
        PrivacyError, match=r'no annotation in \S+ has that field, which Listed adds by itself\. Write the path'
    ):
        annotated(dataset, 'img_path', 'subjects')


def test_annotations_that_are_no_json_have_no_fields(tmp_path):
    dataset = Listed(tmp_path, [(0, 'a')], [])
    (tmp_path / 'annotations.json').write_text('image,who\n0.jpg,anna\n')
    with pytest.raises(
        PrivacyError, match="cannot be read as JSON: .*'who' would be looked for. Write the path of a JSON"
    ):
        annotated(dataset, 'who', 'subjects')


def test_a_number_and_its_text_are_one_subject(synthetic, tmp_path):
    path = tmp_path / 'subjects.json'
    names = [person['image'] for person in json.loads((synthetic / 'annotations/mpii_train.json').read_text())]
    counts = []
    for texts in ([7], [7, '7', ' 7'], [7, '07'], ['Jos\u00e9', 'Jose\u0301']):  # one name, as two systems write it
        path.write_text(json.dumps({name: texts[i % len(texts)] for i, name in enumerate(names)}))
        records = PublicPrivateDataset(mpii(synthetic), privacy_unit='subject', subjects=str(path)).num_records
        counts.append(records)
    assert counts == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ('names', 'warned'),
    [(('Anna B', 'anna  b'), True), (('s-01', 'S_01'), True), (('1_12', '11_2'), False), (('Anna', 'Anne'), False)],
)
def test_subjects_that_may_be_one_person_are_warned_of(synthetic, tmp_path, capfd, names, warned):
    path = tmp_path / 'subjects.json'
    pictures = [person['image'] for person in json.loads((synthetic / 'annotations/mpii_train.json').read_text())]
    path.write_text(json.dumps({picture: names[i % 2] for i, picture in enumerate(pictures)}))
    assert PublicPrivateDataset(mpii(synthetic), privacy_unit='subject', subjects=str(path)).num_records == 2
    assert ("subjects.json': 1 names are written in several ways" in capfd.readouterr().err) == warned


def test_the_digest_depends_on_the_subjects(synthetic, tmp_path):
    path = tmp_path / 'subjects.json'
    names = [person['image'] for person in json.loads((synthetic / 'annotations/mpii_train.json').read_text())]
    digests = set()
    for pictures in (2, 3):
        path.write_text(json.dumps({name: i // pictures for i, name in enumerate(names)}))
        dataset = PublicPrivateDataset(mpii(synthetic), privacy_unit='subject', subjects=str(path))
        assert dataset.subjects == 'subjects.json'  # by name only, since this is published
        digests.add(dataset.subjects_digest)
    assert len(digests) == 2
    plain = PublicPrivateDataset(mpii(synthetic))
    assert plain.subjects is None and plain.subjects_digest is None
