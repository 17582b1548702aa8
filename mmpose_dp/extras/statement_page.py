"""Writes the privacy statement as files: JSON, and a Markdown page.

Must not print an epsilon below the computed one, and must not add anything to the statement.
"""

import json
import os
from pathlib import Path
from typing import Any

from mmpose_dp.privacy.validation import as_given, rounded_up


def statement_markdown(statement: dict[str, Any]) -> str:
    """The statement as a Markdown page."""
    s, warning = dict(statement), ''
    if not s.pop('private'):
        warning = '> **NOT PRIVATE.** A debug seed was set or no noise was added: no figure below is a guarantee.\n\n'
    method, released = s.pop('method'), s.pop('released')
    not_protected, not_covered = (
        '\n'.join(f'- {item}' for item in s.pop(name)) for name in ('not_protected', 'not_covered')
    )
    page = f"""# Privacy statement

{warning}**Guarantee:** {s.pop('guarantee')}, by {method}, for {released}.

**Protected:** {s.pop('protected')}.

**Made indistinguishable:** {s.pop('adjacency')}.

**Not protected:**
{not_protected}

**Not covered by this statement:**
{not_covered}

| | |
| --- | --- |
"""
    for key, value in s.items():
        if isinstance(value, dict):
            value = ', '.join(f'{k}: {_cell(key, v)}' for k, v in value.items())
        page += f'| {key.replace("_", " ")} | {_cell(key, value)} |\n'
    return page


def _cell(key: str, value: Any) -> str:
    """A cell of the table: a computed epsilon is rounded up, everything else is printed as it is."""
    if not isinstance(value, float):
        return str(value)
    return rounded_up(value) if key.startswith(('epsilon', 'personal_epsilon')) else as_given(value)


def write_statement(statement: dict[str, Any], out_dir: str | os.PathLike[str]) -> None:
    """Writes privacy_statement.json and privacy_statement.md, each completely or not at all."""
    for name, text in (
        ('privacy_statement.json', json.dumps(statement, indent=2) + '\n'),
        ('privacy_statement.md', statement_markdown(statement)),
    ):
        path = Path(out_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(path.suffix + '.partial')
        partial.write_text(text)
        partial.replace(path)
