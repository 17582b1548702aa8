"""What a config's ``type`` stands for. Types are resolved here and never compared as text.

A type may be a name ('LoadImage'), a name with a scope ('mmpose.LoadImage'), a path ('mmpose.datasets.transforms.LoadImage') or,
in mmengine's pure Python configs, the class itself. Must not build anything.
"""

from typing import Any

from mmengine.registry import Registry


def resolved(registry: Registry, kind: Any) -> Any:
    """The class (or function) that ``kind``, the ``type`` of a config, stands for; None for a name that is not registered."""
    if not isinstance(kind, str):
        return kind
    try:
        return registry.get(kind)
    except Exception:  # a path into a module that is not there
        return None


def is_kind(registry: Registry, cfg: Any, cls: type) -> bool:
    """Whether a config (or an object in a config's place) is of ``cls`` or of a class derived from it."""
    found = resolved(registry, cfg.get('type')) if isinstance(cfg, dict) else type(cfg)
    return isinstance(found, type) and issubclass(found, cls)


def type_name(kind: Any) -> str:
    """A ``type`` as a message names it: without scope or module."""
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', str(kind))
