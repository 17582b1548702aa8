"""Two statements are compared, and what both have spent is composed; no training counts less than once."""

import json
import shutil

import compare_statements
import pytest

from mmpose_dp.extras.evidence import STATEMENT_NAME
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from tests.support.statements import write_work_dir as write


def compared(call, *paths):
    done = call(compare_statements, *paths, '--json')
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {name: (a, b) for name, a, b in found['differences']}, found['together']


def test_two_trainings_add_up_and_their_differences_are_named(call, tmp_path):
    first, second = write(tmp_path / 'a'), write(tmp_path / 'b', steps=30, noise_multiplier=1.5)
    different, both = compared(call, tmp_path / 'a', tmp_path / 'b')
    assert different['steps'] == (20, 30) and different['noise_multiplier'] == (2.0, 1.5)
    assert 'seal' not in different and 'delta' not in different and 'ledger.head' in different
    total = Ledger()
    total.add(first)
    total.add(second)
    assert total.epsilon(5e-4) <= both['epsilon'] < total.epsilon(5e-4) * 1.001
    assert (
        both['risk']['add_or_remove']['advantage']
        > json.loads((tmp_path / 'a' / STATEMENT_NAME).read_text())['risk']['add_or_remove']['advantage']
    )
    text = call(compare_statements, tmp_path / 'a', tmp_path / 'b').stdout
    assert 'Together, if they are on the same people (from both ledgers.)' in text and 'A 50:50 guess' in text
    (tmp_path / 'b' / LEDGER_NAME).unlink()
    again = compared(call, tmp_path / 'a', tmp_path / 'b' / STATEMENT_NAME)[1]
    assert again['epsilon'] == both['epsilon'] and 'that the statements name' in again['source']


def test_a_ledger_that_goes_on_counts_once(call, tmp_path):
    write(tmp_path / 'a')
    (tmp_path / 'b').mkdir()
    shutil.copy(tmp_path / 'a' / LEDGER_NAME, tmp_path / 'b')
    ledger = write(tmp_path / 'b', steps=5, ledger=Ledger.read(tmp_path / 'b' / LEDGER_NAME))
    for order in ('ab', 'ba'):
        both = compared(call, *(tmp_path / name for name in order))[1]
        assert (
            'from one ledger' in both['source']
            and ledger.epsilon(5e-4) <= both['epsilon'] < ledger.epsilon(5e-4) * 1.001
        )
    different, same = compared(call, tmp_path / 'a', tmp_path / 'a')
    assert not different and same['epsilon'] < both['epsilon']


def test_what_does_not_add_up_is_refused_and_other_views_are_named(call, tmp_path):
    write(tmp_path / 'a')
    write(tmp_path / 'image', privacy_unit='image')
    write(tmp_path / 'view', method='feature', public_view='Gaussian blur')
    done = call(compare_statements, tmp_path / 'a', tmp_path / 'image')
    assert done.returncode == 2 and 'do not add up' in done.stderr
    assert 'public views differ' in compared(call, tmp_path / 'a', tmp_path / 'view')[1]['warnings'][0]
    (tmp_path / 'a' / STATEMENT_NAME).unlink()
    for path, message in ((tmp_path / 'a', 'no statement'), (tmp_path / 'none', 'no such file')):
        done = call(compare_statements, path, tmp_path / 'view')
        assert done.returncode == 2 and message in done.stderr


def test_what_is_not_private_is_not_bounded(call, tmp_path):
    write(tmp_path / 'a', secret_randomness=False)
    write(tmp_path / 'b')
    assert compared(call, tmp_path / 'a', tmp_path / 'b')[1]['epsilon'] == 'not bounded'


@pytest.fixture(autouse=True)
def _few_accountants(monkeypatch):
    """PRV and groups take seconds and are not compared here."""
    monkeypatch.setattr('mmpose_dp.privacy.statement.ACCOUNTANTS', ('pld',))
    monkeypatch.setattr('mmpose_dp.privacy.statement._GROUP_LIMIT', 0.0)
