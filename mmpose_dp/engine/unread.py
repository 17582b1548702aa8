"""Finds names at the top of a config file that nothing reads, and refuses those that look like a setting. Must not run the file.

A config is a program and may have variables: ``data_root``, ``codec``. One that its own file does not use, and that neither
mmengine nor MMPose reads, changes nothing, not even where a file that it inherits from has it too. Beside ``target_epsilom = 8``
the default budget would stay in force.
"""

import ast
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mmengine
from mmpose.registry import OPTIM_WRAPPERS

from mmpose_dp.datasets.resolving import is_kind
from mmpose_dp.privacy.errors import ConfigError

from .optim_wrappers import DPOptimWrapper
from .spelling import TOP, VARIABLES, as_dicts, settings_of
from .training_settings import REPLACED, WRITTEN, idle_schedules, out_of_subspace

_OFFERED = ('_', 'dp_')  # begins what configs/_base_/ offers to those that inherit
_READ_BY_MMPOSE = {'data_mode', 'dataset_info', 'dataset_type'}
_BUDGET = 'default_hooks.privacy_budget.'
_SHORT = {  # what some write for a setting
    'epsilon': f'{_BUDGET}target_epsilon',
    'eps': f'{_BUDGET}target_epsilon',
    'delta': f'{_BUDGET}target_delta',
    'noise': 'optim_wrapper.noise_multiplier',
    'epochs': 'train_cfg.max_epochs',
    'num_epochs': 'train_cfg.max_epochs',
    'learning_rate': 'optim_wrapper.optimizer.lr',
}
_OLD = {  # what MMPose before 1.0 read, and many tutorials still write; not fp16, which some of its own configs still have
    'total_epochs': 'train_cfg.max_epochs',
    'runner': 'train_cfg',
    'lr_config': 'param_scheduler',
    'optimizer_config': 'optim_wrapper',
    'data': 'train_dataloader',
    'evaluation': 'val_evaluator',
    'checkpoint_config': 'default_hooks.checkpoint',
    'log_config': 'default_hooks.logger',
    'resume_from': 'load_from',
}
_CLOSE = 0.84  # of difflib: above MMPose's own val_pipeline and val_batch_size
_MANY = 8  # names in alphabetical order are no accident
_LEAST = 5  # characters: every short name is close to another


class _File(NamedTuple):
    """What a config file says at its top: names with their lines, and those that are read."""

    path: Path
    assigned: dict[str, int]
    read: set[str]
    bases: list[str]  # paths of files, absolute or relative to this one
    private_at: int  # the line of private(_base_, ...); 0 without one


def refuse_unread(cfg: Any) -> None:
    """Raises ConfigError for a name in a private config's files that only looks like a setting.

    Files of a package (``mmpose::``), and those that mmengine has written into a work dir, are not looked at.
    """
    if not is_kind(OPTIM_WRAPPERS, cfg.get('optim_wrapper') or {}, DPOptimWrapper):
        return
    settings = {name: place for name, place in settings_of(cfg).items() if name not in VARIABLES} | _SHORT | _OLD
    written = cfg.get(WRITTEN) or ()
    for file, name in _unread(cfg):
        where = _place(file, name)
        if name in written:
            raise ConfigError(
                f'{where} is assigned above private(), which writes {name} itself and replaces the assignment: pass it to '
                f'private(_base_, ..., {name}=...)'
            )
        meant = _meant(name, settings)
        if meant:
            raise ConfigError(
                f'{where} is read by nothing and would change nothing: did you mean {meant}? If it is your own variable, give it '
                'another name'
            )


def refuse_lost(cfg: Any) -> None:
    """Raises ConfigError for a plain config that calls ``private()`` and leaves its result unused: it would train plainly."""
    for path, name, line in _calls(cfg):
        raise ConfigError(
            f'{path.name}, line {line}: what {name}() gives is lost, and without it the config is that of a plain training: '
            f'write globals().update({name}(...))'
        )


def _calls(cfg: Any) -> Iterator[tuple[Path, str, int]]:
    """The calls of ``private()`` in a config's files in Python that import mmpose_dp.configs, each with its file and line."""
    for file in _files(Path(cfg.filename)) if getattr(cfg, 'filename', None) else ():
        tree = ast.parse(file.path.read_text() if file.path.suffix == '.py' else '')
        for node in ast.walk(tree) if 'mmpose_dp.configs' in ast.unparse(tree) else ():  # which has no comments
            if isinstance(node, ast.Call) and _calls_private(node):
                yield file.path, ast.unparse(node.func), node.lineno


def _calls_private(call: ast.Call) -> bool:
    return 'private' in (getattr(call.func, 'id', ''), getattr(call.func, 'attr', ''))


def unread_in_words(cfg: Any) -> list[str]:
    """A sentence for each name in a config's own file that nothing reads."""
    return [
        f'{_place(file, name)} is read by nothing and changes nothing, even if the config that this one inherits from uses a '
        'variable of this name'
        for file, name in _unread(cfg)
        if file.path == Path(cfg.filename)
    ]


def config_warnings(cfg: Any) -> list[str]:
    """A sentence for each thing in a config that has no effect, or not the one that its author expects."""
    return [*idle_schedules(cfg), *out_of_subspace(cfg), *unread_in_words(cfg)]


def _place(file: _File, name: str) -> str:
    """A name with where it is assigned."""
    line = f', line {file.assigned[name]}' if file.assigned[name] else ''
    return f'{file.path.name}{line}: {name}'


def _unread(cfg: Any) -> Iterator[tuple[_File, str]]:
    read: set[str] = set()
    written = cfg.get(WRITTEN) or ()
    for file in _files(Path(cfg.filename)) if getattr(cfg, 'filename', None) else ():
        read |= file.read
        for name, line in file.assigned.items():
            if name in written and line < file.private_at and name not in read:
                yield file, name
            elif not (name.startswith(_OFFERED) or name in read | TOP | _READ_BY_MMPOSE):
                yield file, name


def _meant(name: str, settings: dict[str, str]) -> str:
    """What to write in place of ``name``; empty if it is like no setting."""
    if name in settings:
        return as_dicts(settings[name])
    names = [one for one in (*settings, *TOP) if len(one) >= _LEAST]
    close = difflib.get_close_matches(name, names, 1, _CLOSE) if len(name) >= _LEAST and name not in VARIABLES else []
    return as_dicts(settings.get(close[0], close[0])) if close else ''


# ---- files ---------------------------------------------------------------------------------------------------------
def _files(path: Path) -> Iterator[_File]:
    """A config's file, and then those that it inherits from by their paths."""
    try:
        file = _python(path) if path.suffix == '.py' else _plain(path)
    except (OSError, SyntaxError, ValueError):  # it was changed since it was loaded
        return
    if not _is_dump(file):
        yield file
    for base in file.bases:
        yield from _files(path.parent / base) if '::' not in base else ()


def _is_dump(file: _File) -> bool:
    """Whether mmengine wrote the file (Config.dump), with all variables of the files behind it: no base, and names in order."""
    names = sorted(file.assigned, key=lambda name: file.assigned[name])
    in_order = len(names) > _MANY and names == sorted(names) and not file.private_at
    return not file.bases and (in_order or bool({'launcher', REPLACED} & {*file.assigned}))


def _plain(path: Path) -> _File:
    """A config in JSON or YAML, which has no variables."""
    content = mmengine.load(path)
    bases = content.pop('_base_', [])
    return _File(path, dict.fromkeys(content, 0), set(), [bases] if isinstance(bases, str) else bases, 0)


def _python(path: Path) -> _File:
    text = path.read_text()
    tree, assigned, private_at = ast.parse(text), {}, 0
    read, bases = set(re.findall(r'\b_base_\.(\w+)', text)), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            read.add(node.id)
        if isinstance(node, ast.Call) and _calls_private(node):
            first = node.args[0] if node.args else None  # globals() of a new-style config has what stands above it
            private_at = node.lineno if isinstance(first, ast.Name) and first.id == '_base_' else 0
        if isinstance(node, ast.ImportFrom) and node.level:  # from .._base_.mine import *
            bases.append('../' * (node.level - 1) + (node.module or '').replace('.', '/') + '.py')
    for statement in _statements(tree.body):
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            names = (n for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
            assigned.update({n.id: n.lineno for n in names})
            if isinstance(target, ast.Name) and target.id == '_base_':
                bases += [
                    n.value for n in ast.walk(statement) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
    return _File(path, assigned, read, bases, private_at)


def _statements(body: list[ast.stmt]) -> Iterator[ast.Assign | ast.AnnAssign]:
    """The assignments at the top of a module, also those in ``if``, ``for``, ``with`` and ``try``."""
    for node in body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield node
        elif not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for part in ('body', 'orelse', 'finalbody'):
                yield from _statements(getattr(node, part, []))
