"""The ledger, and the steps from which epsilon follows. Must not take a step from a statement where the ledger has it."""

import json
from typing import Any

from mmpose_dp.extras.evidence import history_of, ledger_up_to
from mmpose_dp.privacy.accounting import History, epsilon
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from mmpose_dp.privacy.validation import rounded_up

from .findings import Evidence, Findings


def check_ledger(files: Evidence, found: Findings) -> Ledger | None:
    """The ledger as far as the statement goes, if it is there and whole."""
    data = files.ledger_file
    if data is None:
        found.unchecked.append(
            f'the ledger: there is no {LEDGER_NAME} here. Its owner may show it to you without publishing it'
        )
        return None
    found.looked_at.add(files.folder / LEDGER_NAME)
    try:
        whole = Ledger.parse(data)
    except PrivacyError as error:
        found.wrong.append(str(error))
        return None
    *lines, rest = data.split(b'\n')
    if rest:
        words = (
            f'the end of {LEDGER_NAME}, {len(rest)} bytes that are no line: a kill may leave them, and they are no step'
        )
        found.unchecked.append(words)
    written = all(json.dumps(json.loads(line)).encode() == line for line in lines)
    found.expect(
        written,
        f'the ledger: {len(lines)} lines, each sealed with all before it',
        f'{LEDGER_NAME} was changed after it was written',
    )
    stated = files.statement.get('ledger') if isinstance(files.statement, dict) else None
    if not isinstance(stated, dict) or type(stated.get('lines')) is not int:
        found.unchecked.append(f'what the {whole.steps} steps of the ledger have spent: delta is in the statement')
        return whole
    try:
        ledger = ledger_up_to(data, stated)
    except (PrivacyError, LookupError) as error:
        found.wrong.append(str(error))
        return None
    found.checked.append('the statement and the ledger belong together: its head and number of lines')
    if len(lines) > stated['lines'] and isinstance(files.statement.get('delta'), float):
        spent = rounded_up(epsilon(whole.history, files.statement['delta'], 'pld'))
        words = f'{whole.steps - ledger.steps} steps that the ledger has after this statement: with them epsilon is {spent} (pld)'
        # an older checkpoint has an older statement
        (found.warnings if files.opened is None else found.unchecked).append(words)
    return ledger


def openings(files: Evidence) -> list[dict[str, Any]]:
    """What the trainings before the statement said of themselves, whenever one began or was resumed."""
    lines = (files.ledger_file or b'').split(b'\n')[: files.statement['ledger']['lines']]
    parsed = [json.loads(line) for line in lines if line]
    return [line.get('run') or line.get('resumed') for line in parsed if 'run' in line or 'resumed' in line]


def history(statement: dict[str, Any], ledger: Ledger | None, found: Findings) -> History | None:
    """The steps from which epsilon follows: the ledger's, or those that the statement names."""
    entries = statement['ledger']['history']
    steps = statement['steps'] + statement['steps_of_earlier_trainings']
    if ledger is not None:
        same = ledger.steps == steps and (entries is None or ledger.state_dict()['entries'] == entries)
        right, wrong = (
            f'{steps} steps, with the noise and the rates of the ledger',
            'the steps are not those of the ledger',
        )
        found.expect(same, right, wrong)
        found.expect(
            ledger.is_secret or not statement['private'],
            'no debug seed was set in the ledger',
            'the statement says private, and the ledger that a debug seed was set',
        )
        return ledger.history
    if entries is None:
        found.unchecked.append('epsilon: the history is too long for the statement, and there is no ledger')
        return None
    named = history_of(entries)
    right, wrong = f'the number of steps, {steps}', 'the number of steps is not that of the history'
    found.expect(sum(n for _, n in named) == steps, right, wrong)
    return named
