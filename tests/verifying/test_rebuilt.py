"""A statement of any kind of training is written again from its ledger; every word that was changed and sealed again is found."""

import json
import shutil
from fractions import Fraction

import pytest

from mmpose_dp.engine.view_audit import AUDIT_NAME, PRIVATE, update_statement
from mmpose_dp.extras.evidence import STATEMENT_NAME
from mmpose_dp.extras.personal_budgets import Budget, PersonalPlan
from mmpose_dp.extras.schedule import Schedule, ScheduledPlan
from mmpose_dp.privacy.accounting import ACCOUNTANTS, epsilon
from mmpose_dp.privacy.ledger import LEDGER_NAME
from mmpose_dp.verify import verify
from tests.support.core import PLAN_SETTINGS
from tests.support.statements import amend, statement_of, write_work_dir

SETTINGS = {**PLAN_SETTINGS, 'noise_multiplier': 2.0}
BUDGETS = tuple(Budget(e, n, Fraction(q, 100)) for e, n, q in ((1.0, 400, 2), (4.0, 600, 7)))
VIEW = 'Gaussian blur, sigma 14'
KINDS = {
    'dpsgd': {},
    'projected': dict(method='projected', public_data='COCO and more'),
    'feature': dict(method='feature', public_view=VIEW, privacy_unit='image'),
    'hybrid with data': dict(method='hybrid', public_view=VIEW, public_data='COCO'),
    'subjects': dict(method='feature', public_view=VIEW, privacy_unit='subject', subjects="'id', by hand"),
    'debug seed': dict(secret_randomness=False),
    'exposed': dict(expose_private_metrics=True),
    'adaptive': dict(adaptive_norm=True),
    'bfloat16': dict(arithmetic='bfloat16 on a GPU'),
    'no budget': dict(target_epsilon=None, accountant='rdp'),
    'scheduled': dict(plan=ScheduledPlan(**SETTINGS, schedule=Schedule(0.5, 0.7, 4))),
    'personal': dict(plan=PersonalPlan(**SETTINGS, budgets=BUDGETS, assignment=(0, 1) * 500)),
}


def test_an_honest_statement_holds_whatever_the_locale(tmp_path, monkeypatch):
    """Texts of people may have any letters; the page is UTF-8, as its hash says."""
    write_work_dir(tmp_path, steps=1)
    monkeypatch.setattr('io.text_encoding', lambda encoding, *_: encoding or 'latin-1')  # as the locale would
    amend(tmp_path, decision={**statement_of(tmp_path)['decision'], 'controller': 'José \u2126'})
    monkeypatch.undo()
    assert not verify(tmp_path).wrong and 'José \u2126' in (tmp_path / 'privacy_statement.md').read_bytes().decode()


@pytest.mark.parametrize('kind', KINDS)
def test_an_honest_statement_holds_with_its_ledger_and_without(kind, tmp_path):
    write_work_dir(tmp_path, steps=4, **KINDS[kind])
    assert not verify(tmp_path).wrong, str(verify(tmp_path))
    (tmp_path / LEDGER_NAME).unlink()
    found = verify(tmp_path)
    assert not found.wrong and 'compared with each other only' in str(found), str(found)


@pytest.mark.parametrize(('factor', 'holds'), [(1.5, True), (0.5, False)])
@pytest.mark.parametrize('ledger', [True, False])
def test_an_accountant_of_ones_own_is_compared_with_pld(factor, holds, ledger, tmp_path, monkeypatch):
    """Where its statement is verified, the file that registered it is not imported."""
    own = f'own_{factor}'  # epsilons are kept by name
    monkeypatch.setitem(ACCOUNTANTS, own, lambda history, delta: factor * epsilon(history, delta))
    write_work_dir(tmp_path, steps=4, accountant=own, target_epsilon=None)
    monkeypatch.delitem(ACCOUNTANTS, own)
    if not ledger:
        (tmp_path / LEDGER_NAME).unlink()
    found = verify(tmp_path)
    assert not found.wrong if holds else any('by own_' in fault and 'too low' in fault for fault in found.wrong), str(
        found
    )
    assert any(f'by {own}: this accountant is not known here' in line for line in found.unchecked)


def test_several_trainings_in_one_ledger_hold(tmp_path):
    whole = dict(expected_batch_size=1000)  # no sampling: quick to account for
    ledger = write_work_dir(tmp_path, **KINDS['projected'], **whole)
    write_work_dir(tmp_path, ledger=ledger, **KINDS['dpsgd'], **whole)
    write_work_dir(tmp_path, steps=3, ledger=ledger, **KINDS['hybrid with data'], **whole)
    assert 'Projected DP-SGD and DP-SGD and Hybrid' in statement_of(tmp_path)['method'] and not verify(tmp_path).wrong
    (tmp_path / LEDGER_NAME).unlink()
    assert not verify(tmp_path).wrong, str(verify(tmp_path))


def test_personal_budgets_of_an_earlier_training_stay_named(tmp_path):
    """The sum of both shows which record was sampled how often in the first."""
    whole = dict(expected_batch_size=1000)  # no sampling: quick to account for
    budgets = tuple(Budget(target, 500, Fraction(1)) for target in (1.0, 4.0))
    plan = PersonalPlan(**{**SETTINGS, **whole}, budgets=budgets, assignment=(0, 1) * 500)
    ledger = write_work_dir(tmp_path, 2, plan=plan)
    write_work_dir(tmp_path, 3, ledger=ledger, **whole)
    statement = statement_of(tmp_path)
    assert 'which personal budget a record has' in statement['not_protected'] and 'personal_epsilon' not in statement
    assert not verify(tmp_path).wrong, str(verify(tmp_path))
    (tmp_path / LEDGER_NAME).unlink()
    assert not verify(tmp_path).wrong, str(verify(tmp_path))


@pytest.fixture(scope='module')
def works(tmp_path_factory):
    """A work dir of DP-SGD and a hybrid's, each with a budget."""
    folder = tmp_path_factory.mktemp('works')
    for name, kind in (('dpsgd', 'dpsgd'), ('hybrid', 'hybrid with data')):
        write_work_dir(folder / name, target_epsilon=3.0, **KINDS[kind])
    return folder


def wrong_after(folder, ledger=True, **changes):
    """What is wrong once these values are changed and the statement is sealed again; '' if nothing is."""
    before, kept = (
        {name: (folder / name).read_text() for name in (STATEMENT_NAME, 'privacy_statement.md')},
        folder / 'kept',
    )
    amend(folder, **changes)
    if not ledger:
        (folder / LEDGER_NAME).rename(kept)
    found = verify(folder)
    for name, text in before.items():
        (folder / name).write_text(text)
    if not ledger:
        kept.rename(folder / LEDGER_NAME)
    assert not verify(folder).wrong
    return '; '.join(found.wrong), str(found)


HARDENED = "the operating system's entropy, hardened against floating-point attacks"
FORGED = {  # what the ledger determines
    'noise_source': HARDENED, 'sampling_used': 'Poisson, from a coin', 'sampling_assumed': 'none', 'noise_multiplier': 50.0,
    'sample_rate': '1/400', 'expected_batch_size': 1, 'num_records': 100_000, 'epochs': 2.0, 'not_covered': [],
    'not_protected': [], 'released': 'nothing', 'privacy_unit': 'image: one image with all its annotated people',
    'public_views': ['another'], 'public_data': 'none', 'cost_of_tuning': 'included', 'method': 'Feature DP', 'adjacency': 'any',
    'protected': 'everything', 'trust_model': 'none is needed', 'attacker': 'knows nothing', 'anonymity': 'The model is anonymous',
    'for_the_people': 'Nothing can be learned about you', 'parameters_per_record': 0.001, 'rounding': 'forwards in exact numbers',
    'risk': None, 'target_epsilon': 0.01, 'delta': 0.3, 'private': False,
}  # fmt: skip


@pytest.mark.parametrize('name', FORGED)
def test_a_value_that_the_ledger_determines_cannot_be_changed(works, name):
    assert wrong_after(works / 'hybrid', **{name: FORGED[name]})[0]


@pytest.mark.parametrize('name', ['not_covered', 'not_protected'])
@pytest.mark.parametrize('kind', ['dpsgd', 'hybrid'])
@pytest.mark.parametrize('ledger', [True, False])
def test_no_standard_sentence_can_be_left_out_or_added(works, name, kind, ledger):
    """With the ledger and without."""
    sentences = statement_of(works / kind)[name]
    for i, sentence in enumerate(sentences):
        assert sentence[:60] in wrong_after(works / kind, ledger, **{name: sentences[:i] + sentences[i + 1 :]})[0]
    assert f'{name} must not say' in wrong_after(works / kind, ledger, **{name: [*sentences, 'all is well']})[0]


@pytest.mark.parametrize('ledger', [True, False])
def test_a_hybrid_cannot_pass_for_dp_sgd(works, ledger):
    plain, hybrid = (statement_of(works / kind) for kind in ('dpsgd', 'hybrid'))
    words = (
        'protected',
        'adjacency',
        'not_protected',
        'method',
        'public_views',
        'public_data',
        'public_data_sets',
        'for_the_people',
    )
    changes = {key: plain[key] for key in words}
    found = wrong_after(works / 'hybrid', ledger, **changes, guarantee=plain['guarantee'])[0]
    assert bool(found) is ledger  # without the ledger it holds together, and the line says what was compared


def replaced(values, place, figure):
    """The values with another one at a place in nested dicts."""
    first, *rest = place
    return {**values, first: replaced(values[first], rest, figure) if rest else figure}


NO_NUMBER = float('nan')


@pytest.mark.parametrize(
    ('figure', 'place'),
    [
        (0.001, 'epsilon_by_accountant.exact'),
        (0.0, 'risk.profile.0.01'),
        (0.2, 'risk.add_or_remove.true_positive_rate_at.0.2'),
        (0.5, 'risk.add_or_remove.true_rate'),
        (NO_NUMBER, 'risk.add_or_remove.advantage'),
        (NO_NUMBER, 'risk.profile.1e-09'),
    ],
)
@pytest.mark.parametrize('ledger', [True, False])
def test_no_figure_can_be_added(works, figure, place, ledger):
    """The page shows it beside the others, and a delta or a rate of false positives that training does not use looks like them."""
    name, *rest = place.split('.', 3 if 'rate_at' in place else 2)
    changed = replaced(statement_of(works / 'dpsgd')[name], rest, figure)
    if 'add_or_remove' in rest:  # the page shows these two side by side
        changed = replaced(changed, ['replace_one', *rest[1:]], figure)
    found = wrong_after(works / 'dpsgd', ledger, **{name: changed})[0]
    assert 'too low' in found if 'exact' in place or figure is NO_NUMBER else f'could be anything: {place}' in found


def test_epsilon_of_personal_budgets_is_computed_again(tmp_path):
    write_work_dir(tmp_path, 4, **KINDS['personal'])
    stated = statement_of(tmp_path)['personal_epsilon']
    small, large = stated
    for name in stated:
        assert any(f'of the {name}, recomputed' in line for line in verify(tmp_path).checked)
        forged = wrong_after(tmp_path, personal_epsilon={**stated, name: stated[name] / 2})[0]
        assert f'of the {name} is too low: recomputed, it is' in forged
    for other in ({large: stated[large]}, {}, {**stated, '1 records with budget 9': 0.1}):
        assert (
            'personal_epsilon: the budgets in the ledger are 400 records'
            in wrong_after(tmp_path, personal_epsilon=other)[0]
        )
    (tmp_path / LEDGER_NAME).unlink()
    assert 'personal_epsilon: which records are sampled how often is in the ledger alone' in verify(tmp_path).unchecked


def test_there_are_no_personal_budgets_where_the_ledger_has_none(works):
    found = wrong_after(works / 'dpsgd', personal_epsilon={'1000 records with budget 0.1': 0.1})[0]
    assert 'the budgets in the ledger are none, and the statement has 1000 records with budget 0.1' in found


def test_figures_of_private_pictures_are_named_as_not_covered(works, tmp_path):
    folder = shutil.copytree(works / 'hybrid', tmp_path / 'work')
    for named in (PRIVATE, 'validation people'):
        audit = dict(view=statement_of(folder)['public_views'][0], in_words=f'of 8 {named}: SSIM 0.5')
        (folder / AUDIT_NAME).write_text(json.dumps(audit))
        assert update_statement(folder) and not verify(folder).wrong
        covered = statement_of(folder)['not_covered']
        assert ('recoverable_from_view, which were computed from private' in covered[-1]) == (named == PRIVATE)
        assert named != PRIVATE or 'not_covered lacks' in wrong_after(folder, not_covered=covered[:-1])[0]


def test_a_large_delta_cannot_be_missed(works):
    delta = 0.00105
    words = statement_of(works / 'dpsgd')['guarantee'].replace('0.0005', '0.00105')
    by_itself = statement_of(works / 'dpsgd')['delta_in_words'].replace('0.5;', '1.05;')
    wrong, text = wrong_after(works / 'dpsgd', delta=delta, guarantee=words, delta_in_words=by_itself)
    assert not wrong and f'WARNING      delta is {delta}' in text and text.endswith('Read the warnings above.')
    for one in (0.002, 0.3, 0.5):
        assert 'too large for 1000 records' in wrong_after(works / 'dpsgd', delta=one)[0]


def test_what_nothing_determines_is_named(works):
    for changes in (
        dict(max_grad_norm=1e-6),
        dict(pretraining='ImageNet'),
        dict(parameters_trained=5),
        dict(certified='by all'),
    ):
        wrong, text = wrong_after(works / 'dpsgd', **changes)
        (name,) = changes
        line = next(line for line in text.splitlines() if line.startswith('NOT CHECKED  what nothing here determines'))
        assert f'{name} =' in line and 'delta = 0.0005' in line
        assert not wrong or name == 'parameters_trained'  # by which parameters_per_record is computed


def test_a_resume_with_another_rate_and_noise_is_compared_with_its_last_line(tmp_path):
    ledger = write_work_dir(tmp_path, expected_batch_size=1000)
    folder = tmp_path / 'resumed'
    plan = ScheduledPlan(**{**SETTINGS, 'expected_batch_size': 500, 'noise_multiplier': 300.0, 'target_epsilon': 0.1})
    ledger.resume_run(**plan.run_metadata)
    ledger.count(plan.event, 2)
    before, ledger.begin_run = ledger.runs, lambda **_: None
    write_work_dir(folder, 1, ledger, plan)
    assert (
        ledger.runs == before
        and json.loads((folder / LEDGER_NAME).read_text().splitlines()[-1])['noise_multiplier'] == 300.0
    )
    found = verify(folder)
    assert not found.wrong and 'WARNING      epsilon is above target_epsilon=0.1' in str(found), str(found)
