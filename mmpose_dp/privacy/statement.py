"""The privacy statement: what a finished run guarantees, to whom, and what it does not, in words and numbers.

Must not say more than the plan and the ledger support, and must hold nothing computed from private records.
"""

import json
import math
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .accounting import ACCOUNTANTS, epsilon, group_epsilon
from .calibration import first_steps
from .errors import PrivacyError
from .figures import as_given, rounded_up
from .ledger import Ledger
from .plan import METHODS, UNITS, PrivacyPlan
from .rounding import rounding_in_words

_PACKAGES = {
    'mmpose_dp': ('mmpose_dp',),
    'torch': ('torch',),
    'numpy': ('numpy',),
    'opacus': ('opacus',),
    'dp-accounting': ('dp-accounting',),
    'mmpose': ('mmpose',),
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
}
_GROUP_LIMIT = 15.0
_EXPOSED = (
    'losses and accuracies of private batches, which this training or one before it wrote to the logs and into the message '
    'hub of the checkpoints (expose_private_metrics=True): keep those files as private as the data'
)
_NOT_COVERED = [
    'trainings on the same data whose steps are not in this ledger, hyper-parameter search among them: add their ledgers '
    '(tools/privacy_ledger.py add), or tune on public data',
    'choosing a checkpoint by its score on private data',
    'anything else computed from private records and released: logs, losses, statistics, pictures',
    'the machine that trains: whoever can read its memory or disk sees the private data',
    'how long steps take and how much memory, which the log shows, and when files were written: it hints at how many records '
    'were drawn: keep logs to yourself',
    'the number of records, num_records',
]


def build_statement(plan: PrivacyPlan, ledger: Ledger, *, pretraining: str) -> dict[str, Any]:
    """Everything a privacy reviewer asks for, as plain JSON values.

    Args:
        plan: the plan that was trained by.
        ledger: the steps that were taken; epsilon is that of the ledger, not of the plan.
        pretraining: where the initial weights came from, and what is known of their training data, in words.
    """
    delta = plan.target_delta
    spent = ledger.epsilon(delta, plan.accountant)
    taken = ledger.run_history or plan.ahead()  # a resume may have gone on with other noise
    rates = [plan.sample_rate if plan.budgets else event.sample_rate for event, _ in taken]
    secret = plan.secret_randomness and ledger.is_secret
    hardened = plan.secure_mode and ledger.is_hardened
    exposed = plan.expose_private_metrics or ledger.exposes_private_metrics
    views, public_data = (_of_all(plan, ledger, name) for name in ('public_view', 'public_data'))
    return {
        'private': plan.is_private and secret and math.isfinite(spent),
        'guarantee': f'({rounded_up(spent)}, {as_given(delta)})-{"feature DP" if plan.is_feature_dp else "DP"}',
        'method': ' and '.join(METHODS[method] for method in _of_all(plan, ledger, 'method')),
        'adjacency': plan.adjacency,
        'protected': _protected(plan),
        'not_protected': _not_protected(plan, public_data),
        'released': 'the weights after the steps counted here and every checkpoint on the way'
        + (', without the message hub in them' if exposed else ''),
        'epsilon': _json(spent),
        'delta': delta,
        'target_epsilon': plan.target_epsilon,
        'accountant': plan.accountant,
        'epsilon_by_accountant': {name: _json(_try_epsilon(ledger, delta, name)) for name in ACCOUNTANTS},
        **_groups(plan, ledger, spent),
        'privacy_unit': f'{plan.privacy_unit}: {UNITS[plan.privacy_unit]}'
        + (f', by {plan.subjects}' if plan.subjects else ''),
        'num_records': plan.num_records,
        'expected_batch_size': plan.expected_batch_size,
        'sample_rate': ', then '.join(dict.fromkeys(map(str, rates))),
        'sampling_assumed': 'Poisson: each record independently with probability sample_rate, at every step',
        'sampling_used': "Poisson, from the operating system's entropy" if secret else 'Poisson, from a debug seed',
        'noise_source': ("the operating system's entropy" if secret else 'a debug seed')
        + (', hardened against floating-point attacks (secure_mode)' if hardened else ''),
        'steps': ledger.run_steps,
        'steps_of_earlier_trainings': ledger.steps - ledger.run_steps,
        'epochs': round(float(sum(steps * rate for (_, steps), rate in zip(ledger.run_history, rates))), 2),
        'max_grad_norm': _max_grad_norm(plan),
        'noise_multiplier': _course(taken[0][0].noise_multiplier, taken[-1][0].noise_multiplier),
        'rounding': rounding_in_words(plan.arithmetic),
        'public_data': ', '.join([*views, *public_data]) or 'none',
        'public_views': views,
        'public_data_sets': public_data,
        'pretraining': pretraining,
        'cost_of_tuning': 'included as far as it was done in this work dir'
        if ledger.steps > ledger.run_steps
        else 'not included',
        'not_covered': [*_NOT_COVERED, *([_EXPOSED] if exposed else [])],
        'versions': _versions(),
    }


def _of_all(plan: PrivacyPlan, ledger: Ledger, name: str) -> list[str]:
    """What this training and those before it in the ledger had, each once."""
    found = [run.get(name) for run in ledger.runs] + [getattr(plan, name)]
    return [value for value in dict.fromkeys(found) if value is not None]


def _protected(plan: PrivacyPlan) -> str:
    if plan.is_feature_dp:
        return f'what the public view removes from {UNITS[plan.privacy_unit]}. The view: {plan.public_view}'
    return f'everything about {UNITS[plan.privacy_unit]}, and whether it was in the training set at all'


def _not_protected(plan: PrivacyPlan, public_data: list[str]) -> list[str]:
    told = []
    if plan.is_feature_dp:
        told += [
            'the public view of every training record: treat it as published',
            'keypoint labels, boxes and scales of every training record',
            'whether a record is in the training set (membership)',
        ]
    if plan.privacy_unit != 'image':
        shown = (
            ", and their public views: a blur or pixelation sized for a smaller neighbour hides less than a person's own"
            if plan.is_feature_dp and plan.privacy_unit == 'instance'
            else ''
        )
        told.append(
            f'what other records show of a person: the crops of neighbours in the same picture{shown} '
            "(privacy_unit='image' counts a picture as one record)"
        )
    elif plan.is_feature_dp:
        told.append('what the public view of a picture shows of anybody in it, of the neighbours of a person too')
    if plan.is_feature_dp and plan.privacy_unit == 'subject':
        told.append(
            'what several pictures of a subject, such as the frames of a video, show together: each has a public view of its own, '
            'and together they hold more than one'
        )
    told += [f'the public data set: {name}' for name in public_data]
    if plan.subjects:
        told.append(f'which records are one subject (the mapping by {plan.subjects})')
    if plan.budgets:
        told.append('which personal budget a record has')
    told += [
        f'several records at once beyond the group figures: the unit is {UNITS[plan.privacy_unit]}',
        'what anybody could conclude about a person from the population at large',
    ]
    return told


def _groups(plan: PrivacyPlan, ledger: Ledger, spent: float) -> dict[str, Any]:
    """Epsilon for several records at once, and for each personal budget."""
    whose = 'k_subjects' if plan.privacy_unit == 'subject' else 'a_person_with_k_records'
    found: dict[str, Any] = {
        f'epsilon_for_{whose}': {str(k): _json(_try_group(ledger, plan.target_delta, k, spent)) for k in (2, 5, 10)}
    }
    if plan.budgets:
        found['personal_epsilon'] = {
            f'{budget.num_records} records with budget {as_given(budget.epsilon)}': _json(value)
            for budget, value in zip(plan.budgets, plan.epsilons_of(ledger.prior, ledger.run_history))
        }
    return found


def _max_grad_norm(plan: PrivacyPlan) -> float | str:
    if plan.adaptive_norm:
        first = as_given(plan.max_grad_norm)
        return f'{first} at first, then by votes of the records, which are noised and counted with the rest'
    return _course(plan.max_grad_norm, plan.max_grad_norm_at(plan.steps))


def _course(first: float, last: float) -> float | str:
    return first if first == last else f'{as_given(first)}, going to {as_given(last)}'


def _try_epsilon(ledger: Ledger, delta: float, accountant: str) -> float | None:
    try:
        return epsilon(ledger.history, delta, accountant)
    except PrivacyError:
        return None


def _try_group(ledger: Ledger, delta: float, records: int, single: float) -> float | None:
    if single * records > _GROUP_LIMIT:
        return None  # no protection worth the name, and slow to compute
    return group_epsilon(ledger.history, delta, records)


def _json(value: float | None) -> float | str:
    """JSON knows neither infinity nor what could not be computed."""
    return value if value is not None and math.isfinite(value) else 'not bounded'


def _versions() -> dict[str, str]:
    found = {}
    for name, distributions in _PACKAGES.items():
        for distribution in distributions:
            try:
                found[name] = version(distribution)
            except PackageNotFoundError:
                continue
    return found


def statement_markdown(statement: dict[str, Any]) -> str:
    """The statement as a page to read."""
    s = statement
    lines = ['# Privacy statement', '']
    if not s['private']:
        lines += [
            '> **NOT PRIVATE.** A debug seed was set or no noise was added: no figure below is a guarantee.',
            '',
        ]
    lines += [
        f'**Guarantee:** {s["guarantee"]}, by {s["method"]}, for {s["released"]}.',
        '',
        f'**Protected:** {s["protected"]}.',
        '',
        f'**Made indistinguishable:** {s["adjacency"]}.',
        '',
        '**Not protected:**',
        *(f'- {item}' for item in s['not_protected']),
        '',
        '**Not covered by this statement:**',
        *(f'- {item}' for item in s['not_covered']),
        '',
        '| | |',
        '| --- | --- |',
    ]
    told = {
        'private',
        'guarantee',
        'method',
        'released',
        'protected',
        'adjacency',
        'not_protected',
        'not_covered',
    }
    for key, value in s.items():
        if key in told:
            continue
        if isinstance(value, dict):
            value = ', '.join(f'{k}: {_cell(key, v)}' for k, v in value.items())
        lines.append(f'| {key.replace("_", " ")} | {_cell(key, value)} |')
    return '\n'.join(lines) + '\n'


def _cell(key: str, value: Any) -> str:
    """A figure of the table: what was computed as an epsilon is rounded up, everything else stands as it is."""
    if not isinstance(value, float):
        return str(value)
    return rounded_up(value) if key.startswith(('epsilon', 'personal_epsilon')) else as_given(value)


def write_statement(statement: dict[str, Any], out_dir: str | os.PathLike[str]) -> None:
    """Writes privacy_statement.json and privacy_statement.md, each whole or not at all."""
    for name, text in (
        ('privacy_statement.json', json.dumps(statement, indent=2) + '\n'),
        ('privacy_statement.md', statement_markdown(statement)),
    ):
        path = Path(out_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(path.suffix + '.partial')
        partial.write_text(text)
        partial.replace(path)


def epsilon_curve(plan: PrivacyPlan, points: int = 20) -> list[tuple[int, float]]:
    """(step, epsilon spent by then) over the planned steps, for a plot."""
    steps = sorted({max(plan.steps * i // points, 1) for i in range(1, points + 1)})
    ahead = plan.ahead()
    return [(n, epsilon([*plan.prior, *first_steps(ahead, n)], plan.target_delta, plan.accountant)) for n in steps]
