"""Browsing: each private sample beside its public view and what is recovered from it, and plain data sets as MMPose shows them."""

import shutil

import browse_dataset
import cv2
import numpy as np
import pytest
from mmengine.config import Config

from mmpose_dp.auditing.view_inversion import figures
from tests.support.runs import config


@pytest.fixture
def browse(call, synthetic, tmp_path):
    """browse(*arguments, method, root, **options): the tool's result and its pictures, by name."""

    def browsed(*arguments, method='hybrid', root=synthetic, **options):
        path, out = tmp_path / 'config.py', tmp_path / 'out'
        config(root, tmp_path, method, **options).dump(path)
        done = call(browse_dataset, path, '--not-show', '--output-dir', out, '--show-number', 2, *arguments)
        return done, {file.name: cv2.imread(str(file)) for file in sorted(out.glob('*.png'))}

    return browsed


@pytest.mark.parametrize('mode', ['original', 'transformed'])
def test_a_private_sample_its_view_and_what_is_recovered(synthetic, tmp_path, mode):
    path = tmp_path / 'config.py'
    config(synthetic, tmp_path).dump(path)
    dataset = browse_dataset.dataset_of(Config.fromfile(path), 'train', mode)
    private, seen, recovered = browse_dataset.private_panel(dataset, 1, mode)
    assert private.image.shape == seen.image.shape == recovered.image.shape
    assert (private.image.shape == (64, 64, 3)) == (mode == 'transformed')
    before, after = (figures([private.image], [one.image])['psnr'] for one in (seen, recovered))
    assert 15 < before < after < 40  # of the same place, flipped and turned alike, and not the picture itself
    assert private.keypoints.shape == (1, 16, 2) and seen.keypoints is recovered.keypoints is None
    inside = (private.keypoints > -20) & (private.keypoints < np.array(private.image.shape[1::-1]) + 20)
    assert inside.all()


def test_the_pictures_say_that_they_are_private(browse, tmp_path):
    done, pictures = browse()
    assert done.returncode == 0 and 'PRIVATE pictures: keep them as private as the data' in done.stdout
    assert len(pictures) == 2 and (tmp_path / 'out').stat().st_mode & 0o077 == 0
    for picture in pictures.values():
        assert picture.shape == (256 + 2 * browse_dataset.STRIP, 3 * 256 + 8, 3)
        assert (picture[2, -1] == (40, 40, 180)).all()  # the red strip


@pytest.mark.parametrize(
    ('options', 'columns', 'red'),
    [
        (dict(method='dpsgd', default_scope=None), 1, True),  # as new-style configs may have it
        (dict(train_dataloader__dataset__public_view__mode='person'), 2, True),
        (dict(method='feature', arguments=('--phase', 'val')), 1, False),
        (dict(method='feature', arguments=('--phase', 'val', '--mode', 'original')), 1, False),
    ],
)
def test_what_there_is_to_show(browse, options, columns, red):
    done, pictures = browse(*options.pop('arguments', ()), **options)
    assert done.returncode == 0 and len(pictures) == 2, done.stderr
    for picture in pictures.values():
        assert 200 * columns < picture.shape[1] < 270 * columns
        assert (picture[2, -1] == (40, 40, 180)).all() == red


@pytest.mark.parametrize(
    ('view', 'why'),
    [
        (dict(type='PublicView', mode='person'), 'paints a region over'),
        (dict(type='Coarse'), 'the kernel of Coarse is not known. tools/audit_view.py CONFIG'),
        (dict(type='PublicView'), ''),
    ],
)
def test_a_panel_that_is_lacking_is_named(browse, coarse_view, view, why):
    done, _ = browse(train_dataloader__dataset__public_view=dict(view, _delete_=True))
    assert why in done.stdout and ('no picture of what is recovered' in done.stdout) == bool(why), done.stderr


def test_a_picture_that_cannot_be_read_is_left_out(browse, synthetic, tmp_path):
    root = shutil.copytree(synthetic, tmp_path / 'data')
    sorted((root / 'images').iterdir())[1].write_bytes(b'no picture')
    done, pictures = browse(root=root)
    assert 'sample 1 is left out' in done.stdout and len(pictures) == 1


def test_what_cannot_be_done_is_said(browse, call, tmp_path, monkeypatch):
    for name in ('DISPLAY', 'WAYLAND_DISPLAY'):
        monkeypatch.delenv(name, raising=False)
    assert 'no such config' in call(browse_dataset, 'none.py', '--not-show', '--output-dir', tmp_path).stderr
    for arguments, message in (
        (('--not-show',), 'without --output-dir does nothing'),
        (('--output-dir', tmp_path), 'no display'),
        (('--not-show', '--output-dir', tmp_path, '--show-number', 0), 'at least 1'),
    ):
        done = call(browse_dataset, 'mmpose::none.py', *arguments)
        assert done.returncode == 2 and message in done.stderr
    done, _ = browse('--phase', 'test', '--cfg-options', 'test_dataloader=None', 'test_cfg=None', 'test_evaluator=None')
    assert done.returncode == 2 and 'no test_dataloader' in done.stderr
