"""A ledger only grows, on the disk before in memory, and is refused where it was damaged, shortened or exchanged."""

import os
from fractions import Fraction

import pytest

from mmpose_dp.extras.branches import add
from mmpose_dp.privacy.accounting import StepEvent, epsilon
from mmpose_dp.privacy.errors import LedgerError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger

RATE = Fraction(32, 22246)
A, B = StepEvent(1.1, RATE), StepEvent(0.9, Fraction(1, 100))


def ledger_of(*entries, **metadata):
    ledger = Ledger()
    ledger.begin_run(**{'privacy_unit': 'instance', 'secret_randomness': True, **metadata})
    for event, steps in entries:
        ledger.count(event, steps)
    return ledger


def test_it_grows_and_composes():
    ledger = ledger_of((A, 3), (A, 2), (B, 7))
    assert ledger.history == ((A, 5), (B, 7)) and ledger.steps == ledger.run_steps == 12
    assert ledger.epsilon(1e-5) == epsilon([(A, 5), (B, 7)], 1e-5) > epsilon([(A, 5)], 1e-5)
    for steps in (0, -1, 1.5, True):
        with pytest.raises(LedgerError, match='only grows'):
            ledger.count(A, steps)


def test_runs_are_separate():
    ledger = ledger_of((A, 3))
    ledger.begin_run(privacy_unit='instance', secret_randomness=False)
    ledger.count(A, 4)
    assert ledger.earlier_history == ((A, 3),) and ledger.run_steps == 4 and ledger.steps == 7 and len(ledger.runs) == 2
    assert not ledger.is_secret
    with pytest.raises(LedgerError, match='privacy_unit'):
        ledger.begin_run(privacy_unit='image')
    with pytest.raises(LedgerError, match='subjects=None.*another work_dir'):
        ledger.begin_run(privacy_unit='instance', subjects='annotation field patient')


def test_subjects_are_compared_by_a_digest_that_only_the_file_can_check(tmp_path):
    """A plain digest would let everybody who has it try out who is which subject."""
    subjects = dict(privacy_unit='subject', subjects='subjects.json')
    first, second = (ledger_of((A, 3), subjects_digest='a' * 64, **subjects) for _ in range(2))
    assert first.head != second.head and 'a' * 64 not in str(first.runs)  # each has a key of its own
    first.keep_at(tmp_path / LEDGER_NAME)
    first = Ledger.read(tmp_path / LEDGER_NAME)
    first.resume_run(subjects_digest='a' * 64, **subjects)
    first.begin_run(subjects_digest='a' * 64, **subjects)
    for open_run in (first.resume_run, first.begin_run):
        with pytest.raises(LedgerError, match="subjects='subjects.json' and .* other subjects under that name"):
            open_run(subjects_digest='b' * 64, **subjects)
    add(second, first)  # the tool that adds cannot compare; the training that goes on from the sum does
    with pytest.raises(LedgerError, match='other subjects under that name'):
        second.begin_run(subjects_digest='b' * 64, **subjects)
    second.begin_run(subjects_digest='a' * 64, **subjects)


def test_a_ledger_with_a_plain_digest_still_resumes():
    """As they were written before the digest had a key."""
    subjects = dict(privacy_unit='subject', subjects='subjects.json')
    old = ledger_of((A, 3), privacy_unit='subject', subjects=f'subjects.json (sha256 {"a" * 12})')
    old.resume_run(subjects_digest='a' * 64, **subjects)
    old.begin_run(subjects_digest='a' * 64, **subjects)
    for open_run, name, digest in (
        (old.begin_run, 'subjects.json', 'b' * 64),
        (old.begin_run, 'others.json', 'a' * 64),
        (old.resume_run, 'subjects.json', 'b' * 64),
    ):
        with pytest.raises(LedgerError, match='subjects='):
            open_run(privacy_unit='subject', subjects=name, subjects_digest=digest)
    with pytest.raises(LedgerError, match='subjects='):
        add(old, ledger_of((A, 1), privacy_unit='subject', subjects=f'subjects.json (sha256 {"b" * 12})'))


def test_a_run_is_resumed_as_it_was(tmp_path):
    """Its statement could not hold for both parts; and a debug seed or exposed metrics cannot be undone afterwards."""
    metadata = dict(privacy_unit='instance', personal_budgets=[[1.0, 4]], method='feature', public_view='blur')
    ledger = ledger_of((A, 3), **metadata)
    for name, other in (
        ('privacy_unit', 'image'),
        ('personal_budgets', []),
        ('personal_assignment', [0, 1]),
        ('method', 'dpsgd'),
        ('public_view', 'face'),
        ('public_data', 'COCO'),
    ):
        with pytest.raises(
            LedgerError, match=f'{name}={metadata.get(name)!r}.*{other!r}.*another work_dir'.replace('[', r'\[')
        ):
            ledger.resume_run(**{**metadata, name: other})
    ledger.keep_at(tmp_path / LEDGER_NAME)
    for odd in (False, True, False):
        assert ledger.is_secret != ledger.exposes_private_metrics or not odd
        ledger.resume_run(**metadata, secret_randomness=not odd, expose_private_metrics=odd)
    ledger.count(A)
    read = Ledger.read(tmp_path / LEDGER_NAME)
    assert not read.is_secret and read.exposes_private_metrics and read.run_history == ((A, 4),) and len(read.runs) == 1
    with pytest.raises(LedgerError, match='no training'):
        Ledger().resume_run(privacy_unit='instance')


def test_a_view_that_was_published_is_named_by_all_that_follows():
    """Plain DP and then Feature DP is Feature DP; the other way round, or with another view, the last statement is wrong."""
    ledger, metadata = ledger_of((A, 1), method='dpsgd'), dict(privacy_unit='instance', method='feature')
    ledger.begin_run(**metadata, public_view='blur')
    ledger.begin_run(**{**metadata, 'method': 'hybrid'}, public_view='blur')
    for view in ('face', None):
        with pytest.raises(LedgerError, match=f"public_view='blur'.*{view!r}.*another work_dir"):
            ledger.begin_run(**metadata, public_view=view)
    with pytest.raises(LedgerError, match='public_view'):
        add(ledger, ledger_of((B, 1)))


def test_it_goes_through_a_file(tmp_path):
    ledger, personal = ledger_of((A, 3)), StepEvent(1.0, Fraction(1, 4), (Fraction(1, 8), Fraction(1, 4)))
    ledger.keep_at(tmp_path / 'new' / LEDGER_NAME)  # what was counted before is written too
    ledger.count(B)
    ledger.count(personal)
    read = Ledger.read(tmp_path / 'new' / LEDGER_NAME)
    assert read.history == ledger.history == ((A, 3), (B, 1), (personal, 1))
    assert read.head == ledger.head and read.runs == ledger.runs
    assert Ledger.read(tmp_path / 'nothing').history == ()


def test_a_step_is_on_the_disk_before_count_returns(tmp_path, monkeypatch):
    ledger, path, synced = ledger_of(), tmp_path / LEDGER_NAME, []
    ledger.keep_at(path)
    real = os.fsync
    monkeypatch.setattr(os, 'fsync', lambda file: (real(file), synced.append(Ledger.read(path).steps)))
    for _ in range(3):
        ledger.count(A)
    assert synced == [1, 2, 3]
    monkeypatch.setattr(os, 'fsync', lambda file: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        ledger.count(A)
    assert ledger.steps == 3


def test_a_full_disk_is_reported_before_the_step(tmp_path, monkeypatch):
    ledger, path = ledger_of((A, 3)), tmp_path / LEDGER_NAME
    ledger.keep_at(path)
    real = os.write
    monkeypatch.setattr(os, 'write', lambda file, data: real(file, data[: len(data) // 2]))
    with pytest.raises(LedgerError, match=f'{LEDGER_NAME}.*disk full'):
        ledger.count(A)
    with pytest.raises(LedgerError, match=f'{LEDGER_NAME}.*disk full'):
        ledger_of((B, 1)).keep_at(tmp_path / 'new' / LEDGER_NAME)
    monkeypatch.undo()
    assert ledger.steps == Ledger.read(path).steps == 3
    again = Ledger.read(path)
    again.keep_at(path)  # the torn line goes
    again.count(B)
    assert Ledger.read(path).history == ((A, 3), (B, 1))


def test_a_file_is_only_appended_to(tmp_path):
    path, ledger = tmp_path / LEDGER_NAME, ledger_of((A, 3))
    ledger.keep_at(path)
    before = path.read_bytes()
    ledger.count(A)
    assert path.read_bytes().startswith(before)
    with pytest.raises(LedgerError, match='another training'):
        ledger_of((B, 3)).keep_at(path)
    with open(path, 'a') as file:
        file.write('x')
    with pytest.raises(LedgerError, match='somebody else'):
        ledger.count(A)


@pytest.mark.parametrize('end', [b'', b'\r', b' '])
def test_a_whole_last_line_counts_without_its_end(tmp_path, end):
    """An editor, or a copy by hand, may have taken it away; a kill leaves no whole line without having counted it."""
    path, ledger = tmp_path / LEDGER_NAME, Ledger()
    ledger.keep_at(path)
    ledger.begin_run()
    ledger.count(StepEvent(1.0, Fraction(1, 10)), 1000)
    ledger.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + end)
    again = Ledger.read(path)
    assert (again.steps, again.head) == (1000, ledger.head)
    again.keep_at(path)
    again.close()
    assert path.read_bytes() == whole


def test_the_second_of_two_trainings_in_one_folder_is_told_so(tmp_path):
    """Both find an empty folder; the first to begin has it."""
    path, ledgers = tmp_path / LEDGER_NAME, [Ledger.read(tmp_path / LEDGER_NAME) for _ in range(2)]
    for ledger in ledgers:
        ledger.begin_run(privacy_unit='instance')
    ledgers[0].keep_at(path)
    ledgers[0].count(A)
    before = path.read_bytes()
    with pytest.raises(
        LedgerError, match='has lines of another training, or was edited: give a new work_dir or restore'
    ):
        ledgers[1].keep_at(path)
    ledgers[0].count(A)
    assert path.read_bytes().startswith(before) and Ledger.read(path).steps == 2


def test_a_torn_last_line_is_no_step(tmp_path):
    """It was cut off before count returned, so no noise was made for it."""
    path, ledger = tmp_path / LEDGER_NAME, ledger_of((A, 1))
    ledger.keep_at(path)
    ledger.count(A)
    path.write_bytes(path.read_bytes()[:-5])
    again = Ledger.read(path)
    assert again.steps == 1
    again.keep_at(path)
    again.count(B)
    assert Ledger.read(path).history == ((A, 1), (B, 1))


def test_two_ledgers_add_up():
    one, two = ledger_of((A, 3)), ledger_of((B, 4), secret_randomness=False)
    add(one, two)
    assert one.history == ((A, 3), (B, 4)) and len(one.runs) == 2 and not one.is_secret
    assert one.epsilon(1e-5) == epsilon([(A, 3), (B, 4)], 1e-5)
    with pytest.raises(LedgerError, match='privacy_unit'):
        add(one, ledger_of((A, 1), privacy_unit='image'))


@pytest.mark.parametrize(
    'change',
    [
        lambda s: None,
        lambda s: {},
        lambda s: {**s, 'format': 1},
        lambda s: {**s, 'head': 'x'},
        lambda s: {**s, 'entries': []},
        lambda s: {**s, 'entries': [[1.1, '32/22246', 1]]},
        lambda s: {**s, 'entries': 'none'},
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(change):
    ledger = ledger_of((A, 5))
    state = ledger.state_dict()
    ledger.count(B)
    ledger.check_covers(state)  # steps taken since do no harm
    with pytest.raises(LedgerError, match='ledger'):
        ledger.check_covers(change(state))
    with pytest.raises(LedgerError, match='not the beginning'):
        ledger_of((A, 4)).check_covers(state)
