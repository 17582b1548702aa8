"""Packs the records that ``mmpose_dp.privacy.sampling`` samples for a logical batch into micro-batches.

Must not decide itself which records join a step, and must not drop or repeat one.
"""

from collections.abc import Iterator

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmpose.registry import DATA_SAMPLERS
from scipy.stats import poisson
from torch.utils.data import Sampler

from mmpose_dp.privacy.errors import ConfigError
from mmpose_dp.privacy.noise import RandomSource
from mmpose_dp.privacy.sampling import PoissonSampling
from mmpose_dp.privacy.validation import as_whole

from ..public_private_dataset import PublicPrivateDataset
from ..steps import OfStep, Step


@DATA_SAMPLERS.register_module()
class PoissonBatchSampler:
    """Samples logical batches and yields them in micro-batches, each of private or of public samples only.

    Each rank samples its own shard of the private records (:class:`mmpose_dp.privacy.PoissonSampling`).

    Args:
        sampler: mmengine builds it from ``train_dataloader.sampler``; only its ``dataset`` is used.
        batch_size: the largest number of samples in one forward (mmengine's ``train_dataloader.batch_size``). It decides
            memory, not privacy. Private forwards have one size, ``private_forward``; it is smaller than this if that wastes less.
        expected_batch_size: B, over all ranks.
        public_batch_size: public samples per step, over all ranks.
        max_rows_per_record: if a sampled record (an image or subject) has more samples, this many of them are chosen at
            random. None: all are used, in one forward.
        debug_seed: for tests only; the run is then NOT PRIVATE.

    Attributes:
        sampling: decides which records join a step.
        private_forward: the number of samples in every private forward, to which the train loop fills up. Only a record that has
            more samples makes a larger one, which it has to itself.
        public_only: whether this epoch samples public samples only; it is then one pass over the public part.
        steps_done: steps of the current epoch that are already done; set on resume.

    Raises ConfigError for a setting that is out of range or contradicts the data set.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        expected_batch_size: int,
        public_batch_size: int = 0,
        max_rows_per_record: int | None = None,
        debug_seed: int | None = None,
    ) -> None:
        key = 'train_dataloader.batch_sampler'
        self.expected_batch_size = as_whole(expected_batch_size, f'{key}.expected_batch_size')
        self.public_batch_size = as_whole(public_batch_size, f'{key}.public_batch_size', 0)
        self._max_samples = (
            None if max_rows_per_record is None else as_whole(max_rows_per_record, f'{key}.max_rows_per_record')
        )
        self.micro_batch_size = as_whole(batch_size, 'train_dataloader.batch_size')
        dataset = getattr(sampler, 'dataset', None)
        if not isinstance(dataset, PublicPrivateDataset):
            raise ConfigError(
                f'train_dataloader.dataset is {type(dataset).__name__}: PoissonBatchSampler needs '
                "dataset=dict(type='PublicPrivateDataset', private=<your dataset>)"
            )
        rank, world = get_dist_info()
        self.sampler = sampler
        self.num_records = dataset.num_records
        check_batch_size(self.expected_batch_size, self.num_records)
        if self.public_batch_size > dataset.num_public:
            raise ConfigError(
                f'{key}.public_batch_size={public_batch_size} is more than the {dataset.num_public} public records of '
                f'train_dataloader.dataset: write at most {dataset.num_public}'
            )
        shard = range(rank, self.num_records, world)
        self.sampling = PoissonSampling(self.num_records, self.expected_batch_size, shard, RandomSource(debug_seed))
        self._replay = RandomSource(debug_seed)
        self._samples_of, self._record_of = dataset.samples_of, dataset.record_of
        self._samples_per_index = dataset.samples_per_index
        self._public = dataset.public_samples
        self._rank, self._world = rank, world
        # from public numbers alone: the size decides about rounding, and must not follow how many people a record has
        expected = self.expected_batch_size * (self._max_samples or 1) / world
        self._private_limit = _size_that_wastes_least(
            expected, max(self.micro_batch_size // self._samples_per_index, 1)
        )
        self.private_forward = self._private_limit * self._samples_per_index
        self.begin_epoch(public_only=False)

    @property
    def largest_forward(self) -> int:
        """The largest number of samples in one forward: ``batch_size``, or that of the largest record."""
        most = max(len(self._samples_of(record)) for record in range(self.num_records))
        most = most if self._max_samples is None else min(most, self._max_samples)
        return max(self.micro_batch_size, most * self._samples_per_index)

    def begin_epoch(self, public_only: bool, steps_done: int = 0) -> None:
        """The next epoch is one pass over the public samples, or private; ``steps_done`` of it were made before a resume."""
        self.public_only, self.steps_done = public_only, steps_done

    def steps_per_epoch(self, public_only: bool) -> int:
        """Logical steps of one epoch; exact integers, since the accountant counts them."""
        if public_only:
            return max(len(self._public) // max(self.public_batch_size, 1), 1)
        return self.num_records // self.expected_batch_size

    def __len__(self) -> int:
        """Logical steps of the current epoch (not micro-batches)."""
        return self.steps_per_epoch(self.public_only)

    def set_epoch(self, epoch: int) -> None:
        """Does nothing, since sampling depends on no seed and no epoch number. mmengine calls it."""

    def sample(self) -> list[list[int]]:
        """Samples one logical batch of this rank: a list of records, each the list of its indices; public records last."""
        private = [] if self.public_only else self.sampling.private()
        records = [list(self.sampling.at_most(self._samples_of(record), self._max_samples)) for record in private]
        # each rank chooses its share by itself: together they have public_batch_size samples
        size = len(range(self._rank, self.public_batch_size, self._world))
        return records + [[int(self._public[i])] for i in self.sampling.public(len(self._public), size)]

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps_done, len(self)):
            records = self.sample()
            # Each part by itself: in one forward with private samples, the rounding of the public gradient, which no noise
            # hides, would depend on how many private samples there are.
            private, public = (
                [r for r in records if (r[0] in self._public) == is_public] for is_public in (False, True)
            )
            batches = [*_pack(private, self._private_limit), *_pack(public, self.micro_batch_size)]
            batches = batches or [[]]  # if nothing was sampled, the step still happens
            replayed = private[int(self._replay.choice(len(private), 1)[0])][0] if private else None
            for i, indices in enumerate(batches):
                here = self._record_of(replayed) if replayed in indices else None
                yield OfStep(indices, Step(i + 1 == len(batches), here))
        self.steps_done = 0


def check_batch_size(size: int, num_records: int) -> None:
    """Raises ConfigError for an expected batch that so many records cannot give."""
    if not 1 <= size <= num_records:
        raise ConfigError(
            f'train_dataloader.batch_sampler.expected_batch_size={size} must be between 1 and the number of private records, '
            f'{num_records}: write {max(num_records // 16, 1)}, and tools/plan_budget.py says if another is better'
        )


def _pack(records: list[list[int]], limit: int) -> list[list[int]]:
    """Fills micro-batches with whole records: at most ``limit`` samples each, unless a record has more."""
    batches: list[list[int]] = []
    for samples in records:
        if not batches or len(batches[-1]) + len(samples) > limit:
            batches.append([])
        batches[-1].extend(samples)
    return batches


def _size_that_wastes_least(expected: float, most: int) -> int:
    """The size of forwards, up to ``most``, that costs the least time for a step of about ``expected`` samples.

    Larger forwards are filled up with more blank samples. Smaller forwards are more in number, and each costs some time by itself.
    """
    # in samples: HRNet-w32's plain step on an H200, and on two CPU cores
    by_itself = 24 if torch.cuda.is_available() else 2
    counts = np.arange(int(expected + 10 * expected**0.5) + 2)
    likely = poisson.pmf(counts, expected)
    costs = [float(likely @ -(-counts // size)) * (size + by_itself) for size in range(1, most + 1)]
    return 1 + int(np.argmin(costs))
