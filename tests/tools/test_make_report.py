"""The report: what is on the page, what must not be, of what no page is made, and how it looks in a browser."""

import json
import pickle
import re
import shutil
import sys

import audit_view
import cv2
import make_report
import numpy as np
import pytest
from markupsafe import escape
from report_parts import budget_curve, example_people, settings_of, step_rows, validation_scores

from mmpose_dp.engine.view_audit import PRIVATE, VALIDATION, in_words
from mmpose_dp.extras.accountability import with_private_figures
from mmpose_dp.extras.evidence import STATEMENT_NAME, file_sha256, history_of
from mmpose_dp.privacy.accounting import epsilon
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.validation import rounded_up
from tests.support.browser import SIZES, faults, look, started
from tests.support.runs import config
from tests.support.statements import amend, statement_of, write_work_dir

EVIL = '<script>alert("x")</script><img src="https://example.org/x.png">'
VIEW = f'Gaussian blur {EVIL}'
PRIVATE_LOSS, PRIVATE_ACCURACY = 0.123456789, 0.987654321
SCALARS = [
    dict(lr=0.1, loss=PRIVATE_LOSS, acc_pose=PRIVATE_ACCURACY, epsilon=0.1, epoch=1, iter=5, step=5),
    {'PCK': 40.5, 'Head PCK': 50.0, 'time': 0.3, 'data_time': 0.1, 'step': 1},
    {'PCK': 41.5, 'Head PCK': float('nan'), EVIL: 1.0, 'step': 2},
    {'train/loss_kpt': PRIVATE_LOSS, 'step': 6},
    {'acc_pose': PRIVATE_ACCURACY, 'step': 7},
    {'of_a_batch': PRIVATE_LOSS, 'iter': 8, 'step': 8},
]


def report(folder, *options):
    """Runs the tool; returns the page."""
    sys.argv = ['make_report.py', str(folder), *map(str, options)]
    make_report.main()
    return (folder / make_report.REPORT_NAME).read_text()


def audited(folder, sample=VALIDATION, view=VIEW):
    """Leaves what tools/audit_view.py leaves of two people."""
    found = dict(psnr=25.0, ssim=0.5, **{'0 to 4 cycles': 0.9})
    audit = dict(
        view=view, pictures=2, shown=found, recovered={f'total variation {EVIL}': found}, sample=sample, note=''
    )
    audit['in_words'] = in_words(audit)
    (folder / 'view_audit.json').write_text(json.dumps(audit))
    pictures = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    np.savez_compressed(folder / 'view_audit.npz', sample=sample, view=view, original=pictures, recovered=pictures)
    found = dict(recoverable_from_view=audit['in_words'])
    amend(folder, **found, not_covered=with_private_figures(statement_of(folder)['not_covered'], found))


@pytest.fixture(scope='module')
def finished(synthetic, tmp_path_factory):
    """A work dir of Feature DP, in which everything that can be text is hostile."""
    folder = tmp_path_factory.mktemp('report') / 'work'
    write_work_dir(folder, method='feature', public_view=VIEW, target_epsilon=8.0)
    cfg = config(synthetic, folder, load_from='/home/someone/secret/start.pth')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='/home/someone/secret/backbone.pth')
    cfg.default_hooks.privacy_budget.decision = dict(rationale=EVIL, tuning='on synthetic and/or public data')
    cfg.dump(folder / 'config.py')
    decision = {**statement_of(folder)['decision'], 'rationale': EVIL}
    amend(folder, config_sha256=file_sha256(folder / 'config.py'), decision=decision)
    (folder / '20260101_000000/vis_data').mkdir(parents=True)
    lines = [*map(json.dumps, SCALARS), '{"PCK": 99']
    (folder / '20260101_000000/vis_data/scalars.json').write_text('\n'.join(lines))
    audited(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy to change."""
    return shutil.copytree(finished, tmp_path / 'work')


@pytest.fixture(scope='module')
def predictions(synthetic, tmp_path_factory):
    """predictions(split, path): a file as tools/test.py --dump writes it, of people of a split of the synthetic set."""
    folder = tmp_path_factory.mktemp('predictions')

    def of(split, picture=None):
        people = json.loads((synthetic / f'annotations/mpii_{split}.json').read_text())[:3]
        samples = []
        for person in people:
            joints = np.array([person['joints']], np.float32)
            found = dict(keypoints=joints, bboxes=np.array([[10.0, 10, 80, 80]]))
            samples.append(dict(img_path=picture or str(synthetic / 'images' / person['image']), pred_instances=found))
        path = folder / f'{split}.pkl'
        path.write_bytes(pickle.dumps(samples))
        return path

    return of


@pytest.fixture(scope='module')
def page(finished, predictions, tmp_path_factory):
    """The page with everything on it."""
    scores = tmp_path_factory.mktemp('scores') / 'scores.json'
    scores.write_text(json.dumps({'PCK': 60.25, 'step': 3}))
    options = ('--scores', f'without {EVIL}={scores}', '--view-pictures', '--predictions', predictions('val'))
    return report(finished, *options)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    with started(tmp_path_factory.mktemp('profile')) as found:
        yield found


# ---- in a browser ------------------------------------------------------------------------------------------------------
def test_it_looks_right_wide_and_narrow_in_light_and_dark(browser, page, finished):
    address, papers = (finished / make_report.REPORT_NAME).as_uri(), {}
    for width, height in SIZES:
        for dark in (False, True):
            seen = look(browser, address, width, height, dark)
            assert not faults(seen, address), (width, dark)
            papers.setdefault(dark, seen.paper)
    assert papers[False] == 'rgb(255, 255, 255)' != papers[True]
    assert len(seen.headings) > 10
    assert browser.execute_script('return document.querySelectorAll("script, iframe, link[href^=http]").length') == 0
    assert EVIL in browser.execute_script('return document.body.textContent')


def test_the_page_of_a_view_audit_looks_right(browser, tmp_path):
    found = dict(psnr=25.0, ssim=0.5, **{f'{n} to {2 * n} cycles': 0.9 for n in (4, 8, 16, 32)})
    audit = dict(view=VIEW, pictures=2, shown=found, recovered={EVIL: found}, sample=VALIDATION, note='')
    pictures = {
        name: [np.zeros((16, 16, 3), np.uint8)] * 2 for name in ('original', 'public view', 'total variation', EVIL)
    }
    audit_view.write_pictures(audit, pictures, tmp_path)
    address = (tmp_path / 'view_audit.html').as_uri()
    for width, height in SIZES:
        assert not faults(look(browser, address, width, height), address), width


def test_the_browser_finds_what_is_wrong_with_a_page(browser, tmp_path):
    path = tmp_path / 'bad.html'
    path.write_text(
        '<meta name="viewport" content="width=device-width"><h1>A</h1><h3>B</h3><div style="width:500px">x</div>'
        '<img src="http://127.0.0.1:9/x.png"><script>throw new Error("thrown")</script>'
    )
    found = '; '.join(faults(look(browser, path.as_uri(), 390, 844), path.as_uri()))
    for fault in (
        'thrown',
        'outside the page: http://127.0.0.1:9',
        'wider',
        'out of order: [1, 3]',
        'without a text',
        'title',
    ):
        assert fault in found
    address = (tmp_path / 'none.html').as_uri()
    assert 'not the page' in '; '.join(faults(look(browser, address), address))


# ---- what is on it -----------------------------------------------------------------------------------------------------
def test_what_is_on_the_page(page, finished):
    s = statement_of(finished)
    for text in ('41.5', '60.25', 'epoch 2', 'PrivacyBudgetHook', '25.0', '90.0%'):
        assert text in page
    for text in (
        s['guarantee'],
        s['for_the_people'],
        s['not_covered'][0],
        'the risk figures, recomputed',
        'Epsilon spent',
    ):
        assert str(escape(text)) in page
    assert 'and/or public data' in page  # a text with a slash is no path


def test_what_must_not_be_on_it(page, synthetic):
    assert EVIL not in page and 'alert(&#34;x&#34;)' in page
    for secret in (
        PRIVATE_LOSS,
        PRIVATE_ACCURACY,
        '/home/',
        'secret',
        synthetic,
        'mpii_train',
        'load_from',
        'subjects_seal',
    ):
        assert str(secret) not in page, secret
    assert 'backbone.pth' in page
    assert '<script' not in page and "default-src 'none'" in page


def test_pictures_only_if_asked_for(folder):
    page = report(folder)
    assert 'image/png' not in page and 'a validation person' not in page and '90.0%' in page


def test_what_a_private_view_audit_found_is_left_out(folder):
    audited(folder, PRIVATE)
    assert '25.0' in (folder / 'privacy_statement.md').read_text()
    page = report(folder)
    assert '25.0' not in page and 'outside the guarantee, and not on this page' in page
    with pytest.raises(PrivacyError, match='no pictures of validation people'):
        report(folder, '--view-pictures')


@pytest.mark.parametrize('changed', ['sample', 'view'])
def test_pictures_of_another_audit_are_not_shown(folder, changed):
    arrays = dict(np.load(folder / 'view_audit.npz'))
    np.savez_compressed(folder / 'view_audit.npz', **{**arrays, changed: 'another'})
    with pytest.raises(PrivacyError, match='no pictures of validation people'):
        report(folder, '--view-pictures')


def test_private_pictures_are_refused_as_predictions_and_so_are_copies_of_them(
    finished, predictions, synthetic, tmp_path
):
    private = synthetic / 'images' / json.loads((synthetic / 'annotations/mpii_train.json').read_text())[0]['image']
    copied, linked, other, none = (tmp_path / f'{name}.jpg' for name in ('copied', 'linked', 'other', 'none'))
    shutil.copy(private, copied)
    linked.symlink_to(private)
    cv2.imwrite(str(other), np.zeros((96, 96, 3), np.uint8))
    for path, message in ((copied, 'of the private set'), (linked, 'of the private set'), (none, 'can be drawn')):
        with pytest.raises(PrivacyError, match=message):
            example_people(predictions('train', str(path)), finished / 'config.py')
    assert len(example_people(predictions('train', str(other)), finished / 'config.py')) == 3


# ---- of what no page is made -------------------------------------------------------------------------------------------
def test_no_page_of_files_that_do_not_belong_together(folder):
    (folder / make_report.REPORT_NAME).unlink(missing_ok=True)
    (folder / STATEMENT_NAME).write_text((folder / STATEMENT_NAME).read_text().replace('"steps": 20', '"steps": 19'))
    with pytest.raises(PrivacyError, match='do not hold together: .*seal'):
        report(folder)
    assert not (folder / make_report.REPORT_NAME).exists()
    (folder / STATEMENT_NAME).unlink()
    with pytest.raises(PrivacyError, match='privacy_statement.json'):
        report(folder)


@pytest.mark.parametrize('content', ['[1]', '{', None, '{"images": [], "annotations": []}'])
def test_scores_that_cannot_be_read(finished, tmp_path, content):
    if content is not None:
        (tmp_path / 'scores.json').write_text(content)
    with pytest.raises(PrivacyError, match='tools/test.py --out'):
        report(finished, '--scores', f'a={tmp_path}/scores.json')
    with pytest.raises(PrivacyError, match='write NAME=FILE'):
        report(finished, '--scores', 'scores.json')


def test_out_may_be_a_folder_and_must_be_in_one(finished, tmp_path, monkeypatch):
    """A folder ended in an OSError after all the work, and left a file called FOLDER.partial."""
    monkeypatch.setattr(sys, 'argv', ['make_report.py', str(finished), '--out', str(tmp_path)])
    make_report.main()
    assert [path.name for path in tmp_path.iterdir()] == [make_report.REPORT_NAME]
    with pytest.raises(PrivacyError, match=f'--out {tmp_path}/none/page.html: there is no folder {tmp_path}/none'):
        report(finished, '--out', f'{tmp_path}/none/page.html')


def test_a_training_that_is_not_private_says_so_first(tmp_path):
    write_work_dir(tmp_path / 'work', secret_randomness=False)
    page = report(tmp_path / 'work')
    assert page.index('NOT PRIVATE') < page.index('In plain words') and 'No figure is known' in page
    assert 'The config of this statement is not in the work dir' in page and 'public views show' not in page


# ---- the parts ---------------------------------------------------------------------------------------------------------
def test_a_resume_goes_back_and_another_training_to_the_start(tmp_path):
    for name, steps in (('1', (1, 2, 3)), ('2', (3, 4)), ('3', (1,))):
        (tmp_path / name / 'vis_data').mkdir(parents=True)
        lines = [json.dumps(dict(PCK=10.0 * int(name) + step, step=step)) for step in steps]
        (tmp_path / name / 'vis_data/scalars.json').write_text('\n'.join(lines))
        if name == '2':
            assert {at: x['PCK'] for at, x in validation_scores(tmp_path).items()} == {1: 11, 2: 12, 3: 23, 4: 24}
    assert validation_scores(tmp_path) == {1: {'PCK': 31.0}}


def test_settings_are_read_without_running_the_config():
    text = "import os\nos.abort()\ntrain_cfg = {'max_epochs': 3}\noptim_wrapper = dict(a=r'C:\\x\\y.pth', b='./z/w.json')\n"
    assert settings_of(text) == {'train_cfg': "{'max_epochs': 3}", 'optim_wrapper': "dict(a='y.pth', b='w.json')"}
    assert settings_of('train_cfg = (') == settings_of('') == {}


def test_equal_steps_are_one_row_and_very_many_are_cut():
    assert step_rows(history_of([[2.0, '1/20', 3], [2.0, '1/20', 4], [1.0, '1/10', 1]])) == [
        ('1 to 7', '7', '2', '1/20'),
        ('8 to 8', '1', '1', '1/10'),
    ]
    rows = step_rows(history_of([[1.0 + i, '1/20', 1] for i in range(100)]))
    assert len(rows) == 21 and rows[10][0] == '80 more rows' and rows[-1][0] == '100 to 100'


def test_a_curve_needs_steps_and_a_bound():
    assert budget_curve([], 1e-4, 'pld', None) is None
    assert budget_curve(history_of([[0.0, '1/20', 3]]), 1e-4, 'pld', None) is None
    curve = budget_curve(history_of([[2.0, '1/20', 3], [1.0, '1/20', 4]]), 1e-4, 'pld', 1.0)
    assert 'after 7' in curve.words and curve.light != curve.dark


def test_a_curve_shows_the_first_step():
    """It costs most. A line from 0 to step 2 would show half of what two cost, and after many steps nearly nothing of it."""
    first = epsilon(history_of([[1.4, '1/4', 1]]), 1e-3, 'rdp')
    for steps in (1, 32, 400):
        curve = budget_curve(history_of([[1.4, '1/4', steps]]), 1e-3, 'rdp', None)
        assert f'{rounded_up(first)} after 1' in re.split(', |: ', curve.words)
