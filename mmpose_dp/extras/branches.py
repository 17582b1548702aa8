"""Adds up ledgers that may be copies of one another: their common beginning counts once, and each branch counts.

A line's hash is over all lines before it, and every training and every resume has a random name. So two ledgers with a line in
common have one history up to there. Must not count a step once that was taken twice: if an earlier version opened or resumed a
training without a name, nothing shows whether two ledgers are copies, and what follows counts in each.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from mmpose_dp.privacy.accounting import StepEvent
from mmpose_dp.privacy.ledger import Ledger


def add(total: Ledger, other: Ledger, shared: int = 0) -> None:
    """Adds the runs of another ledger on the same records, which composes them, without its first ``shared`` lines: they are there.

    The steps after these lines open a run, since the last run of the sum may be another. Raises LedgerError if runs do not add up.
    """
    opening: dict[str, Any] = {}
    for number, line in enumerate(other.lines):
        opening = line.get('run') or {**opening, **line.get('resumed', {})}
        if number < shared:
            continue
        if 'run' in line or 0 < number == shared:
            total.begin_run(**opening)
        elif 'resumed' in line:
            total.resume_run(**line['resumed'])
        if 'steps' in line:
            personal = tuple(Fraction(rate) for rate in line.get('personal_rates', ()))
            total.count(StepEvent(line['noise_multiplier'], Fraction(line['sample_rate']), personal), line['steps'])


def shared_lines(one: Ledger, other: Ledger) -> int:
    """How many lines, from the first on, two ledgers surely have in common."""
    count = 0
    for line, same in zip(one.lines, other.lines):
        opening = line.get('run', line.get('resumed'))
        if line['hash'] != same['hash'] or opening is not None and not {'training', 'part'} & set(opening):
            break
        count += 1
    return count


def joined(ledgers: Sequence[Ledger]) -> tuple[Ledger, list[str]]:
    """One ledger of all steps, and in words which of them were in several ledgers. Raises LedgerError if they do not add up."""
    total = Ledger()
    added: list[Ledger] = []
    words: list[str] = []
    for number, ledger in enumerate(ledgers):
        others = [
            *ledgers[:number],
            *(other for other in ledgers[number + 1 :] if len(other.lines) > len(ledger.lines)),
        ]
        if ledger.lines and any(shared_lines(ledger, other) == len(ledger.lines) for other in others):
            words.append(f'{ledger.steps} steps are in two ledgers and count once: one ledger holds all of the other')
            continue
        shared = max((shared_lines(ledger, before) for before in added), default=0)
        add(total, ledger, shared)
        added.append(ledger)
        if shared:
            own = sum(line['steps'] for line in ledger.lines[shared:] if 'steps' in line)
            words.append(
                f'{ledger.steps - own} steps are in two ledgers and count once; then these are two branches, of copies of one work '
                'dir, and the steps of both count'
            )
    return total, words


def twice(ledger: Ledger) -> bool:
    """Whether a sum has a training, or a branch of one, more than once."""
    names = [(run['training'], run.get('part')) for run in ledger.runs if 'training' in run]
    return len(set(names)) < len(names)
