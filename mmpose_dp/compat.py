"""The only place that works around broken installs. Each function does nothing where the install is sound.

Must run before mmpose is imported, and must not change what sound packages do.
"""

import importlib.metadata
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

# import name -> least version, and the distributions that provide it
REQUIRED = {
    'torch': ('2.1', ('torch',)),
    'mmengine': ('0.10.0', ('mmengine', 'onedl-mmengine', 'mmengine-lite')),
    'mmcv': ('2.0.0', ('mmcv', 'onedl-mmcv', 'mmcv-lite')),
    'mmdet': ('3.0.0', ('mmdet', 'onedl-mmdetection')),
    'mmpose': ('1.3.0', ('mmpose',)),
    'opacus': ('1.5.0', ('opacus',)),
    'dp_accounting': ('0.4.3', ('dp-accounting',)),
}


def check_versions() -> None:
    """Raises ImportError that names the package that is missing or too old, and what to install."""
    for module, (least, distributions) in REQUIRED.items():
        found = _installed(distributions)
        if found is None and importlib.util.find_spec(module) is None:
            problem = f'{module} is not installed'
        elif found is not None and _numbers(found) < _numbers(least):
            problem = f'{module} {found} is too old'
        else:
            continue
        raise ImportError(
            f'mmpose_dp needs {module} >= {least}, but {problem}. Run `make install` in a clone of mmpose_dp for a complete '
            f'environment, or `pip install "{distributions[0]}>={least}"` in your own'
        )


def _installed(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split('+')[0].split('.')
    return tuple(int(''.join(c for c in part if c.isdigit()) or 0) for part in parts[:3])


def declare_torchvision_ops() -> None:
    """torchvision beside a CPU-only torch fails at import for want of two operator schemas: declare them."""
    import torch

    if importlib.util.find_spec('torchvision') is None or _imports('torchvision'):
        return
    library = torch.library.Library('torchvision', 'FRAGMENT')
    library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    declare_torchvision_ops.library = library  # type: ignore[attr-defined]  # the schemas live as long as this object
    _forget('torchvision')


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):
        _forget(name)
        return False
    return True


def _forget(name: str) -> None:
    for loaded in [m for m in sys.modules if m == name or m.startswith(f'{name}.')]:
        del sys.modules[loaded]


def provide_mmcv_ops() -> None:
    """mmpose imports mmcv's compiled operators, which no top-down model runs: stand in for them where they are missing."""
    if 'mmcv._ext' in sys.modules or importlib.util.find_spec('mmcv._ext') is not None:
        return

    def missing(name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f'mmcv was installed without compiled operators, so mmcv.ops cannot run {name}')

        return call

    module = types.ModuleType('mmcv._ext')
    module.__spec__ = ModuleSpec('mmcv._ext', loader=None)
    module.__getattr__ = missing  # type: ignore[method-assign]
    sys.modules['mmcv._ext'] = module


def allow_full_checkpoints() -> None:
    """mmengine 0.10.7 and older load checkpoints without saying weights_only=False, which torch >= 2.6 then refuses.

    Resuming needs the optimizer, the schedules and the message hub. The file is one that the user named; this keeps what
    mmengine did with older torch.
    """
    import torch
    from mmengine.runner import checkpoint

    if _numbers(torch.__version__) < (2, 6) or _installed(('onedl-mmengine',)):
        return
    plain = checkpoint.torch.load
    if getattr(plain, 'mmpose_dp', False):
        return

    def load(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault('weights_only', False)
        return plain(*args, **kwargs)

    load.mmpose_dp = True  # type: ignore[attr-defined]
    proxy = types.ModuleType('torch')
    proxy.__dict__.update(checkpoint.torch.__dict__, load=load)
    checkpoint.torch = proxy  # only mmengine's checkpoint module sees it


def apply() -> None:
    """Everything, in order."""
    check_versions()
    declare_torchvision_ops()
    provide_mmcv_ops()
    allow_full_checkpoints()
