"""Finding what a training resumes from: an intact checkpoint, and the ledger beside it.

Must not guess what was spent: without the ledger there is no resume.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import CheckpointLoader, Runner

from mmpose_dp.privacy import LEDGER_NAME, Ledger, PrivacyError

from .provenance import CHECKPOINT_KEY, part_of, spent_in

_NEEDED = ('meta', 'state_dict', 'message_hub')


def newest_checkpoint(work_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a work dir that was written to its end; a kill can leave half of one behind."""
    found = [path for path in Path(work_dir).glob('*.pth') if not path.name.startswith('best_') and is_intact(path)]
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None


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
        chosen = [newest_checkpoint(runner.work_dir)]
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
    folder = Path(runner._load_from).parent if resuming else Path(runner.work_dir)
    path, shared = folder / LEDGER_NAME, [None, None]
    if is_main_process() and path.is_file():
        shared = [path.read_bytes(), None]
    elif is_main_process() and not resuming:
        shared = [None, _spent_without_ledger(folder)]
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


def _spent_without_ledger(folder: Path) -> str | None:
    """A checkpoint in a work dir without a ledger that private steps made."""
    found = sorted(path for path in folder.glob('*.pth') if is_intact(path))
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
