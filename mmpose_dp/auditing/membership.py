"""A membership attack on pose models: how well the loss of a record says whether the model was trained on it.

LiRA (Carlini et al. 2022), online: several models are trained, each on a random half of the records. A record's loss in one of
them, the target, is compared with its losses in the others, with and without it. Each model is the target once. A second opinion
beside the one-run audit, of what an attacker sees who has the final weights and data like the private ones. Must not decide
anything about the guarantee: an attack that fails proves nothing.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import beta as beta_law
from scipy.stats import rankdata

from mmpose_dp.extras.risk import FALSE_POSITIVE_RATES

_LEAST_LOSS = 1e-12
_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class AttackResult:
    """How many members an attack finds.

    Attributes:
        true_positive_rates: by rate of false positives, the share of members that the attack finds.
        lower_limits: of these shares, by Clopper and Pearson 1934; all of them hold with the confidence asked for, if (model,
            record) pairs are independent.
        auc: the probability that a member has a higher score than a record that is none.
        deviation: of the AUC from one target model to the next.
    """

    true_positive_rates: dict[float, float]
    lower_limits: dict[float, float]
    auc: float
    deviation: float


def likelihood_ratios(losses: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The score of every record in every model, (models, records): the higher, the likelier a member.

    The log of a loss is about Gaussian over models. Each record has two means, over the *other* models that were trained with it
    and without it; all records share the two variances, since a few models say little of one record's. A record that the others all
    had, or none had, scores 0.

    Args:
        losses: (models, records).
        members: (models, records) bool, whether the model was trained on the record.
    """
    # negative ones are log-likelihoods already (RLE's)
    values = losses if (losses < 0).any() else np.log(np.maximum(losses, _LEAST_LOSS))
    scores = np.zeros(losses.shape)
    for target in range(len(values)):
        others = np.arange(len(values)) != target
        density = {}
        for inside in (True, False):
            of_kind = np.where(members[others] == inside, values[others], np.nan)
            count = (~np.isnan(of_kind)).sum(0)
            mean = np.divide(np.nansum(of_kind, 0), count, out=np.full(len(count), np.nan), where=count > 0)
            spread = np.nansum((of_kind - mean) ** 2) / max(int((count - 1).clip(0).sum()), 1)
            # the mean of few models is uncertain itself
            variance = max(spread, _LEAST_DEVIATION**2) * (1 + 1 / count.clip(1))
            density[inside] = -0.5 * (values[target] - mean) ** 2 / variance - 0.5 * np.log(variance)
        scores[target] = np.nan_to_num(density[True] - density[False])
    return scores


def attack_result(scores: np.ndarray, members: np.ndarray, confidence: float = 0.95) -> AttackResult:
    """What guesses by a threshold on the scores find, over all models and records together.

    Args:
        scores: (models, records).
        members: (models, records) bool.
        confidence: of the lower limits.
    """
    inside, outside = scores[members], np.sort(scores[~members])[::-1]
    rates, limits, error = {}, {}, (1 - confidence) / len(FALSE_POSITIVE_RATES)
    for rate in FALSE_POSITIVE_RATES:
        allowed = int(rate * len(outside))
        found = int((inside > outside[allowed]).sum()) if allowed < len(outside) else len(inside)
        rates[rate] = found / len(inside)
        limits[rate] = float(beta_law.ppf(error, found, len(inside) - found + 1)) if found else 0.0
    each = [area_under_curve(s[m], s[~m]) for s, m in zip(scores, members) if m.any() and not m.all()]
    return AttackResult(rates, limits, area_under_curve(inside, outside), float(np.std(each, ddof=1)))


def area_under_curve(inside: np.ndarray, outside: np.ndarray) -> float:
    """The probability that a member's score is above that of another record; ties count half."""
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)]
    return float((ranks.sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))
