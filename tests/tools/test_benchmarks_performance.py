"""The benchmark runs every method in a process of its own, continues after an interruption, and writes its page."""

import json
import sys

import pytest
from mmengine.config import Config
from performance import SMALL, TINY, job, measure, suites
from performance_page import write_page
from performance_peers import PEERS
from performance_worker import make_step

from tests.support.paths import REPO
from tests.support.processes import run


@pytest.mark.slow
def test_every_method_takes_its_steps(tmp_path):
    command = [
        sys.executable,
        'tools/benchmarks/performance.py',
        '--only',
        'quick',
        '--steps',
        '1',
        '--out',
        str(tmp_path),
    ]
    for _ in range(2):
        done = run(*command, cwd=REPO, timeout=1000)
        assert done.returncode == 0, done.stderr[-2000:]
        results = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
        assert [r['method'] for r in results] == [one['method'] for one in suites(())['quick']]  # measured once
    for result in results:
        if result['method'].startswith('opacus'):  # HRNet adds its residuals in place
            assert 'inplace' in result['failed']
        else:
            assert result['time'] > 0 and result['memory'] > 0 and result['seconds'] > 0


@pytest.mark.parametrize('method', PEERS)
def test_opacus_runs_on_one_of_the_models(method):
    first, _ = make_step(Config.fromfile(SMALL), method, 2, 2, 1, 'cpu', 1)
    list(first())


def test_processes_that_share_a_batch_and_the_page(tmp_path):
    wanted = [job(TINY, 'hybrid', samples=4, expected_batch_size=8, threads=1, processes=n) for n in (2, 1)]
    results = [measure(wanted[0], steps=1)]
    assert 'failed' not in results[0]
    page = tmp_path / 'performance.md'
    page.write_text('Before.\n<!-- benchmark -->\nold\n<!-- /benchmark -->\nAfter.\n')
    write_page(page, dict(models=wanted[:1], processes=wanted), results)
    text = page.read_text()
    assert text.startswith('Before.') and text.endswith('After.\n') and 'old' not in text
    assert '| hybrid |' in text and (tmp_path / 'performance.png').exists()
