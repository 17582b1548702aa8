"""Poisson sampling of private records, and independent sampling of public ones.

The draw decides the amplification that the accountant claims, so it comes from the system's entropy and from nothing else:
not from mmengine's seed, not from a shuffle. Must not drop, repeat or round the draw.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from mmengine.dist import get_dist_info
from mmpose.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.noise import RandomSource

from ..public_private_dataset import PublicPrivateDataset


class MicroBatch(NamedTuple):
    """What the train loop must know of a list of indices.

    Attributes:
        rows: how many there are.
        is_last: whether they end their logical batch.
        replayed: a row of the private record, chosen at random in the logical batch, that is to be replayed alone; None where it
            is in another micro-batch, or where there is none.
    """

    rows: int
    is_last: bool
    replayed: int | None = None


@DATA_SAMPLERS.register_module()
class PoissonBatchSampler:
    """Draws logical batches and hands them out in micro-batches, each of private or of public rows alone.

    Every private record joins a logical batch independently with probability ``expected_batch_size / num_records``, or, with
    personal budgets, with the rate of its budget (``set_rates``). Public
    records are drawn uniformly without replacement, independently of the private draw. Each rank samples its own shard of
    the private records.

    Args:
        sampler: mmengine builds it from ``train_dataloader.sampler``; only its ``dataset`` is used.
        batch_size: the most rows of one forward (mmengine's ``train_dataloader.batch_size``): memory, not privacy.
        expected_batch_size: B, over all ranks.
        public_batch_size: public rows of each step, over all ranks.
        max_rows_per_record: of a drawn record with more rows (an image or subject), so many are taken at random. None: all,
            in one forward.
        debug_seed: for tests only; the run is then NOT PRIVATE.

    Attributes:
        pending: one MicroBatch for each list of indices handed out and not yet trained on, oldest first. Data loaders
            keep the order, also with workers that read ahead.
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
        self.random = RandomSource(debug_seed)
        self._replay = RandomSource(debug_seed)
        self.sample_rate = Fraction(expected_batch_size, self.num_records)
        self._max_rows = max_rows_per_record
        self._shard = range(rank, self.num_records, world)
        self._rows_of, self._rows_per_index = dataset.rows_of, dataset.rows_per_index
        # records that are drawn with one rate, and the rate
        self._groups = {self.sample_rate: list(self._shard)}
        self._public = dataset.public_rows
        self._rank, self._world = rank, world
        self.pending: deque[MicroBatch] = deque()
        self.public_only = False
        self.steps_done = 0  # of the current epoch, set on resume

    def set_rates(self, rates: Sequence[Fraction]) -> None:
        """Draws record r with probability ``rates[r]`` from now on; they add up to ``expected_batch_size``."""
        self._groups = {}
        for record in self._shard:
            self._groups.setdefault(rates[record], []).append(record)

    def leave_out(self, records: set[int]) -> None:
        """Never draws these private records again; rates and ``num_records`` stay. For audits."""
        self._groups = {rate: [r for r in group if r not in records] for rate, group in self._groups.items()}

    @property
    def largest_forward(self) -> int:
        """The most rows that one forward can have: ``batch_size``, or those of the record with the most."""
        most = max(len(self._rows_of(record)) for record in range(self.num_records))
        most = most if self._max_rows is None else min(most, self._max_rows)
        return max(self.micro_batch_size, most * self._rows_per_index)

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
        records = []
        for rate, group in ({} if self.public_only else self._groups).items():
            records += [self._some_rows(group[i]) for i in self.random.bernoulli(len(group), rate)]
        if self.public_batch_size:
            # every rank takes every world-th of an own draw: together about public_batch_size rows
            size = len(range(self._rank, self.public_batch_size, self._world))
            records += [[int(self._public[i])] for i in self.random.choice(len(self._public), size)]
        return records

    def _some_rows(self, record: int) -> list[int]:
        rows = self._rows_of(record)
        if self._max_rows is None or len(rows) <= self._max_rows:
            return rows
        return [rows[i] for i in self.random.choice(len(rows), self._max_rows)]

    def __iter__(self) -> Iterator[list[int]]:
        self.pending.clear()
        for _ in range(self.steps_done, len(self)):
            records = self.draw()
            # each half by itself: in one forward with private rows, the public rows' gradient, which no noise hides, would
            # be rounded differently by how many they are
            halves = [[r for r in records if (r[0] in self._public) == public] for public in (False, True)]
            private_limit = max(self.micro_batch_size // self._rows_per_index, 1)
            limits = (private_limit, self.micro_batch_size)
            batches = [rows for half, limit in zip(halves, limits) for rows in _pack(half, limit)]
            batches = batches or [[]]  # an empty draw: the step still happens
            one = self._replay.choice(len(halves[0]), 1) if halves[0] else ()
            replayed = next((halves[0][i][0] for i in one), None)
            for i, rows in enumerate(batches):
                here = replayed if replayed in rows else None
                self.pending.append(MicroBatch(len(rows), i + 1 == len(batches), here))
                yield rows
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
