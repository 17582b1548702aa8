"""Which parts of a training are code that this project does not know: a user's own, or another package's.

Must not judge them: the guarantee supposes that each of them treats every record by itself.
"""

import sys
from typing import Any

KNOWN = frozenset({'mmpose_dp', 'mmpose', 'mmengine', 'mmcv', 'mmdet', 'torch', *sys.stdlib_module_names})


def own_name(part: Any) -> str:
    """Module and name of the first class of a part that is not of a known package; empty if there is none.

    Args:
        part: an object or a class; a class that this project made from another one is taken for the other one.
    """
    kinds = part.__mro__ if isinstance(part, type) else [*type(part).__mro__]
    if hasattr(part, '__qualname__') and not isinstance(part, type):  # a function
        kinds = [part]
    for kind in kinds:
        if kind.__module__.partition('.')[0] not in KNOWN:
            return f'{kind.__module__}.{kind.__qualname__}'
    return ''
