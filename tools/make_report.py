"""Make one page of a finished private training, for the pose engineer and the privacy officer alike.

python tools/make_report.py work_dirs/my_config
python tools/make_report.py work_dirs/my_config --scores "without privacy=scores.json" --predictions predictions.pkl --view-pictures

Writes WORK_DIR/privacy_report.html, one file that loads nothing: the guarantee in plain words, what an attacker can learn at most,
what is not protected, what is recovered from public views, how epsilon was spent, accuracy, who decided what, what was checked, and
the settings. It is made from the statement, the ledger, the config and the logged validation scores, after they were checked as
python -m mmpose_dp.verify does: of files that do not belong together no page is made.

Nothing outside the guarantee is on it: no private picture, no loss of a private batch. Pictures of validation people are on it only
if you ask for them: --predictions (a file of tools/test.py --dump) shows the predicted joints, --view-pictures what
tools/audit_view.py recovered. --scores adds the scores in a file of tools/test.py --out, of this model or of another, to compare.
"""

import argparse
from datetime import date
from pathlib import Path
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
from cli import run
from html_page import write_page
from report_parts import (
    budget_curve,
    config_of,
    example_people,
    given_scores,
    scores_section,
    settings_of,
    step_rows,
    validation_scores,
    view_sections,
)

from mmpose_dp.extras.evidence import history_of, ledger_up_to
from mmpose_dp.extras.risk import percent, risk_in_words
from mmpose_dp.extras.statement_page import further_facts, guessed, profile_in_words, risk_rows
from mmpose_dp.privacy.accounting import History
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.validation import as_given, rounded_up
from mmpose_dp.verify import NEVER_CHECKED, Evidence, verify

REPORT_NAME = 'privacy_report.html'
_OTHER_PLACES = (  # of the page
    'recoverable from view', 'decision', 'trust model', 'attacker', 'audit', 'public views', 'public data sets',
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('work_dir', type=Path, metavar='WORK_DIR', help='of a private training')
    parser.add_argument('--out', type=Path, help=f'the page (default: WORK_DIR/{REPORT_NAME})')
    parser.add_argument(
        '--scores',
        nargs='+',
        default=[],
        metavar='NAME=FILE',
        help='scores that tools/test.py --out wrote, to show beside',
    )
    parser.add_argument(
        '--predictions', type=Path, metavar='FILE', help='of tools/test.py --dump: shows six of its people'
    )
    parser.add_argument(
        '--view-pictures', action='store_true', help='show the validation people of tools/audit_view.py'
    )
    return parser.parse_args()


def contents(args: argparse.Namespace) -> dict[str, Any]:
    """All that the page says. Raises PrivacyError if there is no statement, or it does not hold together."""
    given, files = given_scores(args.scores), Evidence.at(args.work_dir)
    if files.statement is None or files.opened is not None:
        raise PrivacyError(f'{args.work_dir}: a report is made of a work dir that has a privacy_statement.json')
    findings = verify(args.work_dir)
    if findings.wrong:
        raise PrivacyError(f'no report is made, since the files do not hold together: {"; ".join(findings.wrong)}')
    s, folder = files.statement, files.folder
    history = _history(files)
    config = next(config_of(folder, s['config_sha256']), None)
    text = '' if config is None else config.read_text(errors='replace')
    unit = 'iteration' if 'max_iters' in settings_of(text).get('train_cfg', '') else 'epoch'
    if args.predictions and config is None:
        raise PrivacyError(
            '--predictions: the config of this training is not in the work dir, so nobody knows who is private'
        )
    facts = further_facts(s)
    return dict(
        folder=folder,
        s=s,
        today=date.today().isoformat(),
        **_risk(s),
        views=view_sections(folder, s, args.view_pictures) if s['public_views'] or args.view_pictures else [],
        target='' if s['target_epsilon'] is None else as_given(s['target_epsilon']),
        curve=budget_curve(history, s['delta'], s['accountant'], s['target_epsilon']),
        steps=step_rows(history),
        scores=scores_section(validation_scores(folder), given, unit),
        people=example_people(args.predictions, config) if args.predictions else [],
        decisions=_decisions(s),
        findings=dict(checked=findings.checked, unchecked=[*findings.warnings, *findings.unchecked, *NEVER_CHECKED]),
        facts={name: value for name, value in facts.items() if name not in _OTHER_PLACES},
        settings=settings_of(text),
    )


def _history(files: Evidence) -> History:
    """The steps of the ledger, or those that the statement names; none if neither is there."""
    stated = files.statement['ledger']
    if files.ledger_file is not None:
        return ledger_up_to(files.ledger_file, stated).history
    return [] if stated['history'] is None else history_of(stated['history'])


def _risk(s: dict[str, Any]) -> dict[str, Any]:
    """The risk figures: large, as sentences, and as a table."""
    sentences = risk_in_words(s['risk'], guessed(s))
    if not sentences or not s['private']:
        return dict(tiles={}, sentences=[], risk_rows=[], profile='')
    figures = s['risk']['add_or_remove']
    spent = s['epsilon'] if isinstance(s['epsilon'], str) else rounded_up(s['epsilon'])
    tiles = {
        f'epsilon at delta {s["delta"]:.3g}': spent,
        'a 50:50 guess is right at most': percent(figures['guess_right_at_most']),
        'found at 1 % false alarms, at most': percent(figures['true_positive_rate_at']['0.01']),
        'records': str(s['num_records']),
    }
    return dict(tiles=tiles, sentences=sentences, risk_rows=risk_rows(s['risk']), profile=profile_in_words(s['risk']))


def _decisions(s: dict[str, Any]) -> dict[str, str]:
    """Trust model, attacker, what was decided, and the membership audit."""
    decided = {name.replace('_', ' '): text for name, text in s['decision'].items() if name != 'accuracy'}
    return {'trust model': s['trust_model'], 'attacker': s['attacker'], **decided, 'attack on this config': s['audit']}


def report(folder: Path) -> None:
    """Writes the page of a published folder, from its statement alone."""
    args = argparse.Namespace(work_dir=folder, scores=[], predictions=None, view_pictures=False)
    write_page(folder / REPORT_NAME, 'report.html', zip=zip, **contents(args))


def main() -> None:
    """Gathers, checks, writes."""
    args = parse_args()
    if args.out is not None and args.out.is_dir():
        args.out /= REPORT_NAME
    if args.out is not None and not args.out.parent.is_dir():
        raise PrivacyError(f'--out {args.out}: there is no folder {args.out.parent}')
    values = contents(args)
    out = args.out or values['folder'] / REPORT_NAME
    write_page(out, 'report.html', zip=zip, **values)
    print(f'{out}: {values["s"]["guarantee"]}')
    if args.predictions or args.view_pictures:
        print('It shows validation people: pass it on only if they may be shown.')


if __name__ == '__main__':
    run(main)
