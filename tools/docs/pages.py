"""A hook of mkdocs: pages of docs/ take their text from README.md and other files, so that nothing is written twice.

A paragraph of a page that is only a link to a section of a file above docs/, such as ``[Install](../README.md#install)``, becomes
that section without its heading; a link to such a file without a section becomes the whole file. In a repository browser it stays a
link. Links are changed to where their targets are on the site. In tables, names may break between their parts only. Must not write
text of its own. Run by ``make docs``.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / 'docs'
_INCLUDED = re.compile(r'^\[[^\]]*\]\(\.\./([\w./]+\.md)(?:#([\w-]+))?\)$', re.MULTILINE)
_CELL = re.compile(r'<t[dh]\b.*?</t[dh]>', re.DOTALL)
_LINK = re.compile(r'(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)')


def headings(text: str) -> Iterator[tuple[int, int, str]]:
    """The line number, level and anchor of each heading; what is in a code block is none."""
    in_code = False
    for number, line in enumerate(text.splitlines()):
        in_code ^= line.lstrip().startswith('```')
        found = None if in_code else re.match(r'(#+) +(.+)', line)
        if found:
            yield number, len(found[1]), slugify(found[2].replace('`', ''), '-')


def section(text: str, anchor: str | None) -> str:
    """The section of that anchor without its heading, up to the next heading of its level; of the title, up to the next heading.

    Without an anchor, everything but the title. Raises ValueError if there is no such section.
    """
    found, lines = list(headings(text)), text.splitlines()
    if anchor is None:
        return '\n'.join(lines[found[0][0] + 1 :])
    for place, (start, level, name) in enumerate(found):
        if name == anchor:
            after = [number for number, other, _ in found[place + 1 :] if other <= max(level, 2)]
            return '\n'.join(lines[start + 1 : after[0] if after else None])
    raise ValueError(f'there is no section #{anchor}')


def included(page: str) -> list[tuple[str, str | None]]:
    """The files and sections that a page of docs/ includes."""
    return [(found[1], found[2]) for found in _INCLUDED.finditer((DOCS / page).read_text())]


def places() -> dict[tuple[str, str | None], str]:
    """The page on which each section is that some page includes, and those inside it; under None each whole file."""
    found: dict[tuple[str, str | None], str] = {}
    for page in sorted(path.name for path in DOCS.glob('*.md')):
        for file, anchor in included(page):
            text = (REPO / file).read_text()
            found[file, anchor] = page
            for _, _, inner in headings(section(text, anchor)):
                found[file, inner] = f'{page}#{inner}'
    return found


def put_together(markdown: str) -> str:
    """A page's text as it is on the site. Raises ValueError for a section that does not exist."""
    where = places()

    def target(link: str, file: str) -> str | None:
        """Where a link in ``file``, a path under the repository, leads on the site; None if its target is not part of it."""
        path, _, anchor = link.partition('#')
        aim = (REPO / file).parent.joinpath(path).resolve().relative_to(REPO).as_posix() if path else file
        if aim.startswith('docs/'):
            return link if not path else aim.removeprefix('docs/') + (f'#{anchor}' if anchor else '')
        return where.get((aim, anchor or None)) or where.get((aim, None))

    def linked(text: str, file: str) -> str:
        def one(found: re.Match) -> str:
            if '://' in found[2]:
                return found[0]
            there = target(found[2], file)
            return f'{found[1]}({there})' if there else found[1][1:-1]

        return _LINK.sub(one, text)

    parts, end = [], 0
    for found in _INCLUDED.finditer(markdown):
        parts.append(linked(markdown[end : found.start()], 'docs/page.md'))
        parts.append(linked(section((REPO / found[1]).read_text(), found[2]), found[1]))
        end = found.end()
    return ''.join([*parts, linked(markdown[end:], 'docs/page.md')])


def breaking_at_parts(html: str) -> str:
    """A page with code in its tables that breaks where the parts of a name meet, and not between any two letters, as on a phone."""

    def code(found: re.Match) -> str:
        parts = re.sub(r'([_./(,=]+)(?=[^_./(,=])', r'\1<wbr>', found[1])
        return f'<code style="word-break: normal">{parts}</code>'

    return _CELL.sub(lambda cell: re.sub(r'<code>([^<]*)</code>', code, cell[0]), html)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return breaking_at_parts(html)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    return put_together(markdown)
