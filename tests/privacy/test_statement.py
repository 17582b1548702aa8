"""The statement says what was done, to whom it applies, and what it does not protect."""

import json
import math
from dataclasses import replace
from fractions import Fraction

import pytest

from mmpose_dp.privacy import Ledger, PrivacyPlan, StepEvent, build_statement, statement_markdown, write_statement
from mmpose_dp.privacy.statement import _number, epsilon_curve

SETTINGS = dict(
    privacy_unit='instance',
    num_records=1000,
    expected_batch_size=50,
    steps=40,
    max_grad_norm=0.1,
    target_delta=5e-4,
    target_epsilon=1.0,
)
BY_METHOD = {
    'dpsgd': dict(),
    'projected': dict(public_data='COCO'),
    'feature': dict(public_view='Gaussian blur'),
    'hybrid': dict(public_view='Gaussian blur'),
}


def statement_of(method, steps=40, **changes):
    plan = PrivacyPlan.calibrate(method=method, **{**SETTINGS, **BY_METHOD[method], **changes})
    ledger = Ledger()
    if steps:
        ledger.count(plan.event, steps)
    return build_statement(plan, ledger, pretraining='coco.pth'), plan


@pytest.mark.parametrize('method', ['feature', 'hybrid'])
def test_public_data_beside_the_views_is_named(method):
    statement, _ = statement_of(method, public_data='COCO')
    assert statement['public_data'] == 'Gaussian blur, COCO'
    told = '\n'.join(statement['not_protected'])
    assert 'the public data set: COCO' in told and 'the public view of every training record' in told


@pytest.mark.parametrize('method', BY_METHOD)
def test_everything_a_reviewer_asks_for_is_there(method):
    statement, plan = statement_of(method)
    assert json.loads(json.dumps(statement)) == statement and statement['private']
    page = statement_markdown(statement)
    wanted = ['epsilon', 'delta', 'noise multiplier', 'max grad norm', 'sample rate', 'num records', 'steps']
    wanted += ['accountant', 'public data', 'pretraining', 'privacy unit', 'torch', 'cost of tuning', 'k records']
    wanted += [
        'choosing a checkpoint',
        'every checkpoint on the way',
        'Poisson',
        'how much memory',
        '1/20',
        f'{plan.noise_multiplier:.4g}',
    ]
    wanted += (
        ['feature DP', 'membership', 'keypoint labels'] if plan.is_feature_dp else ['whether it was in the training']
    )
    missing = [words for words in wanted if words not in page and words.capitalize() not in page]
    assert not missing
    assert 0.99 < statement['epsilon'] <= 1.0
    groups = statement['epsilon_for_a_person_with_k_records']
    assert 1.0 < groups['2'] < groups['5']


def test_epsilon_is_the_ledgers_not_the_plans():
    half, _ = statement_of('dpsgd', steps=20)
    assert half['epsilon'] < 0.9 and half['steps'] == 20 and half['epochs'] == 1.0


@pytest.mark.parametrize('changes', [dict(secret_randomness=False)])
def test_not_private_says_so_first(changes):
    statement, _ = statement_of('dpsgd', **changes)
    assert not statement['private'] and 'NOT PRIVATE' in statement_markdown(statement)[:60]


def test_what_earlier_trainings_in_the_ledger_did_is_told():
    """Their noise, their public data and their exposed metrics, whatever the last training did."""
    plan, ledger = statement_of('dpsgd')[1], Ledger()
    ledger.begin_run(privacy_unit='instance', method='projected', public_data='COCO', expose_private_metrics=True)
    ledger.count(plan.event)
    ledger.begin_run(**plan.facts)
    ledger.count(plan.event)
    told = build_statement(plan, ledger, pretraining='none')
    assert told['private'] and told['public_data'] == 'COCO' and told['method'] == 'Projected DP-SGD and DP-SGD'
    assert 'the public data set: COCO' in told['not_protected'] and 'expose_private_metrics' in str(told['not_covered'])
    ledger.count(StepEvent(0.0, Fraction(1, 20)))
    assert not build_statement(plan, ledger, pretraining='none')['private']


def test_what_a_resume_changed_is_told():
    """Noise and rate of all steps, not of the last setting; noise is hardened where all of it was."""
    plan = statement_of('dpsgd', secure_mode=True)[1]
    changed = dict(noise_multiplier=2 * plan.noise_multiplier, expected_batch_size=100)
    for others in (dict(secure_mode=False), dict(secure_mode=True)):
        first, second = replace(plan, **others), replace(plan, **changed)
        ledger = Ledger()
        ledger.begin_run(**first.facts)
        ledger.count(first.event, 20)
        ledger.resume_run(**second.facts)
        ledger.count(second.event, 5)
        told = build_statement(second, ledger, pretraining='none')
        assert told['noise_multiplier'] == f'{plan.noise_multiplier:.4g}, going to {2 * plan.noise_multiplier:.4g}'
        assert told['sample_rate'] == '1/20, then 1/10' and told['epochs'] == 1.5
        assert ('secure_mode' in told['noise_source']) == others['secure_mode']
    ledger.resume_run(**replace(second, secure_mode=False).facts)
    assert 'secure_mode' not in build_statement(second, ledger, pretraining='none')['noise_source']


def test_what_a_smaller_neighbour_shows_is_told():
    units = ('instance', 'image', 'subject')
    told = {unit: str(statement_of('feature', privacy_unit=unit)[0]['not_protected']) for unit in units}
    assert "privacy_unit='image'" in told['instance'] and 'sized for a smaller neighbour' in told['instance']
    assert 'neighbour' not in told['image']
    assert 'crops of neighbours' in told['subject'] and 'sized for a smaller' not in told['subject']
    assert [unit for unit in units if 'frames of a video' in told[unit]] == ['subject']


def test_no_noise_is_not_private_and_not_bounded():
    settings = {k: v for k, v in SETTINGS.items() if k != 'target_epsilon'}
    plan, ledger = PrivacyPlan(method='dpsgd', noise_multiplier=0.0, **settings), Ledger()
    ledger.count(plan.event, 3)
    statement = build_statement(plan, ledger, pretraining='none')
    assert statement['epsilon'] == 'not bounded' and not statement['private']


def test_files_are_written_whole(tmp_path):
    statement, plan = statement_of('hybrid')
    write_statement(statement, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'privacy_statement.json', 'privacy_statement.md'}
    assert json.loads((tmp_path / 'privacy_statement.json').read_text()) == statement
    steps, spent = zip(*epsilon_curve(plan))
    assert steps[-1] == 40 and list(spent) == sorted(spent) and spent[-1] <= 1.0


def test_what_is_promised_is_rounded_up():
    for value, text in (
        (7.0916, '7.092'),
        (7.09101, '7.092'),
        (0.00045454, '0.0004546'),
        (8.0, '8'),
        (math.inf, 'not bounded'),
    ):
        assert _number(value) == text
