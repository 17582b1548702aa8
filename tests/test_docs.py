"""The texts: links lead somewhere, commands name tools and options that exist, and the site's pages come together."""

import argparse
import ast
import importlib.util
import re
import shlex
import sys

import pytest
import yaml

from tests.support.browser import SIZES, faults, look, started
from tests.support.paths import REPO

DOCS = REPO / 'docs'
TEXTS = sorted(
    [*REPO.glob('*.md'), *DOCS.glob('*.md'), *(REPO / '.github').rglob('*.md'), REPO / 'configs/dp/README.md']
)
CODE = re.compile(r'^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\(([^)\s]+)\)')
FILE = re.compile(r'`(\w[\w-]*/[\w/.-]+\.py)`')
YOURS = ('my_', 'YOUR_')  # how the name of a file of the reader's own begins


def module(path):
    """A Python file of tools/, imported under a name that hides no other module."""
    spec = importlib.util.spec_from_file_location(f'docs_test_{path.stem}', path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


PAGES = module(REPO / 'tools/docs/pages.py')


def anchors(text):
    return {anchor for _, _, anchor in PAGES.headings(text)}


def ids(path):
    return str(path.relative_to(REPO))


# ---- links ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('path', TEXTS, ids=ids)
def test_relative_links_lead_somewhere(path):
    text = path.read_text()
    for link in LINK.findall(CODE.sub('', text)):
        if '://' in link:
            continue
        file, _, anchor = link.partition('#')
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize('path', sorted(DOCS.glob('*.md')), ids=ids)
def test_links_of_a_page_as_it_is_on_the_site_stay_within_it(path):
    page = PAGES.put_together(path.read_text())
    assert '](../' not in page
    for link in LINK.findall(CODE.sub('', page)):
        if '://' not in link:
            file, _, anchor = link.partition('#')
            target = page if file in ('', path.name) else None
            if target is None:
                assert (DOCS / file).is_file(), link
                target = PAGES.put_together((DOCS / file).read_text()) if file.endswith('.md') else ''
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize('path', [path for path in TEXTS if path.name != 'CHANGELOG.md'], ids=ids)
def test_files_of_the_code_that_a_text_names_exist(path):
    """Named from the top, from the package, or, in the column of tests, from tests/."""
    roots = REPO, REPO / 'mmpose_dp', REPO / 'tests'
    parts = {child.name for root in roots for child in root.iterdir() if child.is_dir()}
    named = [name for name in FILE.findall(path.read_text()) if name.partition('/')[0] in parts]
    assert not [name for name in named if not any((root / name).exists() for root in roots)]


def test_a_section_is_included_without_what_follows_it():
    text = '# Title\nintro\n## One two\na\n### Inner\nb\n```\n## no heading\n```\n## Three\nc\n'
    assert PAGES.section(text, 'title') == 'intro'
    assert PAGES.section(text, 'one-two') == 'a\n### Inner\nb\n```\n## no heading\n```'
    assert PAGES.section(text, 'three') == 'c'
    with pytest.raises(ValueError, match='no section #four'):
        PAGES.section(text, 'four')


def test_no_table_is_empty():
    for page in (*DOCS.glob('*.md'), REPO / 'README.md', REPO / 'CONTRIBUTING.md'):
        assert not re.search(r'^\|[ :|-]+\|\n(?!\|)', page.read_text(), re.M), page.name


def test_names_in_tables_break_between_their_parts():
    outside, link = '<p><code>max_grad_norm</code></p>', '<a href="a_b.html">a_b</a>'
    found = PAGES.breaking_at_parts(f'{outside}<td><code>dict(order=..., max_rows)</code> {link}</td>')
    inside = '<code style="word-break: normal">dict(<wbr>order=...,<wbr> max_<wbr>rows)</code>'
    assert found == f'{outside}<td>{inside} {link}</td>'


def test_the_site_lists_every_page():
    def pages(nav):
        for item in nav if isinstance(nav, list) else nav.values():
            yield from [item] if isinstance(item, str) else pages(item)

    listed = list(pages(yaml.safe_load((REPO / 'mkdocs.yml').read_text())['nav']))
    assert sorted(listed) == sorted(path.name for path in DOCS.glob('*.md'))


def test_pages_of_the_site_look_right(tmp_path):
    """Wide and narrow, light and dark, with nothing from elsewhere; accuracy.md has the widest tables."""
    site = REPO / 'work_dirs/docs'
    if not (site / 'index.html').is_file():
        pytest.skip('the site is not built (make docs)')
    with started(tmp_path) as browser:
        papers = set()
        for page in ('index.html', 'use.html', 'accuracy.html'):
            for (width, height), dark in zip(SIZES, (False, True)):
                seen = look(browser, (site / page).as_uri(), width, height, dark)
                assert not faults(seen, site.as_uri()), page
                papers.add(seen.paper)
    assert len(papers) == 2


# ---- commands -------------------------------------------------------------------------------------------------------
def commands(text):
    """Each call of a Python tool in code blocks and inline code, as (tool, arguments)."""
    blocks = [block.replace('\\\n', ' ') for _, block in CODE.findall(text)]
    inline = [code.replace('\n', ' ') for code in re.findall(r'`([^`]+)`', CODE.sub('', text))]
    for line in [*(line for block in blocks for line in block.splitlines()), *inline]:
        found = re.match(r'\s*(?:\w+=\S+ )*(?:python )?(tools/[\w/]+\.py)\b(.*)', line)
        if found:
            yield found[1], shlex.split(found[2], comments=True)


class Parsed(BaseException):
    """Carries the parser out of a tool, before the tool does anything."""


@pytest.fixture(scope='module')
def parsers():
    """Of each tool, its argument parser."""
    made = {}

    def stop(parser, *_):
        raise Parsed(parser)

    def of(tool):
        if tool not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, 'parse_args', stop)
                patch.syspath_prepend(str((REPO / tool).parent))
                patch.setattr(sys, 'argv', [tool])
                with pytest.raises(Parsed) as found:
                    module(REPO / tool).main()
            made[tool] = found.value.args[0]
        return made[tool]

    return of


@pytest.mark.parametrize('path', TEXTS, ids=ids)
def test_commands_name_options_and_configs_that_exist(path, parsers):
    for tool, arguments in commands(path.read_text()):
        if not arguments:
            continue  # that the tool exists: test_packaging
        parser = parsers(tool)
        for argument in arguments:
            if argument.startswith('--'):
                assert argument.partition('=')[0] in parser._option_string_actions, f'{tool}: {argument}'
            if argument.startswith('configs/') and not argument.rpartition('/')[2].startswith(YOURS):
                assert (REPO / argument).is_file(), f'{tool}: {argument}'
        chosen = next((action.choices for action in parser._get_positional_actions() if action.choices), None)
        assert chosen is None or arguments[0] in chosen, f'{tool}: {arguments[0]}'


def test_a_wrong_command_is_found(parsers):
    text = 'see `python tools/train.py configs/dp/hrnet_mpii_nonprivate.py --no-such-option`'
    ((tool, arguments),) = commands(text)
    assert arguments[-1] == '--no-such-option' and arguments[-1] not in parsers(tool)._option_string_actions
    assert '--resume' in parsers(tool)._option_string_actions


# ---- code -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('path', TEXTS, ids=ids)
def test_python_blocks_are_python(path):
    for language, block in CODE.findall(path.read_text()):
        if language == 'python':
            ast.parse(block)


def test_what_solves_an_opacus_issue_exists():
    text = (DOCS / 'opacus.md').read_text()
    named = re.findall(r'^- `([\w/]+\.py)` \(`([\w.]+)`\)', text, re.MULTILINE)
    assert len(named) >= 10
    for file, name in named:
        source = (REPO / 'mmpose_dp' / file).read_text()
        for part in name.split('.'):
            assert re.search(rf'^ *(class|def) {part}\b', source, re.MULTILINE), f'{file}: {name}'
