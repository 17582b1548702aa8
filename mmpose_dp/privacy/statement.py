"""The privacy statement: what a finished run guarantees, to whom, and what it does not, in words and numbers.

Must not say more than plan and ledger support, hold anything computed from private records, or import torch: a verifier has none.
"""

import contextlib
import math
from typing import Any

from .accounting import ACCOUNTANTS, History, group_epsilon
from .errors import PrivacyError
from .ledger import NOISE, Ledger
from .plan import METHODS, ROUNDING_MARGIN, UNITS, PrivacyPlan
from .validation import as_given, rounded_up

_ROUNDING_MEASURED = 'float32 on a CPU', 'bfloat16 on a CPU'  # arithmetics of forwards
_OLD_NOISE = 'of some steps float32, by an earlier version: its gaps may show a record to one who knows all others'
GROUPS = (2, 5, 10)  # records of one person, for which a statement gives epsilon
_GROUP_LIMIT = 15.0  # of k times epsilon: above it there is no protection worth the name, and computing it is slow
_UNCOMPUTED = f'not computed (k times epsilon is above {_GROUP_LIMIT:g})'
_RELEASED = 'the weights after the steps counted here and every checkpoint on the way'
_EXPOSED = (
    'losses and accuracies of private batches, which this training or one before it wrote to the logs and into the message '
    'hub of the checkpoints (expose_private_metrics=True): keep those files as private as the data'
)
_NOT_COVERED = [
    'other trainings on the same data, whose steps are not in this ledger: hyper-parameter search, or a training that went on in '
    'a copy or a restored backup of the work dir. Add their ledgers (tools/privacy_ledger.py add), or tune on public data',
    'choosing a checkpoint by its score on private data',
    'anything else computed from private records and released: logs, losses, statistics, pictures',
    'the machine that trains: whoever can read its memory or disk sees the private data',
    'that an error in a private step ended a training early: a record can cause the error, and no noise covers that',
    'how long steps take and how much memory they need, which the log shows, and when files were written: they hint at how many '
    'records were sampled. Do not publish logs',
    'the number of records, num_records',
]


def build_statement(
    plan: PrivacyPlan, ledger: Ledger, *, pretraining: str, spent: float | None = None
) -> dict[str, Any]:
    """Everything that a privacy reviewer needs, as plain JSON values. Epsilon is that of the ledger, not of the plan.

    ``pretraining`` says where the initial weights came from, and what is known of their training data. A verifier gives epsilon,
    ``spent``, which it has computed before; the figures beside it are then left out.
    """
    delta, epsilons = plan.target_delta, {}
    if spent is None:
        spent = ledger.epsilon(delta, plan.accountant)
        epsilons = _other_epsilons(plan, ledger, spent)
    taken = ledger.run_history or plan.planned()  # a resume may have gone on with other noise
    rates = [plan.sample_rate if event.personal_rates else event.sample_rate for event, _ in taken]
    secret = plan.secret_randomness and ledger.is_secret
    source = "the operating system's entropy" if secret else 'a debug seed'
    exposed = plan.expose_private_metrics or ledger.exposes_private_metrics
    earlier = ledger.steps - ledger.run_steps
    votes = f'{as_given(plan.max_grad_norm)} at first, then by votes of the records, which are noised and counted with the rest'
    norms = plan.max_grad_norm, plan.max_grad_norm_at(plan.steps)
    views, public_data = (_of_all(plan, ledger, name) for name in ('public_view', 'public_data'))
    return {
        'private': plan.is_private and secret and math.isfinite(spent),
        'guarantee': f'({rounded_up(spent)}, {as_given(delta)})-{"feature DP" if plan.is_feature_dp else "DP"}',
        'method': ' and '.join(METHODS[method] for method in _of_all(plan, ledger, 'method')),
        **_protection(plan, ledger, public_data),
        'released': f'{_RELEASED}{", without the message hub in them" if exposed else ""}',
        'epsilon': _json(spent),
        'delta': delta,
        'target_epsilon': plan.target_epsilon,
        'accountant': plan.accountant,
        **epsilons,
        'privacy_unit': f'{plan.privacy_unit}: {UNITS[plan.privacy_unit]}{f", by {plan.subjects}" if plan.subjects else ""}',
        'num_records': plan.num_records,
        'expected_batch_size': plan.expected_batch_size,
        'sample_rate': ', then '.join(dict.fromkeys(map(str, rates))),
        'sampling_assumed': 'Poisson: each record independently with probability sample_rate, at every step',
        'sampling_used': f'Poisson, from {source}',
        'noise_source': f'{source}; {NOISE if all(run.get("noise") == NOISE for run in ledger.runs) else _OLD_NOISE}',
        'steps': ledger.run_steps,
        'steps_of_earlier_trainings': earlier,
        'epochs': round(float(sum(steps * rate for (_, steps), rate in zip(ledger.run_history, rates))), 2),
        'max_grad_norm': votes if plan.adaptive_norm else _course(*norms),
        'noise_multiplier': _course(*(event.noise_multiplier for event, _ in taken)),
        'rounding': _rounding(' and '.join(_of_all(plan, ledger, 'arithmetic')).split(' and ')),
        'public_data': ', '.join([*views, *public_data]) or 'none',
        'public_views': views,
        'public_data_sets': public_data,
        'pretraining': pretraining,
        'cost_of_tuning': ('included as far as it was done in this work dir' if earlier else 'not included'),
        'not_covered': [*_NOT_COVERED, *([_EXPOSED] if exposed else [])],
    }


def _of_all(plan: PrivacyPlan, ledger: Ledger, name: str) -> list[str]:
    """The values of this training and of those before it in the ledger, each once."""
    found = [run.get(name) for run in ledger.runs] + [getattr(plan, name)]
    return [value for value in dict.fromkeys(found) if value is not None]


def _protection(plan: PrivacyPlan, ledger: Ledger, public_data: list[str]) -> dict[str, Any]:
    """Which neighbouring data sets are made indistinguishable, and what that protects and does not."""
    unit, feature, who = plan.privacy_unit, plan.is_feature_dp, UNITS[plan.privacy_unit]
    slots = f'two training sets of {plan.num_records} slots each; N, the number of slots, is public. They differ in one slot'
    if feature:
        adjacency = (
            f"{slots}: the private part of a record ({who}) is in one set, and in the other the slot's private part is empty. The "
            'private part is what the public view removes. The public view, keypoint labels, boxes, whatever else the annotation '
            'says, and membership are the same in both'
        )
        protected = f'what the public view removes from {who}. The view: {plan.public_view}'
    else:
        adjacency = f'{slots}, which holds a record ({who}) in one set and is empty in the other'
        protected = f'everything about {who}, and whether it was in the training set at all'
    views, together = ' and their public views' if feature else '', feature and unit == 'image'
    open_to_all = {
        'the public view of every training record: treat it as published': feature,
        'keypoint labels, boxes, scales and whatever else the annotation says of every training record': feature,
        'whether a record is in the training set (membership)': feature,
        f'what other records show of a person: the crops of neighbours in the same picture{views} '
        "(privacy_unit='image' counts a picture as one record)": unit != 'image',
        'what the public view of a picture shows of anybody in it, also of the neighbours of a person': together,
        'what several pictures of a subject, such as the frames of a video, show together: each has its own public view, and '
        'together these show more than one of them': feature and unit == 'subject',
        **{f'the public data set: {name}': True for name in public_data},
        f'which pictures and annotations are of one subject (the mapping by {plan.subjects})': bool(plan.subjects),
        'which personal budget a record has': any(x.get('personal_budgets') for x in (*ledger.runs, plan.run_metadata)),
        f'several records at once beyond the group figures: the unit is {who}': True,
        'what anybody could conclude about a person from the population at large': True,
    }
    not_protected = [text for text, holds in open_to_all.items() if holds]
    return dict(adjacency=adjacency, protected=protected, not_protected=not_protected)


def _other_epsilons(plan: PrivacyPlan, ledger: Ledger, spent: float) -> dict[str, Any]:
    """Epsilon by every accountant, for several records at once, and for each personal budget."""
    delta, by_accountant = plan.target_delta, dict.fromkeys(ACCOUNTANTS, _json(math.inf))
    for name in ACCOUNTANTS:
        with contextlib.suppress(PrivacyError):  # its numerics may fail
            by_accountant[name] = _json(ledger.epsilon(delta, name))
    whose = 'k_subjects' if plan.privacy_unit == 'subject' else 'a_person_with_k_records'
    groups = {f'{k}': _json(epsilon_of_group(ledger.history, delta, k, spent)) for k in GROUPS}
    beyond = {k: _UNCOMPUTED for k in groups if _GROUP_LIMIT < spent * int(k) < math.inf}
    personal = {name: _json(value) for name, value in plan.personal_epsilon(ledger).items()}
    found = {'epsilon_by_accountant': by_accountant, f'epsilon_for_{whose}': groups | beyond}
    return {**found, 'personal_epsilon': personal} if personal else found


def epsilon_of_group(history: History, delta: float, records: int, spent: float) -> float:
    """Epsilon of a person with several records; infinite where it is not computed. ``spent``: epsilon of one record."""
    return group_epsilon(history, delta, records) if spent * records <= _GROUP_LIMIT else math.inf


def _course(*values: float) -> float | str:
    low, high, *ends = map(as_given, (min(values), max(values), values[0], values[-1]))
    words = ', going to '.join(ends) if {low, high} == {*ends} else f'between {low} and {high}'
    return values[0] if low == high else words


def _rounding(of_parts: list[str]) -> str:
    kept = f'forwards in {" and ".join(dict.fromkeys(of_parts))}; records are clipped to {1 - ROUNDING_MARGIN:g} of max_grad_norm'
    if not {*of_parts} <= {*_ROUNDING_MEASURED}:
        return f'{kept}, and how far one record moves the rounding of the others was not measured for this arithmetic'
    room = 'which leaves room for what one record changes in the rounding of the others'
    return f'{kept}, {room} (at most 8e-6 C, measured with 64 records of three models, not proven)'


def _json(value: float) -> float | str:
    """A figure for JSON, which has no infinity."""
    return value if math.isfinite(value) else 'not bounded'
