"""Running a tool as its command does, without a process of its own."""

import sys
from types import SimpleNamespace

import cli
import pytest


@pytest.fixture
def call(monkeypatch, capsys):
    """call(tool, *arguments): exit status and output of a tool's module, as an object with returncode, stdout and stderr."""

    def called(tool, *arguments):
        monkeypatch.setattr(sys, 'argv', [f'{tool.__name__}.py', *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.run(tool.main)
        except SystemExit as end:
            status = end.code
        else:
            status = 0
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=printed.out, stderr=printed.err)

    return called
