"""The statement by itself: its version, form, seal and page. Must not judge what it claims."""

import json

from mmpose_dp.extras.evidence import PAGE_NAME, SCHEMA_VERSION, STATEMENT_NAME, file_sha256, seal_of
from mmpose_dp.extras.statement_page import complete, statement_json
from mmpose_dp.version import __version__

from .findings import Evidence, Findings
from .schema import SCHEMA, schema_faults


def check_form(files: Evidence, found: Findings) -> bool:
    """Version, schema, seal and page; False if nothing else can be checked."""
    statement = files.statement
    version = statement.get('schema_version') if isinstance(statement, dict) else None
    if version is None:
        found.wrong.append('the statement has no schema_version: an older mmpose_dp made it, or it was changed')
        return False
    if version != SCHEMA_VERSION:
        found.wrong.append(f'the statement has schema_version {version!r}, and this program reads {SCHEMA_VERSION!r}')
        return False
    faults = list(schema_faults(statement, json.loads(SCHEMA.read_text())))
    if not found.expect(not faults, 'the statement follows its schema', f'the statement: {"; ".join(faults)}'):
        return False
    intact = seal_of(statement) == statement['seal']
    found.expect(intact, "the statement's seal", 'the statement was changed: its seal does not match its content')
    if files.text is not None:
        found.looked_at.add(files.folder / STATEMENT_NAME)
        same = files.text == statement_json(statement)
        found.expect(same, 'the form of its file', f'{STATEMENT_NAME} was changed after it was written')
    _check_page(files, found)
    return True


def _check_page(files: Evidence, found: Findings) -> None:
    """The page for people must be the one that follows from the statement."""
    stated, page = files.statement['page_sha256'], files.folder / PAGE_NAME
    found.expect(
        complete(files.statement)['page_sha256'] == stated,
        'the hash of its page, which was written again',
        f'page_sha256 is not that of the page of this statement as mmpose_dp {__version__} writes it '
        f'({other_version(files.statement)})',
    )
    if files.text is None:
        return
    if page.is_file():
        found.looked_at.add(page)
        right, wrong = f'{PAGE_NAME} is its page', f'{PAGE_NAME} was changed, or is the page of another statement'
        found.expect(file_sha256(page) == stated, right, wrong)
    else:
        found.unchecked.append(f'the page for people: {PAGE_NAME} is not here, and no other page was compared')


def other_version(statement: dict) -> str:
    """Which version wrote the statement: another one may use other words."""
    project = statement['project']
    return f'the statement is by {project["version"]}, commit {project["commit"]}: verify it with that one'
