"""Puts together the privacy statement of a training: the guarantee, what it means, who decided, and what it can be checked by.

Must not add anything computed from private records.
"""

import os
import os.path as osp
from pathlib import Path
from typing import Any

from mmengine.runner import Runner

from mmpose_dp.extras.accountability import answers, with_membership_audit
from mmpose_dp.extras.checkpoint_file import CheckpointFile
from mmpose_dp.extras.evidence import (
    SCHEMA_VERSION,
    checkpoints_in,
    file_sha256,
    intact_statement,
    ledger_in_statement,
    project,
    versions,
)
from mmpose_dp.extras.risk import risk_of
from mmpose_dp.extras.statement_page import complete
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.statement import build_statement
from mmpose_dp.privacy.validation import as_given

from ..view_audit import with_audit
from .provenance import part_of
from .resuming import checkpoint_settings, kept_privacy, newest_checkpoint

# what follows from the config, and not from the ledger
_SETTINGS = (
    'target_epsilon', 'target_epsilon_changed', 'expected_batch_size', 'max_grad_norm', 'rounding', 'parameters_trained',
    'parameters_per_record', 'decision', 'own_code', 'config_sha256',
)  # fmt: skip
_THEN = ', then by a resume '


def full_statement(
    plan: PrivacyPlan,
    ledger: Ledger,
    runner: Runner,
    *,
    pretraining: str,
    decision: dict[str, str],
    own_code: str,
    budgets: str | None,
    checkpoints: dict[str, str],
    finished: bool,
    before: dict[str, Any],
    goes_on: bool,
) -> dict[str, Any]:
    """The statement of the steps so far, sealed. ``finished``: it names the last checkpoint, which must be written already.

    ``budgets``: in words, if a resume changed the budget. ``checkpoints``: the SHA-256 of those written before, by name.
    ``before``: the statement in the checkpoint that was resumed from; if training does not go on, its settings stay.
    """
    guarantee = build_statement(plan, ledger, pretraining=pretraining)
    statement = {'schema_version': SCHEMA_VERSION, **guarantee}
    statement['risk'] = risk_of(ledger.history, plan.target_delta) if statement['private'] else None
    parameters = sum(p.numel() for p in runner.optim_wrapper.params)
    statement.update(answers(statement, decision, parameters), own_code=own_code)
    statement = with_audit(with_membership_audit(statement, runner.work_dir), runner.work_dir)
    checkpoint, weights = _last_checkpoint(runner) if finished else (None, None)
    return complete(
        {
            **statement,
            **({'target_epsilon_changed': budgets} if budgets else {}),
            'project': project(),
            'versions': versions(),
            'config_sha256': config_sha256(runner),
            'ledger': ledger_in_statement(ledger),
            'checkpoint': checkpoint,
            'weights_sha256': weights,
            'checkpoints': checkpoints,
            **_settings_before(before, guarantee, goes_on),
        }
    )


def _settings_before(before: dict[str, Any], guarantee: dict[str, Any], goes_on: bool) -> dict[str, Any]:
    """What holds of the steps before a resume: the settings, if it has taken none, else C beside the present one."""
    if not goes_on:
        return {key: before[key] for key in _SETTINGS if key in before}
    if 'max_grad_norm' not in before:
        return {}
    norms = before['max_grad_norm'], guarantee['max_grad_norm']
    old, new = (as_given(norm) if isinstance(norm, float) else str(norm) for norm in norms)
    said = old == new or old.endswith(f'{_THEN}{new}')
    return {'max_grad_norm': norms[0] if said else f'{old}{_THEN}{new}'}


class WrittenCheckpoints:
    """The SHA-256 of each checkpoint that a training and those before it in a work dir wrote there.

    Each is read once, when the next statement is written. The statement carries the hashes over a kill and a resume; a checkpoint
    that a kill followed at once has none. A file that lay there before, and that no statement names, gets none either, and neither
    does one that something else puts there meanwhile: a plain training in the same work dir, say.
    """

    def __init__(self, work_dir: str | os.PathLike[str]) -> None:
        self._folder = Path(work_dir)
        self._seen, earlier = self._marks(), intact_statement(self._folder)
        self._hashes = checkpoints_in(earlier) if earlier else {}

    def hashes(self, ledger: Ledger) -> dict[str, str]:
        """The hashes of those that are still there, by name. ``ledger``: of this training, in which their last line is."""
        marks = self._marks()
        changed = [self._folder / name for name, mark in marks.items() if mark != self._seen.get(name)]
        heads = {line['hash'] for line in ledger.lines} if changed else set()
        for path in changed:
            if part_of(kept_privacy(path), 'ledger').get('head') in heads:
                self._hashes[path.name] = file_sha256(path)
        self._seen = marks
        return {name: self._hashes[name] for name in sorted(marks) if name in self._hashes}

    def _marks(self) -> dict[str, tuple[int, int]]:
        found = {path.name: path.stat() for path in self._folder.glob('*.pth')}
        return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}


def config_sha256(runner: Runner) -> str | None:
    """SHA-256 of the config file that mmengine wrote into the work dir; None if there is none."""
    name = osp.basename(runner.cfg.filename) if runner.cfg.filename else f'{runner.timestamp}.py'
    path = Path(runner.work_dir) / name
    return file_sha256(path) if path.is_file() else None


def _last_checkpoint(runner: Runner) -> tuple[dict[str, str] | None, str | None]:
    """The name and SHA-256 of the newest checkpoint, and the digest of its weights; None where it cannot be read from here."""
    path = newest_checkpoint(runner.work_dir, **checkpoint_settings(runner))
    if path is None or not Path(path).is_file():
        return None, None
    found = {'file': Path(path).name, 'sha256': file_sha256(path)}
    try:
        return found, CheckpointFile.read(Path(path)).weights_sha256 or None
    except ValueError:  # an older format
        return found, None
