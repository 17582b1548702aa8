"""Auditing by attack: a lower bound on epsilon from one training with canaries.

Each canary is included in the training with probability one half; an attacker who guesses better than epsilon allows has refuted
it. Must not use anything but what the mechanism releases or treats as public; the inclusion bits only count right guesses.

Sources: Steinke, Nasr and Jagielski 2023 (privacy auditing with one training run, theorem 5.2); Mahloujifar, Melis and Chaudhuri
2024 (the same under a whole trade-off curve, arXiv 2410.22235); gradient canaries as in Nasr et al. 2023.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit, ndtr, ndtri
from scipy.stats import beta as beta_law
from scipy.stats import binom
from torch import Tensor

from mmpose_dp.privacy.errors import ConfigError

_SHARES = (0.03, 0.1, 0.25)  # of the canaries, from either end of the scores, that are guessed
_THRESHOLDS = (0.5, 2.0, 4.0, 8.0)  # of scores, in nats; fixed before the scores are known
_MAX_EPSILON, _MAX_MU = 50.0, 20.0


class Canaries:
    """Orthonormal gradient directions, one per canary: each has a random share of the parameters' entries.

    Args:
        params: the trainable parameters.
        count: number of canaries; at most a tenth of the entries.
        generator: for the shares and signs, which need not be secret.

    Raises ConfigError for another count.
    """

    def __init__(self, params: Sequence[Tensor], count: int, generator: torch.Generator | None = None) -> None:
        total = sum(p.numel() for p in params)
        if not 1 <= count <= total // 10:
            raise ConfigError(f'{count} canaries do not fit {total} parameters: use at most {total // 10}')
        self.count = count
        owner = torch.arange(total) % count
        self._owner = owner[torch.randperm(total, generator=generator)]
        norm = self._owner.bincount(minlength=count).double().sqrt()
        sign = torch.randint(0, 2, (total,), generator=generator) * 2.0 - 1
        self._value = (sign / norm[self._owner]).float()
        self._shapes = [p.shape for p in params]
        self._sizes = [p.numel() for p in params]

    def direction(self, canary: int) -> list[Tensor]:
        """The unit vector of a canary, one tensor per parameter."""
        flat = torch.where(self._owner == canary, self._value, 0.0)
        return [part.view(shape) for part, shape in zip(flat.split(self._sizes), self._shapes)]

    def components(self, gradient: Sequence[Tensor]) -> np.ndarray:
        """The inner product of a gradient with every canary's direction, (count,) float64."""
        flat = torch.cat([g.detach().flatten().cpu() for g in gradient]).double() * self._value
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self._owner, flat).numpy()


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        one_run: lower bound on epsilon that assumes nothing about the mechanism (Steinke et al. 2023).
        independent: sharper lower bound that treats canaries as independent trials (Clopper and Pearson 1934), which they are
            if their gradients are orthogonal and noise and sampling are correct.
        mu: lower bound on mu of Gaussian DP that assumes nothing else about the mechanism (Mahloujifar et al. 2024).
        attack: the score that gave the larger of the first two.
    """

    one_run: float
    independent: float
    mu: float
    attack: str

    @property
    def epsilon_lower_bound(self) -> float:
        """The larger bound: a claim below it is refuted."""
        return max(self.one_run, self.independent)


def audit(scores: dict[str, np.ndarray], members: np.ndarray, delta: float, confidence: float = 0.95) -> AuditResult:
    """Lower bounds on epsilon at ``delta`` from the scores that attacks give each canary.

    Args:
        scores: by attack, (canaries,): the higher, the likelier a member; log-likelihood ratios, or on their scale.
        members: (canaries,) bool, whether each canary was included.
        confidence: the probability that all bounds hold; divided among attacks, bounds and thresholds.
    """
    error = (1 - confidence) / (len(scores) * (4 * len(_SHARES) + len(_THRESHOLDS) + 1))
    found, mus = {}, []
    for name, of_canary in scores.items():
        counts, canaries = _guesses(of_canary, members), len(members)
        one_run = max(one_run_bound(right, all_, canaries, delta, error) for right, all_ in counts)
        found[name] = one_run, _independent(of_canary, members, delta, error)
        mus.append(max(gaussian_bound(right, all_, canaries, error) for right, all_ in counts))
    attack = max(found, key=lambda name: max(found[name]))
    return AuditResult(max(a for a, _ in found.values()), max(b for _, b in found.values()), max(mus), attack)


def _guesses(scores: np.ndarray, members: np.ndarray) -> list[tuple[int, int]]:
    """(right guesses, guesses) on the highest scores, and on the highest and the lowest."""
    order, found = np.argsort(scores, kind='stable'), []
    for share in _SHARES:
        k = max(int(share * len(scores)), 1)
        highest, lowest = int(members[order[-k:]].sum()), int((~members[order[:k]]).sum())
        found += [(highest, k), (highest + lowest, 2 * k)]
    return found


def one_run_bound(correct: int, guesses: int, canaries: int, delta: float, error: float) -> float:
    """The smallest epsilon, 0 or above, at which ``correct`` right of ``guesses`` have at least probability ``error``.

    Steinke et al. 2023, theorem 5.2: under (epsilon, delta)-DP the number of right guesses is above v with probability at
    most P[W >= v] + 2 * canaries * delta * max_i P[v > W >= v - i] / i, W binomial with rate e^epsilon / (1 + e^epsilon).
    """
    below = np.arange(1, correct + 1)

    def probability(epsilon: float) -> float:
        law = binom(guesses, expit(epsilon))
        slack = (np.cumsum(law.pmf(correct - below)) / below).max() if correct else 1.0
        return float(law.sf(correct - 1) + 2 * canaries * delta * slack)

    return _largest(lambda epsilon: probability(epsilon) < error)


def gaussian_bound(correct: int, guesses: int, canaries: int, error: float) -> float:
    """The smallest mu, 0 or above, at which ``correct`` right of ``guesses`` have at least probability ``error``.

    Mahloujifar et al. 2024: let p_i be the probability of i right of g guesses on m canaries, and f the trade-off curve. For every
    set of counts i, sum i p_i / m is at most 1 - f(sum (g - i) p_i / m). If the counts from ``correct`` on had probability
    ``error``, that would force a least p_i on each smaller count in turn; more than 1 in all is a contradiction.
    """
    return _largest(lambda mu: not _is_possible(mu, correct, guesses, canaries, error), _MAX_MU)


def _is_possible(mu: float, correct: int, guesses: int, canaries: int, error: float) -> bool:
    """Whether mu-Gaussian DP allows ``correct`` or more right guesses with probability ``error``."""
    right, wrong = error * correct / canaries, error * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        least = float(ndtr(ndtri(right) - mu))  # wrong guesses, below which ``right`` is impossible
        if least <= wrong:
            break  # nothing more is forced
        right = min(right + i / (guesses - i) * (least - wrong), 1.0)
        wrong = least
    return right + wrong <= guesses / canaries


def _independent(scores: np.ndarray, members: np.ndarray, delta: float, error: float) -> float:
    """The best bound from a threshold t: (epsilon, delta)-DP means P[score > t | in] <= e^epsilon P[score > t | out] + delta."""
    best = max(_at_threshold(t, scores, members, delta, error) for t in _THRESHOLDS)
    # also the best threshold of every second canary, applied to the others, from which it is independent
    tried = np.quantile(scores[::2], np.linspace(0, 1, 200))
    chosen = max(tried, key=lambda t: _at_threshold(t, scores[::2], members[::2], delta, error))
    return max(best, _at_threshold(chosen, scores[1::2], members[1::2], delta, error))


def _at_threshold(threshold: float, scores: np.ndarray, members: np.ndarray, delta: float, error: float) -> float:
    hits, false_alarms = (int((scores[part] > threshold).sum()) for part in (members, ~members))
    inside, outside = int(members.sum()), int((~members).sum())
    low = beta_law.ppf(error / 2, hits, inside - hits + 1) if hits else 0.0
    high = beta_law.ppf(1 - error / 2, false_alarms + 1, outside - false_alarms) if false_alarms < outside else 1.0
    return max(float(np.log((low - delta) / high)), 0.0) if low > delta else 0.0


def _largest(refuted: Callable[[float], bool], limit: float = _MAX_EPSILON) -> float:
    """The largest epsilon, or mu, that is refuted, by bisection."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, limit
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
