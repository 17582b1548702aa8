"""Set-up that all tests share: the package is imported first, and two small synthetic data sets are made once."""

import functools
import gc
import sys
from types import SimpleNamespace

import cli
import hypothesis
import pytest
from mmengine.logging import MessageHub, MMLogger
from mmengine.runner import set_random_seed
from mmpose.registry import VISUALIZERS
from mmpose.utils import register_all_modules
from yapf.yapflib import yapf_api

import mmpose_dp  # noqa: F401  (its compat repairs the install before a test imports mmpose.models)
from mmpose_dp.datasets.synthetic import make_synthetic_mpii

register_all_modules()
# The same examples in every run. Others: pytest --hypothesis-profile=default
hypothesis.settings.register_profile('fixed', derandomize=True, database=None)
hypothesis.settings.load_profile('fixed')
# mmengine collects garbage whenever a data set is built: a third of a second each, over all that the imports left behind
gc.collect()
gc.freeze()
_format = yapf_api.FormatCode


@functools.lru_cache(maxsize=16)
def _formatted(text, style, verify):
    return _format(text, style_config=dict(style), **dict(verify))


def _format_once(text, style_config, **more):
    """yapf's FormatCode. mmengine formats a run's config six times, a fifth of a second each: here it takes the first answer."""
    return _formatted(text, tuple(style_config.items()), tuple(more.items()))


yapf_api.FormatCode = _format_once


@pytest.fixture(autouse=True)
def no_runner_of_another_test():
    """Forgets each test's loggers, hubs and visualizers.

    mmengine names loggers and hubs to the second, so that a quick next run would write to closed streams. MMPose names
    every visualizer alike, so that all runs of a process would write to the folder of the first.
    """
    kept = [(kind, dict(kind._instance_dict)) for kind in (MMLogger, MessageHub)]
    yield
    for name in ('PoseLocalVisualizer', 'Pose3dLocalVisualizer'):
        VISUALIZERS.get(name)._instance_dict.clear()
    for kind, instances in kept:
        kind._instance_dict.clear()
        kind._instance_dict.update(instances)


@pytest.fixture(autouse=True)
def same_crops_in_every_run():
    """Seeds the generators of augmentations and weights: a test that passes once passes in CI. Secret noise has its own source."""
    set_random_seed(0)


def pytest_fixture_setup(fixturedef):
    """The same for what several tests share, such as a module's training, which is made before the fixture above."""
    if fixturedef.scope != 'function':
        set_random_seed(0)


def pytest_collectstart(collector):
    """The same for what a module of tests makes where it is imported."""
    if isinstance(collector, pytest.Module):
        set_random_seed(0)


@pytest.fixture(scope='session')
def synthetic(tmp_path_factory):
    """40 + 12 synthetic people of the private domain, in a folder laid out as data/mpii."""
    return make_synthetic_mpii(tmp_path_factory.mktemp('private'), 'private', 40, 12, image_size=96, workers=1)


@pytest.fixture(scope='session')
def synthetic_public(tmp_path_factory):
    """40 + 12 synthetic people of the public domain."""
    return make_synthetic_mpii(tmp_path_factory.mktemp('public'), 'public', 40, 12, image_size=96, workers=1)


# several processes run one file each, in this order (--no-loadscope-reorder): files that take minutes come first
LONG = (
    'test_mpii_end_to_end.py',
    'test_zoo.py',
    'test_training.py',
    'test_resuming.py',
    'test_malformed.py',
    'test_benchmarks_performance.py',
    'test_audit.py',
    'test_variants.py',
    'test_killing.py',
)


def pytest_collection_modifyitems(items):
    """Puts the long files first, in the order of ``LONG``."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


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
