"""Data that is to be public is not the private set's, and neither are the people that training is validated on."""

import json
import os
import shutil

import pytest
from mmengine.dataset import RepeatDataset
from mmpose.registry import DATASETS
from torch.utils.data import Dataset

from mmpose_dp.datasets import PublicPrivateDataset, refuse_private_validation
from mmpose_dp.datasets.overlap import private_among
from mmpose_dp.privacy.errors import DataError
from tests.support.datasets import coco_style, mpii
from tests.support.runs import config, tiny, train


@pytest.fixture
def edited(synthetic, tmp_path):
    """The private images beside annotations that name one person alone."""
    shutil.copytree(synthetic / 'annotations', tmp_path / 'annotations')
    (tmp_path / 'images').symlink_to(synthetic / 'images')
    people = json.loads((tmp_path / 'annotations/mpii_train.json').read_text())
    (tmp_path / 'annotations/mpii_train.json').write_text(json.dumps(people[:1]))
    return tmp_path


def test_shared_public_data_is_refused(synthetic, edited):
    with pytest.raises(DataError, match='has the private annotation file'):
        PublicPrivateDataset(mpii(synthetic), public=mpii(synthetic))
    with pytest.raises(DataError, match='shares 1 image files'):
        PublicPrivateDataset(mpii(synthetic), public=mpii(edited))


@pytest.mark.parametrize('same', [shutil.copy, os.link])
def test_copies_of_the_images_are_the_images(synthetic, edited, same, capsys):
    """Under another name in another folder, beside other annotations; one changed byte makes another picture."""
    people = json.loads((edited / 'annotations/mpii_train.json').read_text())
    (edited / 'images').unlink()
    (edited / 'images').mkdir()
    same(synthetic / 'images' / people[0]['image'], edited / 'images/777.jpg')
    (edited / 'annotations/mpii_train.json').write_text(json.dumps([dict(people[0], image='777.jpg')]))
    private = PublicPrivateDataset(mpii(synthetic))
    with pytest.raises(DataError, match='shares 1 image files'):
        PublicPrivateDataset(mpii(synthetic), public=mpii(edited))
    refuse_private_validation(private.private, private.images, DATASETS.build(mpii(edited)))
    assert 'shares 1 image files with the private set' in capsys.readouterr().err
    data = bytearray((edited / 'images/777.jpg').read_bytes())
    data[-3] ^= 1
    (edited / 'images/777.jpg').unlink()
    (edited / 'images/777.jpg').write_bytes(data)
    assert private_among([str(edited / 'images/777.jpg')], private.images) == []


def test_scores_on_private_records_are_refused(synthetic, tmp_path):
    cfg = tiny(config(synthetic, tmp_path, 'dpsgd'))
    cfg.val_dataloader.dataset.update(ann_file=cfg.train_dataloader.dataset.private.ann_file, headbox_file=None)
    with pytest.raises(DataError, match=r'val_dataloader\.dataset has the private.*mpii_train\.json.*val_cfg=None'):
        train(cfg)
    assert not list(tmp_path.glob('*.jsonl')) and not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize('copied', [False, True])
def test_scores_against_private_annotations_are_refused(synthetic, tmp_path, copied):
    """They are found for the pictures of another file too, if the numbers are the same: COCO's begin at 1 in most files."""
    cfg = tiny(config(synthetic, tmp_path / 'run', 'dpsgd'))
    own, other = tmp_path / 'own.json', tmp_path / 'other.json'
    shutil.move(synthetic / coco_style(synthetic, 'own', 16), own)
    people = json.loads(own.read_text())
    other.write_text(json.dumps(dict(people, annotations=people['annotations'][:2])))
    shutil.copy(own, tmp_path / 'copy.json')
    cfg.train_dataloader.dataset.private, cfg.val_dataloader.dataset = (
        dict(
            type='CocoDataset',
            ann_file=str(file),
            data_prefix=dict(img=f'{synthetic}/images/'),
            metainfo=dict(from_file='configs/_base_/datasets/mpii.py'),
            pipeline=dataset.pipeline,
            test_mode=file == other,
        )
        for file, dataset in ((own, cfg.train_dataloader.dataset.private), (other, cfg.val_dataloader.dataset))
    )
    cfg.train_dataloader.batch_sampler.expected_batch_size = 2
    cfg.val_evaluator = dict(type='CocoMetric', ann_file=str(tmp_path / 'copy.json' if copied else own))
    with pytest.raises(DataError, match=r'val_evaluator: CocoMetric has the private annotation file .*own\.json'):
        train(cfg)
    assert not list(tmp_path.glob('*/*.jsonl'))


class Cached(Dataset):
    """A wrapper of a user's own, which holds another data set under a name of its own, and itself."""

    def __init__(self, one):
        self.inner, self.itself = one, [self]


def test_they_are_found_in_joined_sets(synthetic, synthetic_public):
    private = PublicPrivateDataset(mpii(synthetic))

    def joined(*parts):
        parts = [dict(part, pipeline=[]) for part in parts]
        return DATASETS.build(
            dict(type='CombinedDataset', metainfo=dict(from_file='configs/_base_/datasets/mpii.py'), datasets=parts)
        )

    refuse_private_validation(private.private, private.images, joined(mpii(synthetic, 'val'), mpii(synthetic_public)))
    with pytest.raises(DataError, match='scores on private records'):
        refuse_private_validation(private.private, private.images, joined(mpii(synthetic, 'val'), mpii(synthetic)))
    for wrapper in (Cached(one=DATASETS.build(mpii(synthetic))), Cached(one={'a': private}), private):
        with pytest.raises(DataError, match='scores on private records'):
            refuse_private_validation(private.private, private.images, wrapper)
    repeated = RepeatDataset(DATASETS.build(mpii(synthetic)), 2)
    with pytest.raises(DataError, match='scores on private records'):
        refuse_private_validation(private.private, private.images, repeated)


def test_images_that_both_have_are_warned_of(synthetic, edited, capsys):
    private = PublicPrivateDataset(mpii(synthetic))
    refuse_private_validation(private.private, private.images, DATASETS.build(mpii(synthetic, 'val')))
    assert 'shares' not in capsys.readouterr().err
    refuse_private_validation(private.private, private.images, DATASETS.build(mpii(edited)))
    assert 'shares 1 image files with the private set' in capsys.readouterr().err
