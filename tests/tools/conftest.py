"""A public view of one's own, for the tools that show or audit views."""

import numpy as np
import pytest
from mmpose.registry import TRANSFORMS

from mmpose_dp.datasets import View


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
