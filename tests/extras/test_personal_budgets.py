"""Personal budgets: each group of records keeps its own epsilon."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest

from mmpose_dp.extras.personal_budgets import (
    _RATE_BITS,
    Budget,
    PersonalPlan,
    _highest_rate,
    calibrate_sample_rates,
    of_group,
)
from mmpose_dp.privacy.accounting import StepEvent, epsilon
from mmpose_dp.privacy.calibration import calibrate_noise_multiplier
from mmpose_dp.privacy.errors import BudgetError, LedgerError
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.statement import build_statement
from tests.support.core import PLAN_SETTINGS

SETTINGS = dict(PLAN_SETTINGS, accountant='rdp')


def plan(*budgets, **changes):
    return PersonalPlan.calibrate(target_epsilon=budgets[-1].epsilon, budgets=budgets, **{**SETTINGS, **changes})


def test_earlier_trainings_count_at_their_highest_rate():
    """Their groups may have been others: a rate of theirs is never taken for one of ours."""
    first, ledger = plan(Budget(0.1, 100), Budget(0.5, 900)), Ledger()
    ledger.begin_run(privacy_unit='instance')
    ledger.count(first.event, 1)
    ledger.begin_run(privacy_unit='instance')
    second = plan(Budget(1.0, 500), Budget(4.0, 500), earlier_history=ledger.history)
    highest = [(StepEvent(e.noise_multiplier, max(e.personal_rates)), n) for e, n in ledger.history]
    for group, spent in enumerate(second.epsilons):
        own = [(of_group(event, group), steps) for event, steps in second.planned()]
        assert spent == pytest.approx(epsilon([*highest, *own], SETTINGS['target_delta'], 'rdp'))
        assert 0.95 * second.budgets[group].epsilon < spent <= second.budgets[group].epsilon
    assert second.allowed_steps(ledger) == 40
    assert sum(budget.sample_rate * budget.num_records for budget in second.budgets) == 50


def test_the_ledger_and_the_statement_name_the_groups():
    budgets = Budget(0.5, 100, Fraction(1, 40)), Budget(1.0, 900, Fraction(19, 360))
    own = dict(budgets=budgets, assignment=(0,) * 100 + (1,) * 900, target_epsilon=1.0)
    made, ledger = PersonalPlan(noise_multiplier=1.7, **own, **SETTINGS), Ledger()
    with pytest.raises(BudgetError, match='more than target_epsilon=0.5'):
        PersonalPlan(
            noise_multiplier=1.2, **{**own, 'budgets': (budgets[0], replace(budgets[1], epsilon=9.0))}, **SETTINGS
        )
    assert len(made.record_rates) == 1000 and sum(made.record_rates) == 50
    assert json.loads(json.dumps(made.run_metadata)) == made.run_metadata
    assert made.run_metadata['personal_budgets'] == [[0.5, 100], [1.0, 900]]
    ledger.begin_run(**made.run_metadata)
    ledger.count(made.event, 20)
    assert made.allowed_steps(ledger) == 20
    statement = build_statement(made, ledger, pretraining='none')
    personal = statement['personal_epsilon']
    assert list(personal) == ['100 records with budget 0.5', '900 records with budget 1']
    assert 0 < personal['100 records with budget 0.5'] < 0.5 * personal['900 records with budget 1'] < 0.5
    assert 'which personal budget a record has' in statement['not_protected'] and statement['sample_rate'] == '1/20'
    with pytest.raises(LedgerError, match='personal_assignment'):
        ledger.resume_run(**{**made.run_metadata, 'personal_assignment': [1] * 1000})


def test_all_sampled_every_time_is_a_plateau():
    """With B = N every larger sigma fits as well: the least one is wanted."""
    sigma, rates = calibrate_sample_rates([(0.55, 50), (4.0, 50)], 1e-5, 100, 10, 'rdp')
    assert sigma == pytest.approx(calibrate_noise_multiplier(0.55, 1e-5, Fraction(1), 10, 'rdp'), rel=0.02)
    assert rates == (1, 1)


def test_budgets_that_cannot_be_met_are_refused():
    history = [(StepEvent(1.0, Fraction(1, 2)), 100)]
    for budgets, spent in (([(0.1, 50), (4.0, 50)], history), ([(1e-9, 50), (2e-9, 50)], ())):
        with pytest.raises(BudgetError, match='personal budget'):
            calibrate_sample_rates(budgets, 1e-5, 10, 10, 'rdp', spent)


@pytest.mark.parametrize('units', [1, 2, 3, 50, 99])
def test_a_budget_that_the_smallest_rates_alone_meet(units):
    """One percent of such a rate is less than the rates are apart: the search must end."""
    fitting = Fraction(units, 2**_RATE_BITS)
    rate = _highest_rate(1.0, 1.0, lambda history: 2.0 if history[0][0].sample_rate > fitting else 0.5, (), ((1.0, 9),))
    assert 0.99 * fitting <= rate <= fitting
