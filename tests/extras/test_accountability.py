"""What officers ask for is answered by what was stated, or 'not stated'."""

import json

import pytest

from mmpose_dp.engine.hooks.privacy_budget_hook import PrivacyBudgetHook
from mmpose_dp.extras.accountability import (
    AUDIT_NAME,
    DECISIONS,
    answers,
    checked_decision,
    for_the_people,
    plan_warnings,
    record_audit,
    with_membership_audit,
)
from mmpose_dp.privacy.errors import ConfigError
from mmpose_dp.privacy.plan import PrivacyPlan
from tests.support.core import PLAN_SETTINGS

RISK = {'add_or_remove': {'guess_right_at_most': 0.5417}}


def stated(unit='instance', **changes):
    return dict(
        private=True, privacy_unit=f'{unit}: words', num_records=200, delta=1e-3, public_views=[], risk=RISK, **changes
    )


@pytest.mark.parametrize(
    ('decision', 'message'),
    [
        ('me', 'must be a dict'),
        (dict(chosen='me'), 'decision.chosen is unknown; write one of .*chosen_by'),
        (dict(chosen_by=3), 'chosen_by=3 must be a text'),
        (dict(rationale=' '), 'must be a text'),
    ],
)
def test_a_wrong_decision_is_refused_when_the_hook_is_built(decision, message):
    with pytest.raises(ConfigError, match=message):
        PrivacyBudgetHook(target_delta=1e-5, target_epsilon=1.0, decision=decision)


def test_what_nobody_stated_is_not_stated():
    found = answers(stated(), checked_decision(dict(chosen_by='me')), parameters=50)
    assert found['decision'] == {**dict.fromkeys(DECISIONS, 'not stated'), 'chosen_by': 'me'}
    assert found['parameters_per_record'] == 0.25 and 'does not by itself establish' in found['anonymity']
    assert found['decision'] == answers(stated('image'), found['decision'], 50)['decision']
    per_subject = answers(stated('subject'), checked_decision(None), 50)['decision']['records_per_person']
    assert per_subject.startswith('one')


def test_a_delta_near_one_of_all_records_is_a_warning_and_its_product_is_stated():
    def warned(delta):
        return ' '.join(
            plan_warnings(
                PrivacyPlan(**{**PLAN_SETTINGS, 'noise_multiplier': 2.0, 'num_records': 22246, 'target_delta': delta})
            )
        )

    assert 'is above 1/N' in warned(1 / 22000)  # the paper's own, which is allowed
    assert 'should be well below 1/N: delta times the number of records is 0.2;' in warned(0.2 / 22246)
    assert 'delta' not in warned(0.09 / 22246)
    assert '0.2; ' in answers(stated(), checked_decision(None), 50)['delta_in_words']


def test_the_people_are_told_what_holds_for_them():
    plain, feature = for_the_people(stated()), for_the_people({**stated(), 'public_views': ['blur']})
    assert '54.2 %' in plain and 'whether a picture of you' in plain and 'version of each picture' not in plain
    assert 'not protected' in feature and 'It shows: blur.' in feature
    assert 'several pictures' in plain and 'several pictures' not in for_the_people(stated('subject'))
    assert 'hides whether all pictures of you were used at all' in for_the_people(stated('subject'))
    assert 'guess whether a picture of you in it was used at all' in plain and 'the hidden part was used' in feature
    assert 'no protection' in for_the_people({**stated(), 'private': False})
    assert '%' not in for_the_people({**stated(), 'risk': None})


def test_an_audit_is_in_the_statement_with_its_date(tmp_path):
    result = dict(
        date='2026-11-27',
        refuted=False,
        epsilon_lower_bound=0.31,
        epsilon_claimed=0.8,
        canaries=500,
        confidence=0.95,
        attack='likelihood',
    )
    assert 'not run' in with_membership_audit({}, tmp_path)['audit']
    assert not record_audit(tmp_path, result)  # no statement yet: the next one takes it up
    words = with_membership_audit({}, tmp_path)['audit']
    assert words.startswith('2026-11-27: not refuted') and '500 canaries' in words and '0.310' in words
    assert 'the larger of one for any mechanism and one that treats canaries' in words  # as earlier versions wrote it
    both = dict(epsilon_lower_bound_any_mechanism=0.0, epsilon_lower_bound_independent=1.078)
    audited = dict(num_records=200, delta=1e-3)
    (tmp_path / AUDIT_NAME).write_text(json.dumps({**result, **both, 'audited': audited}))
    words = with_membership_audit(stated(), tmp_path)['audit']
    assert '0.000 without assumptions on the mechanism, and 1.078 if canaries are independent trials, which' in words
    words = with_membership_audit({**stated(), 'delta': 1e-4}, tmp_path)['audit']
    assert words.startswith('not of this training') and 'delta 0.001 and not 0.0001' in words and '1.078' not in words
    (tmp_path / AUDIT_NAME).write_text(json.dumps({**result, 'refuted': True}))
    assert ': REFUTED' in with_membership_audit({}, tmp_path)['audit']
    (tmp_path / AUDIT_NAME).write_text('{"date": 3}')
    assert 'not run' in with_membership_audit({}, tmp_path)['audit']
