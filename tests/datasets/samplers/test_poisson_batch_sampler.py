"""Poisson sampling as the data loader sees it."""

from fractions import Fraction

import numpy as np
import pytest
from mmengine.dataset import DefaultSampler
from scipy import stats
from torch.utils.data import DataLoader

from mmpose_dp.datasets import PoissonBatchSampler, PublicPrivateDataset
from mmpose_dp.privacy.errors import PrivacyError


class Parts(PublicPrivateDataset):
    """60 private and 30 public samples without images; ``groups`` makes several samples one record."""

    def __init__(self, groups=None, augmentations=1):
        self._records = groups or [[i] for i in range(60)]
        self._record_of = {sample: record for record, samples in enumerate(self._records) for sample in samples}
        self.augmentations = augmentations
        self.private, self.views, self.public = range(60), None, range(30)

    def __getitem__(self, index):
        return index


def sampler(dataset=None, batch_size=8, **settings):
    settings = {'expected_batch_size': 12, 'debug_seed': 0, **settings}
    return PoissonBatchSampler(DefaultSampler(dataset or Parts()), batch_size, **settings)


def logical_batches(s):
    """Joins micro-batches as the train loop does, checking what is announced of them."""
    batches, current = [], []
    for indices in s:
        current += indices
        if indices.step.is_last:
            batches.append(current)
            current = []
    assert not current
    return batches


@pytest.mark.parametrize('expected', [12, 23])  # 23 does not divide 60: the rate is not rounded
def test_inclusion_rate_and_sizes(expected):
    s, sizes, hits = sampler(expected_batch_size=expected), [], np.zeros(60)
    assert s.sampling.sample_rate == Fraction(expected, 60)
    for _ in range(400):
        for indices in logical_batches(s):
            sizes.append(len(indices))
            hits[indices] += 1
    steps = len(sizes)
    q = expected / 60
    assert steps == 400 * (60 // expected)
    assert stats.binomtest(int(hits.sum()), steps * 60, q).pvalue > 1e-4
    assert stats.chisquare(hits).pvalue > 1e-4
    # binomial variance: a sampler that shuffles and cuts would have none
    assert abs(np.var(sizes) / (60 * q * (1 - q)) - 1) < 0.15


def test_micro_batches_are_bounded_and_empty_batches_are_steps():
    s = sampler(batch_size=3, expected_batch_size=1)
    batches = list(s)
    sizes = [len(indices) for indices in batches]
    assert max(sizes) <= 3 and 0 in sizes
    assert sum(indices.step.is_last for indices in batches) == len(s) == 60


def test_augmented_samples_count_in_memory():
    s = sampler(Parts(augmentations=4), batch_size=8, public_batch_size=8)
    assert max(len(indices) for indices in s if indices and indices[0] < 60) == 2
    assert max(len(indices) for indices in s if indices and indices[0] >= 60) == 8


def test_records_are_never_split():
    groups = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(20)]
    s = sampler(Parts(groups), batch_size=4, expected_batch_size=10)
    assert s.num_records == 20
    for indices in s:
        assert sorted(indices) == sorted(r for g in groups if g[0] in indices for r in g)


def test_no_micro_batch_holds_both_parts():
    """In one forward with private samples, the rounding of the public gradient would reveal how many they are."""
    s = sampler(batch_size=4, public_batch_size=6)
    batches = list(s)
    assert all(len({index >= 60 for index in indices}) <= 1 for indices in batches)
    assert sum(indices.step.is_last for indices in batches) == len(s)


def test_public_samples_are_independent_of_the_private_ones():
    s = sampler(public_batch_size=6)
    private, public = [], []
    for _ in range(200):
        for indices in logical_batches(s):
            sampled = np.zeros(90)
            sampled[indices] = 1
            assert sampled[60:].sum() == 6
            private.append(sampled[:60]), public.append(sampled[60:])
    # the view of record i is public sample i: whether they are sampled must not be correlated
    for shift in (0, 1):
        records, views = (np.array(private)[:, shift : shift + 29].ravel(), np.array(public)[:, :29].ravel())
        assert abs(np.corrcoef(records, views)[0, 1]) < 0.03


def test_public_only_epochs():
    s = sampler(public_batch_size=6)
    s.begin_epoch(public_only=True)
    batches = logical_batches(s)
    assert len(batches) == len(s) == 5
    assert all(len(indices) == 6 and min(indices) >= 60 for indices in batches)


def test_sampling_comes_from_the_systems_entropy():
    one, two = (logical_batches(sampler(debug_seed=None)) for _ in range(2))
    assert one != two
    assert logical_batches(sampler()) == logical_batches(sampler())


def test_the_step_comes_with_its_batch_from_workers_that_read_ahead():
    s = sampler()
    loader = DataLoader(Parts(), batch_sampler=s, num_workers=2, collate_fn=lambda batch: (list(batch), batch.step))
    for _ in range(3):
        batches = list(loader)
        assert sum(step.is_last for _, step in batches) == len(s) and batches[-1][1].is_last
        assert all(step.replayed is None or step.replayed in indices for indices, step in batches)


def test_a_resumed_epoch_has_only_its_remaining_steps():
    s = sampler()
    s.begin_epoch(public_only=False, steps_done=3)
    assert len(logical_batches(s)) == 2
    assert len(logical_batches(s)) == 5


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(expected_batch_size=61), 'expected_batch_size=61.*60: write 3, and tools'),
        (dict(expected_batch_size=0), 'expected_batch_size=0'),
        (dict(public_batch_size=31), 'public_batch_size=31.*30 public.*: write at most 30'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(PrivacyError, match=message):
        sampler(**settings)


def test_another_data_set_is_refused():
    with pytest.raises(PrivacyError, match="type='PublicPrivateDataset'"):
        PoissonBatchSampler(DefaultSampler(range(10)), 4, expected_batch_size=2)


@pytest.mark.parametrize(('limit', 'augmentations', 'largest'), [(None, 1, 20), (None, 2, 40), (3, 1, 8), (5, 2, 10)])
def test_the_largest_forward_is_known(limit, augmentations, largest):
    """A record goes through one forward whole, however small batch_size is."""
    dataset = Parts([list(range(20)), *[[i] for i in range(20, 60)]], augmentations)
    s = sampler(dataset, expected_batch_size=12, max_rows_per_record=limit)
    assert s.largest_forward == largest
    seen = [len(indices) * augmentations for _ in range(20) for indices in s]
    assert max(seen) <= s.largest_forward
