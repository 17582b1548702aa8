"""What lets a third party check a statement: its version and seal, and the hashes of what it belongs to.

The seal shows damage and careless editing. It is no signature: whoever forges a statement can seal it again, but then has to forge
the ledger and the checkpoint as well. Needs no torch. Must not look at private records.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from mmpose_dp.privacy.accounting import History, StepEvent
from mmpose_dp.privacy.errors import LedgerError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from mmpose_dp.version import __version__

SCHEMA_VERSION = '1.0'
STATEMENT_NAME, PAGE_NAME = 'privacy_statement.json', 'privacy_statement.md'
_ROOT = Path(__file__).parents[2]
_PACKAGES = {name: name for name in ('mmpose_dp', 'torch', 'numpy', 'opacus', 'dp-accounting', 'mmpose')}
_PACKAGES |= dict.fromkeys(('mmengine', 'mmengine-lite', 'onedl-mmengine'), 'mmengine')  # distributions of one package
_LONGEST = 500  # of the history in a statement; a longer one, of a schedule, is in the ledger alone


def seal_of(statement: dict[str, Any]) -> str:
    """SHA-256 over everything in a statement but its seal."""
    content = {key: value for key, value in statement.items() if key != 'seal'}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(statement: dict[str, Any]) -> dict[str, Any]:
    """A statement with its seal, last."""
    content = {key: value for key, value in statement.items() if key != 'seal'}
    return {**content, 'seal': seal_of(content)}


def plain_sha256(value: Any) -> str:
    """SHA-256 of a plain value: text, numbers, lists and dicts of these."""
    return hashlib.sha256(ascii(value).encode()).hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checkpoints_in(statement: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of the checkpoints that a statement names, by name."""
    last = statement['checkpoint']
    return {**statement.get('checkpoints', {}), **({str(last['file']): str(last['sha256'])} if last else {})}


def intact_statement(folder: Path) -> dict[str, Any] | None:
    """The statement in a work dir; None if there is none, or if its seal is broken."""
    try:
        statement = json.loads((folder / STATEMENT_NAME).read_text())
        return statement if seal_of(statement) == statement['seal'] else None
    except (AttributeError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def is_checkpoint_of(statement: dict[str, Any] | None, path: Path, sha256: str | None = None) -> bool | None:
    """Whether a checkpoint, whose ``sha256`` is computed here if it is not given, is the one that a statement has the SHA-256 of.

    None if there is none to compare.

    The checkpoint that follows an unfinished statement may have taken the place of one that the statement names.
    """
    wanted = None if statement is None else checkpoints_in(statement).get(path.name)
    if statement is None or wanted is None:
        return None
    return True if (sha256 or file_sha256(path)) == wanted else False if statement['checkpoint'] else None


def ledger_in_statement(ledger: Ledger) -> dict[str, Any]:
    """What a statement says of its ledger: the last line's hash, the number of lines, and the steps that epsilon follows from."""
    state = ledger.state_dict()
    history = state['entries'] if len(state['entries']) <= _LONGEST else None
    return {'head': state['head'], 'lines': state['lines'], 'history': history}


def project() -> dict[str, str]:
    """Name, version and commit of this project."""
    return {'name': 'mmpose_dp', 'version': __version__, 'commit': _commit()}


@lru_cache(maxsize=1)
def _commit() -> str:
    """The commit of a clone, with '-dirty' if files were changed, or of an install from a repository; else 'not known'."""
    if (_ROOT / '.git').exists():
        command = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude', '*']
        with suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=20, check=True)
            return found.stdout.strip() or 'not known'
    with suppress(PackageNotFoundError, ValueError, LookupError, TypeError):
        origin = json.loads(distribution('mmpose_dp').read_text('direct_url.json') or '{}')
        return str(origin['vcs_info']['commit_id'])
    return 'not known'


def versions() -> dict[str, str]:
    """The versions of the packages that matter."""
    found = {}
    for name, package in _PACKAGES.items():
        with suppress(PackageNotFoundError):
            found[package] = version(name)
    return found


def ledger_up_to(data: bytes, stated: dict[str, Any]) -> Ledger:
    """The ledger in a file's bytes as far as a statement's ``ledger`` counts it.

    Raises LedgerError if the file was cut, changed, or belongs to another statement.
    """
    lines = data.split(b'\n')[:-1]
    if len(lines) < stated['lines']:
        raise LedgerError(
            f'{LEDGER_NAME} was cut: it has {len(lines)} lines, and the statement knows {stated["lines"]}'
        )
    ledger = Ledger.parse(b''.join(line + b'\n' for line in lines[: stated['lines']]))
    if ledger.head != stated['head']:
        raise LedgerError(
            f'the statement belongs to another ledger than {LEDGER_NAME}, or to a copy that went on apart'
        )
    return ledger


def history_of(entries: Sequence[Sequence[Any]]) -> History:
    """The steps that a statement or a checkpoint names, [noise_multiplier, sample_rate, steps] each."""
    return [(StepEvent(sigma, Fraction(rate)), steps) for sigma, rate, steps in entries]
