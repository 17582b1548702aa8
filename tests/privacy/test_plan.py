"""A plan that contradicts itself cannot be built; one that was built keeps its budget."""

from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest

from mmpose_dp.privacy.errors import BudgetError, ConfigError
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.plan import PrivacyPlan
from tests.support.core import PLAN_SETTINGS as SETTINGS


def plan(**changes):
    return PrivacyPlan.calibrate(**{'target_epsilon': 2.0, **SETTINGS, **changes})


def test_a_plan_couples_its_parts():
    made = plan()
    assert made.sample_rate == made.event.sample_rate == Fraction(1, 20)
    assert made.max_grad_norm_at(39) == 0.1
    assert (
        1.99 < made.epsilon <= 2.0 and made.planned() == [(made.event, 40)] and made.planned(30) == [(made.event, 10)]
    )
    assert made.is_private and not made.is_feature_dp
    with pytest.raises(FrozenInstanceError):
        made.noise_multiplier = 0.1


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(method='magic'), 'method'),
        (dict(privacy_unit='person'), 'privacy_unit'),
        (dict(accountant='gdp'), 'accountant'),
        (dict(num_records=0), 'num_records'),
        (dict(expected_batch_size=1001), 'more than the 1000'),
        (dict(expected_batch_size=2.5), 'expected_batch_size'),
        (dict(steps=0), 'steps'),
        (dict(max_grad_norm=0), 'max_grad_norm'),
        (dict(target_delta=0.01), 'target_delta=0.01 is too large for 1000'),
        (dict(target_delta=0), 'target_delta'),
        (dict(target_epsilon=-1), 'target_epsilon'),
        (dict(method='hybrid'), 'needs a public_view'),
        (dict(public_view='blur'), 'must not have a public_view'),
        (dict(method='projected'), 'needs public_data'),
        (dict(public_data='COCO'), 'must not have public_data'),
    ],
)
def test_contradictions_name_the_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(**changes)


def test_own_noise_beyond_the_budget_is_refused():
    with pytest.raises(BudgetError, match='noise_multiplier=0.5 spends epsilon'):
        PrivacyPlan(noise_multiplier=0.5, target_epsilon=2.0, **SETTINGS)
    assert not PrivacyPlan(noise_multiplier=0.0, **SETTINGS).is_private
    assert not plan(secret_randomness=False).is_private


def test_what_a_ledger_has_spent_is_no_longer_there():
    made, ledger = plan(), Ledger()
    assert made.allowed_steps(ledger) == 40
    ledger.count(made.event, 15)
    assert made.allowed_steps(ledger) == 25
    ledger.count(made.event, 25)
    assert made.allowed_steps(ledger) == 0


def test_a_plan_without_a_budget_goes_on():
    made, ledger = PrivacyPlan(noise_multiplier=1.0, **SETTINGS), Ledger()
    ledger.count(made.event, 39)
    assert made.allowed_steps(ledger) == 40
