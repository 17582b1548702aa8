"""The repository, and the real images that may be beside it in ../shared/data. Must not copy or change them."""

from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


def shared(name: str) -> Path:
    """The file or folder ``name`` of ../shared/data ('mpii', 'coco/test_coco.json'). Skips the test if it is absent."""
    path = REPO.parent / 'shared' / 'data' / name
    if not path.exists():
        pytest.skip(f'needs {path}, which is beside a checkout and no part of it')
    return path
