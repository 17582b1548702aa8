"""What a budget can buy: how much of a whole training is signal and how much is noise, before any training.

**Derivation.** One private step adds up the clipped gradients of a Poisson sample of B records on average, each of norm
at most C, and adds N(0, (sigma C)^2) to each of d numbers. Let r be the length of the mean clipped gradient, in units of C:
1 if all records pull with full weight in one direction, 0 if they cancel. In that direction a step's sum is r C B on
average. If the direction stays, T steps add up to

    signal = T r C B,        noise = sigma C sqrt(d T)    (the length of a sum of T independent noises in d dimensions),

    signal / noise = r B sqrt(T) / (sigma sqrt(d)) = r N mu / sqrt(d)    with    mu = q sqrt(T) / sigma,  q = B / N.

C cancels: it matters only through r. That mu is the limit, for large sigma, of the Gaussian-DP mu of the subsampled
Gaussian, q sqrt(T (exp(1 / sigma^2) - 1)) (Dong et al. 2022, section 5.2). At small rates sigma falls below about 1, and
then the mu that covers the whole trade-off curve (extras/risk.py) is larger than q sqrt(T) / sigma: privacy is paid for
that buys no signal. So the ratio is computed from the steps, and the mu of the privacy loss distribution is shown beside
it. If sigma and C follow a schedule, the sums run over its parts: signal = r sum_t C_t B, noise^2 = d sum_t (sigma_t C_t)^2.

For a ratio s, the cosine between what was added up and the signal is s / sqrt(1 + s^2). To first order the loss falls by
the length of the mean gradient times that cosine per length moved: r C s / sqrt(1 + s^2), ``useful`` in units of C, by
which choices of what to train compare. With a projector d is its rank, since the noise outside the subspace is dropped,
and r is that of the subspace.

**What it leaves out.** The direction turns while the model learns, and r falls. Records differ, which a training without
noise suffers from too. The optimizer and its learning rate: one that is too large wrecks the start at any ratio. The
public gradient. So a verdict is an estimate, calibrated on trainings of synthetic people (docs/plan.md), and no part of the
guarantee. Must not be given anything computed from private records: r comes from public ones.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mmpose_dp.privacy.accounting import History, epsilon, privacy_loss
from mmpose_dp.privacy.errors import BudgetError, ConfigError
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.statement import epsilon_of_group

from .risk import TradeOff

MEANINGS = 'can learn', 'may learn a little', 'cannot learn'  # verdicts
# where the verdict changes, ratios of signal to noise of the whole training; the runs behind it are in docs/plan.md
LEARNS, LITTLE = 0.02, 0.005
# the same for mixing weights, which begin where they are already good: docs/accuracy_people.md, "Where private pictures pay"
MIXING_LIMITS = dict.fromkeys(('experts', 'channel_experts'), (0.2, 0.06))
LEAST_STEPS = 30  # no run of docs/accuracy.csv has fewer
MANY_EPOCHS = 10
_ENOUGH = 0.9  # of the best batch's ratio
_RATES = (256, 64, 32, 16, 8, 4, 2)  # batches that are compared: N divided by these
PEOPLE = (1, 2, 5, 10)  # records of one person

# the smaller r of the benchmark's two starts on pictures, to a digit: docs/plan.md, "Where r comes from"
DEFAULT_R = {
    'all': 0.1,
    'head+last_stage+norms': 0.07,
    'norms+first_stage': 0.1,
    'norms': 0.07,
    'bias': 0.05,
    'head': 0.02,
    'subspace': 0.04,
}
OTHER_R = 0.1


@dataclass(frozen=True)
class Choice:
    """Something that may be trained: what ``optim_wrapper.trainable`` would say, how many numbers are noised, and r."""

    trainable: str
    numbers: int  # d
    r: float
    source: str  # of r, in words
    configured: bool = False


def default_r(trainable: str) -> float:
    """r where nobody measured it."""
    return DEFAULT_R.get(trainable, OTHER_R)


def check_r(r: float) -> None:
    """Raises ConfigError for an r outside 0 to 1."""
    if not 0 <= r <= 1:
        raise ConfigError(f'r={r} must be between 0 and 1: it is a length in units of max_grad_norm')


def strength(plan: PrivacyPlan) -> float:
    """Signal over noise of a whole training for r = 1 and d = 1: N q sqrt(T) / sigma. Infinity without noise.

    With personal budgets the records of a step are counted at their own rates.
    """
    rates = plan.record_rates
    records = float(sum(rates)) if rates else float(plan.expected_batch_size)
    signal = variance = 0.0
    step = 0
    for event, steps in plan.planned():
        norm = plan.max_grad_norm_at(step)
        signal += steps * norm * records
        variance += steps * (event.noise_multiplier * norm) ** 2
        step += steps
    return signal / math.sqrt(variance) if variance else math.inf


def ratio(plan: PrivacyPlan, r: float, numbers: int) -> float:
    """Signal over noise of a whole training of ``numbers`` parameters, or coordinates. Raises ConfigError as ``check_r``."""
    check_r(r)
    return r * strength(plan) / math.sqrt(numbers) if r else 0.0


def most_numbers(plan: PrivacyPlan, r: float, least: float) -> int | None:
    """The most numbers that can be trained with a ratio of ``least``; None if nothing limits them."""
    most = (r * strength(plan) / least) ** 2
    return int(most) if math.isfinite(most) else None


def useful(value: float, r: float) -> float:
    """r times the cosine between what a training of that ratio adds up and the signal: descent per length moved, in units of C.

    By this, choices compare: a small one has little noise, but also little of the gradient.
    """
    return r * (value / math.hypot(1.0, value) if math.isfinite(value) else 1.0)


def limits(trainable: str = '') -> tuple[float, float]:
    """The least ratios of 'can learn' and of 'may learn a little', for what ``optim_wrapper.trainable`` says."""
    return MIXING_LIMITS.get(trainable, (LEARNS, LITTLE))


def verdict(value: float, trainable: str = '') -> str:
    """What a ratio means for this ``trainable``, one of MEANINGS."""
    learns, little = limits(trainable)
    return MEANINGS[0 if value >= learns else 1 if value >= little else 2]


# ---- what if ---------------------------------------------------------------------------------------------------------
def recalibrated(plan: PrivacyPlan, **changes: Any) -> PrivacyPlan:
    """The plan with ``changes`` and the noise that its budget then needs; without a budget, that of its own epsilon.

    Raises ConfigError for changes that contradict the rest, and BudgetError where no noise is enough.
    """
    kept = {field.name: getattr(plan, field.name) for field in fields(plan)}
    target = kept.pop('target_epsilon') or plan.epsilon
    del kept['noise_multiplier']
    return type(plan).calibrate(target_epsilon=target, **{**kept, **changes})


def epsilon_by_epoch(plan: PrivacyPlan, points: int = 10) -> list[tuple[float, float]]:
    """(private epochs, epsilon spent until then), at most ``points`` of them, evenly spaced."""
    steps = sorted({max(plan.steps * i // points, 1) for i in range(1, points + 1)})
    return [(count / steps_per_epoch(plan), plan.epsilon_after(count)) for count in steps]


def steps_per_epoch(plan: PrivacyPlan) -> int:
    """Private steps of an epoch, as training counts them."""
    return plan.num_records // plan.expected_batch_size


@dataclass(frozen=True)
class Batch:
    """What one expected batch size gives for the same budget and as many epochs."""

    size: int
    steps: int
    noise_multiplier: float
    strength: float  # the ratio for r = 1 and d = 1


def batch_sizes(plan: PrivacyPlan) -> list[int]:
    """The batch sizes that are compared: fractions of N, and the configured one."""
    sizes = {plan.num_records // rate for rate in _RATES} | {plan.expected_batch_size}
    return sorted(size for size in sizes if size)


def with_batch(plan: PrivacyPlan, size: int) -> Batch | None:
    """The same budget and epochs with another batch size; None where no noise is enough for so few records per step."""
    epochs = plan.steps / steps_per_epoch(plan)
    steps = max(round(epochs * (plan.num_records // size)), 1)
    try:
        other = recalibrated(plan, expected_batch_size=size, steps=steps)
    except BudgetError:
        return None
    return Batch(size, steps, other.noise_multiplier, strength(other))


def best_batch(batches: Sequence[Batch]) -> Batch:
    """The smallest batch with nine tenths of the largest ratio: smaller ones take more steps, which the optimizer can use.

    Batches with fewer than ``LEAST_STEPS`` steps are left out if there are others.
    """
    enough = [batch for batch in batches if batch.steps >= LEAST_STEPS] or list(batches)
    most = max(batch.strength for batch in enough)
    return min((batch for batch in enough if batch.strength >= _ENOUGH * most), key=lambda batch: batch.size)


def with_more_epochs(plan: PrivacyPlan, epochs: int = MANY_EPOCHS) -> dict[str, float]:
    """What ``epochs`` more bring: in the same budget, and with the same noise, which spends more."""
    added = epochs * steps_per_epoch(plan)
    longer = recalibrated(plan, steps=plan.steps + added)
    spent = [*plan.earlier_history, *plan.planned(), *_repeated(plan, added)]
    return dict(
        epochs=epochs,
        noise_multiplier=longer.noise_multiplier,
        strength=strength(longer),
        gain=strength(longer) / strength(plan),
        epsilon_with_the_same_noise=epsilon(spent, plan.target_delta, plan.accountant),
    )


def _repeated(plan: PrivacyPlan, steps: int) -> History:
    """More steps like the last planned one."""
    return [(plan.event_at(plan.steps - 1), steps)] if steps else []


def for_people(plan: PrivacyPlan, counts: Iterable[int]) -> list[tuple[int, float]]:
    """(records of one person, epsilon of that person) for several numbers of records; infinity where the statement says so."""
    history = [*plan.earlier_history, *plan.planned()]
    return [
        (count, plan.epsilon if count == 1 else epsilon_of_group(history, plan.target_delta, count, plan.epsilon))
        for count in counts
    ]


def second_training(plan: PrivacyPlan) -> dict[str, float]:
    """What a second training of the same kind costs: epsilon of both, and the ratio left to each within the budget of one."""
    both = [*plan.earlier_history, *plan.planned(), *plan.planned()]
    shared = recalibrated(plan, steps=2 * plan.steps)
    return dict(
        epsilon_of_both=epsilon(both, plan.target_delta, plan.accountant),
        noise_multiplier_for_one_budget=shared.noise_multiplier,
        left_of_the_ratio=strength(shared) / strength(plan) / math.sqrt(2),
    )


def gaussian_mu(plan: PrivacyPlan) -> float | None:
    """The least mu of Gaussian DP that covers the whole training (extras/risk.py); None where it is not bounded."""
    history = [*plan.earlier_history, *plan.planned()]
    try:
        return TradeOff.of(privacy_loss(tuple(history))).gaussian()[0]
    except (ArithmeticError, ValueError, MemoryError):  # no noise, or losses beyond what a grid holds
        return None
