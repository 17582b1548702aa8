"""The benchmark runs every method and measures each against the plain step of the same run."""

import importlib.util

from helpers import REPO


def test_every_method_takes_its_steps():
    spec = importlib.util.spec_from_file_location('benchmark', REPO / 'tools/benchmark.py')
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    config = str(REPO / 'configs/dp/hrnet_synthetic_hybrid_eps08.py')
    results = benchmark.measure(config, rows=4, steps=1, device='cpu')
    assert [name for name, _ in results] == list(benchmark.METHODS)
    assert all(seconds > 0 for _, seconds in results)
