"""The benchmark for a GPU runs on a CPU too, judges what it finds, and writes its part of the page."""

import sys
from functools import partial

import gpu
import gpu_checks
import pytest
from gpu_page import Results, verdicts
from performance_worker import PLAIN


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    """The page after a quick run, and what it printed."""
    page = tmp_path_factory.mktemp('gpu') / 'page.md'
    page.write_text('Before.\n<!-- gpu -->\nold\n<!-- /gpu -->\nAfter.\n')
    with pytest.MonkeyPatch.context() as patch:
        # the bar of its noise, p > 1e-4, is one that secret noise misses once in 10,000 runs
        patch.setattr(gpu_checks, 'DeviceRandomSource', partial(gpu_checks.DeviceRandomSource, 1))
        patch.setattr(sys, 'argv', ['gpu.py', '--quick', '--device', 'cpu', '--page', str(page)])
        gpu.main()
    return page.read_text()


def test_a_quick_run_writes_its_part_of_the_page(page):
    assert page.startswith('Before.\n<!-- gpu -->\n## CPU') and page.endswith('<!-- /gpu -->\nAfter.\n')
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in page.splitlines() if line[:1] == '|']
    cells = {row[0]: row[1:] for row in rows}
    for method in ('dpsgd', 'hybrid', 'dpsgd, bfloat16', 'finding a basis'):
        assert cells[method][0].endswith('x'), method
    found = {row[0]: (row[2], row[3]) for row in rows if len(row) == 4 and row[3] in ('met', 'MISSED')}
    for name in ('error, float32', 'error, TF32', 'error, bfloat16', 'noise, Kolm'):
        ((value, word),) = [found[key] for key in found if key.startswith(name)]
        assert word == 'met', (name, value)
    assert found['records that begin to mix'] == ('refused', 'met')
    assert 'waiting for data' in found['an epoch of private steps'][0]
    assert any(key.startswith('time, hybrid') for key in found)


def test_each_bar_can_be_missed():
    slow, here = dict(seconds=2.0, bytes=200), ('c_hybrid.py', 2)
    results = Results(refused=False, epoch=dict(private=3.0, plain=1.0, waiting=0.5))
    results.speed = {
        (here[0], PLAIN, 2): dict(seconds=1.0, bytes=100),
        (here[0], 'dpsgd', 2): slow,
        (here[0], 'hybrid', 2): dict(failed='RuntimeError: no memory'),
        (here[0], 'opacus, hooks', 2): slow,
    }
    results.errors = {here[0]: {'float32': 1e-3, 'TF32': 0.2, 'bfloat16': 'does not run: RuntimeError'}}
    results.noise = dict(pvalue=1e-9, seconds=1.0)
    found = [*verdicts(results)]
    assert len(found) == 11 and {word for *_, word in found} == {'MISSED'}
