"""Show what trainings have spent and what that means, or add up several on the same data.

python tools/privacy_ledger.py show work_dirs/a
python tools/privacy_ledger.py show epoch_35.pth
python tools/privacy_ledger.py add work_dirs/* --out all.jsonl

Give a ledger's file, the work dir that holds it, or (to show) a checkpoint. Delta is that of the statement beside it, or --delta.
`add` composes: the epsilon it prints holds against somebody who sees the results of all these trainings. That is what
a hyper-parameter search costs. What ledgers have in common, since their work dirs are copies of one, counts once, and what each
branch added counts. If you put the sum into the last training's work dir as privacy_ledger.jsonl before it starts, that
training is calibrated to what is left.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cli import run

from mmpose_dp.engine.hooks.resuming import refuse_older_ledger
from mmpose_dp.extras.branches import joined, twice
from mmpose_dp.extras.checkpoint_file import CheckpointFile
from mmpose_dp.extras.evidence import PAGE_NAME, STATEMENT_NAME, history_of, ledger_up_to
from mmpose_dp.extras.risk import risk_in_words, risk_of
from mmpose_dp.privacy.accounting import ACCOUNTANTS
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from mmpose_dp.privacy.validation import as_delta, as_given, rounded_up

_SEAL = 'subjects_seal'
_UNSHOWN = (_SEAL, 'training', 'part', 'view_source')  # metadata that only a program reads


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=['show', 'add'], help='show each ledger by itself, or add them up')
    parser.add_argument(
        'ledgers', nargs='+', type=Path, help='privacy_ledger.jsonl, the folder that holds it, or a .pth'
    )
    parser.add_argument('--delta', type=float, help="delta for which to compute epsilon (default: the statement's)")
    parser.add_argument('--out', type=Path, help='file to which add writes the sum; must not exist')
    return parser.parse_args()


def opened(path: Path) -> tuple[Ledger, dict[str, Any] | None]:
    """The ledger at a path, and the statement that belongs to it, if there is one.

    Raises PrivacyError if there is none, if it is damaged, or if the statement, or a checkpoint, beside it counts more.
    """
    if path.suffix == '.pth' and path.is_file():
        return _of_checkpoint(path)
    path = path / LEDGER_NAME if path.is_dir() else path
    path = path.with_name(LEDGER_NAME) if path.name in (STATEMENT_NAME, PAGE_NAME) else path
    if not path.is_file():
        raise PrivacyError(f'{path}: there is no such ledger')
    ledger, beside, statement = Ledger.read(path), path.parent / STATEMENT_NAME, None
    if not ledger.lines:  # an empty file, or one of another kind: its epsilon would be 0
        raise PrivacyError(
            f'{path} has no whole line of a ledger, so it does not say what was spent: give the {LEDGER_NAME} of a training'
        )
    if path.name != LEDGER_NAME:
        return ledger, None
    try:
        if beside.is_file():
            statement = json.loads(beside.read_text())
            if 'ledger' in statement:  # older ones do not say
                ledger_up_to(path.read_bytes(), statement['ledger'])
    except (ValueError, LookupError, TypeError) as error:  # a LedgerError too
        raise PrivacyError(f'{path} and {beside.name} beside it: {error}') from error
    refuse_older_ledger(ledger, path.parent)
    return ledger, statement


def _of_checkpoint(path: Path) -> tuple[Ledger, dict[str, Any]]:
    """The steps that a checkpoint counts, without their metadata, and its statement."""
    try:
        values = CheckpointFile.read(path).values
        inside = values.get('privacy') or {}
        statement = values.get('privacy_statement') or inside['statement']
        entries = inside['ledger']['entries'] if 'ledger' in inside else statement['ledger']['history']
        ledger = Ledger()
        for event, steps in history_of(entries):
            ledger.count(event, steps)
    except (ValueError, LookupError, TypeError) as error:
        raise PrivacyError(f'{path} holds no steps that can be read ({error}): give its work dir') from error
    return ledger, statement


def delta_of(given: float | None, statements: list[dict[str, Any] | None]) -> float:
    """``--delta``, or that of the statements. Raises PrivacyError if neither says."""
    if given is not None:
        return as_delta(given, '--delta')
    found = {statement['delta'] for statement in statements if statement is not None and 'delta' in statement}
    if len(found) == 1 and None not in statements:
        return as_delta(found.pop(), 'delta of the statement')
    why = (
        f'they have {" and ".join(sorted(map(as_given, found)))}' if len(found) > 1 else f'there is no {STATEMENT_NAME}'
    )
    raise PrivacyError(f'the statements do not say which delta to use ({why} beside the ledgers): write --delta')


def report(ledger: Ledger, delta: float) -> None:
    """Prints the steps, epsilon, and what they mean."""
    for run_number, metadata in enumerate(ledger.runs, 1):
        shown = {key: value for key, value in metadata.items() if value not in (None, []) and key not in _UNSHOWN}
        print(f'training {run_number}: ' + ', '.join(f'{key} {value}' for key, value in shown.items()))
    for event, steps in ledger.history:
        rates = f' (personal: {", ".join(map(str, event.personal_rates))})' if event.personal_rates else ''
        print(
            f'{steps:>8} steps, noise_multiplier {event.noise_multiplier:.4f}, sample_rate {event.sample_rate}{rates}'
        )
    if not ledger.is_secret:
        print('NOT PRIVATE: a debug seed was set')
    for accountant in ACCOUNTANTS:
        try:
            print(f'epsilon {rounded_up(ledger.epsilon(delta, accountant))} at delta {as_given(delta)} ({accountant})')
        except PrivacyError as error:
            print(f'epsilon by {accountant}: {error}')
    if ledger.is_secret:
        print(*risk_in_words(risk_of(ledger.history, delta)), sep='\n')


def add(ledgers: list[Ledger], delta: float, out: Path | None) -> None:
    """Prints the sum, and writes it to ``out``. Raises PrivacyError if a training is in it twice, or ``out`` exists."""
    total, shared = joined(ledgers)
    if twice(total):
        raise PrivacyError(
            'a training is in several of these ledgers, not at their beginning, and would be counted more than once: give each '
            'once. Nothing distinguishes the ledgers of two copies of a work dir that an earlier version resumed'
        )
    if out is not None:
        if out.exists():
            raise PrivacyError(f'--out {out} exists, and a ledger is never overwritten: give another name')
        total.keep_at(out)
    print(*shared, sep='\n', end='\n' if shared else '')
    report(total, delta)
    if any(_SEAL in metadata for metadata in total.runs):
        print(
            'Whether all of these trainings had the same subjects is not known from their ledgers: the sum holds only if they '
            'had. A training that continues from the sum compares its own with each.'
        )


def main() -> None:
    """Reads, adds, prints."""
    args = parse_args()
    found = [opened(path) for path in args.ledgers]
    if args.command == 'show':
        for path, (ledger, statement) in zip(args.ledgers, found):
            print(path)
            report(ledger, delta_of(args.delta, [statement]))
        return
    if any(path.suffix == '.pth' for path in args.ledgers):
        raise PrivacyError('add needs ledgers, and a checkpoint holds none: give its work dir')
    add([ledger for ledger, _ in found], delta_of(args.delta, [statement for _, statement in found]), args.out)


if __name__ == '__main__':
    import mmpose_dp  # noqa: F401  (checks the install)

    sys.exit(run(main))
