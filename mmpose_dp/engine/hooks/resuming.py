"""Finding what a training resumes from: an intact checkpoint, and the ledger beside it.

Must not guess what was spent: without the ledger there is no resume.
"""

import glob
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import CheckpointLoader, Runner

from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger

from .provenance import CHECKPOINT_KEY, part_of, spent_in

_NEEDED = ('meta', 'state_dict', 'message_hub')


def checkpoint_folders(work_dir: str | os.PathLike[str], out_dir: Any = None) -> list[str]:
    """Where a training's checkpoints are: its work dir and, last, where ``CheckpointHook.out_dir`` puts them."""
    work_dir = os.fspath(work_dir)
    if out_dir in (None, work_dir):
        return [work_dir]
    name = os.path.basename(os.path.abspath(work_dir))
    return [work_dir, f'{str(out_dir).rstrip("/")}/{name}']


def newest_checkpoint(
    work_dir: str | os.PathLike[str], out_dir: Any = None, filename_tmpl: str | None = None
) -> str | None:
    """The newest checkpoint of a training that was written to its end; a kill can leave half of one behind.

    Args:
        work_dir: of the training.
        out_dir, filename_tmpl: CheckpointHook's. What is on a remote storage is found by the name that mmengine leaves in the
            work dir.
    """
    found = [path for path in _checkpoints(work_dir, out_dir, filename_tmpl) if not path.name.startswith('best_')]
    found = [path for path in found if is_intact(path)]
    if found:
        return str(max(found, key=lambda path: path.stat().st_mtime))
    last = Path(work_dir) / 'last_checkpoint'
    named = last.read_text().strip() if '://' in str(out_dir or '') and last.is_file() else ''
    return named or None


def _checkpoints(work_dir: str | os.PathLike[str], out_dir: Any, filename_tmpl: str | None) -> list[Path]:
    """Every file that is named as a checkpoint; published statements and the like are not."""
    patterns = {'*.pth'}
    if isinstance(filename_tmpl, str):
        patterns |= {re.sub(r'\{[^}]*\}', '*', glob.escape(filename_tmpl))}
    folders = [Path(folder) for folder in checkpoint_folders(work_dir, out_dir) if '://' not in folder]
    found = {path for folder in folders for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.name != LEDGER_NAME)


def _kept_by(runner: Runner) -> dict[str, Any]:
    """Where and under what names a runner's checkpoints are kept."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    return {} if hook is None else dict(out_dir=hook.out_dir, filename_tmpl=hook.filename_tmpl)


def is_intact(path: Path) -> bool:
    """Whether a file can be a whole checkpoint: torch's zip archive with its end, or the older pickle."""
    if zipfile.is_zipfile(path):
        return True
    with open(path, 'rb') as file:
        start = file.read(4)
    return start[:1] == b'\x80' and start[:2] != b'PK'


def find_start(runner: Runner) -> None:
    """Settles what to load, and refuses what cannot be loaded. Raises PrivacyError."""
    if runner._resume and not runner._load_from:
        chosen = [newest_checkpoint(runner.work_dir, **_kept_by(runner))]
        broadcast_object_list(chosen)  # all ranks go on from the same one
        runner._load_from = chosen[0]
    start = runner._load_from
    if start and '://' not in str(start):
        start = runner._load_from = os.path.expanduser(start)  # as mmengine reads it
        if not os.path.isfile(start):
            raise PrivacyError(f'load_from={start}: there is no such file')
        if not is_intact(Path(start)):
            raise PrivacyError(f'load_from={start} is damaged or no checkpoint; give an intact one')
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.max_keep_ckpts == 1:
            raise PrivacyError(
                'default_hooks.checkpoint.max_keep_ckpts=1 deletes the only checkpoint before the next one is written, so '
                'a kill in between loses the training: write 2 or more'
            )


def open_ledger(runner: Runner) -> Ledger:
    """The ledger that this training goes on with: of the checkpoint's folder on resume, else of the work dir.

    One folder is one budget: what earlier trainings in it have spent counts. Raises PrivacyError for a damaged one, and for
    a resume without one.
    """
    resuming = runner._resume and runner._load_from
    folder = _folder_of_ledger(runner) if resuming else Path(runner.work_dir)
    path, shared = folder / LEDGER_NAME, [None, None]
    if is_main_process() and path.is_file():
        shared = [path.read_bytes(), None]
    elif is_main_process() and not resuming:
        shared = [None, _spent_without_ledger(runner)]
    broadcast_object_list(shared)
    if shared[1] is not None:
        raise PrivacyError(
            f'{path} is missing, and {shared[1]} beside it is of a private training: what that spent would not be counted. '
            'Put the ledger back, or give another work_dir'
        )
    if shared[0] is not None:
        return Ledger.parse(shared[0], str(path))
    if resuming:
        raise PrivacyError(
            f'{path} is missing, so what {runner._load_from} has spent is not known: put the ledger back beside the '
            'checkpoint. To start a new private training from its weights, use load_from without resume'
        )
    return Ledger()


def _folder_of_ledger(runner: Runner) -> Path:
    """The folder of the checkpoint to resume from; the work dir where the checkpoint lies in ``CheckpointHook.out_dir``."""
    beside = os.path.dirname(str(runner._load_from))
    kept = checkpoint_folders(runner.work_dir, _kept_by(runner).get('out_dir'))
    elsewhere = '://' in beside or os.path.realpath(beside) in [os.path.realpath(folder) for folder in kept]
    return Path(runner.work_dir if elsewhere else beside)


def _spent_without_ledger(runner: Runner) -> str | None:
    """A checkpoint of this work dir that private steps made; there is no ledger."""
    settings = {'out_dir': None, 'filename_tmpl': None, **_kept_by(runner)}
    found = [path for path in _checkpoints(runner.work_dir, **settings) if is_intact(path)]
    spent = (str(path) for path in found if spent_in(CheckpointLoader.load_checkpoint(str(path), 'cpu')))
    return next(spent, None)


def check_resumed(checkpoint: Any, ledger: Ledger) -> None:
    """Raises PrivacyError unless a checkpoint can be resumed from and the ledger holds all that it has spent."""
    missing = [name for name in _NEEDED if not isinstance(checkpoint, dict) or name not in checkpoint]
    if missing:
        raise PrivacyError(
            f'the checkpoint to resume from lacks {", ".join(missing)}: it holds weights only. Use load_from without resume'
        )
    privacy = part_of(checkpoint, CHECKPOINT_KEY)
    if 'ledger' not in privacy:
        raise PrivacyError(
            'the checkpoint to resume from has no privacy ledger, so what it has spent is unknown. To start a new '
            'private training from its weights, use load_from without resume'
        )
    ledger.check_covers(privacy['ledger'])
