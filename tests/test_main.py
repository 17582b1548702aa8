"""The tools of an installed package, by their names."""

import runpy
import sys

import pytest

from mmpose_dp.__main__ import TOOLS, tools
from tests.support.paths import REPO


@pytest.fixture
def ended(monkeypatch, capsys):
    """ended(*arguments): exit status and output of ``python -m mmpose_dp`` with them."""

    def called(*arguments):
        monkeypatch.setattr(sys, 'argv', ['mmpose_dp', *arguments])
        monkeypatch.setattr(sys, 'path', [*sys.path])
        status = 0
        try:
            runpy.run_module('mmpose_dp', run_name='__main__')
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return called


def test_every_tool_has_a_name_and_a_sentence():
    assert TOOLS.resolve() == REPO / 'tools'
    named = tools()
    assert {'train', 'test', 'check_config', 'publish_model', 'make_report', 'verify'} <= set(named)
    assert not {'cli', 'html_page', 'published_folder', 'report_parts'} & set(named), 'no tools themselves'
    assert all(len(what.split()) > 4 and '"' not in what for what in named.values())


def test_a_tool_runs_with_its_arguments_and_its_exit_status(ended, tmp_path):
    status, page = ended()
    assert status == 0 and all(f'  {name} ' in page for name in tools())
    status, page = ended('compare_statements', '--help')
    assert not status and 'usage: compare_statements.py [-h]' in page
    status, page = ended('compare_statements', str(tmp_path), str(tmp_path))
    assert status == 2 and page.startswith('mmpose_dp: ') and str(tmp_path) in page
    status, page = ended('verify', str(tmp_path))
    assert status == 1 and page.startswith('mmpose_dp: ')
    assert ended('trian') == (2, f'{ended()[1]}mmpose_dp: there is no tool {"trian"!r}\n')
