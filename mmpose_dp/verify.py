"""Checks a privacy statement against what it belongs to, without the trainer: python -m mmpose_dp.verify WORK_DIR|FILE

FILE is a privacy_statement.json, a privacy_ledger.jsonl, or a checkpoint (.pth), published or not. Needs dp-accounting, numpy and
scipy alone; with Opacus installed, epsilon is recomputed by its accountants too. Prints what was checked and what could not be,
and exits with 0, or with 1 if anything is wrong. Must not run code of the files, and must not call a thing checked that was not.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .extras.checkpoint_file import CheckpointFile
from .extras.evidence import SCHEMA_VERSION, STATEMENT_NAME, file_sha256, history_of, ledger_up_to, seal_of
from .extras.risk import risk_of
from .extras.statement_page import statement_json
from .privacy.accounting import ACCOUNTANTS, History, epsilon, group_epsilon
from .privacy.errors import PrivacyError
from .privacy.ledger import LEDGER_NAME, Ledger
from .privacy.validation import as_given, rounded_up

SCHEMA = Path(__file__).parent / 'statement.schema.json'
_TOLERANCE = 0.01  # relative: another version of a library may compute a slightly larger figure
NEVER_CHECKED = (
    'whether the training did what the ledger says: that sampling, clipping and noise were as stated needs the code and the '
    'machine',
    'who wrote these files: they have hashes and no signature, so somebody could forge all of them together',
)
_TYPES = {
    'object': dict,
    'array': list,
    'string': str,
    'number': (int, float),
    'integer': int,
    'boolean': bool,
    'null': type(None),
}


@dataclass
class Findings:
    """What was checked, what is wrong and what could not be checked, in words."""

    checked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def expect(self, holds: bool, right: str, wrong: str) -> bool:
        """Notes one check."""
        (self.checked if holds else self.wrong).append(right if holds else wrong)
        return holds

    def __str__(self) -> str:
        lines = [f'checked      {text}' for text in self.checked]
        lines += [f'NOT CHECKED  {text}' for text in (*self.unchecked, *NEVER_CHECKED)]
        lines += [f'WRONG        {text}' for text in self.wrong]
        end = 'The statement does not hold together: do not rely on it.' if self.wrong else 'Nothing is wrong.'
        return '\n'.join([*lines, end])


@dataclass(frozen=True)
class Evidence:
    """The files that belong together: a statement, and what lies in its folder."""

    folder: Path
    statement: Any  # None if there is none
    text: str | None = None  # of the statement's file
    opened: Path | None = None  # the checkpoint in which the statement was

    @classmethod
    def at(cls, path: Path) -> 'Evidence':
        """The files of a work dir, of a statement, a ledger or a checkpoint. Raises PrivacyError for something else."""
        if path.suffix == '.pth' and path.is_file():
            try:
                values = CheckpointFile.read(path).values
            except ValueError as error:
                raise PrivacyError(f'{path}: {error}') from error
            statement = values.get('privacy_statement') or _inside(values).get('statement')
            if not isinstance(statement, dict):
                raise PrivacyError(
                    f'{path} holds no privacy statement: no private training made it, or an older version'
                )
            return cls(path.parent, statement, opened=path)
        if path.is_dir():
            path = path / STATEMENT_NAME
            if not path.is_file() and not (path.parent / LEDGER_NAME).is_file():
                raise PrivacyError(f'{path.parent} holds neither {STATEMENT_NAME} nor {LEDGER_NAME}')
        elif not path.is_file():
            raise PrivacyError(f'{path}: there is no such file or folder')
        elif path.suffix == '.jsonl':
            path = path.parent / STATEMENT_NAME
        if not path.is_file():
            return cls(path.parent, None)
        try:
            text = path.read_bytes().decode()
            return cls(path.parent, json.loads(text), text)
        except (ValueError, RecursionError) as error:
            raise PrivacyError(f'{path} is damaged: {error}') from error

    @cached_property
    def ledger_file(self) -> bytes | None:
        """The ledger's bytes, if it is there."""
        path = self.folder / LEDGER_NAME
        return path.read_bytes() if path.is_file() else None


def verify(path: Path) -> Findings:
    """Checks everything that can be checked from a file or folder. Raises PrivacyError if there is nothing to check."""
    found = Findings()
    files = Evidence.at(path)
    ledger = _check_ledger(files, found)
    if files.statement is None:
        found.unchecked.append(f'the statement: there is no {STATEMENT_NAME} beside the ledger')
        return found
    try:
        if not _check_form(files, found):
            return found
        history = _history(files.statement, ledger, found)
        if history is not None:
            _check_figures(files.statement, history, found)
        _check_checkpoints(files, found)
        _check_published_files(files, found)
        _check_config(files, found)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        found.wrong.append(f'the statement cannot be evaluated: {type(error).__name__}: {error}')
    return found


# ---- the statement by itself -------------------------------------------------------------------------------------------
def _check_form(files: Evidence, found: Findings) -> bool:
    """Version, schema, seal and page; False if nothing else can be checked."""
    statement = files.statement
    version = statement.get('schema_version') if isinstance(statement, dict) else None
    if version is None:
        found.wrong.append('the statement has no schema_version: an older mmpose_dp made it, or it was changed')
        return False
    if version != SCHEMA_VERSION:
        found.wrong.append(f'the statement has schema_version {version!r}, and this program reads {SCHEMA_VERSION!r}')
        return False
    faults = list(schema_faults(statement, json.loads(SCHEMA.read_text())))
    if not found.expect(not faults, 'the statement follows its schema', f'the statement: {"; ".join(faults)}'):
        return False
    intact = seal_of(statement) == statement['seal']
    found.expect(intact, "the statement's seal", 'the statement was changed: its seal does not match its content')
    if files.text is not None:
        same = files.text == statement_json(statement)
        found.expect(same, 'the form of its file', f'{STATEMENT_NAME} was changed after it was written')
    page = files.folder / 'privacy_statement.md'
    if files.text is not None and page.is_file():
        same = file_sha256(page) == statement['page_sha256']
        found.expect(same, f'{page.name} is its page', f'{page.name} was changed, or is the page of another statement')
    return True


def schema_faults(value: Any, schema: dict[str, Any], where: str = '') -> Iterator[str]:
    """Where a value does not follow a JSON schema, of which type, const, required, properties and items are read."""
    kinds = schema.get('type', list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    number = isinstance(value, bool) and 'boolean' not in kinds
    if number or not isinstance(value, tuple(t for k in kinds for t in _as_tuple(_TYPES[k]))):
        yield f'{where or "it"} is not {" or ".join(kinds)}'
        return
    if 'const' in schema and value != schema['const']:
        yield f'{where} is not {schema["const"]!r}'
    if isinstance(value, dict):
        yield from (f'{where}{name} is missing' for name in schema.get('required', ()) if name not in value)
        for name, inner in schema.get('properties', {}).items():
            if name in value:
                yield from schema_faults(value[name], inner, f'{where}{name}.')
    if isinstance(value, list) and 'items' in schema:
        for one in value:
            yield from schema_faults(one, schema['items'], f'{where}items.')


def _as_tuple(kind: Any) -> tuple:
    return kind if isinstance(kind, tuple) else (kind,)


# ---- the ledger --------------------------------------------------------------------------------------------------------
def _check_ledger(files: Evidence, found: Findings) -> Ledger | None:
    """The ledger as far as the statement goes, if it is there and whole."""
    data = files.ledger_file
    if data is None:
        found.unchecked.append(f'the ledger: there is no {LEDGER_NAME} here. Ask for it, it need not be published')
        return None
    try:
        whole = Ledger.parse(data)
    except PrivacyError as error:
        found.wrong.append(str(error))
        return None
    lines = data.split(b'\n')[:-1]
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
        found.unchecked.append(
            f'{whole.steps - ledger.steps} steps that the ledger has after this statement: with them epsilon is {spent} (pld)'
        )
    return ledger


def _history(statement: dict[str, Any], ledger: Ledger | None, found: Findings) -> History | None:
    """The steps from which epsilon follows: the ledger's, or those that the statement names."""
    named = statement['ledger']['history']
    steps = statement['steps'] + statement['steps_of_earlier_trainings']
    if ledger is not None:
        same = ledger.steps == steps and (named is None or ledger.state_dict()['entries'] == named)
        found.expect(
            same, f'{steps} steps, with the noise and the rates of the ledger', 'the steps are not those of the ledger'
        )
        found.expect(
            ledger.is_secret or not statement['private'],
            'no debug seed was set in the ledger',
            'the statement says private, and the ledger that a debug seed was set',
        )
        run = ledger.runs[-1] if ledger.runs else {}
        recorded = ('num_records', run.get('num_records')), ('privacy_unit', run.get('privacy_unit'))
        same = all(value is None or str(statement[name]).partition(':')[0] == str(value) for name, value in recorded)
        found.expect(
            same, 'number of records and privacy unit', 'number of records or privacy unit are not those of the ledger'
        )
        return ledger.history
    if named is None:
        found.unchecked.append('epsilon: the history is too long for the statement, and there is no ledger')
        return None
    history = history_of(named)
    found.expect(
        sum(n for _, n in history) == steps,
        f'the number of steps, {steps}',
        'the number of steps is not that of the history',
    )
    return history


# ---- the figures -------------------------------------------------------------------------------------------------------
def _check_figures(statement: dict[str, Any], history: History, found: Findings) -> None:
    delta, main = statement['delta'], statement['accountant']
    for name in ACCOUNTANTS:
        stated = _number(statement['epsilon_by_accountant'][name])
        try:
            again = epsilon(history, delta, name)
        except PrivacyError as error:
            if math.isfinite(stated):
                found.unchecked.append(f'epsilon by {name}: {error.__cause__ or error}')
            continue
        _compare(f'epsilon {rounded_up(stated)} by {name}', stated, again, found)
    spent = statement['epsilon']
    if main not in ACCOUNTANTS:  # one of the trainer's own: what it says must hold by one that is known here
        what = f'epsilon {rounded_up(_number(spent))} by {main}, an accountant that is not known here and was compared with pld'
        _compare(what, _number(spent), epsilon(history, delta, 'pld'), found)
    words = f'({rounded_up(_number(spent))}, {as_given(delta)})-'
    same = spent == statement['epsilon_by_accountant'].get(main) and statement['guarantee'].startswith(words)
    found.expect(same, 'the guarantee names this epsilon', 'the guarantee, epsilon and epsilon_by_accountant differ')
    for key, several in statement.items():
        if key.startswith('epsilon_for_'):
            for k, value in several.items():
                stated = _number(value)
                if math.isfinite(stated):
                    _compare(
                        f'epsilon {rounded_up(stated)} for {k} records',
                        stated,
                        group_epsilon(history, delta, int(k)),
                        found,
                    )
    if statement.get('personal_epsilon'):
        found.unchecked.append('personal_epsilon: only the records that are sampled most are recomputed')
    if isinstance(statement['risk'], dict):
        _check_risk(statement['risk'], risk_of(history, delta), found)
    else:
        found.unchecked.append('risk figures: the statement has none')


def _number(value: Any) -> float:
    return math.inf if value == 'not bounded' else float(value)


def _compare(what: str, stated: float, again: float, found: Findings) -> None:
    holds = again <= stated * (1 + _TOLERANCE) + 1e-9
    found.expect(holds, f'{what}, recomputed', f'{what} is too low: recomputed, it is {rounded_up(again)}')


def _check_risk(stated: dict[str, Any], again: dict[str, Any] | None, found: Findings) -> None:
    """Every figure that can be recomputed must not be below what it is."""
    if again is None:
        found.wrong.append('the statement has risk figures, and its steps have none')
        return
    low = [name for name, one, other in _leaves(stated, again, 'risk') if other > one * (1 + _TOLERANCE) + 1e-6]
    found.expect(not low, 'the risk figures, recomputed', f'too low: {", ".join(low)}')


def _leaves(stated: Any, again: Any, name: str) -> Iterator[tuple[str, float, float]]:
    if isinstance(again, dict):
        for key, value in again.items():
            yield from _leaves(stated[key] if isinstance(stated, dict) else stated, value, f'{name}.{key}')
    elif again != 'not computed' and stated != 'not computed':
        yield name, _number(stated), _number(again)


# ---- checkpoints and config --------------------------------------------------------------------------------------------
def _check_checkpoints(files: Evidence, found: Findings) -> None:
    """The last checkpoint by its hash, and every one in the folder by what is in it."""
    stated, paths = files.statement['checkpoint'], sorted(files.folder.glob('*.pth'))
    if files.opened is not None:
        paths = [files.opened]
    elif stated is None:
        found.unchecked.append('the last checkpoint: the statement was written before it (was training interrupted?)')
    elif (path := files.folder / stated['file']) in paths:
        right, wrong = (f'{path.name} is {words} checkpoint of this statement' for words in ('the', 'not the'))
        found.expect(file_sha256(path) == stated['sha256'], right, wrong)
    else:
        found.unchecked.append(f'{stated["file"]}: it is not here')
    for path in paths:
        try:
            checkpoint = CheckpointFile.read(path)
        except ValueError as error:
            found.wrong.append(str(error))
            continue
        published = checkpoint.values.get('privacy_statement')
        state = published['ledger'] if published else _inside(checkpoint.values).get('ledger')
        if published:
            _check_weights(path.name, published, checkpoint.weights_sha256, found)
        if not isinstance(state, dict) or not published and not state.get('entries'):
            found.unchecked.append(f'{path.name}: it took no private step')
        elif files.ledger_file is not None:
            _check_covered(path.name, state, files, found)


def _check_covered(name: str, state: dict[str, Any], files: Evidence, found: Findings) -> None:
    """A checkpoint must be of this ledger, and not later than the statement."""
    lines = (files.ledger_file or b'').split(b'\n')[: files.statement['ledger']['lines']]
    heads = [json.loads(line)['hash'] for line in lines if line]
    right, wrong = (f'{name}: its steps are {words} those of this statement' for words in ('among', 'not among'))
    found.expect(state.get('head') in heads, right, wrong)


def _check_weights(name: str, statement: dict[str, Any], weights: str, found: Findings) -> None:
    """The weights of a published file must be those of the statement in it, and that one must be whole."""
    intact = seal_of(statement) == statement.get('seal') and statement.get('weights_sha256') == weights
    found.expect(
        intact, f'{name} has the weights of its statement', f'{name} does not have the weights of its statement'
    )


def _check_published_files(files: Evidence, found: Findings) -> None:
    """The other files of a published folder, by their hashes."""
    for name, wanted in files.statement.get('published_files', {}).items():
        path = files.folder / name
        if Path(name).name != name or not path.is_file():
            found.unchecked.append(f'{name}: it is not here')
        else:
            found.expect(
                file_sha256(path) == wanted, f'{name} was published with this statement', f'{name} was changed'
            )


def _check_config(files: Evidence, found: Findings) -> None:
    if files.statement.get('published_files'):
        found.unchecked.append("the training's config: only its hash is in a published statement")
        return
    if files.opened is not None:
        found.unchecked.append('the config: only its hash is in a published file')
        return
    configs = [*files.folder.glob('*.py'), *files.folder.glob('*/vis_data/config.py')]
    if not configs or files.statement['config_sha256'] is None:
        found.unchecked.append('the config: there is none here')
        return
    same = [path for path in configs if file_sha256(path) == files.statement['config_sha256']]
    right = f'{same[0].relative_to(files.folder)} is the config of this statement' if same else ''
    found.expect(bool(same), right, 'no config here is that of this statement')


def _inside(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a training put into its checkpoint about privacy."""
    found = checkpoint.get('privacy')
    return found if isinstance(found, dict) else {}


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
