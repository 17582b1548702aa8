"""The lower bounds of a one-run audit: sound on mechanisms whose privacy is known, and exact where that can be computed."""

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from mmpose_dp.auditing.canaries import audit, gaussian_bound, one_run_bound

DELTA = 1e-5


def epsilon_of(mu):
    """The epsilon of mu-Gaussian DP at DELTA (Dong et al. 2022, corollary 2.13)."""

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - DELTA

    return brentq(excess, 0, 200) if mu > 0 and excess(0) > 0 else 0.0


def gaussian_audit(mu, canaries, seed):
    """The audit of a Gaussian mechanism that releases each canary's bit, times mu, with noise of deviation 1."""
    rng = np.random.default_rng(seed)
    members = rng.random(canaries) < 0.5
    seen = rng.normal(size=canaries) + mu * members
    return audit({'likelihood': mu * (seen - mu / 2)}, members, DELTA)


@pytest.mark.parametrize('mu', [0.5, 1.0, 2.0])
def test_bounds_on_a_gaussian_mechanism_hold_and_mu_is_the_sharper_one(mu):
    found = [gaussian_audit(mu, 500, seed) for seed in range(8)]
    assert max(one.mu for one in found) < mu
    assert max(one.epsilon_lower_bound for one in found) < epsilon_of(mu)
    assert all(epsilon_of(one.mu) >= one.one_run for one in found)
    if mu >= 1:
        assert np.mean([epsilon_of(one.mu) for one in found]) > 1.3 * np.mean([one.one_run for one in found])


@pytest.mark.parametrize('right', [0.55, 0.9, 0.999])
def test_one_guess_is_right_as_often_as_gaussian_dp_allows_and_no_more(right):
    """Phi(mu / 2) is the largest accuracy on a fair coin."""
    assert gaussian_bound(1, 1, 1, right) == pytest.approx(2 * norm.ppf(right), abs=2e-3)
    assert gaussian_bound(1, 1, 1, 0.5) <= 1e-3


def test_bounds_of_counts_grow_with_right_guesses_and_shrink_with_confidence():
    bounds = [gaussian_bound(right, 100, 1000, 0.01) for right in (0, 50, 60, 70, 80, 90, 100)]
    assert bounds == sorted(bounds) and bounds[:2] == [0, 0] and bounds[-1] > 1
    assert (
        gaussian_bound(90, 100, 1000, 1e-6)
        < gaussian_bound(90, 100, 1000, 0.01)
        < gaussian_bound(90, 100, 100, 0.01) * 2
    )
    assert one_run_bound(50, 100, 1000, DELTA, 0.01) == 0


def test_nothing_known_gives_no_bound():
    rng = np.random.default_rng(0)
    members = rng.random(2000) < 0.5
    found = audit({'a': rng.normal(size=2000), 'b': rng.normal(size=2000)}, members, DELTA)
    assert found.mu == found.epsilon_lower_bound == 0
