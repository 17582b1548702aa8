"""Finds what a training resumes from: an intact checkpoint and the ledger beside it.

Must not guess what was spent: without the ledger there is no resume.
"""

import ast
import contextlib
import glob
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import CheckpointLoader, Runner
from torch import nn
from torch.serialization import MAGIC_NUMBER

from mmpose_dp.extras.checkpoint_file import plain_values
from mmpose_dp.extras.evidence import STATEMENT_NAME, intact_statement
from mmpose_dp.models import read_checkpoint
from mmpose_dp.privacy.errors import ConfigError, LedgerError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger

from ..checks.own_state import own_state
from .provenance import CHECKPOINT_KEY, part_of, spent_in

_NEEDED = ('meta', 'state_dict', 'message_hub')


def checkpoint_folders(work_dir: str | os.PathLike[str], out_dir: Any = None) -> list[str]:
    """The folders of a training's checkpoints: its work dir and, last, the folder below ``CheckpointHook.out_dir``."""
    work_dir = os.fspath(work_dir)
    if out_dir in (None, work_dir):
        return [work_dir]
    name = os.path.basename(os.path.abspath(work_dir))
    return [work_dir, f'{str(out_dir).rstrip("/")}/{name}']


def newest_checkpoint(
    work_dir: str | os.PathLike[str], out_dir: Any = None, filename_tmpl: str | None = None
) -> str | None:
    """The newest complete checkpoint of a training; a kill can leave an incomplete one.

    The newest is the one that has seen the most: lines of the ledger, then epochs, then steps. Times of files count only where a
    checkpoint has none of these, since a copy of a folder gives all files new ones.

    Args:
        work_dir: that of the training.
        out_dir, filename_tmpl: CheckpointHook's. On remote storage, the checkpoint is the one that mmengine named in the work
            dir.
    """
    found = [path for path in _checkpoints(work_dir, out_dir, filename_tmpl) if not path.name.startswith('best_')]
    found = [path for path in found if is_intact(path)]
    if found:
        return str(max(found, key=lambda path: (*_progress(path), path.stat().st_mtime)))
    last = Path(work_dir) / 'last_checkpoint'
    named = last.read_text().strip() if '://' in str(out_dir or '') and last.is_file() else ''
    return named or None


def _progress(path: Path) -> tuple[int, ...]:
    """How many lines of the ledger, epochs and steps a checkpoint has seen; -1 for what it does not hold."""
    values = plain_values(path)
    ledger, meta = part_of(part_of(values, CHECKPOINT_KEY), 'ledger'), part_of(values, 'meta')
    seen = ledger.get('lines'), meta.get('epoch'), meta.get('iter')
    return tuple(value if type(value) is int else -1 for value in seen)


def _checkpoints(work_dir: str | os.PathLike[str], out_dir: Any, filename_tmpl: str | None) -> list[Path]:
    """Every file with the name of a checkpoint."""
    patterns = {'*.pth'}
    if isinstance(filename_tmpl, str):
        patterns |= {re.sub(r'\{[^}]*\}', '*', glob.escape(filename_tmpl))}
    folders = [Path(folder) for folder in checkpoint_folders(work_dir, out_dir) if '://' not in folder]
    found = {path for folder in folders for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file() and path.name != LEDGER_NAME)


def checkpoint_settings(runner: Runner) -> dict[str, Any]:
    """The folder and the file names of a runner's checkpoints."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    return {} if hook is None else dict(out_dir=hook.out_dir, filename_tmpl=hook.filename_tmpl)


_OLDER = pickle.dumps(MAGIC_NUMBER, protocol=2)  # begins a checkpoint of torch before 1.6
_OF_SCRIPTS = 'constants.pkl'


def is_intact(path: Path) -> bool:
    """Whether a file can be a complete checkpoint: torch's zip archive with its end, or the older pickle."""
    if zipfile.is_zipfile(path):
        members = _members(path)
        return 'data.pkl' in members and _OF_SCRIPTS not in members
    with open(path, 'rb') as file:
        return file.read(len(_OLDER)) == _OLDER


def _members(path: Path) -> set[str]:
    """The names of the files in a zip archive, without their folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.partition('/')[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError):
        return set()


def damage_in_words(path: Path) -> str:
    """What is wrong with a file that is not intact as a checkpoint, and what to give instead."""
    if zipfile.is_zipfile(path) and _OF_SCRIPTS in _members(path):
        return (
            f'{path} is a TorchScript archive: save its weights, with torch.save(torch.jit.load(...).state_dict(), ...)'
        )
    if path.suffix != '.safetensors':
        return f'{path} is damaged or not a checkpoint: give an intact one'
    save = f"torch.save(dict(state_dict=safetensors.torch.load_file('{path.name}')), '{path.stem}.pth')"
    return (
        f'{path} is a safetensors file, and a checkpoint of torch is wanted, which can also say what its weights were trained '
        f'on: give the .pth file of the same weights, or write one, with {save}'
    )


def refuse_no_path(load_from: Any) -> None:
    """Raises ConfigError for a load_from that is neither a path nor nothing."""
    if load_from is not None and (not load_from or not isinstance(load_from, (str, os.PathLike))):
        raise ConfigError(f'load_from={load_from!r} must be the path of one checkpoint, as text, or None')


def refuse_nothing_to_resume(work_dir: str | os.PathLike[str]) -> None:
    """Raises ConfigError for a folder without a ledger, which has no checkpoint either: its name may be misspelled."""
    if not (Path(work_dir) / LEDGER_NAME).is_file():
        raise ConfigError(
            f'there is nothing to resume in {work_dir}, neither a checkpoint nor {LEDGER_NAME}: leave out --resume (or '
            'resume=True) to spend a new budget'
        )


def find_start(runner: Runner) -> None:
    """Finds the checkpoint to load.

    Raises ConfigError for one that cannot be loaded, for a resume of nothing, and for settings that could lose a checkpoint.
    """
    if runner._resume and not runner._load_from:
        chosen = [newest_checkpoint(runner.work_dir, **checkpoint_settings(runner))]
        broadcast_object_list(chosen)  # all ranks continue from the same one
        runner._load_from = chosen[0]
        if chosen[0] is None:
            refuse_nothing_to_resume(runner.work_dir)
    start = runner._load_from
    refuse_no_path(start)
    if start and '://' not in str(start):
        start = runner._load_from = os.path.expanduser(start)  # as mmengine does
        if not os.path.isfile(start):
            raise ConfigError(f'load_from={start}: there is no such file')
        if not is_intact(Path(start)):
            raise ConfigError(f'load_from={damage_in_words(Path(start))}')
        read_checkpoint(start, 'load_from')
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.max_keep_ckpts == 1:
            raise ConfigError(
                'default_hooks.checkpoint.max_keep_ckpts=1 deletes the only checkpoint before the next one is written, so '
                'a kill in between would lose the training: write 2 or more'
            )


def open_ledger(runner: Runner) -> Ledger:
    """The ledger that this training continues: on resume that in the checkpoint's folder, otherwise that in the work dir.

    One folder is one budget: what earlier trainings in it spent counts. Raises LedgerError if the ledger is damaged, or missing
    on resume or beside the checkpoint of a private training.
    """
    resuming = runner._resume and runner._load_from
    folder = _folder_of_ledger(runner) if resuming else Path(runner.work_dir)
    path = folder / LEDGER_NAME
    shared: list[Any] = [None, None]  # the ledger's content, or a checkpoint that should have a ledger
    if is_main_process() and path.is_file():
        shared = [path.read_bytes(), None]
    elif is_main_process() and not resuming:
        shared = [None, _spent_without_ledger(runner)]
    broadcast_object_list(shared)
    if shared[1] is not None:
        raise LedgerError(
            f'{path} is missing, but {shared[1]} is from a private training, whose steps would not be counted: put the ledger '
            'back, or write another work_dir'
        )
    if shared[0] is None and resuming:
        newest = newest_checkpoint(runner.work_dir, **checkpoint_settings(runner))  # load_from may still be the start
        raise LedgerError(
            f'{path} is missing, so what {runner._load_from} has spent is unknown: put the ledger back beside the '
            'checkpoint. To start a new private training from its weights, use load_from without resume'
            + (f'. To go on from {newest}, write load_from=None' if newest else '')
        )
    ledger = Ledger.parse(shared[0] or b'', str(path))
    if is_main_process():
        for one in (folder, runner.work_dir):
            resumed = str(runner._load_from) if resuming else ''
            refuse_older_ledger(ledger, one, **checkpoint_settings(runner), resumed=resumed)
    return ledger


def refuse_older_ledger(
    ledger: Ledger,
    work_dir: str | os.PathLike[str],
    out_dir: Any = None,
    filename_tmpl: str | None = None,
    resumed: str = '',
) -> None:
    """Raises LedgerError if the statement, or a checkpoint, of a work dir knows of steps that the ledger lacks.

    The ledger was then put back, cut or exchanged.

    Args:
        ledger: that of the work dir.
        work_dir: where to look.
        out_dir, filename_tmpl: CheckpointHook's.
        resumed: the checkpoint to resume from, at which ``check_resumed`` looks.
    """
    heads, known = {line['hash'] for line in ledger.lines}, {STATEMENT_NAME: intact_statement(Path(work_dir))}
    own = [path for path in _checkpoints(work_dir, out_dir, filename_tmpl) if path != Path(resumed)]
    known |= {path.name: kept_privacy(path) for path in own}
    for name, holder in known.items():
        state = part_of(holder, 'ledger')
        if state.get('lines') and state.get('head') not in heads:
            raise LedgerError(
                f'{name} in {work_dir} states steps that {LEDGER_NAME} does not have, so they would not be counted: an older copy '
                'of the ledger, or another one, was put in its place. Put the ledger back, or write another work_dir. (A '
                'checkpoint of another training belongs in another folder)'
            )


def kept_privacy(path: Path) -> dict:
    """What a checkpoint file holds of privacy, without reading its tensors; empty for another file."""
    return part_of(plain_values(path), CHECKPOINT_KEY)


def ledger_elsewhere(runner: Runner) -> str:
    """A sentence if a resume goes on in another folder than the ledger that it read; else empty."""
    folder = _folder_of_ledger(runner)
    if os.path.realpath(folder) == os.path.realpath(runner.work_dir):
        return ''
    return (
        f'This training goes on in {runner.work_dir}, and its steps are in the ledger there: {folder / LEDGER_NAME} does not count '
        'them. If the training in that folder goes on too, add both with tools/privacy_ledger.py add.'
    )


def _folder_of_ledger(runner: Runner) -> Path:
    """The folder of the checkpoint to resume from; the work dir if the checkpoint is in ``CheckpointHook.out_dir``."""
    beside = os.path.dirname(str(runner._load_from))
    kept = checkpoint_folders(runner.work_dir, checkpoint_settings(runner).get('out_dir'))
    elsewhere = '://' in beside or os.path.realpath(beside) in [os.path.realpath(folder) for folder in kept]
    return Path(runner.work_dir if elsewhere else beside)


def _spent_without_ledger(runner: Runner) -> str | None:
    """A checkpoint of this work dir that comes from private steps, for a work dir without a ledger."""
    settings = {'out_dir': None, 'filename_tmpl': None, **checkpoint_settings(runner)}
    found = [path for path in _checkpoints(runner.work_dir, **settings) if is_intact(path)]
    spent = (str(path) for path in found if spent_in(CheckpointLoader.load_checkpoint(str(path), 'cpu')))
    return next(spent, None)


def check_resumed(checkpoint: Any, ledger: Ledger) -> None:
    """Raises LedgerError unless a checkpoint can be resumed from and the ledger holds everything it spent."""
    missing = [name for name in _NEEDED if not isinstance(checkpoint, dict) or name not in checkpoint]
    if missing:
        raise LedgerError(
            f'the checkpoint to resume from lacks {", ".join(missing)}: it holds weights only. Use load_from without resume'
        )
    privacy = part_of(checkpoint, CHECKPOINT_KEY)
    if 'ledger' not in privacy:
        raise LedgerError(
            'the checkpoint to resume from has no privacy ledger, so what it has spent is unknown. To start a new '
            'private training from its weights, use load_from without resume'
        )
    ledger.check_covers(privacy['ledger'])


def other_view_source(ledger: Ledger, source: str | None) -> str:
    """A sentence if the public view follows something else than in the last training of the ledger; else empty.

    ``source``: PublicPrivateDataset's ``view_source``. Older ledgers do not have it.
    """
    before = ledger.runs[-1].get('view_source') if ledger.runs else None
    if None in (before, source) or before == source:
        return ''
    return (
        f'train_dataloader.dataset.private: the {str(before).partition(" (")[0]} in its annotation file, or the steps of its '
        'pipeline before GetBBoxCenterScale, are not those of the training before, and the public view follows them: a picture in '
        'which they differ gets a second view, and two views together show more than one'
    )


def check_same_view_source(ledger: Ledger, source: str | None) -> None:
    """Raises ConfigError if a resume has ``other_view_source``."""
    if words := other_view_source(ledger, source):
        raise ConfigError(
            f'{words}. Put the old file and pipeline back, or, if both views may be known, start a new training with load_from'
        )


def check_same_optimizer(checkpoint: Any, cfg: Any) -> None:
    """Raises ConfigError if a checkpoint holds the state of another optimizer than the config's, which cannot be gone on with."""
    for key in ('optimizer', 'public_optimizer'):
        old = _optimizer_in(str(part_of(checkpoint, 'meta').get('cfg', '')), key)
        new = ((cfg.get('optim_wrapper') or {}).get(key) or {}).get('type')
        new = getattr(new, '__name__', new)
        if old and new and old.rpartition('.')[2] != new.rpartition('.')[2]:
            raise ConfigError(
                f'optim_wrapper.{key}: the checkpoint to resume from was trained with {old}, and the config says {new}. Put '
                f'{old} back, or start anew in another work_dir'
            )


def check_same_model(checkpoint: Any, model: nn.Module) -> None:
    """Raises ConfigError if a checkpoint lacks a tensor of the model: an init_cfg's, or a random one, would stay."""
    weights = part_of(checkpoint, 'state_dict').items()
    shapes = {str(name).removeprefix('module.'): getattr(value, 'shape', None) for name, value in weights}
    for name, value in own_state(model).items():
        if shapes.get(name) != value.shape:
            raise ConfigError(
                f'the checkpoint to resume from has no {name} of shape {tuple(value.shape)}, which the model of this config has: '
                'the statement could not say where its values come from. Put the old model, optim_wrapper.norm and trainable back, '
                'or start a new training with load_from'
            )


def _optimizer_in(text: str, key: str) -> str:
    """The type of ``optim_wrapper[key]`` in a config's text, which is not run; empty if it does not say."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == 'optim_wrapper':
                kind = _argument(_argument(node.value, key), 'type')
                return str(kind.value) if isinstance(kind, ast.Constant) else ''
    return ''


def _argument(node: Any, name: str) -> Any:
    """The argument ``name`` of a call such as dict(...); None if there is none."""
    return next((one.value for one in getattr(node, 'keywords', ()) if one.arg == name), None)
