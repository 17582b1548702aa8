"""Show what trainings have spent: read a privacy ledger, or add up several on the same data.

python tools/privacy_ledger.py show work_dirs/a/privacy_ledger.jsonl --delta 4.5e-5
python tools/privacy_ledger.py add work_dirs/*/privacy_ledger.jsonl --delta 4.5e-5 --out all.jsonl

`add` composes: the epsilon it prints holds against somebody who sees the results of all these trainings. That is what a
hyper-parameter search costs. If you put the sum into the last training's work dir as privacy_ledger.jsonl before it starts, that
training is calibrated to what is left.
"""

import argparse
import sys
from pathlib import Path

from cli import run

from mmpose_dp.privacy.accounting import ACCOUNTANTS
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.validation import as_given, rounded_up

_SEAL = 'subjects_seal'  # metadata that only a resume reads


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=['show', 'add'], help='show each ledger by itself, or add them up')
    parser.add_argument('ledgers', nargs='+', type=Path, help='privacy_ledger.jsonl files, not folders')
    parser.add_argument('--delta', type=float, required=True, help='delta for which to compute epsilon')
    parser.add_argument('--out', type=Path, help='file to which add writes the sum; must not exist')
    return parser.parse_args()


def report(ledger: Ledger, delta: float) -> None:
    """Prints the steps and epsilon."""
    for run_number, metadata in enumerate(ledger.runs, 1):
        print(
            f'training {run_number}: '
            + ', '.join(f'{key} {value}' for key, value in metadata.items() if value not in (None, []) and key != _SEAL)
        )
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


def main() -> None:
    """Reads, adds, prints."""
    args = parse_args()
    total = Ledger()
    for path in args.ledgers:
        if not path.is_file():
            raise PrivacyError(f'{path}: there is no such ledger')
        if args.command == 'show':
            print(path)
            report(Ledger.read(path), args.delta)
        else:
            total.add(Ledger.read(path))
    if args.command == 'add':
        if args.out is not None:
            if args.out.exists():
                raise PrivacyError(f'--out {args.out} exists; a ledger is never overwritten')
            total.keep_at(args.out)
        report(total, args.delta)
        if any(_SEAL in metadata for metadata in total.runs):
            print(
                'Whether all of these trainings had the same subjects is not known from their ledgers: the sum holds only if they '
                'had. A training that continues from the sum compares its own with each.'
            )


if __name__ == '__main__':
    import mmpose_dp  # noqa: F401  (checks the install)

    sys.exit(run(main))
