"""Puts the figures of tools/audit_view.py, on what can be recovered from public views, into a privacy statement.

Must not examine anything itself, and must not use figures of a view that is not the statement's.
"""

import json
import os
from pathlib import Path
from typing import Any

from mmpose_dp.extras.accountability import PRIVATE_PICTURES, with_private_figures
from mmpose_dp.extras.evidence import STATEMENT_NAME
from mmpose_dp.extras.statement_page import write_statement

AUDIT_NAME = 'view_audit.json'
PICTURES_NAME = 'view_audit.npz'
VALIDATION = 'validation people'
PRIVATE = PRIVATE_PICTURES
NOT_EXAMINED = 'not examined: run tools/audit_view.py CONFIG'


def recoverable_from_view(work_dir: str | os.PathLike[str], view: str | None) -> str:
    """The findings of the audit in a work dir for this view (its description), or that it was not examined."""
    try:
        audit = json.loads((Path(work_dir) / AUDIT_NAME).read_text())
        return audit['in_words'] if audit['view'] == view else NOT_EXAMINED
    except (OSError, ValueError, KeyError, TypeError):
        return NOT_EXAMINED


def in_words(audit: dict[str, Any]) -> str:
    """The figures of an audit, as a sentence."""
    if not audit['recovered']:
        return audit['note']
    seen = audit['shown']
    parts = [f'the view itself has {seen["psnr"]:.1f} dB and SSIM {seen["ssim"]:.2f}']
    parts += [
        f'{name} recovers {found["psnr"]:.1f} dB and SSIM {found["ssim"]:.2f}'
        if isinstance(found, dict)
        else f'{name}: {found}'
        for name, found in audit['recovered'].items()
    ]
    return f'of {audit["pictures"]} {audit["sample"]}: {"; ".join(parts)} (PSNR within the padded box)'


def figure_rows(audit: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The figures of an audit as a table: its head, and a row for the view and for each reconstruction that was run."""
    bands = [key for key in audit['shown'] if key not in ('psnr', 'ssim')]
    rows = []
    for name, found in {'the public view': audit['shown'], **audit['recovered']}.items():
        if isinstance(found, dict):
            shares = [f'{found[band]:.1%}' for band in bands]
            rows.append([name, f'{found["psnr"]:.1f}', f'{found["ssim"]:.2f}', *shares])
    return ['', 'PSNR in dB', 'SSIM', *bands], rows


def with_audit(statement: dict[str, Any], work_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """A statement with the findings of the audit in a work dir for its public views; one without views stays as it is."""
    found = [recoverable_from_view(work_dir, view) for view in statement.get('public_views', [])]
    if not found:
        return statement
    statement = {**statement, 'recoverable_from_view': '; '.join(found)}
    return {**statement, 'not_covered': with_private_figures(statement['not_covered'], statement)}


def update_statement(work_dir: str | os.PathLike[str]) -> bool:
    """Puts the figures of the audit in a work dir into the statement there; False if there are none for its views."""
    try:
        statement = json.loads((Path(work_dir) / STATEMENT_NAME).read_text())
    except FileNotFoundError:
        return False
    if all(recoverable_from_view(work_dir, view) == NOT_EXAMINED for view in statement.get('public_views', [])):
        return False
    write_statement(with_audit(statement, work_dir), work_dir)
    return True
