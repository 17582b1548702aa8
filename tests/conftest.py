"""Set-up that every test shares: the package first, and one small synthetic data set a session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests share helpers.py and shared_data.py

import mmpose_dp  # noqa: E402, F401  (first: its compat mends the install before a test imports mmpose)
from mmpose.utils import register_all_modules  # noqa: E402

from mmpose_dp.datasets.synthetic import make_synthetic_mpii  # noqa: E402

register_all_modules()


@pytest.fixture(scope='session')
def synthetic(tmp_path_factory):
    """40 + 12 drawn people of the private domain; a folder laid out as data/mpii."""
    return make_synthetic_mpii(tmp_path_factory.mktemp('private'), 'private', 40, 12, image_size=96, workers=1)


@pytest.fixture(scope='session')
def synthetic_public(tmp_path_factory):
    """40 + 12 drawn people of the public domain."""
    return make_synthetic_mpii(tmp_path_factory.mktemp('public'), 'public', 40, 12, image_size=96, workers=1)
