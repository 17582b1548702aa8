"""Running a tool as its command does, without a process of its own."""

import sys
from types import SimpleNamespace

import cli
import numpy as np
import pytest
from mmpose.registry import TRANSFORMS

from mmpose_dp.datasets import View


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


class Coarse(View):
    """A view of one's own."""

    description = 'every fourth pixel'

    def transform(self, results):
        """Repeats every fourth pixel."""
        height, width = results['img'].shape[:2]
        rows, columns = np.arange(height) // 4 * 4, np.arange(width) // 4 * 4
        results['img'] = results['img'][rows][:, columns]
        return results


@pytest.fixture
def coarse_view(monkeypatch):
    """Registers a view that is not a PublicView."""
    monkeypatch.setitem(TRANSFORMS._module_dict, 'Coarse', Coarse)
