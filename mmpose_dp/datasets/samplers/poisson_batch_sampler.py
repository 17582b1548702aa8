"""Micro-batches of the logical batches that ``mmpose_dp.privacy.sampling`` decides on.

Must not decide itself which records join a step, and must not drop or repeat one.
"""

from collections.abc import Iterator

from mmengine.dist import get_dist_info
from mmpose.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.noise import RandomSource
from mmpose_dp.privacy.sampling import PoissonSampling

from ..public_private_dataset import PublicPrivateDataset
from ..steps import OfStep, Step


@DATA_SAMPLERS.register_module()
class PoissonBatchSampler:
    """Draws logical batches and hands them out in micro-batches, each of private or of public rows alone.

    Each rank samples its own shard of the private records (:class:`mmpose_dp.privacy.PoissonSampling`).

    Args:
        sampler: mmengine builds it from ``train_dataloader.sampler``; only its ``dataset`` is used.
        batch_size: the most rows of one forward (mmengine's ``train_dataloader.batch_size``): memory, not privacy.
        expected_batch_size: B, over all ranks.
        public_batch_size: public rows of each step, over all ranks.
        max_rows_per_record: of a drawn record with more rows (an image or subject), so many are taken at random. None: all,
            in one forward.
        debug_seed: for tests only; the run is then NOT PRIVATE.

    Attributes:
        sampling: decides which records join a step.
        public_only: draw public rows only; an epoch is then one pass over the public half.
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
        for name, value, low in (
            ('expected_batch_size', expected_batch_size, 1),
            ('public_batch_size', public_batch_size, 0),
            ('max_rows_per_record', 1 if max_rows_per_record is None else max_rows_per_record, 1),
        ):
            if type(value) is not int or value < low:
                raise PrivacyError(
                    f'train_dataloader.batch_sampler.{name}={value!r} must be a whole number, {low} or above'
                )
        if type(batch_size) is not int or batch_size < 1:
            raise PrivacyError(f'train_dataloader.batch_size={batch_size!r} must be a whole number above 0')
        dataset = getattr(sampler, 'dataset', None)
        if not isinstance(dataset, PublicPrivateDataset):
            raise PrivacyError(
                f'train_dataloader.dataset is {type(dataset).__name__}: PoissonBatchSampler needs '
                "dataset=dict(type='PublicPrivateDataset', private=<your dataset>)"
            )
        rank, world = get_dist_info()
        self.sampler = sampler
        self.micro_batch_size = batch_size
        self.expected_batch_size = expected_batch_size
        self.public_batch_size = public_batch_size
        self.num_records = dataset.num_records
        if not 1 <= expected_batch_size <= self.num_records:
            raise PrivacyError(
                f'train_dataloader.batch_sampler.expected_batch_size={expected_batch_size} must lie between 1 and the '
                f'number of private records, {self.num_records}'
            )
        if public_batch_size > dataset.num_public:
            raise PrivacyError(
                f'train_dataloader.batch_sampler.public_batch_size={public_batch_size} is more than the '
                f'{dataset.num_public} public records of train_dataloader.dataset'
            )
        shard = range(rank, self.num_records, world)
        self.sampling = PoissonSampling(self.num_records, expected_batch_size, shard, RandomSource(debug_seed))
        self._replay = RandomSource(debug_seed)
        self._max_rows = max_rows_per_record
        self._samples_of, self._samples_per_index = dataset.samples_of, dataset.samples_per_index
        self._public = dataset.public_samples
        self._rank, self._world = rank, world
        self.public_only = False
        self.steps_done = 0  # of the current epoch, set on resume

    @property
    def largest_forward(self) -> int:
        """The most rows that one forward can have: ``batch_size``, or those of the record with the most."""
        most = max(len(self._samples_of(record)) for record in range(self.num_records))
        most = most if self._max_rows is None else min(most, self._max_rows)
        return max(self.micro_batch_size, most * self._samples_per_index)

    def steps_per_epoch(self, public_only: bool) -> int:
        """Logical steps of one epoch; exact integers, since the accountant counts them."""
        if public_only:
            return max(len(self._public) // max(self.public_batch_size, 1), 1)
        return self.num_records // self.expected_batch_size

    def __len__(self) -> int:
        """Logical steps of the current epoch (not micro-batches)."""
        return self.steps_per_epoch(self.public_only)

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: no draw depends on a seed or an epoch number. mmengine calls it."""

    def draw(self) -> list[list[int]]:
        """One logical batch of this rank: a list of records, each the list of its rows; public ones last."""
        private = [] if self.public_only else self.sampling.private()
        records = [list(self.sampling.at_most(self._samples_of(record), self._max_rows)) for record in private]
        # every rank takes every world-th of a choice of its own: together about public_batch_size samples
        size = len(range(self._rank, self.public_batch_size, self._world))
        return records + [[int(self._public[i])] for i in self.sampling.public(len(self._public), size)]

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps_done, len(self)):
            records = self.draw()
            # each half by itself: in one forward with private rows, the public rows' gradient, which no noise hides, would
            # be rounded differently by how many they are
            halves = [[r for r in records if (r[0] in self._public) == public] for public in (False, True)]
            private_limit = max(self.micro_batch_size // self._samples_per_index, 1)
            limits = (private_limit, self.micro_batch_size)
            batches = [rows for half, limit in zip(halves, limits) for rows in _pack(half, limit)]
            batches = batches or [[]]  # an empty draw: the step still happens
            one = self._replay.choice(len(halves[0]), 1) if halves[0] else ()
            replayed = next((halves[0][i][0] for i in one), None)
            for i, rows in enumerate(batches):
                here = replayed if replayed in rows else None
                yield OfStep(rows, Step(i + 1 == len(batches), here))
        self.steps_done = 0


def _pack(records: list[list[int]], limit: int) -> list[list[int]]:
    """Fills micro-batches of about equal size with whole records, at most ``limit`` rows each unless one record has more."""
    if not records:
        return []
    count = -(-sum(map(len, records)) // limit)
    target = -(-sum(map(len, records)) // count)
    batches: list[list[int]] = [[]]
    for rows in records:
        if batches[-1] and len(batches[-1]) + len(rows) > target:
            batches.append([])
        batches[-1].extend(rows)
    return batches
