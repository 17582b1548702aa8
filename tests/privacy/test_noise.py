"""Noise and sampling: the right distribution, from a source nobody can repeat."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from mmpose_dp.privacy import RandomSource


def test_gaussian_is_standard_normal_and_a_wrong_scale_is_rejected():
    sample = RandomSource(debug_seed=1).gaussian(200_000).numpy()
    assert stats.kstest(sample, 'norm').pvalue > 1e-3
    for wrong in (0.98, 1.02):
        assert stats.kstest(sample * wrong, 'norm').pvalue < 1e-3


def test_gaussian_is_independent_within_and_across_chunks(monkeypatch):
    monkeypatch.setattr('mmpose_dp.privacy.noise._CHUNK', 1000)
    sample = RandomSource(debug_seed=2).gaussian(99_999).numpy()
    assert len(sample) == 99_999
    for lag in (1, 500, 1000):
        assert abs(np.corrcoef(sample[:-lag], sample[lag:])[0, 1]) < 0.015


def test_system_entropy_ignores_and_leaves_every_seed():
    draws = []
    for _ in range(2):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        source = RandomSource()
        draws.append((source.gaussian(8), source.uint64(8)))
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == np.random.get_state()[1]).all() and before[2] == random.getstate()
        assert source.is_secret
    assert not torch.equal(draws[0][0], draws[1][0]) and (draws[0][1] != draws[1][1]).all()


def test_debug_seed_repeats_and_is_not_secret():
    one, two = RandomSource(3), RandomSource(3)
    assert torch.equal(one.gaussian(100), two.gaussian(100)) and not one.is_secret


def test_bernoulli_rate_and_independence():
    source, rate, rounds, count = RandomSource(debug_seed=4), Fraction(7, 50), 4000, 50
    drawn = np.zeros((rounds, count))
    for row in drawn:
        row[source.bernoulli(count, rate)] = 1
    assert stats.binomtest(int(drawn.sum()), rounds * count, float(rate)).pvalue > 1e-4
    # sizes follow the binomial distribution, records and steps are uncorrelated
    sizes = drawn.sum(1).astype(int)
    law = stats.binom(count, float(rate))
    expected = np.array([law.cdf(3), *law.pmf(np.arange(4, 12)), law.sf(11)]) * rounds
    found = np.bincount(np.clip(sizes, 3, 12) - 3, minlength=10)
    assert stats.chisquare(found, expected).pvalue > 1e-4
    corr = np.corrcoef(drawn.T) - np.eye(count)
    assert abs(corr).max() < 0.08
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.01


def test_bernoulli_edges():
    source = RandomSource()
    assert list(source.bernoulli(5, Fraction(1))) == [0, 1, 2, 3, 4]
    assert len(source.bernoulli(0, Fraction(1, 2))) == 0
    for bad in (Fraction(0), Fraction(3, 2)):
        with pytest.raises(ValueError, match='rate'):
            source.bernoulli(5, bad)


def test_choice_is_uniform_without_replacement():
    source, hits = RandomSource(debug_seed=5), np.zeros(10)
    for _ in range(3000):
        chosen = source.choice(10, 3)
        assert len(set(chosen)) == 3
        hits[chosen] += 1
    assert stats.chisquare(hits).pvalue > 1e-4
    with pytest.raises(ValueError, match='without replacement'):
        source.choice(2, 3)


def test_secure_mode_is_standard_normal_from_four_draws():
    source = RandomSource(debug_seed=6, secure_mode=True)
    sample = source.gaussian(200_000).numpy()
    assert stats.kstest(sample, 'norm').pvalue > 1e-3
    parts = RandomSource(debug_seed=6)
    four = sum(parts._normal(100).astype(np.float64) for _ in range(4)) / 2
    assert np.allclose(RandomSource(debug_seed=6, secure_mode=True).gaussian(100).numpy(), four.astype(np.float32))
