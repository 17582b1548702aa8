"""The view audit: its figures, the files it writes, and the statement that includes them."""

import itertools
import json
import shutil
import sys
from types import SimpleNamespace

import audit_view
import cv2
import numpy as np
import pytest
import skimage.data
from mmengine.config import Config
from mmpose.registry import DATASETS

from mmpose_dp.auditing import view_inversion
from mmpose_dp.auditing.view_inversion import BANDS, ViewNetwork, figures, invert_by_tv, train_network
from mmpose_dp.datasets import PublicView
from mmpose_dp.engine.view_audit import NOT_EXAMINED, PRIVATE, VALIDATION, recoverable_from_view, update_statement
from tests.support.runs import config

SIZE = 96


@pytest.fixture(scope='module')
def face():
    """A portrait that comes with scikit-image, (96, 96, 3)."""
    return cv2.resize(skimage.data.astronaut()[:300, 80:380], (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def gain(picture, **view):
    """(PSNR of the view, dB that an inversion adds)."""
    center, box = np.array([SIZE / 2, SIZE / 2]), float(SIZE)
    person = audit_view.Person(picture, center, box, box, nobody())
    seen = person.seen(PublicView(**view))
    found = invert_by_tv(seen, PublicView(**view), center, box, iterations=200)
    before, after = (figures([picture], [x])['psnr'] for x in (seen, found))
    return before, after - before


def nobody():
    return dict(keypoints=np.zeros((1, 16, 2)), keypoints_visible=np.zeros((1, 16)))


def test_little_is_recovered_from_the_default_view_and_much_from_the_full_resolution_blur(face):
    assert gain(face)[1] < 1.5
    assert gain(face, mode='pixelate')[1] < 2.5
    assert gain(face, mode='blur_full_resolution')[1] > 5  # or the inversion is no attack


def test_the_inversion_explains_the_view(face):
    """The view of the recovered picture is the published one, up to rounding."""
    for mode in ('blur', 'pixelate', 'blur_full_resolution'):
        view, center = PublicView(mode), np.array([60.0, 40.0])
        person = audit_view.Person(face, center, 50.0, 70.0, nobody())
        seen = person.seen(view)
        found = invert_by_tv(seen, view, center, 50.0, 70.0, iterations=200)
        again = audit_view.Person(found, center, 50.0, 70.0, nobody()).seen(view)
        assert np.abs(again.astype(int) - seen).mean() < 1.5, mode
        assert not np.array_equal(found, seen)


def test_a_network_learns_what_a_view_removed(face, monkeypatch):
    """Seconds suffice for one picture. Before training, the network returns the first reconstruction."""
    clock = itertools.count(0, 0.02)  # a step takes so long, however busy the machine is
    monkeypatch.setattr(view_inversion, 'time', SimpleNamespace(monotonic=clock.__next__))
    originals = np.stack([np.roll(face, 8 * k, 1) for k in range(8)])
    views = np.stack([cv2.blur(picture, (9, 9)) for picture in originals])
    given = np.concatenate([views, views], 3)
    assert np.array_equal(ViewNetwork().restore(given), views)
    network = train_network(originals, given, seconds=3.0, batch_size=4)
    before, after = figures(originals, views)['psnr'], figures(originals, network.restore(given))['psnr']
    assert after > before + 1


def test_shares_of_detail():
    """Each band counts its own frequencies: if a picture loses one of them, the share of that band alone falls."""
    wave = [np.cos(np.pi * cycles * 2 * (np.arange(128) + 0.5) / 128) for cycles in (2, 6, 12, 32)]
    picture = np.repeat(128 + 25 * sum(wave)[None, :, None] * np.ones((128, 1, 3)), 1, 0).astype(np.uint8)
    without = (picture - 25 * wave[2][None, :, None]).astype(np.uint8)
    shares = list(figures([picture], [without]).values())[2:]
    assert len(shares) == len(BANDS)
    assert shares[2] < 0.05 and min(shares[0], shares[1], shares[3]) > 0.9


@pytest.fixture(scope='module')
def audited(synthetic, synthetic_public, tmp_path_factory):
    """The work dir of an audit of the hybrid's synthetic config, with a network trained for a second."""
    work_dir = tmp_path_factory.mktemp('audit')
    path = work_dir / 'config.py'
    config(synthetic, work_dir).dump(path)
    statement = dict(public_views=[described(path)], private=True, guarantee='', method='', released='', protected='')
    (work_dir / 'privacy_statement.json').write_text(
        json.dumps(dict(statement, adjacency='', not_protected=[], not_covered=[], recoverable_from_view=NOT_EXAMINED))
    )
    audit(path, '--public-images', str(synthetic_public), '--minutes', '0.02')
    return work_dir


def described(path):
    return DATASETS.build(Config.fromfile(path).train_dataloader.dataset).view_description


def audit(path, *options):
    sys.argv = ['audit_view.py', str(path), '--images', '2', '--size', '48', *options]
    audit_view.main()


def test_private_pictures_are_no_attackers(synthetic, tmp_path):
    """An attack trained on them would say what somebody with the private pictures recovers."""
    path = tmp_path / 'config.py'
    config(synthetic, tmp_path).dump(path)
    with pytest.raises(
        audit_view.PrivacyError, match='--public-images .* holds private pictures of .*: give a folder of other'
    ):
        audit(path, '--public-images', str(synthetic))


def test_what_an_audit_writes(audited):
    found = json.loads((audited / 'view_audit.json').read_text())
    assert found['sample'] == 'validation people' and found['pictures'] == 2
    assert len(found['recovered']) == 2 and all(isinstance(x, dict) for x in found['recovered'].values())
    with np.load(audited / 'view_audit.npz') as arrays:
        assert arrays['sample'] == VALIDATION and arrays['original'].shape == (2, 48, 48, 3)
    page = (audited / 'view_audit.html').read_text()
    assert page.count('data:image/png;base64,') == 2 * 4
    assert 'validation people. Never publish it' in page and 'src="http' not in page and '<script' not in page


def test_a_statement_includes_the_figures(audited):
    words = json.loads((audited / 'view_audit.json').read_text())['in_words']
    assert json.loads((audited / 'privacy_statement.json').read_text())['recoverable_from_view'] == words
    assert words in (audited / 'privacy_statement.md').read_text()


def test_figures_of_another_view_are_not_used(audited, tmp_path):
    view = json.loads((audited / 'view_audit.json').read_text())['view']
    assert recoverable_from_view(audited, view) != NOT_EXAMINED
    assert recoverable_from_view(audited, f'{view}, boxes padded by 2') == NOT_EXAMINED
    assert recoverable_from_view(tmp_path, view) == NOT_EXAMINED and not update_statement(tmp_path)
    (tmp_path / 'view_audit.json').write_text('[1')
    assert recoverable_from_view(tmp_path, view) == NOT_EXAMINED


@pytest.fixture
def with_view(synthetic, tmp_path):
    """Audits the synthetic config with another view and no validation people; returns view_audit.json."""

    def audited(*options, **settings):
        cfg = config(synthetic, tmp_path)
        cfg.train_dataloader.dataset.public_view = dict(dict(type='PublicView'), **settings)
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        cfg.dump(tmp_path / 'config.py')
        audit(tmp_path / 'config.py', *options)
        return json.loads((tmp_path / 'view_audit.json').read_text())

    return audited


def test_validation_people_in_private_pictures_are_named_so(synthetic, tmp_path):
    cfg = config(synthetic, tmp_path)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert audit_view._sample(cfg, dataset)[1] == VALIDATION
    del cfg.val_dataloader.dataset['headbox_file']
    cfg.val_dataloader.dataset.ann_file = cfg.train_dataloader.dataset.private.ann_file
    assert PRIVATE in audit_view._sample(cfg, dataset)[1]
    # copies of the pictures under other names
    shutil.copytree(synthetic, tmp_path / 'copies')
    for path in (tmp_path / 'copies/images').iterdir():
        path.rename(path.with_name(f'9{path.name}'))
    annotations = tmp_path / 'copies/annotations/mpii_train.json'
    people = json.loads(annotations.read_text())
    annotations.write_text(json.dumps([dict(person, image=f'9{person["image"]}') for person in people]))
    cfg.val_dataloader.dataset.update(data_root=str(tmp_path / 'copies'), ann_file='annotations/mpii_train.json')
    assert PRIVATE in audit_view._sample(cfg, dataset)[1]


def test_without_public_people_and_without_validation(with_view):
    found = with_view(mode='pixelate')
    assert 'computed from them without noise' in found['sample'] and found['sample'] in found['in_words']
    assert 'not run' in found['recovered']['a network']


def test_a_view_of_ones_own_is_attacked_by_the_network_alone(with_view, coarse_view, synthetic_public):
    found = with_view('--public-images', str(synthetic_public), '--minutes', '0.02', type='Coarse')
    assert found['view'].startswith('every fourth pixel')
    known, learned = found['recovered'].values()
    assert known == 'not run, since the kernel of Coarse is not known' and known in found['in_words']
    assert isinstance(learned, dict) and learned['psnr'] > 0


def test_a_region_is_not_recovered(with_view):
    found = with_view(mode='person')
    assert found['recovered'] == {} and 'nothing of the region' in found['in_words']


def test_a_config_without_a_view(synthetic, tmp_path):
    path = tmp_path / 'config.py'
    config(synthetic, tmp_path, 'dpsgd').dump(path)
    with pytest.raises(audit_view.PrivacyError, match='publishes no view'):
        audit(path)


def test_a_comparison_of_the_views(synthetic_public, capsys):
    audit_view.print_comparison(
        type('Args', (), dict(public_images=str(synthetic_public), images=2, size=32, minutes=0.005))
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(audit_view.TABLE) and all(line.count('|') == 7 for line in lines)
