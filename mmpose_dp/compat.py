"""Checks the install and works around broken ones; no other module does.

Each function does nothing if the install is sound. Must run before mmpose is imported, must be safe to run twice, and must not
change the behaviour of sound packages.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import types
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec
from pathlib import Path
from typing import Any

# import name -> lowest version, the distributions that provide it, the command that installs it.
# `--no-deps` is there if pip would otherwise replace or build another package: torch for opacus, mmengine for mmcv, chumpy for
# mmpose.
REQUIRED = {
    'torch': ('2.1', ('torch',), 'pip install torch'),
    'mmengine': ('0.10.0', ('mmengine', 'onedl-mmengine', 'mmengine-lite'), 'pip install onedl-mmengine'),
    'mmcv': ('2.0.0', ('mmcv', 'onedl-mmcv', 'mmcv-lite'), 'pip install --no-deps onedl-mmcv'),
    'mmdet': ('3.0.0', ('mmdet', 'onedl-mmdetection'), 'pip install --no-deps onedl-mmdetection'),
    'mmpose': ('1.3.0', ('mmpose',), 'pip install --no-deps "mmpose>=1.3.2"'),
    'opacus': ('1.5.0', ('opacus',), 'pip install --no-deps "opacus>=1.5.0" opt-einsum'),
    'dp_accounting': ('0.4.4', ('dp-accounting',), 'pip install "dp-accounting>=0.4.4"'),
}


def apply() -> None:
    """Runs all checks and workarounds. Raises ImportError if a package is missing or too old."""
    check_versions()
    declare_torchvision_ops()
    provide_mmcv_ops()
    allow_mmengine_checkpoints()
    allow_inheriting_configs()
    warn_without_pkg_resources()


# ---- versions ------------------------------------------------------------------------------------
def check_versions() -> None:
    """Raises one ImportError that lists every missing or too old package, both versions, and the command to install it."""
    problems = []
    for module, (least, distributions, remedy) in REQUIRED.items():
        found = _version(module, distributions)
        if found is None:
            problems.append(f'{module} >= {least} is needed, but it is not installed: {remedy}')
        elif _numbers(found) < _numbers(least):
            upgrade = remedy.replace('install', 'install -U', 1)
            problems.append(f'{module} >= {least} is needed, but {found} is installed: {upgrade}')
    if problems:
        lines = '\n  '.join(problems)
        raise ImportError(
            f'mmpose_dp cannot run in this environment ({sys.prefix}):\n  {lines}\n'
            'Or run `make install` in a clone of mmpose_dp: a complete environment in .venv'
        )


def _version(module: str, distributions: tuple[str, ...]) -> str | None:
    """The installed version, if possible without importing the package; None if it is missing."""
    if importlib.util.find_spec(module) is None:
        return None
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    # a source tree on PYTHONPATH, or a fork under an unknown name
    return str(getattr(importlib.import_module(module), '__version__', '0'))


def _numbers(version: str) -> tuple[int, ...]:
    """'2.0.0rc4+cpu' -> (2, 0, 0); '1.5' -> (1, 5, 0)."""
    release = re.match(r'\d+(\.\d+)*', version)
    parts = [int(part) for part in release[0].split('.')] if release else []
    return tuple((parts + [0, 0, 0])[:3])


# ---- torchvision ---------------------------------------------------------------------------------
# schemas exist as long as the torch.library.Library objects that hold them
_declared: list[Any] = []


def declare_torchvision_ops() -> None:
    """Declares the two schemas without which torchvision fails at import.

    This happens if torchvision is built for CUDA and torch for CPUs only. Nothing here runs nms.
    """
    import torch

    spec = importlib.util.find_spec('torchvision')
    if 'torchvision' in sys.modules or spec is None or spec.origin is None:
        return
    finder = FileFinder(str(Path(spec.origin).parent), (ExtensionFileLoader, EXTENSION_SUFFIXES))
    compiled = finder.find_spec('_C')
    try:
        if compiled is not None and compiled.origin is not None:
            # torchvision does this at import; twice is harmless
            torch.ops.load_library(compiled.origin)
    except OSError:
        pass  # libraries of another torch build are missing
    missing = [name for name in ('nms', 'qnms') if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library('torchvision', 'FRAGMENT')
        for name in missing:
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        _declared.append(library)


# ---- mmcv ----------------------------------------------------------------------------------------
def provide_mmcv_ops() -> None:
    """Replaces mmcv's compiled operators by stand-ins if they do not load.

    mmpose imports them, but no top-down model runs them. A stand-in raises NotImplementedError with the reason when it is called.
    """
    try:
        importlib.import_module('mmcv._ext')
        return
    except ImportError as error:
        # not compiled (mmcv-lite, onedl-mmcv), or compiled for another torch
        reason = str(error)

    def operator(name: str) -> Callable[..., Any]:
        if name.startswith('__'):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f'mmcv.ops needs the compiled operator {name}, which this mmcv does not have '
                f'({reason}). Top-down models do not need it; for others, install an mmcv built '
                'for this torch'
            )

        return call

    module = types.ModuleType('mmcv._ext')
    # some libraries check the spec before they import, and None would raise an error there
    module.__spec__ = ModuleSpec('mmcv._ext', loader=None, origin=__name__)
    module.__getattr__ = operator  # type: ignore[method-assign]
    sys.modules['mmcv._ext'] = module


# ---- mmengine ------------------------------------------------------------------------------------
def allow_mmengine_checkpoints() -> None:
    """Allows mmengine's own types in checkpoints, so that resuming works.

    mmengine up to 0.10.7 cannot resume under torch >= 2.6, which loads plain tensors only. onedl-mmengine can, but lacks some of
    numpy's numbers: it then warns at length and loads without any check. Any other type in a checkpoint is treated as before.
    """
    import torch
    from mmengine.runner import checkpoint

    if _numbers(torch.__version__) < (2, 6, 0):
        return
    knows = 'weights_only' in inspect.getsource(checkpoint)
    torch.serialization.add_safe_globals(_number_types() if knows else checkpoint_types())


def checkpoint_types() -> list[Any]:
    """The types in mmengine's checkpoints beside tensors: the hub's histories and numpy's numbers."""
    import numpy as np
    from mmengine.logging import HistoryBuffer

    core = np._core if hasattr(np, '_core') and _numbers(np.__version__) >= (2, 0, 0) else np.core
    return [
        HistoryBuffer,
        # a history pickles its methods by getattr; this replacement reads nothing else
        (_history_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        core.multiarray._reconstruct,
        core.multiarray.scalar,
        *_number_types(),
    ]


def _number_types() -> list[Any]:
    """Numpy's numbers, and ``bytes``, by which an empty array is pickled: that of a metainfo without a skeleton, say."""
    import numpy as np

    return [
        *(type(np.dtype(kind)) for kind in ('bool', 'uint8', 'int32', 'int64', 'float32', 'float64')),
        *((_no_bytes, f'{module}.bytes') for module in ('builtins', '__builtin__')),
    ]


def _no_bytes() -> bytes:
    return b''


def _history_method(owner: Any, name: str) -> Any:
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name.startswith('_'):
        raise ValueError(f'a checkpoint asks for {name!r} of {owner!r}, which no mmengine checkpoint needs')
    return getattr(owner, name)


def allow_inheriting_configs() -> None:
    """Lets ``_base_ = 'mmpose_dp::dp/...'`` name a config of this package.

    mmengine accepts 'package::path' only for packages that it knows, and looks for their types in a registry of the same name;
    the types of mmpose_dp are in MMPose's registry.
    """
    from mmengine.config import Config
    from mmengine.config.utils import MODULE2PACKAGE

    if 'mmpose_dp' in MODULE2PACKAGE:
        return
    MODULE2PACKAGE['mmpose_dp'] = 'mmpose_dp'
    plain = Config._get_cfg_path

    def path_and_scope(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = plain(cfg_path, filename)
        return path, 'mmpose' if scope == 'mmpose_dp' else scope

    Config._get_cfg_path = staticmethod(path_and_scope)


def warn_without_pkg_resources() -> None:
    """Warns if `mmpose::` base configs will not load.

    mmengine up to 0.10.7 finds them through pkg_resources, which setuptools 81 removed.
    """
    from mmengine.utils import package_utils

    if 'pkg_resources' not in inspect.getsource(package_utils) or importlib.util.find_spec('pkg_resources'):
        return
    warnings.warn(
        "configs with `_base_ = 'mmpose::...'` will not load: this mmengine needs pkg_resources. "
        "Type `pip install 'setuptools<81'`, or install onedl-mmengine instead of mmengine",
        stacklevel=2,
    )
