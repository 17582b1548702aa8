"""What a verification finds, and the files that belong together.

Must not check anything itself.
"""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmpose_dp.extras.checkpoint_file import CheckpointFile
from mmpose_dp.extras.evidence import PAGE_NAME, STATEMENT_NAME
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME

NEVER_CHECKED = (
    'whether the training did what the ledger says: that sampling, clipping and noise were as stated needs the code and the '
    'machine',
    'who wrote these files: they have hashes and no signature, so somebody could forge all of them together',
)


@dataclass
class Findings:
    """What was checked, what is wrong, what could not be checked and what a reader must not miss, in words."""

    checked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    looked_at: set[Path] = field(default_factory=set)  # the files that a line is about
    unseen: list[str] = field(default_factory=list)  # the others in the folder
    confirmed: bool = False  # a checkpoint's own statement says the same

    def expect(self, holds: bool, right: str, wrong: str) -> bool:
        """Notes one check."""
        (self.checked if holds else self.wrong).append(right if holds else wrong)
        return holds

    def __str__(self) -> str:
        lines = [f'checked      {text}' for text in self.checked]
        rest = [f'files here that were not looked at, {len(self.unseen)}: {named(self.unseen)}'] if self.unseen else []
        lines += [f'NOT CHECKED  {text}' for text in (*self.unchecked, *rest, *NEVER_CHECKED)]
        lines += [f'WARNING      {text}' for text in self.warnings]
        lines += [f'WRONG        {text}' for text in self.wrong]
        if self.wrong:
            return '\n'.join([*lines, 'The statement does not hold together: do not rely on it.'])
        end = 'Nothing that was checked is wrong.'
        return '\n'.join([*lines, f'{end} Read the warnings above.' if self.warnings else end])


@dataclass(frozen=True)
class Evidence:
    """The files that belong together: a statement, and the files in its folder."""

    folder: Path
    statement: Any  # None if there is none
    text: str | None = None  # of the statement's file
    opened: Path | None = None  # the checkpoint in which the statement was
    published: bool = False  # whether that one, or the whole folder, was written by tools/publish_model.py

    @classmethod
    def at(cls, path: Path) -> 'Evidence':
        """The files of a work dir, of a statement, a ledger or a checkpoint. Raises PrivacyError for something else."""
        if path.suffix == '.pth' and path.is_file():
            return cls._inside(path)
        if path.is_dir():
            path = path / STATEMENT_NAME
            if not path.is_file() and not (path.parent / LEDGER_NAME).is_file():
                raise PrivacyError(f'{path.parent} holds neither {STATEMENT_NAME} nor {LEDGER_NAME}')
        elif not path.is_file():
            raise PrivacyError(f'{path}: there is no such file or folder')
        elif path.suffix == '.jsonl' or path.name == PAGE_NAME:
            path = path.parent / STATEMENT_NAME
        if not path.is_file():
            return cls(path.parent, None)
        try:
            text = path.read_bytes().decode()
            statement = json.loads(text)
            return cls(path.parent, statement, text, published='published_files' in statement)
        except (TypeError, ValueError, RecursionError) as error:
            if path.name == STATEMENT_NAME:
                raise PrivacyError(f'{path} is damaged: {error}') from error
            raise PrivacyError(
                f'{path} is no privacy statement ({error}): give a work dir, its {STATEMENT_NAME} or {LEDGER_NAME}, or a checkpoint'
            ) from error

    @classmethod
    def _inside(cls, path: Path) -> 'Evidence':
        try:
            values = CheckpointFile.read(path).values
        except ValueError as error:
            raise PrivacyError(f'{path}: {error}') from error
        statement = values.get('privacy_statement') or inside(values).get('statement')
        if not isinstance(statement, dict):
            raise PrivacyError(f'{path} holds no privacy statement: no private training made it, or an older version')
        return cls(path.parent, statement, opened=path, published='privacy_statement' in values)

    @cached_property
    def ledger_file(self) -> bytes | None:
        """The ledger's bytes, if it is there."""
        path = self.folder / LEDGER_NAME
        return path.read_bytes() if path.is_file() else None


def inside(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a training put into its checkpoint about privacy."""
    found = checkpoint.get('privacy')
    return found if isinstance(found, dict) else {}


def named(values: list[str], most: int = 20) -> str:
    """A list in words, and how many more there are."""
    more = len(values) - most
    return ', '.join(values[:most]) + (f' and {more} more' if more > 0 else '')
