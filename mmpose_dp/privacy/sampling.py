"""Which records join a step: the random decision whose amplification the accountant claims.

It comes from the operating system's entropy alone, not from mmengine's seed or a shuffle. Must not drop, repeat or round it.
"""

from collections.abc import Sequence
from fractions import Fraction

from .noise import RandomSource


class PoissonSampling:
    """Every private record joins a step independently with probability q = ``expected_batch_size / num_records``.

    So a step may have any number of records, or none (Poisson subsampling: Balle et al. 2018; Mironov et al. 2019). Public
    samples are taken uniformly without replacement, independently of the private ones: a public sample that came with its private
    record would reveal that the record was in the step, and q would no longer amplify.

    ``shard`` are the private records that this process samples; N and B are those of all processes together.
    """

    def __init__(
        self, num_records: int, expected_batch_size: int, shard: Sequence[int], random: RandomSource | None = None
    ) -> None:
        self.sample_rate = Fraction(expected_batch_size, num_records)  # q, exact
        self.random = random or RandomSource()
        self._shard = list(shard)
        self._groups = {self.sample_rate: self._shard}  # records that are sampled at one rate, by the rate

    def set_rates(self, rates: Sequence[Fraction]) -> None:
        """Samples record r with probability ``rates[r]`` from now on; the rates add up to ``expected_batch_size``."""
        self._groups = {}
        for record in self._shard:
            self._groups.setdefault(rates[record], []).append(record)

    def leave_out(self, records: set[int]) -> None:
        """Never samples these records again; the rates and N stay. For audits."""
        self._shard = [record for record in self._shard if record not in records]
        self._groups = {rate: [r for r in group if r not in records] for rate, group in self._groups.items()}

    def private(self) -> list[int]:
        """The private records of one step."""
        groups = self._groups.items()
        return [group[i] for rate, group in groups for i in self.random.bernoulli(len(group), rate).tolist()]

    def public(self, available: int, size: int) -> list[int]:
        """``size`` different numbers below ``available``: the public samples of one step."""
        return self.random.choice(available, size).tolist() if size else []

    def at_most(self, samples: Sequence[int], most: int | None) -> Sequence[int]:
        """The samples of one record, or ``most`` of them at random where it has more."""
        if most is None or len(samples) <= most:
            return samples
        return [samples[i] for i in self.random.choice(len(samples), most)]
