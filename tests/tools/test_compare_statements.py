"""Two statements are compared, and what both have spent is composed; no training counts less than once."""

import json
import shutil

import compare_statements
import privacy_ledger
import pytest

from mmpose_dp.extras.branches import add
from mmpose_dp.extras.evidence import STATEMENT_NAME, ledger_in_statement
from mmpose_dp.privacy.accounting import epsilon
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger, _dump, _seal
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.validation import rounded_up
from mmpose_dp.verify import verify
from tests.support.core import PLAN_SETTINGS
from tests.support.statements import amend
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
    add(total, first)
    add(total, second)
    assert total.epsilon(5e-4) <= both['epsilon'] < total.epsilon(5e-4) * 1.001
    assert (
        both['risk']['add_or_remove']['advantage']
        > json.loads((tmp_path / 'a' / STATEMENT_NAME).read_text())['risk']['add_or_remove']['advantage']
    )
    text = call(compare_statements, tmp_path / 'a', tmp_path / 'b').stdout
    assert 'Together, if they are on the same people (from both ledgers):' in text and 'A 50:50 guess' in text
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


@pytest.fixture
def branches(tmp_path):
    """Two copies of a work dir, each resumed for ten more steps."""
    write(tmp_path / 'a', steps=10)
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    return [resumed(tmp_path / name) for name in 'ab']


def resumed(folder):
    plan = PrivacyPlan(**{**PLAN_SETTINGS, 'noise_multiplier': 2.0})
    ledger = Ledger.read(folder / LEDGER_NAME)
    ledger.keep_at(folder / LEDGER_NAME)
    ledger.resume_run(**plan.run_metadata)
    ledger.count(plan.event, 10)
    ledger.close()
    amend(folder, ledger=ledger_in_statement(ledger), steps=20)
    return folder


def test_branches_of_one_work_dir_both_count(call, branches, tmp_path):
    one, other = branches
    ledgers = [Ledger.read(folder / LEDGER_NAME) for folder in branches]
    assert ledgers[0].head != ledgers[1].head and ledgers[0].history == ledgers[1].history
    event = ledgers[0].history[0][0]
    both = compared(call, one, other)[1]
    spent = epsilon([(event, 30)], 5e-4)
    assert '10 steps are in two ledgers and count once; then these are two branches' in both['source']
    assert epsilon([(event, 20)], 5e-4) < spent <= both['epsilon'] < spent * 1.001
    out = tmp_path / 'all.jsonl'
    done = call(privacy_ledger, 'add', one, other, one, '--out', out)
    assert done.returncode == 0 and 'two branches' in done.stdout, done.stderr
    assert sum(line.startswith('training ') for line in done.stdout.splitlines()) == 2
    assert Ledger.read(out).history == ((event, 20), (event, 10)) and f'epsilon {rounded_up(spent)} at' in done.stdout
    done = call(privacy_ledger, 'add', out, other, '--delta', '1e-3')
    assert done.returncode == 2 and 'more than once' in done.stderr
    shutil.copy(other / LEDGER_NAME, one)
    assert 'a copy that went on apart' in str(verify(one).wrong)
    assert 'a copy that went on apart' in call(privacy_ledger, 'show', one).stderr


def test_what_an_earlier_version_resumed_cannot_be_told_apart_and_counts_in_each(call, branches):
    """Its resumes had no random name, so copies that went on apart have the same bytes."""
    for folder in branches:
        lines = [json.loads(line) for line in (folder / LEDGER_NAME).read_text().splitlines()]
        old, head = Ledger(), Ledger().head
        for line in lines:
            line.get('resumed', {}).pop('part', None)
            line['hash'] = head = _seal(head, line)
            old._take(line)
        (folder / LEDGER_NAME).write_bytes(b''.join(map(_dump, lines)))
        amend(folder, ledger=ledger_in_statement(Ledger.read(folder / LEDGER_NAME)))
    both = compared(call, *branches)[1]
    assert '10 steps are in two ledgers' in both['source'] and 'may be in both, and counts twice' in both['source']
    event = old.history[0][0]
    assert both['epsilon'] >= epsilon([(event, 30)], 5e-4)
    done = call(privacy_ledger, 'add', *branches)
    assert done.returncode == 2 and 'earlier version' in done.stderr
    resumed(branches[0])
    assert 'one ledger' in compared(call, branches[0], branches[0])[1]['source']


def test_what_does_not_add_up_is_refused_and_other_views_are_named(call, tmp_path):
    write(tmp_path / 'a')
    write(tmp_path / 'image', privacy_unit='image')
    write(tmp_path / 'view', method='feature', public_view='Gaussian blur')
    done = call(compare_statements, tmp_path / 'a', tmp_path / 'image')
    assert done.returncode == 2 and 'do not add up' in done.stderr
    assert 'public views differ' in compared(call, tmp_path / 'a', tmp_path / 'view')[1]['warnings'][0]
    for other, guess in (('view', "a given record's hidden part was used at all"), ('a', 'a given record was used')):
        text = call(compare_statements, tmp_path / 'a', tmp_path / other).stdout
        assert f'A 50:50 guess whether {guess} becomes right' in text  # with a view, membership is published
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
