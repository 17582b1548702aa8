"""A schedule couples sigma and C, and what it spends stays within the budget."""

from fractions import Fraction

import pytest

from mmpose_dp.extras.schedule import Schedule, ScheduledPlan
from mmpose_dp.privacy.errors import ConfigError
from tests.support.core import PLAN_SETTINGS as SETTINGS


def test_a_schedule_couples_sigma_and_c():
    schedule = Schedule(noise_multiplier=0.5, max_grad_norm=2.0, pieces=5)
    made = ScheduledPlan.calibrate(target_epsilon=2.0, schedule=schedule, **SETTINGS)
    assert [steps for _, steps in made.planned()] == [8] * 5 and 1.98 < made.epsilon <= 2.0
    assert made.event_at(39).noise_multiplier == pytest.approx(0.5 * made.noise_multiplier)
    assert made.max_grad_norm_at(39) == pytest.approx(0.2)
    assert made.planned(20) == [*((event, 4) for event, _ in made.planned()[2:3]), *made.planned()[3:]]
    assert made.event_at(1000) == made.event_at(39)


def test_a_schedule_that_changes_nothing_is_no_schedule():
    plain, scheduled = (ScheduledPlan(noise_multiplier=1.0, schedule=s, **SETTINGS) for s in (None, Schedule()))
    assert plain.planned() == scheduled.planned() == [(plain.event, 40)] and plain.epsilon == scheduled.epsilon
    assert plain.max_grad_norm_at(39) == scheduled.max_grad_norm_at(39)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(noise_multiplier=0), 'schedule.noise_multiplier=0 must be'),
        (dict(max_grad_norm='2'), "schedule.max_grad_norm='2' must be"),
        (dict(pieces=Fraction(5, 2)), 'schedule.pieces'),
        (dict(pieces=True), 'schedule.pieces'),
    ],
)
def test_settings_that_cannot_be_kept_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**settings)


def test_a_norm_that_falls_below_float32_is_refused():
    with pytest.raises(ConfigError, match='max_grad_norm=1e-11.*end of the schedule'):
        ScheduledPlan(noise_multiplier=1.0, schedule=Schedule(max_grad_norm=1e-10), **SETTINGS)
