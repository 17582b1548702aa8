"""Where the real images beside the repository are, ../shared/data. Must not copy or change them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / 'shared' / 'data'


def shared(name: str) -> Path:
    """The file or folder ``name`` there ('mpii', 'coco/test_coco.json'); skips without it."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f'needs {path}, which lies beside a checkout and is no part of it')
    return path
