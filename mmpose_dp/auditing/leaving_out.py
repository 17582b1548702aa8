"""Leaves records out of what a training samples. N and the rates stay, as in the guarantee's neighbouring data sets.

Must not change which other records are sampled.
"""

from mmpose_dp.privacy.sampling import PoissonSampling


def leave_out(sampling: PoissonSampling, records: set[int]) -> None:
    """From now on, ``sampling`` never gives these private records."""
    sample = sampling.private

    def of_others() -> list[int]:
        return [record for record in sample() if record not in records]

    sampling.private = of_others  # type: ignore[method-assign]
