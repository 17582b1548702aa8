"""Reads a checkpoint's plain values and the digest of its weights without torch, and without running what is in the file.

A checkpoint is a zip archive with a pickle. This reads those of trainings; a published file has a stricter reader, which accepts
one form alone (verifying/published.py). Everything in the pickle but plain values and tensors becomes an ``_Opaque``, so no code of
the file or of a package is called. Must not import torch, and must not look up a class that a file names.
"""

import hashlib
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# what trainable='lora' and 'experts' keep of a layer beside its weight, in which it is contained
_UPDATE = re.compile(r'(.+)\.(lora_(down|up)\..+|expert_weights|expert_own_.+)')


def without_updates(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without what low-rank updates and experts keep beside the layers: what plain MMPose loads."""
    found = {name: _UPDATE.fullmatch(str(name)) for name in weights}
    return {
        name: value for name, value in weights.items() if not ((of := found[name]) and f'{of[1]}.weight' in weights)
    }


@dataclass(frozen=True)
class _Storage:
    kind: str  # such as 'FloatStorage'
    key: str  # of the archive's file
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_plain: bool = True  # False if a bit says that the numbers are to be read negated or conjugated


class _Opaque:
    """Stands for anything that is neither a plain value nor a tensor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Of a list that is not a plain one."""

    def extend(self, values: Any) -> None:
        """Of a list that is not a plain one."""


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: Any, stride: Any, gradient: Any = None, hooks: Any = None, bits: Any = None
) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(shape), tuple(stride), not bits)


def _first(value: Any, *rest: Any) -> Any:
    return value


_KNOWN = {
    ('collections', 'OrderedDict'): OrderedDict,
    ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
    ('torch._utils', '_rebuild_parameter'): _first,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and name.endswith('Storage'):
            return type(name, (_Opaque,), {})
        return _KNOWN.get((module, name), _Opaque)

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, numel = pid
        return _Storage(kind.__name__, str(key), int(numel))


@dataclass(frozen=True)
class CheckpointFile:
    """The plain values of a checkpoint file, and the digest of its weights (empty if it has none)."""

    values: dict[str, Any]
    weights_sha256: str

    @classmethod
    def read(cls, path: Path) -> 'CheckpointFile':
        """Reads a file. Raises ValueError for one that is damaged, or is not torch's zip archive."""
        try:
            with zipfile.ZipFile(path) as archive:
                values, folder = _values(archive)
                weights = values.get('state_dict')
                digest = _digest(weights, archive, folder) if isinstance(weights, dict) else ''
                damaged = archive.testzip()
                if damaged is not None:
                    raise ValueError(f'{damaged} in it does not match its checksum')
        except Exception as error:  # a file can be wrong in any way
            raise ValueError(f'{path.name} cannot be read: {error or type(error).__name__}') from error
        return cls(values, digest)


def plain_values(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint file, without reading its tensors; empty for a file that cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _values(archive)[0]
    except Exception:  # a file can be wrong in any way
        return {}


def _values(archive: zipfile.ZipFile) -> tuple[dict[str, Any], str]:
    """The plain values in an archive, and the folder of its tensors. Raises ValueError, or anything that a pickle raises."""
    names = [name for name in archive.namelist() if name.endswith('/data.pkl')]
    with archive.open(names[0]) as file:
        values = _Reader(file).load()
    if not isinstance(values, dict):
        raise ValueError('it holds no dict')
    return values, names[0][: -len('.pkl')]


def _digest(weights: dict[str, Any], archive: zipfile.ZipFile, folder: str) -> str:
    """SHA-256 over the names, types, shapes and numbers of the tensors that are published, in the order of their names."""
    digest, weights = hashlib.sha256(), without_updates(weights)
    for name in sorted(map(str, weights)):
        tensor = weights[name]
        if not isinstance(tensor, _Tensor):
            digest.update(
                f'{name} {tensor!r}\n'.encode() if isinstance(tensor, (int, float, str)) else f'{name}\n'.encode()
            )
            continue
        digest.update(f'{name} {tensor.storage.kind} {tensor.shape}\n'.encode())
        digest.update(_bytes_of(tensor, archive.read(f'{folder}/{tensor.storage.key}')))
    return digest.hexdigest()


def _bytes_of(tensor: _Tensor, raw: bytes) -> bytes:
    """The numbers of a tensor, row by row. Raises ValueError if the storage is too short for it, or if they are not plain."""
    if not tensor.is_plain:
        raise ValueError('a tensor is stored negated or conjugated')
    size = len(raw) // tensor.storage.numel if tensor.storage.numel else 1
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride))
    if 0 in tensor.shape:
        return b''
    if min((tensor.offset, *tensor.stride, *tensor.shape)) < 0 or (last + 1) * size > len(raw):
        raise ValueError('a tensor reaches beyond its storage')
    numbers = np.frombuffer(raw, dtype=f'V{size}')[tensor.offset :]
    steps = [step * size for step in tensor.stride]
    return np.lib.stride_tricks.as_strided(numbers, tensor.shape, steps, writeable=False).tobytes()
