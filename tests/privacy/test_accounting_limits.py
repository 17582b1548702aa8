"""Epsilon at the edges: closed forms of the Gaussian mechanism, tiny deltas and rates, very many steps, numbers of other types."""

import math
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from mmpose_dp.engine.hooks import PrivacyBudgetHook
from mmpose_dp.privacy.accounting import ACCOUNTANTS, StepEvent, epsilon, group_epsilon
from mmpose_dp.privacy.calibration import calibrate_noise_multiplier
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.plan import PrivacyPlan

ALL = Fraction(1)
DELTAS = (0.9, 0.5, 0.1, 1e-3, 1e-5, 1e-8, 1e-10, 1e-12, 1e-13, 1e-14, 1e-16, 1e-30)
# noise multiplier and steps: epsilon from 0 to 6 * 10^4
GAUSSIANS = (
    (0.002, 1),
    (0.003, 1),
    (0.01, 1),
    (0.3, 1),
    (1.0, 1),
    (50.0, 1),
    (1e3, 1),
    (0.5, 10),
    (5.0, 100),
    (1.0, 100),
    (1e2, 10_000),
)
NOT_NUMBERS = ('1e-5', True, None, math.nan, math.inf, -math.inf, torch.tensor(1e-5), [1e-5], 1j, Decimal('1e-5'))


def exact(mu, delta):
    """Epsilon of the Gaussian mechanism of sensitivity ``mu`` and noise 1 (Balle and Wang 2018, theorem 8)."""

    def excess(eps):
        first, second = norm.logcdf(mu / 2 - eps / mu), eps + norm.logcdf(-mu / 2 - eps / mu)
        return first + math.log(max(-math.expm1(min(second - first, 0.0)), 1e-300)) - math.log(delta)

    return brentq(excess, 0, 1e9, xtol=1e-12) if excess(0.0) > 0 else 0.0


@pytest.mark.parametrize('accountant', ACCOUNTANTS)
def test_never_below_the_gaussian_mechanism(accountant):
    evaluated, prv = 0, accountant == 'prv'
    for sigma, steps in GAUSSIANS[3::3] if prv else GAUSSIANS:  # PRV takes seconds
        for delta in DELTAS[::2] if prv else DELTAS:
            try:
                found = epsilon([(StepEvent(sigma, ALL), steps)], delta, accountant)
            except PrivacyError:
                assert prv  # the others always answer
                continue
            wanted = exact(math.sqrt(steps) / sigma, delta)
            assert found >= wanted * (1 - 1e-8), (sigma, steps, delta)
            if accountant == 'pld' and delta > 1e-12:
                assert found <= wanted * 1.05 + 1e-3, (sigma, steps, delta)
            evaluated += 1
    assert evaluated > (3 if prv else 100)


@pytest.mark.parametrize('accountant', ACCOUNTANTS)
def test_never_below_pld_when_records_are_sampled(accountant):
    """What is right without sampling may be no bound with it: Gaussian DP's central limit says 1.76 here, where 3.08 is spent."""
    history = [(StepEvent(0.7, Fraction(1, 100)), 300)]
    assert epsilon(history, 1e-5, accountant) >= 0.995 * epsilon(history, 1e-5, 'pld')  # pld rounds up to a grid


def test_tiny_deltas():
    history = [(StepEvent(1.0, Fraction(1, 100)), 100)]
    spent = [epsilon(history, delta) for delta in (1e-10, 1e-11, 1e-12, 1e-13, 1e-15, 1e-50, 1e-300)]
    assert spent == sorted(spent) and all(map(math.isfinite, spent))
    assert epsilon(history, 1e-15) == epsilon(history, 1e-15, 'rdp')
    assert group_epsilon(history, 1e-15, 1) == epsilon(history, 1e-15) and group_epsilon(history, 1e-15, 2) == math.inf
    for target in (0.5, 1.0, 1e6):
        sigma = calibrate_noise_multiplier(target, 1e-15, Fraction(1, 100), 100)
        assert 0.99 * target < epsilon([(StepEvent(sigma, Fraction(1, 100)), 100)], 1e-15) <= target
    with pytest.raises(PrivacyError, match="'pld' or 'rdp'"):
        epsilon(history, 1e-15, 'prv')


def test_small_targets_find_their_noise():
    for target, delta, rate, steps in ((1e-5, 1e-5, ALL, 1), (1e-9, 1e-9, ALL, 1), (1e-3, 1e-12, Fraction(1, 10), 10)):
        sigma = calibrate_noise_multiplier(target, delta, rate, steps)
        assert epsilon([(StepEvent(sigma, rate), steps)], delta) <= target
        assert epsilon([(StepEvent(sigma * 0.99, rate), steps)], delta) > target


@pytest.mark.parametrize('accountant', ACCOUNTANTS)
def test_out_of_reach_says_what_is_in_reach(accountant):
    setting = dict(target_delta=1e-20, sample_rate=ALL, steps=1, accountant=accountant)
    if accountant == 'prv':
        setting['target_delta'] = 1e-9
    try:
        sigma = calibrate_noise_multiplier(1e-4, **setting)
    except PrivacyError as refusal:
        error = refusal
    else:  # this one has no least epsilon
        assert epsilon([(StepEvent(sigma, ALL), 1)], setting['target_delta'], accountant) <= 1e-4
        return
    assert 'cannot be met with any noise' in str(error)
    least = float(re.search(r'still gives (\S+)\.', str(error)).group(1))
    assert calibrate_noise_multiplier(1.1 * least, **setting) > 0  # the advice works
    if 'pld' in str(error).partition('still')[2]:
        assert calibrate_noise_multiplier(1e-4, **{**setting, 'accountant': 'pld'}) > 0


def test_tiny_rates_and_very_many_steps():
    for rate in ('1e-12', '1e-15', '1e-17', '1e-18', '1e-330'):
        spent = [epsilon([(StepEvent(1.0, Fraction(rate)), 100)], 1e-5, accountant) for accountant in ('pld', 'rdp')]
        assert 0 <= spent[0] <= spent[1] < 0.2
    for sigma, rate, steps in (
        (1.0, Fraction(1, 100), 10**8),
        (100.0, Fraction(1, 1000), 10**8),
        (50.0, ALL / 10, 10**12),
    ):
        history = [(StepEvent(sigma, rate), steps)]
        assert epsilon(history, 1e-5) == epsilon(history, 1e-5, 'rdp') < math.inf
        assert epsilon(history, 1e-5) > epsilon([(StepEvent(sigma, rate), 10**6)], 1e-5)


def test_numbers_of_other_types():
    event = StepEvent(np.float32(1.0), Fraction(1, 100))
    assert type(event.noise_multiplier) is float and event == StepEvent(1, Fraction(1, 100))
    wanted = epsilon([(event, 100)], 1e-5)
    for delta in (Fraction(1, 10**5), np.float64(1e-5)):
        assert epsilon([(event, np.int64(100))], delta) == wanted
    assert epsilon([(event, 100)], np.float32(1e-5)) == pytest.approx(wanted, rel=1e-6)
    settings = dict(method='dpsgd', privacy_unit='instance', max_grad_norm=Fraction(1, 10))
    plan = PrivacyPlan.calibrate(
        target_epsilon=Fraction(8), target_delta=Fraction(1, 10**4), num_records=np.int64(1000), steps=np.int32(10),
        expected_batch_size=np.int64(10), **settings,
    )  # fmt: skip
    assert [type(x) for x in (plan.target_delta, plan.target_epsilon, plan.max_grad_norm)] == [float] * 3
    assert type(plan.num_records) is type(plan.expected_batch_size) is type(plan.steps) is int
    hook = PrivacyBudgetHook(target_epsilon=np.float32(8), target_delta=Fraction(1, 10**4))
    assert hook.target_epsilon == 8 and hook.target_delta == 1e-4


@pytest.mark.parametrize('value', NOT_NUMBERS, ids=str)
def test_what_is_no_number_is_named(value):
    numbers = dict(num_records=1000, expected_batch_size=10, steps=10, max_grad_norm=1.0)
    plan = dict(method='dpsgd', privacy_unit='instance', **numbers)
    history, target = [(StepEvent(1.0, Fraction(1, 100)), 10)], dict(target_epsilon=1.0, target_delta=1e-5)
    calls = {
        'noise_multiplier': [lambda: StepEvent(value, ALL)],
        'target_delta': [
            lambda: epsilon(history, value),
            lambda: group_epsilon(history, value, 2),
            lambda: calibrate_noise_multiplier(1.0, value, ALL, 10),
            lambda: PrivacyPlan.calibrate(**{**target, **plan, 'target_delta': value}),
            lambda: PrivacyPlan(noise_multiplier=1.0, **{**plan, 'target_delta': value}),
            lambda: PrivacyBudgetHook(target_delta=value),
        ],
        'target_epsilon': [
            lambda: calibrate_noise_multiplier(value, 1e-5, ALL, 10),
            lambda: PrivacyPlan.calibrate(**{**target, **plan, 'target_epsilon': value}),
            *([] if value is None else [lambda: PrivacyBudgetHook(target_delta=1e-5, target_epsilon=value)]),
        ],
        'steps': [
            lambda: epsilon([(StepEvent(1.0, ALL), value)], 1e-5),
            lambda: PrivacyPlan.calibrate(**{**target, **plan, 'steps': value}),
        ],
        'max_grad_norm': [lambda: PrivacyPlan.calibrate(**{**target, **plan, 'max_grad_norm': value})],
    }
    for name, wanted in calls.items():
        for call in wanted:
            with pytest.raises(PrivacyError, match=f'{name}=.* must '):
                call()
