"""x"""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Budget:
    """The records that have one personal epsilon, and the rate at which they are drawn (Boenisch et al. 2023)."""

    epsilon: float
    num_records: int
    sample_rate: Fraction = Fraction(0)
