"""Risk figures: closed forms, other people's programs, and never below what is computed."""

import math
from fractions import Fraction

import gdpnum
import numpy as np
import pytest
from riskcal import analysis as riskcal
from scipy.stats import norm

from mmpose_dp.extras import risk as module
from mmpose_dp.extras.risk import FALSE_POSITIVE_RATES, TradeOff, percent, risk_in_words, risk_of
from mmpose_dp.privacy.accounting import StepEvent, epsilon, privacy_loss


def history(sigma, rate, steps):
    return ((StepEvent(sigma, Fraction(rate)), steps),)


@pytest.mark.parametrize(('sigma', 'steps'), [(0.8, 1), (3.0, 1), (20.0, 25)])
def test_gaussian_mechanisms_have_closed_forms(sigma, steps):
    mu, found = math.sqrt(steps) / sigma, risk_of(history(sigma, 1, steps), 1e-5)
    for name, exact in (('add_or_remove', mu), ('replace_one', 2 * mu)):
        figures = found[name]
        wanted = {'gdp_mu': exact, 'advantage': 2 * norm.cdf(exact / 2) - 1, 'guess_right_at_most': norm.cdf(exact / 2)}
        for key, value in wanted.items():
            assert value * (1 - 1e-6) <= figures[key] <= value * 1.002 + 2e-6, (name, key)
        for rate in FALSE_POSITIVE_RATES:
            value = norm.cdf(norm.ppf(rate) + exact)
            assert value - 1e-9 <= figures['true_positive_rate_at'][f'{rate:g}'] <= value * 1.001 + 1e-6
        assert figures['gdp_regret'] < 1e-3
    assert found['add_or_remove']['epsilon'] >= epsilon(history(sigma, 1, steps), 1e-5) * (1 - 1e-9)


def test_one_sampled_gaussian_has_the_best_attacks_rates():
    """The Neyman-Pearson attack on one step, both when a record is removed and when it is added."""
    q, sigma = 0.3, 0.9
    at = np.linspace(-12, 12, 200001)
    without = norm.sf(at, scale=sigma)
    with_it = (1 - q) * without + q * norm.sf(at, loc=1, scale=sigma)
    curve = TradeOff.of(privacy_loss(history(sigma, '3/10', 1)))
    for rate in (1e-4, *FALSE_POSITIVE_RATES):
        added = np.interp(rate, without[::-1], with_it[::-1])
        removed = np.interp(rate, (1 - with_it), (1 - without))
        assert curve.true_positive_rate(rate) >= max(added, removed) - 1e-9
        assert curve.true_positive_rate(rate) <= max(added, removed) * 1.001
    assert curve.advantage == pytest.approx(q * (2 * norm.cdf(0.5 / sigma) - 1), rel=1e-4)


@pytest.mark.parametrize(('q', 'sigma'), [('3/10', 0.9), ('1/20', 1.2)])
def test_mu_of_one_sampled_gaussian_is_that_of_the_best_attack(q, sigma):
    """Down to rates of 1e-10, where mu is largest, and where gdpnum loses the tail of one direction."""
    at, rate = np.linspace(-12, 12, 200001), float(Fraction(q))
    alarms = norm.sf(at, scale=sigma)
    misses = (1 - rate) * norm.cdf(at, scale=sigma) + rate * norm.cdf(at, loc=1, scale=sigma)
    inside = (alarms > 1e-10) & (misses > 1e-10)
    exact = (norm.isf(alarms) + norm.isf(misses))[inside].max()
    mu, _ = TradeOff.of(privacy_loss(history(sigma, q, 1))).gaussian()
    assert exact * (1 - 1e-6) <= mu <= exact * 1.001


# as printed: six decimals. In a long training, discretization and the tails that riskcal and gdpnum cut off show
CASES = [(1.2, '1/20', 40, 2e-6), (0.9, '1/4', 12, 2e-6), (3.0, '1', 9, 2e-6), (1.118, '16/11123', 4000, 5e-5)]


@pytest.mark.parametrize(('sigma', 'rate', 'steps', 'digits'), CASES)
def test_riskcal_and_gdpnum_agree_on_the_figures_printed(sigma, rate, steps, digits):
    steps = history(sigma, rate, steps)
    loss, figures = privacy_loss(steps), risk_of(steps, 1e-5)['add_or_remove']
    other = gdpnum.PLDConverter(loss)
    for advantage in (riskcal.get_advantage_from_pld(loss), other.get_advantage()):
        assert advantage - 1e-9 <= figures['advantage'] <= advantage + digits
    assert figures['guess_right_at_most'] == pytest.approx(1 - riskcal.get_bayes_risk_from_pld(loss, 0.5), abs=digits)
    for alarms, found in figures['true_positive_rate_at'].items():
        for misses in (riskcal.get_beta_from_pld(loss, alpha=float(alarms)), other.get_beta(float(alarms))):
            assert 1 - misses - 1e-9 <= found <= 1 - misses + digits


@pytest.mark.parametrize('case', CASES[:3])
def test_gdpnum_agrees_on_mu_regret_and_profile(case, monkeypatch):
    monkeypatch.setattr(module, '_LEAST_RATE', 1e-4)  # further out its curve loses the tail of one direction
    steps = history(*case[:3])
    loss = privacy_loss(steps)
    (mu, regret), other = TradeOff.of(loss).gaussian(), gdpnum.PLDConverter(loss)
    other_mu, other_regret = other.get_mu_and_regret(err=1e-4)
    assert mu == pytest.approx(other_mu, rel=1e-3) and regret == pytest.approx(other_regret, rel=3e-3, abs=2e-6)
    for delta, spent in risk_of(steps, 1e-5)['profile'].items():
        if float(delta) >= 1e-4:
            reached = (1 - other.betas_symm - np.exp(spent) * other.alphas_symm).max()
            assert float(delta) * 0.98 <= reached <= float(delta)


def test_the_curve_is_symmetric_and_below_chance_and_mu_covers_it():
    curve = TradeOff.of(privacy_loss(history(0.9, '1/4', 12)))
    assert np.all(np.diff(curve.false_alarms) >= 0) and np.all(np.diff(curve.misses) <= 0)
    assert np.allclose(curve.false_alarms, curve.misses[::-1])
    assert np.all(curve.false_alarms + curve.misses <= 1 + 1e-12)
    mu, regret = curve.gaussian()
    at = np.linspace(1e-9, 1 - 1e-9, 999)
    misses = np.interp(at, curve.false_alarms, curve.misses)
    assert np.all(norm.cdf(norm.isf(at) - mu) <= misses + 1e-9) and 0 < regret < 0.2


def test_more_steps_risk_more_and_profiles_fall_in_delta():
    few, many = (risk_of(history(1.1, '1/50', steps), 1e-5) for steps in (50, 500))
    assert few['add_or_remove']['gdp_mu'] < many['add_or_remove']['gdp_mu']
    for found in (few, many):
        spent = list(found['profile'].values())
        assert spent == sorted(spent) and found['replace_one']['advantage'] > found['add_or_remove']['advantage']
        rates = found['add_or_remove']['true_positive_rate_at']
        assert all(float(rate) < value for rate, value in rates.items())


def test_no_noise_has_no_figures_and_no_step_no_risk():
    assert risk_of(history(0.0, '1/4', 3), 1e-5) is None and risk_in_words(None) == ()
    nothing = risk_of((), 1e-5)['add_or_remove']
    assert nothing['advantage'] == nothing['gdp_mu'] == nothing['epsilon'] == 0
    assert nothing['true_positive_rate_at']['0.01'] == pytest.approx(0.01, abs=2e-6)


def test_percentages_are_rounded_up_and_sentences_hold_them():
    assert [percent(p) for p in (0.54174, 0.5, 0.020084, 1e-3, 1.0)] == ['54.2 %', '50 %', '2.01 %', '0.1 %', '100 %']
    words = ' '.join(risk_in_words(risk_of(history(1.118, '1/700', 1000), 1e-5)))
    assert 'A 50:50 guess whether a given record was used becomes right at most' in words and 'regret' in words
