"""Names in annotations that are not those of the files: the message gives the file that is meant."""

import json
import unicodedata

import pytest

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.privacy.errors import DataError
from tests.support.coco_data import content, write

NAMES = {
    'a backslash': (
        r'ward 1\00.png',
        'ward 1/00.png',
        r'with \\ between folders, which only Windows reads: write the names',
    ),
    'a path of Windows': (r'C:\export\00.png', '00.png', r'with \\ between folders'),
    'another case': ('ward/IMG_00.PNG', 'Ward/img_00.png', 'img_00.png: write the names as the files have them'),
    'as in an address': ('ward%201/b%C3%BCro.png', 'ward 1/b\u00fcro.png', 'write the names as the files have them'),
    'accents apart': (
        unicodedata.normalize('NFD', 'b\u00fcro.png'),
        'b\u00fcro.png',
        r'another form of Unicode \(NFC and NFD\)',
    ),
    'no such file': ('09.jpg', '09.png', 'Set data_prefix.img, or remove them from the annotations'),
}


@pytest.mark.parametrize('name', NAMES)
def test_a_picture_of_another_name(tmp_path, name):
    """The message advised to set data_prefix.img, which was right."""
    written, file, message = NAMES[name]
    data = content()
    data['images'][0]['file_name'] = file
    (tmp_path / 'img' / file).parent.mkdir(parents=True)
    cfg = write(tmp_path, data)
    PublicPrivateDataset(cfg)
    data['images'][0]['file_name'] = written
    (tmp_path / 'own.json').write_text(json.dumps(data))
    with pytest.raises(DataError, match=f'private: 1 image files named in own.json do not exist, .*{message}') as error:
        PublicPrivateDataset(cfg)
    assert (f'There is {tmp_path}/img/{file}' in str(error.value)) == (name != 'no such file')


@pytest.mark.parametrize('name', ['$DATA/own.json', '${DATA}/own.json', '{{$DATA}}/own.json'])
def test_an_environment_variable_that_nothing_replaced(tmp_path, name):
    cfg = dict(write(tmp_path), ann_file=name)
    with pytest.raises(DataError, match=r'does not exist. An environment variable .* write {{\$NAME:}} in its place'):
        PublicPrivateDataset(cfg)


@pytest.mark.parametrize('name', ['Own.json', 'OWN.JSON', '..\\here\\own.json', 'own.jsonl'])
def test_an_annotation_file_of_another_name(tmp_path, name):
    cfg = dict(write(tmp_path / 'here'), ann_file=name)
    there = 'Arrange the files' if name == 'own.jsonl' else 'There is .*own.json: write its name as it is'
    with pytest.raises(DataError, match=f'does not exist. {there}'):
        PublicPrivateDataset(cfg)
