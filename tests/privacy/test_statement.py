"""The statement says what was done, to whom it applies, and what it does not protect."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest

from mmpose_dp.extras.statement_page import statement_markdown, write_statement
from mmpose_dp.privacy.accounting import StepEvent
from mmpose_dp.privacy.ledger import NOISE, Ledger
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.statement import build_statement
from tests.support.core import PLAN_SETTINGS

SETTINGS = {**PLAN_SETTINGS, 'target_epsilon': 1.0}
BY_METHOD = {
    'dpsgd': dict(),
    'projected': dict(public_data='COCO'),
    'feature': dict(public_view='Gaussian blur'),
    'hybrid': dict(public_view='Gaussian blur'),
}


def statement_of(method, steps=40, **changes):
    plan = PrivacyPlan.calibrate(**{**SETTINGS, 'method': method, **BY_METHOD[method], **changes})
    ledger = Ledger()
    if steps:
        ledger.count(plan.event, steps)
    return build_statement(plan, ledger, pretraining='coco.pth'), plan


@pytest.mark.parametrize('method', ['feature', 'hybrid'])
def test_public_data_beside_the_views_is_named(method):
    statement, _ = statement_of(method, public_data='COCO')
    assert statement['public_data'] == 'Gaussian blur, COCO'
    stated = '\n'.join(statement['not_protected'])
    assert 'the public data set: COCO' in stated and 'the public view of every training record' in stated


@pytest.mark.parametrize('method', BY_METHOD)
def test_everything_a_reviewer_asks_for_is_there(method):
    statement, plan = statement_of(method)
    assert json.loads(json.dumps(statement)) == statement and statement['private']
    page = statement_markdown(statement)
    wanted = ['epsilon', 'delta', 'noise multiplier', 'max grad norm', 'sample rate', 'num records', 'steps']
    wanted += ['accountant', 'public data', 'pretraining', 'privacy unit', 'cost of tuning', 'k records']
    wanted += [
        'choosing a checkpoint',
        'every checkpoint on the way',
        'Poisson',
        'how much memory',
        '1/20',
        str(plan.noise_multiplier),
        'records are clipped to 0.999',
    ]
    wanted += (
        ['feature DP', 'membership', 'keypoint labels', 'whatever else the annotation says']
        if plan.is_feature_dp
        else ['whether it was in the training']
    )
    missing = [words for words in wanted if words not in page and words.capitalize() not in page]
    assert not missing
    assert 0.99 < statement['epsilon'] <= 1.0
    groups = statement['epsilon_for_a_person_with_k_records']
    assert 1.0 < groups['2'] < groups['5']


def test_epsilon_is_the_ledgers_not_the_plans():
    halfway, _ = statement_of('dpsgd', steps=20)
    assert halfway['epsilon'] < 0.9 and halfway['steps'] == 20 and halfway['epochs'] == 1.0


@pytest.mark.parametrize('changes', [dict(secret_randomness=False)])
def test_not_private_says_so_first(changes):
    statement, _ = statement_of('dpsgd', **changes)
    assert not statement['private'] and 'NOT PRIVATE' in statement_markdown(statement)[:60]


def test_what_earlier_trainings_in_the_ledger_did_is_stated():
    """Their noise, their public data and their exposed metrics, whatever the last training did."""
    plan, ledger = statement_of('dpsgd')[1], Ledger()
    ledger.begin_run(privacy_unit='instance', method='projected', public_data='COCO', expose_private_metrics=True)
    ledger.count(plan.event)
    ledger.begin_run(**plan.run_metadata)
    ledger.count(plan.event)
    stated = build_statement(plan, ledger, pretraining='none')
    assert stated['private'] and stated['public_data'] == 'COCO' and stated['method'] == 'Projected DP-SGD and DP-SGD'
    assert 'the public data set: COCO' in stated['not_protected'] and 'expose_private_metrics' in str(
        stated['not_covered']
    )
    ledger.count(StepEvent(0.0, Fraction(1, 20)))
    assert not build_statement(plan, ledger, pretraining='none')['private']


def test_what_a_resume_changed_is_stated():
    """Noise and rate of all steps, not of the last setting; noise is rounded to a grid where all of it was."""
    plan = statement_of('dpsgd')[1]
    second = replace(plan, noise_multiplier=2 * plan.noise_multiplier, expected_batch_size=100)
    for earlier in (plan.run_metadata, {**plan.run_metadata, 'noise': 'float32'}, no_word_of_noise(plan)):
        ledger, first = Ledger(), plan
        ledger.begin_run(**earlier)
        ledger.count(first.event, 20)
        ledger.resume_run(**second.run_metadata)
        ledger.count(second.event, 5)
        stated = build_statement(second, ledger, pretraining='none')
        assert stated['noise_multiplier'] == f'{plan.noise_multiplier}, going to {2 * plan.noise_multiplier}'
        assert stated['sample_rate'] == '1/20, then 1/10' and stated['epochs'] == 1.5
        ledger.count(first.event)  # back to the first noise: the words must not hide the other
        stated['noise_multiplier'] = build_statement(first, ledger, pretraining='none')['noise_multiplier']
        assert stated['noise_multiplier'] == f'between {plan.noise_multiplier} and {2 * plan.noise_multiplier}'
        assert (NOISE in stated['noise_source']) == (earlier == plan.run_metadata)
        assert ('by an earlier version' in stated['noise_source']) == (earlier != plan.run_metadata)


def no_word_of_noise(plan):
    """What runs of earlier versions have in the ledger."""
    return {key: value for key, value in plan.run_metadata.items() if key != 'noise'} | {'secure_mode': True}


def test_what_neighbours_show_is_stated():
    units = ('instance', 'image', 'subject')
    stated = {unit: str(statement_of('feature', privacy_unit=unit)[0]['not_protected']) for unit in units}
    for unit in ('instance', 'subject'):
        assert 'crops of neighbours in the same picture and their public views' in stated[unit]
        assert "privacy_unit='image'" in stated[unit]
    assert 'neighbours' in stated['image'] and 'crops' not in stated['image']
    assert 'neighbour' not in str(statement_of('dpsgd', privacy_unit='image')[0]['not_protected'])
    assert [unit for unit in units if 'frames of a video' in stated[unit]] == ['subject']


def test_no_noise_is_not_private_and_not_bounded():
    plan, ledger = PrivacyPlan(noise_multiplier=0.0, **PLAN_SETTINGS), Ledger()
    ledger.count(plan.event, 3)
    statement = build_statement(plan, ledger, pretraining='none')
    assert statement['epsilon'] == 'not bounded' and not statement['private']


def test_files_are_written_whole(tmp_path):
    statement, plan = statement_of('hybrid')
    write_statement(statement, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {'privacy_statement.json', 'privacy_statement.md'}
    assert json.loads((tmp_path / 'privacy_statement.json').read_text()) == statement
    spent = [plan.epsilon_after(steps) for steps in range(0, 41, 5)]
    assert spent[0] == 0 and spent == sorted(spent) and spent[-1] == plan.epsilon <= 1.0


def test_no_printed_epsilon_is_below_the_computed_one():
    """In the guarantee, in the table, in messages and logs; what somebody set is printed as it was set."""
    plan = PrivacyPlan(noise_multiplier=1.0, **{**SETTINGS, 'target_epsilon': None, 'target_delta': 1e-3 / 3})
    for steps in (7, 23):
        ledger = Ledger()
        ledger.count(plan.event, steps)
        statement = build_statement(plan, ledger, pretraining='none')
        page, rows = statement_markdown(statement), []
        for line in page.splitlines():
            if line.startswith('| epsilon'):
                rows.append(line.split('|')[2])
        assert float(rows[0]) >= statement['epsilon'] and f'({rows[0].strip()}, {1e-3 / 3})-DP' in page
        for key, row in (('epsilon_by_accountant', rows[1]), ('epsilon_for_a_person_with_k_records', rows[2])):
            printed = dict(part.strip().split(': ') for part in row.split(', '))
            assert all(float(printed[k]) >= value for k, value in statement[key].items())
    assert f'| delta | {1e-3 / 3} |' in page


def test_delta_is_printed_as_given():
    assert ', 0.0005)-DP' in statement_of('dpsgd', accountant='rdp')[0]['guarantee']
    assert f', {1 / 22000})-DP' in statement_of('dpsgd', target_delta=1 / 22000, accountant='rdp')[0]['guarantee']


def test_neighbours_have_the_same_number_of_slots():
    """N is known, so nobody is added or removed: a slot is emptied."""
    for method in BY_METHOD:
        stated = statement_of(method)[0]['adjacency']
        assert (
            '1000 slots each; N, the number of slots, is public' in stated
            and 'empty' in stated
            and 'one more' not in stated
        )


def test_who_is_which_subject_is_not_in_a_statement():
    """Two mappings of one name give one statement, which says that the mapping is not protected."""
    settings = dict(privacy_unit='subject', subjects='subjects.json')
    given = [statement_of('dpsgd', subjects_digest=digest * 64, **settings)[0] for digest in 'ab']
    assert (
        given[0] == given[1]
        and 'which pictures and annotations are of one subject (the mapping by subjects.json)'
        in given[0]['not_protected']
    )


def test_rounding_is_stated_for_the_arithmetic_used():
    bounds = {
        name: statement_of('dpsgd', arithmetic=name)[0]['rounding']
        for name in ('bfloat16 on a CPU', 'float16 on a GPU')
    }
    assert '8e-6 C' in bounds['bfloat16 on a CPU'] and 'not measured' in bounds['float16 on a GPU']


@pytest.mark.parametrize(
    ('parts', 'words'),
    [
        (['float16 on a GPU', 'float32 on a CPU'], 'forwards in float16 on a GPU and float32 on a CPU;'),
        (['float32 on a CPU', 'float16 on a GPU', 'float32 on a CPU'], 'in float32 on a CPU and float16 on a GPU;'),
        ([None, 'float32 on a CPU'], 'forwards in not known and float32 on a CPU;'),  # by an earlier version
    ],
)
@pytest.mark.parametrize('resumed', [True, False])
def test_rounding_is_stated_for_every_part_of_a_training(parts, words, resumed):
    ledger, plan = Ledger(), PrivacyPlan(**{**PLAN_SETTINGS, 'noise_multiplier': 2.0})
    for number, arithmetic in enumerate(parts):
        metadata = {**plan.run_metadata, 'arithmetic': arithmetic}
        metadata = {name: value for name, value in metadata.items() if name != 'arithmetic' or value}
        (ledger.resume_run if number and resumed else ledger.begin_run)(**metadata)
        ledger.count(plan.event)
    found = build_statement(plan, ledger, pretraining='none')['rounding']
    if None not in parts or resumed:
        assert words in found and 'was not measured' in found
