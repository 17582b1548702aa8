"""Write into a privacy statement, after training, who decided what and why.

python tools/fill_in_statement.py work_dirs/mine purpose='gait analysis in the clinic' legal_basis='consent'
python tools/fill_in_statement.py work_dirs/mine

Without texts it prints the questions and what the statement says to each. Figures cannot be written: they follow from the training.
A config states the same before training: default_hooks.privacy_budget.decision. The checkpoint keeps what was stated then, and
``python -m mmpose_dp.privacy.verify`` names every text that was changed since; one that was filled in is no difference.
"""

import argparse
import sys

from cli import run

from mmpose_dp.extras.accountability import DECISIONS, record_decision
from mmpose_dp.privacy.errors import ConfigError


def texts_of(arguments: list[str]) -> dict[str, str]:
    """The texts by key. Raises ConfigError for an argument that is not of the form key=text, or a key that appears twice."""
    texts: dict[str, str] = {}
    for argument in arguments:
        key, is_there, text = argument.partition('=')
        if not is_there or key in texts:
            raise ConfigError(f'{argument!r}: write each key once, as key="text"; the keys are {", ".join(DECISIONS)}')
        texts[key] = text
    return texts


def main() -> None:
    """Reads, changes, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('work_dir', help='the folder that holds privacy_statement.json')
    parser.add_argument('texts', nargs='*', metavar='KEY="TEXT"', help=f'keys: {", ".join(DECISIONS)}')
    args = parser.parse_args()
    for key, text in record_decision(args.work_dir, texts_of(args.texts)).items():
        print(f'{key} ({DECISIONS[key]}): {text}')


if __name__ == '__main__':
    sys.exit(run(main))
