"""Writes the privacy statement as files: JSON, and a Markdown page.

Must not print an epsilon below the computed one, and must not add anything to the statement.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mmpose_dp.privacy.validation import as_given, rounded_up

from .evidence import PAGE_NAME, STATEMENT_NAME, sealed
from .risk import risk_in_words

_RATES = 'true_positive_rate_at'
_LAST = ('page_sha256', 'seal')  # not on the page, whose hash they hold
_SENTENCES = (  # of the page, above its table
    'private', 'guarantee', 'method', 'released', 'protected', 'adjacency', 'not_protected', 'not_covered', 'risk',
    'for_the_people', 'anonymity',
)  # fmt: skip


def complete(statement: dict[str, Any]) -> dict[str, Any]:
    """A statement with the hash of its page, and sealed; to be called after every change."""
    content = {key: value for key, value in statement.items() if key not in _LAST}
    page = hashlib.sha256(statement_markdown(content).encode()).hexdigest()
    return sealed({**content, 'page_sha256': page})


def statement_json(statement: dict[str, Any]) -> str:
    """The statement as the text of its file."""
    return json.dumps(statement, indent=2) + '\n'


def statement_markdown(statement: dict[str, Any]) -> str:
    """The statement as a Markdown page."""
    s, warning = statement, ''
    if not s['private']:
        warning = '> **NOT PRIVATE.** A debug seed was set or no noise was added: no figure below is a guarantee.\n\n'
    people, anonymity = s.get('for_the_people', ''), s.get('anonymity', '')
    ending = ''.join(f'\n{title}\n\n{text}\n' for title, text in (('## For the people in the data', people),) if text)
    not_protected, not_covered = (
        '\n'.join(f'- {item}' for item in s[name]) for name in ('not_protected', 'not_covered')
    )
    page = f"""# Privacy statement

{warning}**Guarantee:** {s['guarantee']}, by {s['method']}, for {s['released']}.

**Protected:** {s['protected']}.
{_meaning(s)}
**Made indistinguishable:** {s['adjacency']}.

**Not protected:**
{not_protected}

**Not covered by this statement:**
{not_covered}
{f'- {anonymity}' if anonymity else ''}

| | |
| --- | --- |
"""
    return page + ''.join(f'| {name} | {text} |\n' for name, text in further_facts(s).items()) + ending


def further_facts(statement: dict[str, Any]) -> dict[str, str]:
    """What has no sentence of its own on a page, in words: its name, and its value as it may be printed."""
    facts = {}
    for key, value in statement.items():
        if key in _LAST or key in _SENTENCES:
            continue
        if key == 'checkpoints':
            value = f'SHA-256 of {len(value)}, in {STATEMENT_NAME}'
        if key == 'ledger':
            value = f'{value["lines"]} lines, the last with hash {value["head"]}'
        if isinstance(value, dict):
            value = ', '.join(f'{k}: {_cell(key, v)}' for k, v in value.items())
        facts[key.replace('_', ' ')] = _cell(key, value)
        if key == 'epsilon_by_accountant':
            used = f'the guarantee is that of {statement["accountant"]}, which is the one to quote'
            facts['why these differ'] = f'each accountant gives an upper bound of the same epsilon; {used}'
    return facts


def _meaning(statement: dict[str, Any]) -> str:
    """What the figures mean, and the table of them."""
    risk = statement.get('risk')
    words = risk_in_words(risk, guessed(statement))
    if not risk or not words:
        return ''
    rows = [f'| {name} | {" | ".join(cells)} |' for name, *cells in risk_rows(risk)]
    table = '\n'.join(['| | add or remove | replace one |', '| --- | --- | --- |', *rows])
    sentences = '\n'.join(f'- {sentence}' for sentence in words)
    return f'\n**What that means:**\n{sentences}\n\n{table}\n\nEpsilon (add or remove): {profile_in_words(risk)}.\n'


def guessed(statement: dict[str, Any]) -> str:
    """What an attacker guesses, for ``risk_in_words``."""
    hidden = bool(statement.get('public_views'))
    return "whether a given record's hidden part was used at all" if hidden else 'whether a given record was used'


def risk_rows(risk: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each risk figure's name, and its value for a record added or removed and for one replaced."""
    rows = [(name.replace('_', ' '), *_both(risk, name)) for name in risk['add_or_remove'] if name != _RATES]
    for rate in risk['add_or_remove'][_RATES]:
        rows.append((f'true positive rate at {rate} false positives', *_both(risk, _RATES, rate)))
    return rows


def profile_in_words(risk: dict[str, Any]) -> str:
    """Epsilon at several values of delta."""
    return ', '.join(f'{spent} at delta {delta}' for delta, spent in risk['profile'].items())


def _both(risk: dict[str, Any], name: str, rate: str | None = None) -> tuple[str, str]:
    """Two cells: a figure for a record added or removed, and for one replaced."""
    cells = []
    for relation in ('add_or_remove', 'replace_one'):
        found = risk[relation]
        value = found if isinstance(found, str) else found[name] if rate is None else found[name][rate]
        cells.append(as_given(value) if isinstance(value, float) else str(value))
    return cells[0], cells[1]


def _cell(key: str, value: Any) -> str:
    """A cell of the table: a computed epsilon is rounded up, everything else is printed as it is."""
    if not isinstance(value, float):
        return str(value)
    return rounded_up(value) if key.startswith(('epsilon', 'personal_epsilon')) else as_given(value)


def write_statement(statement: dict[str, Any], out_dir: str | os.PathLike[str]) -> None:
    """Writes privacy_statement.json, with its seal, and privacy_statement.md, each completely or not at all."""
    if 'schema_version' in statement:
        statement = complete(statement)
    for name, text in ((STATEMENT_NAME, statement_json(statement)), (PAGE_NAME, statement_markdown(statement))):
        path = Path(out_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(path.suffix + '.partial')
        partial.write_bytes(text.encode())  # whatever the locale: the statement has the hash of its page
        partial.replace(path)
