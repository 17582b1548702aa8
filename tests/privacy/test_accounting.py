"""Epsilon: the literature's values, the accountants against each other."""

import itertools
import math
from fractions import Fraction

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants.utils import get_noise_multiplier

from mmpose_dp.privacy.accounting import StepEvent, epsilon, group_epsilon
from mmpose_dp.privacy.calibration import calibrate_noise_multiplier, smallest_sigma, steps_within
from mmpose_dp.privacy.errors import PrivacyError

RATE, STEPS, DELTA = Fraction(32, 22246), 17379, 1 / 22000  # the paper's: 25 epochs of MPII in batches of 32
# design.md section 2
DESIGN = {'rdp': {0.2: 3.20, 0.4: 1.80, 0.6: 1.33, 0.8: 1.12}, 'prv': {0.2: 2.97, 0.4: 1.68, 0.6: 1.25, 0.8: 1.04}}


def test_the_papers_setting_under_each_accountant():
    history = [(StepEvent(1.118, RATE), STEPS)]
    spent = {name: epsilon(history, DELTA, name) for name in ('pld', 'prv', 'rdp')}
    assert spent == pytest.approx({'pld': 0.696, 'prv': 0.705, 'rdp': 0.795}, abs=1e-3)
    assert group_epsilon(history, DELTA, 1) == pytest.approx(spent['pld'], rel=1e-6)
    assert group_epsilon(history, DELTA, 2) == pytest.approx(1.51, abs=0.01)
    assert group_epsilon(history, DELTA, 5) == pytest.approx(4.34, abs=0.03)


@pytest.mark.parametrize(('accountant', 'target'), [(a, e) for a in DESIGN for e in DESIGN[a]])
def test_calibration_reproduces_the_expected_noise(accountant, target):
    """The expected values are Opacus' search, which may stop 0.01 of epsilon short of the target; ours goes on to it."""
    sigma = calibrate_noise_multiplier(target, DELTA, RATE, STEPS, accountant)
    by_opacus = get_noise_multiplier(
        target_epsilon=target, target_delta=DELTA, sample_rate=float(RATE), steps=STEPS, accountant=accountant
    )
    assert by_opacus == pytest.approx(DESIGN[accountant][target], rel=0.01)
    assert 0.97 * by_opacus < sigma <= by_opacus
    spent = epsilon([(StepEvent(sigma, RATE), STEPS)], DELTA, accountant)
    assert target * (1 - 1e-3) < spent <= target


def test_the_default_accountant_is_the_tightest_and_keeps_the_target():
    sigma = {a: calibrate_noise_multiplier(0.8, DELTA, RATE, STEPS, a) for a in ('pld', 'prv', 'rdp')}
    assert sigma['pld'] < sigma['prv'] < sigma['rdp']
    assert 0.799 < epsilon([(StepEvent(sigma['pld'], RATE), STEPS)], DELTA) <= 0.8


@pytest.mark.parametrize(
    ('sigma', 'rate', 'steps'), itertools.product([0.7, 1.5, 6.0], [Fraction(1, 500), Fraction(1, 9)], [20, 2000])
)
def test_accountants_agree_within_their_gaps(sigma, rate, steps):
    history = [(StepEvent(sigma, rate), steps)]
    pld, prv, rdp = (epsilon(history, 1e-5, name) for name in ('pld', 'prv', 'rdp'))
    assert pld <= prv + 1e-3 and prv <= rdp + 0.03
    assert rdp < 2 * pld + 1


def test_a_grown_history_spends_more_and_order_does_not_matter():
    a, b = StepEvent(1.0, Fraction(1, 50)), StepEvent(2.0, Fraction(1, 20))
    one = epsilon([(a, 50)], 1e-5)
    both = epsilon([(a, 50), (b, 30)], 1e-5)
    assert one < both == pytest.approx(epsilon([(b, 30), (a, 20), (a, 30)], 1e-5), rel=1e-9)
    assert epsilon([], 1e-5) == 0 and epsilon([(StepEvent(0.0, Fraction(1, 2)), 1)], 1e-5) == math.inf


def test_heterogeneous_histories_agree_with_dp_accountings_own_composition():
    """Its event API, with its own grid, for a ledger of three settings: a schedule, a resume with another batch size."""
    history = [
        (StepEvent(1.2, Fraction(1, 50)), 300),
        (StepEvent(0.9, Fraction(1, 50)), 200),
        (StepEvent(2.5, Fraction(1, 8)), 40),
    ]
    for library, name, slack in ((PLDAccountant(), 'pld', 1e-3), (RdpAccountant(), 'rdp', 0.05)):
        for event, steps in history:
            sampled = dp_event.PoissonSampledDpEvent(
                float(event.sample_rate), dp_event.GaussianDpEvent(event.noise_multiplier)
            )
            library.compose(dp_event.SelfComposedDpEvent(sampled, steps))
        theirs, ours = library.get_epsilon(1e-5), epsilon(history, 1e-5, name)
        assert ours == pytest.approx(theirs, abs=slack), name
    parts = [epsilon([part], 1e-5) for part in history]
    assert max(parts) < epsilon(history, 1e-5) < sum(parts)


def test_steps_within_is_the_last_that_fits():
    event = StepEvent(1.0, Fraction(1, 50))
    steps = steps_within(1.0, 1e-5, [(event, 10_000)], 'pld', [(event, 10)])
    assert epsilon([(event, 10 + steps)], 1e-5) <= 1.0 < epsilon([(event, 11 + steps)], 1e-5)
    assert steps_within(1.0, 1e-5, [(event, 5)], 'pld', []) == 5


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(target_epsilon=0.0), 'target_epsilon=0.0'),
        (dict(target_epsilon=math.inf), 'target_epsilon=inf'),
        (dict(target_delta=0.0), 'target_delta=0.0'),
        (dict(target_delta=1), 'target_delta=1'),
        (dict(steps=0), 'steps=0'),
        (dict(steps=1.5), 'steps=1.5'),
        (dict(accountant='gdp'), 'under-estimates'),
        (dict(target_epsilon=1e-7, target_delta=1e-14, steps=10**4), 'cannot be met'),
    ],
)
def test_impossible_budgets_name_the_key(arguments, message):
    wanted = dict(target_epsilon=1.0, target_delta=1e-5, sample_rate=RATE, steps=10)
    with pytest.raises(PrivacyError, match=message):
        calibrate_noise_multiplier(**{**wanted, **arguments})


def test_rates_are_exact():
    with pytest.raises(PrivacyError, match='must be exact'):
        StepEvent(1.0, 0.1)
    for rate in (Fraction(0), Fraction(3, 2)):
        with pytest.raises(PrivacyError, match='sample_rate'):
            StepEvent(1.0, rate)


@pytest.mark.parametrize('accountant', ['rdp', 'pld'])
def test_a_target_that_a_power_of_two_just_meets(accountant):
    """Steps of two find such a sigma themselves; the search between them must not ask it again and hear otherwise."""
    for sigma, steps, delta in ((8.0, 100, 1e-6), (16.0, 20, 1e-5), (1.0, 3, 1e-5)):
        target = epsilon([(StepEvent(sigma, Fraction(1)), steps)], delta, accountant)
        found = calibrate_noise_multiplier(target, delta, Fraction(1), steps, accountant)
        assert sigma * (1 - 1e-3) < found <= sigma * (1 + 2e-4)


SHAPES = {
    'smooth': lambda x, root: root / x,
    'steep': lambda x, root: (root / x) ** 9,
    'with a kink': lambda x, root: (root / x) ** (1 if x < root else 9),
    'infinite for little noise': lambda x, root: root / x if x > 0.97 * root else math.inf,
    'a plateau': lambda x, root: 1.0 if x >= root else 2.0,
    'zero': lambda x, root: 0.0 if x >= root else 2.0,
    'not quite falling': lambda x, root: root / x * (1.0005 if int(x / root * 5000) % 2 else 1),
}


@pytest.mark.parametrize(('root', 'start'), [(0.05, 0.06), (0.3, 0.31), (3.7, 1.0), (8.0, 8.0), (1e4, 9e3)])
@pytest.mark.parametrize('shape', SHAPES)
def test_the_search_rounds_up_by_its_precision_whatever_the_curve_is(shape, root, start):
    """And it asks for few ratios, which may take a second each, if the curve is smooth."""
    asked = []

    def ratio(x):
        asked.append(x)
        return SHAPES[shape](x, root)

    found = smallest_sigma(ratio, start, 1e-4)
    assert ratio(found) <= 1 and found <= root * (1.0011 if shape == 'not quite falling' else 1.0001)
    assert len({*asked}) <= (11 if shape in ('smooth', 'steep') else 50)


def test_all_drawn_every_time_is_a_plateau():
    """With B = N every larger sigma may fit as well: the least one is wanted."""
    for edge in (1.07, 1.9, 0.3):
        assert edge <= smallest_sigma(lambda x: 1.0 if x >= edge else 2.0, 1.0, 1e-3) <= edge * 1.002  # noqa: B023
