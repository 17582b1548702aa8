"""Poisson sampling as the data loader sees it."""

from fractions import Fraction

import numpy as np
import pytest
from mmengine.dataset import DefaultSampler
from scipy import stats
from torch.utils.data import DataLoader

from mmpose_dp.datasets import PoissonBatchSampler, PublicPrivateDataset
from mmpose_dp.privacy.errors import PrivacyError


class Halves(PublicPrivateDataset):
    """60 private and 30 public rows without images; ``groups`` makes several rows one record."""

    def __init__(self, groups=None, augmentations=1):
        self._records = groups or [[i] for i in range(60)]
        self.augmentations = augmentations
        self.private, self.views, self.public = range(60), None, range(30)

    def __getitem__(self, index):
        return index


def sampler(dataset=None, batch_size=8, **settings):
    settings = {'expected_batch_size': 12, 'debug_seed': 0, **settings}
    return PoissonBatchSampler(DefaultSampler(dataset or Halves()), batch_size, **settings)


def logical_batches(s):
    """Joins micro-batches as the train loop does, checking what is announced of them."""
    batches, current = [], []
    for rows in s:
        current += rows
        if rows.step.is_last:
            batches.append(current)
            current = []
    assert not current
    return batches


@pytest.mark.parametrize('expected', [12, 23])  # 23 does not divide 60: the rate is not rounded
def test_inclusion_rate_and_sizes(expected):
    s, sizes, hits = sampler(expected_batch_size=expected), [], np.zeros(60)
    assert s.sampling.sample_rate == Fraction(expected, 60)
    for _ in range(400):
        for rows in logical_batches(s):
            sizes.append(len(rows))
            hits[rows] += 1
    steps = len(sizes)
    q = expected / 60
    assert steps == 400 * (60 // expected)
    assert stats.binomtest(int(hits.sum()), steps * 60, q).pvalue > 1e-4
    assert stats.chisquare(hits).pvalue > 1e-4
    # binomial variance: a sampler that shuffles and cuts would have none
    assert abs(np.var(sizes) / (60 * q * (1 - q)) - 1) < 0.15


def test_micro_batches_are_bounded_and_empty_draws_are_steps():
    s = sampler(batch_size=3, expected_batch_size=1)
    batches = list(s)
    sizes = [len(rows) for rows in batches]
    assert max(sizes) <= 3 and 0 in sizes
    assert sum(rows.step.is_last for rows in batches) == len(s) == 60


def test_augmented_rows_count_as_rows_in_memory():
    s = sampler(Halves(augmentations=4), batch_size=8, public_batch_size=8)
    assert max(len(rows) for rows in s if rows and rows[0] < 60) == 2
    assert max(len(rows) for rows in s if rows and rows[0] >= 60) == 8


def test_records_are_never_split():
    groups = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(20)]
    s = sampler(Halves(groups), batch_size=4, expected_batch_size=10)
    assert s.num_records == 20
    for rows in s:
        assert sorted(rows) == sorted(r for g in groups if g[0] in rows for r in g)


def test_no_micro_batch_holds_both_halves():
    """In one forward with private rows, the rounding of the public gradient would tell how many they are."""
    s = sampler(batch_size=4, public_batch_size=6)
    batches = list(s)
    assert all(len({row >= 60 for row in rows}) <= 1 for rows in batches)
    assert sum(rows.step.is_last for rows in batches) == len(s)


def test_public_rows_are_independent_of_the_private_draw():
    s = sampler(public_batch_size=6)
    private, public = [], []
    for _ in range(200):
        for rows in logical_batches(s):
            drawn = np.zeros(90)
            drawn[rows] = 1
            assert drawn[60:].sum() == 6
            private.append(drawn[:60]), public.append(drawn[60:])
    # the view of record i is public row i: their draws must not be correlated
    for shift in (0, 1):
        rows, views = (
            np.array(private)[:, shift : shift + 29].ravel(),
            np.array(public)[:, :29].ravel(),
        )
        assert abs(np.corrcoef(rows, views)[0, 1]) < 0.03


def test_public_only_epochs():
    s = sampler(public_batch_size=6)
    s.public_only = True
    batches = logical_batches(s)
    assert len(batches) == len(s) == 5
    assert all(len(rows) == 6 and min(rows) >= 60 for rows in batches)


def test_draws_come_from_the_systems_entropy():
    one, two = (logical_batches(sampler(debug_seed=None)) for _ in range(2))
    assert one != two
    assert logical_batches(sampler()) == logical_batches(sampler())


def test_the_step_comes_with_its_batch_from_workers_that_read_ahead():
    s = sampler()
    loader = DataLoader(Halves(), batch_sampler=s, num_workers=2, collate_fn=lambda rows: (list(rows), rows.step))
    for _ in range(3):
        batches = list(loader)
        assert sum(step.is_last for _, step in batches) == len(s) and batches[-1][1].is_last
        assert all(step.replayed is None or step.replayed in rows for rows, step in batches)


def test_a_resumed_epoch_has_only_its_remaining_steps():
    s = sampler()
    s.steps_done = 3
    assert len(logical_batches(s)) == 2
    assert len(logical_batches(s)) == 5


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(expected_batch_size=61), 'expected_batch_size=61.*60'),
        (dict(expected_batch_size=0), 'expected_batch_size=0'),
        (dict(public_batch_size=31), 'public_batch_size=31.*30 public'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(PrivacyError, match=message):
        sampler(**settings)


def test_another_data_set_is_refused():
    with pytest.raises(PrivacyError, match="type='PublicPrivateDataset'"):
        PoissonBatchSampler(DefaultSampler(range(10)), 4, expected_batch_size=2)


@pytest.mark.parametrize(('limit', 'augmentations', 'rows'), [(None, 1, 20), (None, 2, 40), (3, 1, 8), (5, 2, 10)])
def test_the_largest_forward_is_known(limit, augmentations, rows):
    """A record goes through one forward whole, however small batch_size is."""
    dataset = Halves([list(range(20)), *[[i] for i in range(20, 60)]], augmentations)
    s = sampler(dataset, expected_batch_size=12, max_rows_per_record=limit)
    assert s.largest_forward == rows
    seen = [len(rows) * augmentations for _ in range(20) for rows in s]
    assert max(seen) <= s.largest_forward
