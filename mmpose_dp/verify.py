"""Checks a privacy statement against what it belongs to, without the trainer: python -m mmpose_dp.verify WORK_DIR|FILE

FILE is a privacy_statement.json, a privacy_ledger.jsonl, or a checkpoint (.pth), published or not. Needs dp-accounting, numpy and
scipy alone; with Opacus installed, epsilon is recomputed by its accountants too. Prints what was checked and what could not be,
and exits with 0, or with 1 if anything is wrong. Must not run code of the files, or say that something was checked that was not.
The checks are in verifying/, one module for each thing that is checked.
"""

import argparse
import logging
import sys
from pathlib import Path

from .extras.evidence import STATEMENT_NAME
from .privacy.errors import PrivacyError
from .verifying.figures import check_delta, check_figures, check_personal
from .verifying.files import check_checkpoints, check_config, check_published_files, name_the_unseen
from .verifying.findings import NEVER_CHECKED, Evidence, Findings
from .verifying.ledger import check_ledger, history, openings
from .verifying.rebuilt import check_words
from .verifying.schema import SCHEMA, schema_faults
from .verifying.statement import check_form

__all__ = ['NEVER_CHECKED', 'SCHEMA', 'Evidence', 'Findings', 'schema_faults', 'verify']


def verify(path: Path) -> Findings:
    """Checks everything that can be checked from a file or folder. Raises PrivacyError if there is nothing to check."""
    found = Findings()
    files = Evidence.at(path)
    ledger = check_ledger(files, found)
    if files.statement is None:
        found.unchecked.append(f'the statement: there is no {STATEMENT_NAME} beside the ledger')
        return found
    try:
        if not check_form(files, found):
            return found
        steps, opened = history(files.statement, ledger, found), openings(files) if ledger is not None else []
        check_delta(files.statement, found)
        if steps is not None:
            check_figures(files.statement, steps, found, went_on=len(opened) != 1)
        check_personal(files.statement, ledger, found)
        check_checkpoints(files, found)
        check_words(files.statement, ledger, opened[-1] if opened else {}, found)
        check_published_files(files, found)
        check_config(files, found)
        name_the_unseen(files, found)
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        found.wrong.append(f'the statement cannot be evaluated: {type(error).__name__}: {error}')
    return found


def main() -> None:
    """Prints the findings."""
    parser = argparse.ArgumentParser(prog='python -m mmpose_dp.verify', description=__doc__.splitlines()[0])
    parser.add_argument('path', type=Path, help='work dir, privacy_statement.json, privacy_ledger.jsonl or .pth')
    args = parser.parse_args()
    logging.getLogger('absl').setLevel(logging.ERROR)  # RDP orders that do not converge are left out, which is safe
    try:
        found = verify(args.path)
    except PrivacyError as error:
        print(f'mmpose_dp: {error}', file=sys.stderr)
        sys.exit(1)
    print(found)
    sys.exit(1 if found.wrong else 0)


if __name__ == '__main__':
    main()
