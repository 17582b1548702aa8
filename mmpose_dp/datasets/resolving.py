"""Resolves a config's ``type`` to a class, so that types are never compared as text.

A type may be a name ('LoadImage'), a name with a scope ('mmpose.LoadImage'), a path ('mmpose.datasets.transforms.LoadImage') or,
in mmengine's pure Python configs, the class itself. Must not build anything.
"""

from collections.abc import Iterator
from typing import Any

from mmengine.registry import Registry


def resolved(registry: Registry, kind: Any) -> Any:
    """The class (or function) that ``kind``, the ``type`` of a config, refers to; None if the name is not registered."""
    if not isinstance(kind, str):
        return kind
    try:
        return registry.get(kind)
    except BrokenPipeError:  # of its own print: says nothing about the name
        raise
    except Exception:  # a path into a module that does not exist
        return None


def is_kind(registry: Registry, cfg: Any, cls: type) -> bool:
    """Whether a config (or an object in its place) is of ``cls`` or of a subclass."""
    found = resolved(registry, cfg.get('type')) if isinstance(cfg, dict) else type(cfg)
    return isinstance(found, type) and issubclass(found, cls)


def type_name(kind: Any) -> str:
    """The name of a ``type`` for messages, without scope or module."""
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def every_dict(node: Any) -> Iterator[dict]:
    """Every dict in nested dicts and lists, each before those in it, so that a caller may change it in between."""
    if isinstance(node, dict):
        yield node
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        yield from every_dict(part)
