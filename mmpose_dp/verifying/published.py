"""The one form of a published checkpoint, and of the same weights as safetensors.

Must refuse everything that a reader could understand in another way than this one: a published file holds named tensors, each with
a storage of its own, and plain values. Must not import torch, and must not look up a class that a file names.
"""

import hashlib
import io
import json
import math
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmpose_dp.extras.evidence import plain_sha256

from .archive import read_archive

_KINDS = {  # of torch's storages: the name in safetensors, and the bytes of a number
    'DoubleStorage': ('F64', 8),
    'FloatStorage': ('F32', 4),
    'HalfStorage': ('F16', 2),
    'BFloat16Storage': ('BF16', 2),
    'LongStorage': ('I64', 8),
    'IntStorage': ('I32', 4),
    'ShortStorage': ('I16', 2),
    'CharStorage': ('I8', 1),
    'ByteStorage': ('U8', 1),
    'BoolStorage': ('BOOL', 1),
}
_KIND_OF = {name: kind for kind, (name, _) in _KINDS.items()}
_OPCODES = set(  # what torch.save needs for tensors and plain values; each does one thing, for every reader
    'PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINPUT LONG_BINPUT BINGET LONG_BINGET '
    'EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GLOBAL BINPERSID REDUCE'.split()
)
_CONTENT = {'state_dict', 'meta', 'privacy_statement'}
_META = {'dataset_meta', 'mmpose_dp_version', 'lineage'}
_META_BEFORE = {'dataset_meta', 'mmpose_dp_version', 'descent'}  # what older versions wrote


@dataclass(frozen=True)
class Published:
    """The plain values of a published checkpoint, and the digest of its weights."""

    statement: dict[str, Any]
    meta_sha256: str
    weights_sha256: str


def read_published(data: bytes) -> Published:
    """Reads a published checkpoint. Raises ValueError for every file that tools/publish_model.py would not have written."""
    try:
        files = read_archive(data)
        values = _values(files['data.pkl'])
        if not isinstance(values, dict) or set(values) != _CONTENT:
            raise ValueError(f'it does not hold {", ".join(sorted(_CONTENT))} alone')
        weights, meta, statement = values['state_dict'], values['meta'], values['privacy_statement']
        if type(meta) is not dict or set(meta) not in (_META, _META_BEFORE):
            raise ValueError(f'meta in it does not hold {", ".join(sorted(_META))} alone')
        if type(statement) is not dict or not _is_plain(meta) or not _is_plain(statement):
            raise ValueError('there is something else than plain values in meta or in the statement')
        digest, used = hashlib.sha256(), set()
        for name in sorted(_names(weights)):
            kind, shape, key = _checked(name, weights[name], files)
            if key in used:
                raise ValueError(f'{name} shares its numbers with another tensor')
            used.add(key)
            digest.update(f'{name} {kind} {shape}\n'.encode())
            digest.update(files[f'data/{key}'])
    except ValueError:
        raise
    except Exception as error:  # a file can be wrong in any way
        raise ValueError(f'{type(error).__name__}: {error}') from error
    if {f'data/{key}' for key in used} != {name for name in files if name.startswith('data/')}:
        raise ValueError('it holds numbers that belong to none of its tensors')
    return Published(statement, plain_sha256(meta), digest.hexdigest())


def _names(weights: Any) -> Iterator[str]:
    if type(weights) is not dict or not weights:
        raise ValueError('state_dict in it is not a dict of tensors')
    for name in weights:
        if type(name) is not str:
            raise ValueError(f'state_dict has a key {name!r}')
        yield name


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) in (str, int) and _is_plain(one) for key, one in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


# ---- the pickle --------------------------------------------------------------------------------------------------------
class _Storage(tuple):
    """What the file says of a storage."""


class _Tensor(tuple):
    """What the file says of a tensor."""


class _Kind(str):
    """The name of a class of storages."""


class _Hooks(OrderedDict):
    """Of a tensor's gradient: there are none."""

    def __init__(self) -> None:  # takes no items
        super().__init__()


def _rebuilt(*arguments: Any) -> _Tensor:
    return _Tensor(arguments)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ('collections', 'OrderedDict'):
            return _Hooks
        if (module, name) == ('torch._utils', '_rebuild_tensor_v2'):
            return _rebuilt
        if module == 'torch' and name in _KINDS:
            return _Kind(name)
        raise ValueError(f'it needs {module}.{name}, which a published file does not: do not load it')

    def persistent_load(self, pid: Any) -> _Storage:
        return _Storage(pid)


def _values(data: bytes) -> Any:
    """What the pickle holds, if it has one form alone."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == 'GLOBAL':
            _Reader(io.BytesIO()).find_class(*str(argument).split(' ', 1))
        elif operation.name not in _OPCODES or operation.name == 'PROTO' and argument != 2:
            raise ValueError(
                f'its pickle has the operation {operation.name}, which torch.save does not use for weights'
            )
    pickletools.dis(data, out=io.StringIO())  # raises ValueError if anything is left over at its end
    file = io.BytesIO(data)
    values = _Reader(file).load()
    if file.tell() != len(data):
        raise ValueError('there is something behind its pickle')
    return values


def _checked(name: str, tensor: Any, files: dict[str, bytes]) -> tuple[str, tuple[int, ...], str]:
    """Kind, shape and storage of a tensor that is its whole storage, row by row. Raises ValueError for another."""
    if type(tensor) is not _Tensor or len(tensor) != 6:
        raise ValueError(f'{name} is not a plain tensor')
    storage, offset, shape, stride, gradient, hooks = tensor
    if type(storage) is not _Storage or len(storage) != 5:
        raise ValueError(f'{name} has no plain storage')
    word, kind, key, device, numel = storage
    whole = (type(word), type(kind), type(key), type(device)) == (str, _Kind, str, str) and (word, device) == (
        'storage',
        'cpu',
    )
    numbers = [offset, numel, *shape, *stride]
    if (
        not whole
        or type(shape) is not tuple
        or type(stride) is not tuple
        or any(type(n) is not int or n < 0 for n in numbers)
    ):
        raise ValueError(f'{name} is not a plain tensor in the memory of a CPU')
    rows = tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))
    if offset != 0 or stride != rows or numel != math.prod(shape):
        raise ValueError(f'{name} does not fill its storage row by row')
    if gradient is not False or type(hooks) is not _Hooks or hooks or vars(hooks):
        raise ValueError(f'{name} has hooks, or is a parameter')
    if len(files.get(f'data/{key}', b'')) != numel * _KINDS[kind][1] or f'data/{key}' not in files:
        raise ValueError(f'{name} has another number of bytes than of numbers')
    return str(kind), shape, key


# ---- safetensors -------------------------------------------------------------------------------------------------------
def safetensors_sha256(data: bytes) -> str:
    """The digest of the weights in a safetensors file. Raises ValueError for every file of another form than torch.save_file's."""
    size = int.from_bytes(data[:8], 'little')
    text, numbers = data[8 : 8 + size], data[8 + size :]
    if len(data) < 8 or len(text) != size:
        raise ValueError('it is cut off')
    header = json.loads(text.decode(), object_pairs_hook=_each_once)
    if type(header) is not dict or json.dumps(
        header, separators=(',', ':'), ensure_ascii=False
    ).encode() != text.rstrip(b' '):
        raise ValueError('its header has another form than safetensors writes')
    if header.pop('__metadata__', None) not in (None, {'format': 'pt'}):
        raise ValueError('it holds metadata')
    digest, spans = hashlib.sha256(), []
    for name in sorted(header):
        one = header[name]
        if type(one) is not dict or set(one) != {'dtype', 'shape', 'data_offsets'} or one['dtype'] not in _KIND_OF:
            raise ValueError(f'{name} is not a plain tensor')
        shape, (begin, end), kind = one['shape'], one['data_offsets'], _KIND_OF[one['dtype']]
        whole = all(type(n) is int and n >= 0 for n in [begin, end, *shape])
        if not whole or end - begin != math.prod(shape) * _KINDS[kind][1]:
            raise ValueError(f'{name} has another number of bytes than of numbers')
        spans.append((begin, end))
        digest.update(f'{name} {kind} {tuple(shape)}\n'.encode())
        digest.update(numbers[begin:end])
    edges = [0, *(end for _, end in sorted(spans))]
    if [begin for begin, _ in sorted(spans)] != edges[:-1] or edges[-1] != len(numbers):
        raise ValueError('its tensors overlap, or there is something between or behind them')
    return digest.hexdigest()


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError('its header has a name twice')
    return dict(pairs)
