"""Show how two privacy statements differ, and what both trainings together have spent.

python tools/compare_statements.py work_dirs/a work_dirs/b
python tools/compare_statements.py a.pth b/privacy_statement.json [--json]

A statement is given as its file, as the work dir that holds it, or as a checkpoint, published or not. What both have spent holds
if they are on the same people, which the statements cannot say: that is for you to know. It is composed from the ledgers, or else
from the steps that the statements name. What both ledgers have counts once: one may continue the other, or both may go on from
copies of one work dir.
"""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from cli import run

from mmpose_dp.extras.branches import joined, shared_lines, twice
from mmpose_dp.extras.evidence import history_of, ledger_up_to
from mmpose_dp.extras.risk import risk_in_words, risk_of
from mmpose_dp.extras.statement_page import guessed
from mmpose_dp.privacy.accounting import History
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.validation import as_given, rounded_up
from mmpose_dp.verify import Evidence

_APART = ('seal', 'page_sha256', 'for_the_people')  # differ whenever anything does
_FEATURE = 'feature DP'
_TWICE = {  # by whether they have a beginning in common
    False: ' A training that is in both counts twice.',
    True: ' An earlier version resumed them without a name: what they then did alike may be in both, and counts twice.',
}


def differences(one: Any, other: Any, name: str = '') -> list[tuple[str, Any, Any]]:
    """(name, value in one, value in the other) of everything that differs; None where one has no such value."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in dict.fromkeys([*one, *other]):
            if name or key not in _APART:
                found += differences(one.get(key), other.get(key), f'{name}.{key}' if name else key)
        return found
    return [] if one == other else [(name, one, other)]


def composed(one: Evidence, other: Evidence) -> tuple[History, str]:
    """The steps of both statements, each training once, and in words where they are from.

    Raises PrivacyError if they cannot be composed.
    """
    a, b = one.statement, other.statement
    if _unit(a) != _unit(b):
        raise PrivacyError(
            f'the statements have the privacy units {_unit(a)!r} and {_unit(b)!r}, whose epsilons do not add up'
        )
    first, second = _ledger(one), _ledger(other)
    if first is not None and second is not None:
        shorter, longer = sorted((first, second), key=lambda ledger: len(ledger.lines))
        if one.folder.resolve() == other.folder.resolve() or shared_lines(shorter, longer) == len(shorter.lines):
            return longer.history, 'from one ledger, which holds both'
        for pair in ((first, second), (second, first)):  # a public view may come after plain DP, and not before
            with suppress(PrivacyError):
                total, words = joined(pair)
                source = f'from both ledgers{": " if words else ""}{"".join(words)}.'
                return total.history, source + (_TWICE[bool(words)] if twice(total) else '')
        return [*first.history, *second.history], 'from both ledgers. What is in both counts twice.'
    if a['ledger']['head'] == b['ledger']['head']:
        return _named(a), 'from the steps that both name, of one ledger'
    return [*_named(a), *_named(b)], (
        'from the steps that the statements name: a training that is in both, since one continues the other, counts twice'
    )


def _unit(statement: dict[str, Any]) -> str:
    return str(statement['privacy_unit']).partition(':')[0]


def _ledger(files: Evidence) -> Ledger | None:
    """The ledger beside a statement, as far as the statement counts it; None if there is none, or it is another's."""
    try:
        return None if files.ledger_file is None else ledger_up_to(files.ledger_file, files.statement['ledger'])
    except PrivacyError:
        return None


def _named(statement: dict[str, Any]) -> History:
    if statement['ledger']['history'] is None:
        raise PrivacyError('a statement does not name its steps, since they are too many: its ledger is needed')
    return history_of(statement['ledger']['history'])


def together(one: Evidence, other: Evidence) -> dict[str, Any]:
    """What both have spent, at the larger delta of the two, as plain JSON values."""
    history, source = composed(one, other)
    delta = max(one.statement['delta'], other.statement['delta'])
    accountant = one.statement['accountant']
    ledger = Ledger()
    for event, steps in history:
        ledger.count(event, steps)
    private = bool(one.statement['private'] and other.statement['private'])
    both = [_FEATURE in files.statement['guarantee'] for files in (one, other)]
    found = dict(private=private, delta=delta, accountant=accountant, source=source, warnings=[])
    if both[0] != both[1] or one.statement['public_views'] != other.statement['public_views']:
        found['warnings'].append(
            'their public views differ: what any of these views shows is not protected by either, and the sum holds for what '
            'none of them shows'
        )
    return {
        **found,
        'epsilon': float(rounded_up(ledger.epsilon(delta, accountant))) if private else 'not bounded',
        'risk': risk_of(history, delta) if private else None,
    }


def opened(path: Path) -> Evidence:
    """The files at a path. Raises PrivacyError if there is no statement that can be compared."""
    files = Evidence.at(path)
    if not isinstance(files.statement, dict) or 'ledger' not in files.statement:
        raise PrivacyError(f'{path}: there is no statement there, or one of an older version without its ledger')
    return files


def main() -> None:
    """Reads, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('statements', nargs=2, type=Path, metavar='STATEMENT', help='statement, work dir or .pth')
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args()
    one, other = (opened(path) for path in args.statements)
    different, spent = differences(one.statement, other.statement), together(one, other)
    if args.json:
        print(json.dumps(dict(differences=different, together=spent), indent=2))
        return
    print(f'A: {args.statements[0]}\nB: {args.statements[1]}\n')
    for name, a, b in different:
        print(f'{name}\n    A: {a}\n    B: {b}')
    print('' if different else 'The statements are the same.\n')
    print(f'Together, if they are on the same people ({spent["source"].rstrip(".")}):')
    print(f'epsilon {spent["epsilon"]} at delta {as_given(spent["delta"])} ({spent["accountant"]})')
    views = [view for files in (one, other) for view in files.statement['public_views']]
    print(*risk_in_words(spent['risk'], guessed(dict(public_views=views))), *spent['warnings'], sep='\n')


if __name__ == '__main__':
    sys.exit(run(main))
