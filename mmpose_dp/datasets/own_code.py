"""Finds which parts of a training are code that this project does not know: a user's own, or another package's.

Must not judge them: the guarantee supposes that each of them treats every record by itself.
"""

import sys
from typing import Any

_OURS = 'mmpose_dp'
# albumentations: what MMPose's Albumentation wraps
KNOWN = frozenset({_OURS, 'mmpose', 'mmengine', 'mmcv', 'mmdet', 'albumentations', 'torch', *sys.stdlib_module_names})


def own_name(part: Any) -> str:
    """Module and name of a part's class, if that is of no known package; empty otherwise.

    Args:
        part: an object, a class or a function. Of a class that this project made from another one, the other one counts.
    """
    is_function = hasattr(part, '__qualname__') and not isinstance(part, type)
    kinds = [part] if is_function else part.__mro__ if isinstance(part, type) else type(part).__mro__
    for kind in kinds:
        package = (kind.__module__ or 'builtins').partition('.')[0]
        if package != _OURS:
            return '' if package in KNOWN else f'{kind.__module__}.{kind.__qualname__}'
    return ''
