"""The forecast: its ratio against a simulated training, its what-ifs against the accountant, and its choice of a batch."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mmpose_dp.extras import forecast
from mmpose_dp.extras.forecast import Batch
from mmpose_dp.extras.schedule import Schedule, ScheduledPlan
from mmpose_dp.privacy.accounting import epsilon, group_epsilon
from mmpose_dp.privacy.errors import ConfigError
from mmpose_dp.privacy.plan import PrivacyPlan
from tests.support.core import PLAN_SETTINGS

SETTINGS = dict(PLAN_SETTINGS, num_records=800, expected_batch_size=100, target_delta=1e-4)


@pytest.fixture(scope='module')
def plan():
    return PrivacyPlan.calibrate(target_epsilon=1.0, **SETTINGS)


def test_the_ratio_is_r_n_mu_over_the_root_of_d(plan):
    mu = plan.sample_rate * math.sqrt(plan.steps) / plan.noise_multiplier
    assert forecast.ratio(plan, 0.3, 500) == pytest.approx(0.3 * 800 * mu / math.sqrt(500))
    assert forecast.ratio(replace(plan, max_grad_norm=7.0), 0.3, 500) == pytest.approx(forecast.ratio(plan, 0.3, 500))


def test_the_ratio_is_that_of_a_simulated_training():
    """Records of a common direction and a larger spread, Poisson samples, clipping and noise, step by step."""
    rng, d, norm = np.random.default_rng(0), 200, 0.1
    plan = PrivacyPlan(noise_multiplier=2.0, **SETTINGS)
    records = 0.4 * np.eye(d)[0] + rng.normal(size=(800, d)) / math.sqrt(d)
    records *= np.minimum(1, norm / np.linalg.norm(records, axis=1))[:, None]
    r = float(np.linalg.norm(records.mean(0))) / norm
    total, noise = np.zeros(d), np.zeros(d)
    for _ in range(plan.steps):
        total += records[rng.random(800) < float(plan.sample_rate)].sum(0)
        noise += rng.normal(size=d) * plan.noise_multiplier * norm
    assert 0.3 < r < 0.5
    assert np.linalg.norm(total) / np.linalg.norm(noise) == pytest.approx(forecast.ratio(plan, r, d), rel=0.15)


def test_mu_of_the_steps_is_that_of_gaussian_dp_where_sigma_is_large():
    plan = PrivacyPlan(noise_multiplier=20.0, **SETTINGS)
    assert forecast.strength(plan) / plan.num_records == pytest.approx(forecast.gaussian_mu(plan), rel=0.05)
    small = PrivacyPlan(noise_multiplier=0.6, **SETTINGS)  # there privacy is paid for that brings no signal
    assert forecast.strength(small) / small.num_records < 0.7 * forecast.gaussian_mu(small)


def test_a_schedule_counts_part_by_part():
    schedule = Schedule(noise_multiplier=0.5, max_grad_norm=4.0, pieces=2)
    plan = ScheduledPlan(noise_multiplier=4.0, schedule=schedule, **SETTINGS)
    signal, variance = 20 * 100 * (1 + 4), 20 * 4.0**2 + 20 * (2.0 * 4) ** 2
    assert forecast.strength(plan) == pytest.approx(signal / math.sqrt(variance))


def test_without_noise_everything_can_be_learned():
    plan = PrivacyPlan(noise_multiplier=0.0, **SETTINGS)
    assert forecast.ratio(plan, 0.1, 10**9) == math.inf and forecast.most_numbers(plan, 0.1, 1.0) is None
    assert forecast.useful(math.inf, 0.1) == 0.1
    assert forecast.ratio(plan, 0.0, 10) == 0.0  # nothing to learn


@pytest.mark.parametrize('r', [-0.1, 1.1, math.nan])
def test_an_r_that_is_no_share_of_c_is_refused(plan, r):
    with pytest.raises(ConfigError, match='between 0 and 1'):
        forecast.ratio(plan, r, 10)


def test_most_numbers_have_the_ratio(plan):
    most = forecast.most_numbers(plan, 0.2, 0.5)
    assert forecast.ratio(plan, 0.2, most) >= 0.5 > forecast.ratio(plan, 0.2, most + 1)


def test_verdicts_follow_the_ratio():
    values = (0, forecast.LITTLE, forecast.LEARNS, math.inf)
    words = ['cannot learn', 'may learn a little', 'can learn', 'can learn']
    assert [forecast.verdict(x) for x in values] == words
    for mixing in ('experts', 'channel_experts'):
        learns, little = forecast.limits(mixing)
        assert little > forecast.LEARNS  # what would be enough for weights
        assert [forecast.verdict(x, mixing) for x in (0, little, learns, math.inf)] == words
    small, large = forecast.useful(5.0, 0.03), forecast.useful(1.5, 0.1)
    assert small < large  # a small subspace has little noise and little of the gradient


# ---- what if ---------------------------------------------------------------------------------------------------------
def test_epsilon_by_epoch_is_the_accountants(plan):
    curve = forecast.epsilon_by_epoch(plan, 5)
    assert [epoch for epoch, _ in curve] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [spent for _, spent in curve] == [plan.epsilon_after(8 * epoch) for epoch in range(1, 6)]
    assert len(forecast.epsilon_by_epoch(replace(plan, steps=2))) == 2


def test_another_batch_spends_the_same_in_as_many_epochs(plan):
    other = forecast.with_batch(plan, 400)
    assert other.steps == 10 and other.strength > forecast.strength(plan)
    changed = dict(expected_batch_size=400, steps=10, noise_multiplier=other.noise_multiplier)
    assert replace(plan, **changed).epsilon == pytest.approx(plan.epsilon, rel=2e-3)
    assert plan.expected_batch_size in forecast.batch_sizes(plan)
    assert min(forecast.batch_sizes(PrivacyPlan(noise_multiplier=1.0, **{**SETTINGS, 'num_records': 100}))) == 1


def test_the_best_batch_is_the_smallest_good_one_with_enough_steps():
    batches = [Batch(8, 400, 1, 5.0), Batch(32, 100, 1, 9.5), Batch(64, 50, 1, 10.0), Batch(400, 8, 1, 20.0)]
    assert forecast.best_batch(batches).size == 32
    assert forecast.best_batch(batches[3:]).size == 400


def test_more_epochs_and_a_second_training(plan):
    more = forecast.with_more_epochs(plan, 5)
    spent = epsilon([(plan.event, 80)], plan.target_delta)
    assert more['epsilon_with_the_same_noise'] == spent > plan.epsilon
    assert more['noise_multiplier'] > plan.noise_multiplier and more['gain'] > 1
    second = forecast.second_training(plan)
    assert second['epsilon_of_both'] == spent
    assert second['noise_multiplier_for_one_budget'] == more['noise_multiplier']
    assert second['left_of_the_ratio'] == pytest.approx(more['gain'] / math.sqrt(2))


def test_people_with_several_records(plan):
    people = dict(forecast.for_people(plan, (1, 2)))
    assert people == {1: plan.epsilon, 2: group_epsilon(plan.planned(), plan.target_delta, 2)}


def test_earlier_trainings_count(plan):
    later = forecast.recalibrated(plan, earlier_history=((plan.event, 10),))
    assert later.noise_multiplier > plan.noise_multiplier and later.epsilon <= 1.0
    spent = [*later.earlier_history, (later.event, 80)]
    assert forecast.second_training(later)['epsilon_of_both'] == epsilon(spent, plan.target_delta)


def test_a_plan_without_a_budget_keeps_its_own_epsilon():
    plan = PrivacyPlan(noise_multiplier=3.0, **SETTINGS)
    assert forecast.recalibrated(plan).noise_multiplier == pytest.approx(3.0, rel=2e-3)
