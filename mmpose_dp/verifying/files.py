"""The checkpoints, published files and configs beside a statement, and the names of the files that nobody looked at.

Must name every checkpoint whose weights no hash covers, and must say which file a hash is of.
"""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmpose_dp.extras.checkpoint_file import CheckpointFile
from mmpose_dp.extras.evidence import (
    STATEMENT_NAME,
    checkpoints_in,
    file_sha256,
    intact_statement,
    is_checkpoint_of,
    seal_of,
)

from .findings import Evidence, Findings, inside
from .inside import check_inside
from .published import Published, read_published, safetensors_sha256

_RESUME = re.compile(r"""resume = (True|False)|load_from = (None|'[^']*'|"[^"]*")""")


# ---- checkpoints -------------------------------------------------------------------------------------------------------
def check_checkpoints(files: Evidence, found: Findings) -> None:
    """Every checkpoint in the folder, or the one that was opened: by its hash where a statement has it, and by what is in it."""
    statement = intact_statement(files.folder) if files.opened is not None else files.statement
    paths = [files.opened] if files.opened is not None else sorted(files.folder.glob('*.pth'))
    for path in paths:
        found.looked_at.add(path)
        try:
            file = CheckpointFile.read(path)
        except ValueError as error:
            found.wrong.append(str(error))
            continue
        if 'privacy_statement' in file.values:
            _check_published(path, files, found)
        else:
            _check_unpublished(path, file, files, statement, found)
    if files.opened is not None:
        return
    if files.statement['checkpoint'] is None:
        found.unchecked.append('the last checkpoint: the statement was written before it (was training interrupted?)')
    here = {path.name for path in paths}
    found.unchecked += [f'{name}: it is not here' for name in checkpoints_in(files.statement) if name not in here]


def _check_unpublished(
    path: Path, file: CheckpointFile, files: Evidence, statement: dict[str, Any] | None, found: Findings
) -> None:
    """A checkpoint of a training: its bytes if a hash is known, and its steps."""
    same, whose = is_checkpoint_of(statement, path), STATEMENT_NAME if files.opened is not None else 'this statement'
    if same is None:
        found.unchecked.append(
            f'{path.name}: its weights. No statement here has its hash, so it may have been changed, and loading it can run code'
        )
    else:
        found.expect(same, f'{path.name} is a checkpoint of {whose}', f'{path.name} is not the checkpoint of {whose}')
    if statement is not None and same and (statement['checkpoint'] or {}).get('file') == path.name:
        right, wrong = (f'weights_sha256 {words} that of the weights in {path.name}' for words in ('is', 'is not'))
        found.expect(statement['weights_sha256'] == (file.weights_sha256 or None), right, wrong)
    privacy = inside(file.values)
    if statement is not None and 'statement' in privacy and (same or files.opened is None):
        check_inside(path.name, privacy['statement'], statement, found)
    state = privacy.get('ledger')
    if not isinstance(state, dict):
        if same:  # a statement names the checkpoints of its training, and no others
            found.wrong.append(f'{path.name}: {whose} names it as a checkpoint, and no private training wrote it')
        else:
            found.unchecked.append(f'{path.name}: where it is from. No private training of this project wrote it')
    elif files.ledger_file is not None:
        _check_covered(path.name, state, files, found)


def _check_covered(name: str, state: dict[str, Any], files: Evidence, found: Findings) -> None:
    """A checkpoint must be of this ledger, and not later than the statement."""
    heads = _heads_of((files.ledger_file or b'').split(b'\n')[: files.statement['ledger']['lines']])
    right, wrong = (f'{name}: its steps are {words} those of this statement' for words in ('among', 'not among'))
    found.expect(state.get('head') in heads, right, wrong)


def _heads_of(lines: list[bytes]) -> list[str]:
    """The hashes of a ledger's lines, without those of damaged ones, of which another line tells."""
    heads = []
    for line in lines:
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            heads.append(json.loads(line)['hash'])
    return heads


def _check_published(path: Path, files: Evidence, found: Findings) -> None:
    """A published file must have its one form, and weights and meta as the statement in it says."""
    name = path.name
    try:
        published = read_published(path.read_bytes())
    except ValueError as error:
        found.wrong.append(f'{name} is not as tools/publish_model.py writes it, so do not load it: {error}')
        return
    statement = published.statement
    intact = seal_of(statement) == statement.get('seal') and statement.get('weights_sha256') == published.weights_sha256
    right, wrong = f'{name} has the weights of its statement', f'{name} does not have the weights of its statement'
    found.expect(intact, f'{right}, and one form for every reader', wrong)
    _check_meta(name, published, found)
    if files.opened is None and not files.published:
        check_inside(name, statement, files.statement, found)
    elif files.opened is None:
        same = statement == files.statement
        found.expect(same, f'{name} has the statement of the folder', f'{name} has another statement than the folder')
    if files.ledger_file is not None:
        _check_covered(name, statement.get('ledger') or {}, files, found)


def _check_meta(name: str, published: Published, found: Findings) -> None:
    stated = published.statement.get('meta_sha256')
    if stated is None:
        found.unchecked.append(
            f'{name}: its joints and what its training started from (meta), of which the statement has no hash'
        )
        return
    right, wrong = f'{name} has the meta of its statement', f'{name}: its meta was changed'
    found.expect(published.meta_sha256 == stated, right, wrong)


# ---- a published folder ------------------------------------------------------------------------------------------------
def check_published_files(files: Evidence, found: Findings) -> None:
    """The other files of a published folder, by their hashes; the weights in safetensors also by their numbers."""
    for name, wanted in files.statement.get('published_files', {}).items():
        path = files.folder / name
        if Path(name).name != name or not path.is_file():
            found.unchecked.append(f'{name}: it is not here')
            continue
        found.looked_at.add(path)
        data = path.read_bytes()
        same = hashlib.sha256(data).hexdigest() == wanted
        found.expect(same, f'{name} was published with this statement', f'{name} was changed')
        if path.suffix == '.safetensors':
            _check_safetensors(name, data, files.statement['weights_sha256'], found)
        elif path.suffix == '.onnx':
            found.unchecked.append(f'{name}: whether it computes what the weights do; only its hash was compared')


def _check_safetensors(name: str, data: bytes, wanted: str, found: Findings) -> None:
    try:
        same = safetensors_sha256(data) == wanted
    except Exception as error:  # a file can be wrong in any way
        found.wrong.append(
            f'{name} is not as safetensors writes it, so do not load it: {error or type(error).__name__}'
        )
        return
    found.expect(same, f'{name} has the weights of the statement', f'{name} does not have the weights of the statement')


# ---- configs -----------------------------------------------------------------------------------------------------------
def check_config(files: Evidence, found: Findings) -> None:
    """Every copy of the config in a work dir. Earlier and later runs there may have had others, whose copies are named."""
    stated = files.statement['config_sha256']
    if files.published:
        found.unchecked.append("the training's config: only its hash is published")
        return
    runs = sorted(files.folder.glob('*/vis_data/config.py'))
    hashes = {path: file_sha256(path) for path in [*sorted(files.folder.glob('*.py')), *runs]}
    if not hashes or stated is None:
        found.unchecked.append('the config: there is none here')
        return
    found.looked_at |= set(hashes)
    same, others = ([path for path in hashes if (hashes[path] == stated) is wanted] for wanted in (True, False))
    if files.opened is not None and not same:
        found.unchecked.append('the config of this checkpoint: it is not here')
        return
    found.expect(bool(same), _are(same, files), 'no config here is that of this statement')
    for path in others:
        where = path.relative_to(files.folder)
        if any(_differ_by_resume(path, one) for one in same):  # of one training, before and after a resume
            found.unchecked.append(
                f'{where}: what it resumes from. It is else the config of this statement, as a resume leaves it'
            )
            continue
        # another run in the work dir, such as a resume or a test, leaves its own config in its folder and above
        of_a_run = len(runs) > 1 and hashes[path] in {hashes[run] for run in runs}
        if of_a_run or files.opened is not None:
            found.warnings.append(f'{where} is another config than that of this statement: of another run, or changed')
        else:
            found.wrong.append(f'{where} is not the config of this statement: it was changed, or does not belong here')


def _differ_by_resume(*paths: Path) -> bool:
    """Whether two configs are the same but for what --resume sets: ``resume``, and ``load_from`` with it."""
    texts = [path.read_text(errors='replace').splitlines() for path in paths]
    first, second = ([line for line in text if not _RESUME.fullmatch(line)] for text in texts)
    return first == second and any('resume = True' in text for text in texts)


def _are(paths: list[Path], files: Evidence) -> str:
    names = [str(path.relative_to(files.folder)) for path in paths]
    return f'{" and ".join(names)} {"is" if len(names) == 1 else "are"} the config of this statement'


# ---- the rest ----------------------------------------------------------------------------------------------------------
def name_the_unseen(files: Evidence, found: Findings) -> None:
    """Names the files of the folder that no check looked at, those that people open first."""
    if files.opened is not None:
        return
    rest = [path for path in files.folder.rglob('*') if path.is_file() and path not in found.looked_at]
    rest.sort(key=lambda path: (len(path.relative_to(files.folder).parts), path))
    found.unseen += [str(path.relative_to(files.folder)) for path in rest]
