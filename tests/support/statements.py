"""Work dirs with a statement and a ledger, as a training leaves them, without the training."""

import json
from pathlib import Path
from typing import Any

from mmpose_dp.extras.accountability import answers, checked_decision, with_membership_audit
from mmpose_dp.extras.evidence import SCHEMA_VERSION, STATEMENT_NAME, ledger_in_statement, project, versions
from mmpose_dp.extras.risk import risk_of
from mmpose_dp.extras.statement_page import write_statement
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.statement import build_statement
from tests.support.core import PLAN_SETTINGS


def write_work_dir(
    folder: Path, steps: int = 20, ledger: Ledger | None = None, plan: Any = None, **changes: Any
) -> Ledger:
    """A work dir with a statement and a ledger, as a training of ``steps`` would leave it; returns the ledger."""
    plan = plan or PrivacyPlan(**{**PLAN_SETTINGS, 'noise_multiplier': 2.0, **changes})
    ledger = ledger or Ledger()
    ledger.begin_run(**plan.run_metadata)
    for step in range(steps):
        ledger.count(plan.event_at(step))
    folder.mkdir(exist_ok=True)
    ledger.keep_at(folder / LEDGER_NAME)
    ledger.close()
    statement = {'schema_version': SCHEMA_VERSION, **build_statement(plan, ledger, pretraining='none')}
    statement['risk'] = risk_of(ledger.history, plan.target_delta) if statement['private'] else None
    statement.update(answers(statement, checked_decision(None), 100))
    statement.update(ledger=ledger_in_statement(ledger), checkpoint=None, weights_sha256=None, config_sha256=None)
    statement.update(project=project(), versions=versions())
    write_statement(with_membership_audit(statement, folder), folder)
    return ledger


def statement_of(folder: Path) -> dict[str, Any]:
    """The statement in a work dir."""
    return json.loads((folder / STATEMENT_NAME).read_text())


def amend(folder: Path, **changes: Any) -> None:
    """Changes a statement and seals it again."""
    write_statement({**statement_of(folder), **changes}, folder)
