"""What a privacy officer asks beside the figures: the attacker assumed, who decided what and why, audits, and words for the people.

Follows the questions of NIST SP 800-226, EDPB opinion 28/2024 and the registry of DP deployments. Must not make up an answer: what
nobody stated is 'not stated'. Must not look at private records.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpose_dp.privacy.errors import ConfigError, LedgerError
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.validation import as_given

from .evidence import STATEMENT_NAME, intact_statement
from .risk import percent
from .statement_page import write_statement

NOT_STATED = 'not stated'
DECISIONS = {  # the keys of PrivacyBudgetHook's ``decision``
    'statement_date': 'on which day the statement is given',
    'controller': 'which organisation is responsible for the data',
    'purpose': 'what the model is for',
    'legal_basis': 'by which right the data is used',
    'chosen_by': 'who chose epsilon, delta, privacy unit and public view',
    'rationale': 'why these',
    'review_date': 'when the choice is looked at again',
    'records_per_person': 'how many records one person has (maximum, median), as far as that may be known',
    'tuning': 'how many trainings came before, and on which data',
    'accuracy': 'what is lost against a training without privacy',
    'data_source': 'which data set this is, and which version of it',
    'retention': 'how long the data and the model are kept',
}
AUDIT_NAME = 'membership_audit.json'
_NOT_AUDITED = 'not run: tools/audit.py CONFIG --report-to WORK_DIR'
_TRUST_MODEL = 'central: whoever trains sees all private data and is trusted, with the machine and its administrators'
_ATTACKER = (
    'knows every other record, the code, the config and the initial weights; sees every checkpoint and the final weights; has any '
    'computing power; does not see the random numbers of sampling and noise, the memory of the machine, or how long steps took'
)
PRIVATE_PICTURES = 'private pictures (these figures were computed from them without noise)'
_PRIVATE_FIGURES = (
    'the figures in recoverable_from_view, which were computed from private pictures without noise: publish this statement only if '
    'they may be known, or repeat tools/audit_view.py with a validation set'
)
_ANONYMITY = (
    'This statement does not by itself establish that the model is anonymous, or that no personal data is processed: whether '
    'these figures are small enough, for this purpose and these people, is a legal judgement of its own'
)


def plan_warnings(plan: PrivacyPlan) -> list[str]:
    """What a user should know of a plan before training."""
    why = 'a debug seed is set' if plan.noise_multiplier else 'noise_multiplier is 0'
    delta, one_of_all = as_given(plan.target_delta), 1 / plan.num_records
    above = plan.target_delta > one_of_all
    found = {
        f'target_delta={delta} is above 1/N = {one_of_all:.3g}': above,
        f'target_delta={delta} is above 1/(10 N) = {one_of_all / 10:.3g}, and should be well below 1/N: '
        f'{_delta_in_words(plan.target_delta, plan.num_records)}': not above and plan.target_delta > one_of_all / 10,
        f'NOT PRIVATE: {why}': not plan.is_private,
    }
    return [text for text, holds in found.items() if holds]


def _delta_in_words(delta: float, records: int) -> str:
    """What delta allows by itself."""
    return (
        f'delta times the number of records is {delta * records:.3g}; (epsilon, delta) by itself would allow that so many records '
        'are revealed on average'
    )


def checked_decision(decision: Any, key: str = 'default_hooks.privacy_budget.decision') -> dict[str, str]:
    """The ``decision`` of a config, every key filled in. Raises ConfigError for another key, or a value that is no text."""
    if not isinstance(decision or {}, Mapping):
        raise ConfigError(f'{key}={decision!r} must be a dict with some of the keys {", ".join(DECISIONS)}')
    for name, value in (decision or {}).items():
        if name not in DECISIONS:
            raise ConfigError(f'{key}.{name} is unknown; write one of {", ".join(DECISIONS)}')
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f'{key}.{name}={value!r} must be a text')
    return {name: (decision or {}).get(name, NOT_STATED) for name in DECISIONS}


def filled_in(decision: dict[str, str], earlier: dict[str, str]) -> dict[str, str]:
    """A decision with the texts of an earlier statement where it has none: somebody may have filled them in after training."""
    return {name: text if text != NOT_STATED else earlier.get(name, text) for name, text in decision.items()}


def answers(statement: dict[str, Any], decision: dict[str, str], parameters: int) -> dict[str, Any]:
    """What a statement adds for an officer. ``parameters``: how many numbers are trained."""
    decided = dict(decision)
    if statement['privacy_unit'].startswith('subject') and decided['records_per_person'] == NOT_STATED:
        decided['records_per_person'] = 'one: a record is everything of one subject'
    ratio = parameters / statement['num_records']
    return {
        'trust_model': _TRUST_MODEL,
        'attacker': _ATTACKER,
        'delta_in_words': _delta_in_words(statement['delta'], statement['num_records']),
        'decision': decided,
        'parameters_trained': parameters,
        'parameters_per_record': float(f'{ratio:.4g}'),
        'anonymity': _ANONYMITY,
        'for_the_people': for_the_people(statement),
    }


def for_the_people(statement: dict[str, Any]) -> str:
    """One paragraph for the people in the data, without terms of the field."""
    if not statement['private']:
        return 'This training gives the people in the data no protection that could be put into numbers.'
    feature = bool(statement.get('public_views'))
    unit = statement['privacy_unit'].partition(':')[0]
    whose = {
        'instance': 'a picture of you in it',
        'image': 'a photograph with you in it',
        'subject': 'all pictures of you',
    }[unit]
    were = 'were' if unit == 'subject' else 'was'
    words = 'A model that finds the joints of people in pictures was trained on a collection that you may be part of. '
    if feature:
        words += (
            'A version of each picture from which detail or a part was taken away, where the joints are, and who is in the '
            f'collection were treated as public, and are not protected. It shows: {"; ".join(statement["public_views"])}. What '
            f'that version does not show of {whose} was hidden by random noise during training. '
        )
    else:
        words += f'Random noise during training hides whether {whose} {were} used at all. '
    figures = (statement.get('risk') or {}).get('add_or_remove')
    if isinstance(figures, dict):
        what = f'whether {"the hidden part was" if feature else f"{whose} {were}"} used at all'
        words += (
            f'Somebody who studies the model and has to guess {what}, with even chances, is right at most '
            f'{percent(figures["guess_right_at_most"])} of the time instead of 50 %. '
        )
    if unit != 'subject':
        words += 'If there are several pictures of you, the protection is weaker. '
    return words + 'What the model learned about people in general can still be true of you.'


def with_membership_audit(statement: dict[str, Any], work_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """A statement with the result of tools/audit.py that is in a work dir, or that none was run."""
    try:
        found = json.loads((Path(work_dir) / AUDIT_NAME).read_text())
        words = (
            f'{found["date"]}: {"REFUTED" if found["refuted"] else "not refuted"}. Lower bound of epsilon {_bounds(found)}, '
            f'against the {found["epsilon_claimed"]:.4g} that config claims, with {found["canaries"]} canaries, at '
            f'{found["confidence"]:.0%} confidence, by {found["attack"]}. The audit was a training of its own, whose steps this '
            'ledger does not count'
        )
        if other := differs_from_audited(statement, found.get('audited', {})):
            words = f'not of this training: the one in {AUDIT_NAME} is of another, with {"; ".join(other)}'
    except (OSError, ValueError, LookupError, TypeError):
        words = _NOT_AUDITED
    return {**statement, 'audit': words}


def record_decision(work_dir: str | os.PathLike[str], texts: dict[str, str]) -> dict[str, str]:
    """Puts texts of DECISIONS into the statement of a work dir; the others stay. Returns all that it then says.

    Raises ConfigError for a key or text that cannot be, and LedgerError for a folder without an intact statement.
    """
    statement = intact_statement(Path(work_dir))
    if statement is None or not isinstance(statement.get('decision'), dict):
        raise LedgerError(
            f'{work_dir}: there is no intact {STATEMENT_NAME}. Name the work dir of a training, and restore a statement that was '
            'edited by hand'
        )
    checked_decision(texts, 'decision')
    decision = {**statement['decision'], **texts}
    if texts:
        write_statement({**statement, 'decision': decision}, work_dir)
    return decision


def _bounds(found: dict[str, Any]) -> str:
    """The lower bounds of an audit, each with what it assumes."""
    if 'epsilon_lower_bound_any_mechanism' not in found:  # of an earlier version
        larger = 'the larger of one for any mechanism and one that treats canaries as independent trials'
        return f'{found["epsilon_lower_bound"]:.3f} ({larger})'
    return (
        f'{found["epsilon_lower_bound_any_mechanism"]:.3f} without assumptions on the mechanism, and '
        f'{found["epsilon_lower_bound_independent"]:.3f} if canaries are independent trials, which they are if their gradients are '
        'orthogonal and noise and sampling are as stated'
    )


def differs_from_audited(statement: dict[str, Any], audited: dict[str, Any]) -> list[str]:
    """What an audited training has otherwise than a statement, in words; ``audited``: some keys of a statement."""
    return [
        f'{name} {value!r} and not {statement[name]!r}'
        for name, value in audited.items()
        if name in statement and not _alike(value, statement[name])
    ]


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are the same; another machine may calibrate the last digits of a figure otherwise."""
    both = isinstance(one, float) and isinstance(other, (float, int))
    return math.isclose(one, other, rel_tol=1e-3) if both else bool(one == other)


def with_private_figures(not_covered: list[str], statement: dict[str, Any]) -> list[str]:
    """What a statement does not cover, the figures of a view on private pictures among it if the statement has some."""
    has = PRIVATE_PICTURES in str(statement.get('recoverable_from_view'))
    return [*without_private_figures(not_covered), *([_PRIVATE_FIGURES] if has else [])]


def without_private_figures(not_covered: list[str]) -> list[str]:
    """The same without that sentence."""
    return [text for text in not_covered if text != _PRIVATE_FIGURES]


def record_audit(work_dir: str | os.PathLike[str], result: dict[str, Any]) -> bool:
    """Keeps the result of tools/audit.py in a work dir, and puts it into the statement there; False if there is none.

    ``result``: date, refuted, epsilon_lower_bound, epsilon_claimed, canaries, confidence, attack, and what tools/audit.py adds.
    """
    folder = Path(work_dir)
    (folder / AUDIT_NAME).write_text(json.dumps(result, indent=2) + '\n')
    try:
        statement = json.loads((folder / STATEMENT_NAME).read_text())
    except FileNotFoundError:
        return False
    write_statement(with_membership_audit(statement, folder), folder)
    return True
