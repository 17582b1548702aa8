"""A statement beside the one that a checkpoint carries, word by word.

A checkpoint carries the statement of the steps that it has seen. Must not let pass what differs, and must not call a value wrong
that may have changed since: an older checkpoint has seen fewer steps, and a resume may have changed some settings.
"""

from typing import Any

from mmpose_dp.extras.accountability import NOT_STATED, without_private_figures

from .figures import TOLERANCE, number
from .findings import Findings, named

# written after the checkpoint, or into one of the two only; the decision is compared text by text
_APART = {
    'checkpoint', 'decision', 'checkpoints', 'weights_sha256', 'meta_sha256', 'published_files', 'page_sha256', 'seal', 'audit',
    'recoverable_from_view',
}  # fmt: skip
# what more steps change, or a resume by the same config
_GROWING = {
    'guarantee', 'epsilon', 'epsilon_by_accountant', 'personal_epsilon', 'risk', 'sample_rate', 'steps', 'epochs',
    'noise_multiplier', 'ledger', 'for_the_people', 'config_sha256',
}  # fmt: skip


def check_inside(name: str, kept: Any, statement: dict[str, Any], found: Findings) -> None:
    """Compares ``statement`` with the one in the checkpoint ``name``: every value if both count the same steps."""
    if not isinstance(kept, dict) or not isinstance(kept.get('ledger'), dict):
        found.unchecked.append(
            f'{name}: whether it says the same as the statement. It has none, or one of an older version'
        )
        return
    _check_decision(name, kept, statement, found)
    differing = [key for key in dict.fromkeys([*statement, *kept]) if _value(statement, key) != _value(kept, key)]
    if kept['ledger'] == statement['ledger']:
        words = [f'{key} {_short(kept.get(key))} and not {_short(statement.get(key))}' for key in differing]
        right = f'the statement in {name} says the same, every value'
        if found.expect(not differing, right, f'the statement in {name} counts the same steps and has {named(words)}'):
            found.confirmed = True
        return
    _check_earlier(name, kept, statement, found)
    changed = [key for key in differing if key not in _GROWING and not key.startswith('epsilon_for_')]
    if changed:
        found.warnings.append(
            f'the statement in {name}, of fewer steps, differs in {named(changed)}: a resume or another training changed it, or '
            'somebody did'
        )


def _check_decision(name: str, kept: dict[str, Any], statement: dict[str, Any], found: Findings) -> None:
    """Warns of texts that somebody changed after training; one that was missing may be filled in."""
    before, now = kept.get('decision') or {}, statement.get('decision') or {}
    words = [
        f'decision.{key} {_short(text)} and not {_short(now.get(key))}'
        for key, text in before.items()
        if text not in (now.get(key), NOT_STATED)
    ]
    if words:
        found.warnings.append(f'{name}: after training, texts were changed; the checkpoint has {named(words)}')


def _check_earlier(name: str, kept: dict[str, Any], statement: dict[str, Any], found: Findings) -> None:
    """The steps of an older checkpoint must be the first ones of the statement, and cannot have spent more."""
    older, newer = kept['ledger'], statement['ledger']
    begins = older['lines'] < newer['lines'] and (
        older['history'] is None or newer['history'] is None or _begins(newer['history'], older['history'])
    )
    alike = all(kept[key] == statement[key] for key in ('delta', 'accountant'))
    more = alike and number(kept['epsilon']) > number(statement['epsilon']) * (1 + TOLERANCE)
    found.expect(
        begins and not more,
        f'the steps of the statement in {name} are the first ones of this statement',
        f'the statement in {name} has epsilon {kept["epsilon"]}, and steps that are not the first ones of this statement',
    )


def _begins(whole: list, part: list) -> bool:
    """Whether the steps of ``whole`` begin with those of ``part``, of which the last may have become more."""
    if not part:
        return True
    first, (sigma, rate, steps) = part[:-1], part[-1]
    here = whole[len(first) : len(part)]
    return whole[: len(first)] == first and bool(here) and here[0][:2] == [sigma, rate] and here[0][2] >= steps


def _value(statement: dict[str, Any], key: str) -> Any:
    value = None if key in _APART else statement.get(key)
    return without_private_figures(value) if key == 'not_covered' and isinstance(value, list) else value


def _short(value: Any) -> str:
    return f'{value!r:.80}'
