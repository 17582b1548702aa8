"""A published file has one form: everything that torch, or another reader, could read in another way is refused."""

import io
import json
import operator
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from mmpose_dp.extras.checkpoint_file import CheckpointFile
from mmpose_dp.verifying.published import read_published, safetensors_sha256

WEIGHTS = {
    'a.weight': torch.arange(24.0).reshape(4, 6),
    'a.bias': torch.tensor([True, False]),
    'b.weight': torch.arange(24).reshape(2, 3, 4, 1).half(),
    'b.steps': torch.tensor(7),
    'c.empty': torch.zeros(0, 3, dtype=torch.bfloat16),
    'd': torch.ones(3, dtype=torch.float64),
}
META = dict(
    dataset_meta={0: 'knee', 'sigmas': [0.1, 1e-300, None]},
    mmpose_dp_version='1',
    lineage={'private': True, 'x': (1, 'y')},
)


def content():
    """What publish_model.py writes, of its kinds of values."""
    weights = {name: value.clone() for name, value in WEIGHTS.items()}
    return dict(state_dict=weights, meta=dict(META), privacy_statement={'seal': 'x', 'epsilon': -1.5, 'big': 2**40})


def saved(values, **options):
    file = io.BytesIO()
    torch.save(values, file, **options)
    return file.getvalue()


HONEST = saved(content())


def fault_of(data):
    with pytest.raises(ValueError) as caught:
        read_published(data)
    return str(caught.value)


def test_what_an_older_publish_model_wrote_is_read_too():
    before = {**META, 'descent': META['lineage']}
    del before['lineage']
    assert read_published(saved(changed(meta=before))).statement == content()['privacy_statement']
    assert 'meta in it does not hold' in fault_of(saved(changed(meta={**META, **before})))


def test_what_publish_model_writes_is_read_as_torch_reads_it(tmp_path):
    (tmp_path / 'a.pth').write_bytes(HONEST)
    found = read_published(HONEST)
    assert found.statement == content()['privacy_statement']
    assert found.weights_sha256 == CheckpointFile.read(tmp_path / 'a.pth').weights_sha256
    other = content()
    other['meta']['dataset_meta'][0] = 'hip'
    assert read_published(saved(other)).meta_sha256 != found.meta_sha256
    other['state_dict']['d'][1] = -1
    assert read_published(saved(other)).weights_sha256 != found.weights_sha256


# ---- the zip archive ---------------------------------------------------------------------------------------------------
def zipped(entries, compression=zipfile.ZIP_STORED, comment=b'', gap=None):
    """``gap``: before this file there are two bytes that belong to none; -1: before the directory."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, 'w', compression) as archive:
        warnings.simplefilter('ignore')  # of names that are there twice
        for number, (name, data) in enumerate([*entries, (None, None)]):
            if gap in (number, -1 if name is None else number):
                archive.fp.seek(archive.start_dir)
                archive.start_dir += archive.fp.write(b'PK')
            if name is not None:
                archive.writestr(zipfile.ZipInfo(name), data, compression)
        archive.comment = comment
    return file.getvalue()


def entries():
    with zipfile.ZipFile(io.BytesIO(HONEST)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def renamed(old, new, data=None):
    return [(name.replace(old, new), data if data and old in name else value) for name, value in entries()]


def evil(old='/data/', new='/DATA/'):
    """Copies of the storages, all zeros, under another name."""
    return [(name.replace(old, new), bytes(len(data))) for name, data in entries() if old in name]


ARCHIVES = {
    'big-endian numbers': renamed('byteorder', 'byteorder', b'big'),
    'no byteorder': [one for one in entries() if 'byteorder' not in one[0]],
    'another version': renamed('/version', '/version', b'4\n'),
    'another alignment': renamed('.storage_alignment', '.storage_alignment', b'1'),
    'DATA first': [entries()[0], *evil(), *entries()[1:]],
    'DATA last': [*entries(), *evil()],
    'DATA alone': renamed('/data/', '/DATA/'),
    'another folder in front': [*evil('archive/', 'evil/'), *entries()],
    'another folder behind': [*entries(), *evil('archive/', 'evil/')],
    'another spelling of the folder': [*entries(), *evil('archive/', 'ARCHIVE/')],
    'backslashes': [*entries(), *evil('/data/', '\\data\\')],
    'a leading zero': [*entries(), ('archive/data/00', b'x')],
    'a folder inside': [*entries(), ('archive/data/x/0', b'x')],
    'a name twice': [*entries(), (entries()[-1][0], b'x')],
    'a storage twice': [*entries(), *evil('/data/', '/data/')],
    'two pickles': [*entries(), entries()[0]],
    'a second pickle': [*entries(), ('archive/constants.pkl', b'x')],
    'code': [*entries(), ('archive/code/a.py', b'x')],
    'an unused storage': [*entries(), ('archive/data/99', b'x')],
    'a missing storage': [one for one in entries() if not one[0].endswith('data/1')],
    'a longer storage': renamed('data/1', 'data/1', b'x' * 99),
    'a storage in another folder': renamed('archive/data/1', 'evil/data/1'),
    'no folder': renamed('archive/', ''),
    'a text': [*entries(), ('archive/README', b'x')],
}


@pytest.mark.parametrize('kind', ARCHIVES)
def test_an_archive_that_torch_would_not_write_is_refused(kind):
    assert read_published(zipped(entries())) == read_published(HONEST)
    assert fault_of(zipped(ARCHIVES[kind]))


def test_bytes_that_belong_to_no_file_are_refused():
    plain, directory = zipped(entries()), zipped(entries()).index(b'PK\1\2')
    end = plain.index(b'PK\5\6')
    shifted = plain[:end] + plain[end : end + 16] + struct.pack('<IH', directory + 1, 0)
    for data in (
        zipped(entries(), zipfile.ZIP_DEFLATED),
        zipped(entries(), comment=b'x'),
        *(zipped(entries(), gap=number) for number in (0, 1, 5, -1)),
        b'x' + plain,
        plain + b'x',
        plain[:directory] + b'x' + shifted[directory:],
        plain + plain,
        HONEST + HONEST,
        HONEST[:-1],
        HONEST[:5],
        b'',
    ):
        assert fault_of(data)


def headers(data):
    """(offset, length, bytes that nobody reads) of two files' headers, of two entries of the directory, and of its end."""
    for kind, length, free in (
        (b'PK\3\4', 30, {4, 5, *range(10, 14)}),
        (b'PK\1\2', 46, {*range(4, 8), *range(12, 16), *range(36, 42)}),
    ):
        at = -1
        for _ in range(2):
            at = data.index(kind, at + 1)
            name, extra = struct.unpack_from('<HH', data, at + (26 if length == 30 else 28))
            yield at, length + name + extra, free
    if b'PK\7\10' in data:
        yield data.index(b'PK\7\10'), 16, set()
    if b'PK\6\6' in data:
        yield data.index(b'PK\6\6'), 76, {*range(12, 16)}
    yield data.rindex(b'PK\5\6'), 22, set()


@pytest.mark.parametrize('data', [HONEST, zipped(entries())], ids=['by torch', 'by zipfile'])
def test_every_byte_of_its_headers_counts(data):
    """But versions, times and modes."""
    for at, length, free in headers(data):
        for position in set(range(length)) - free:
            other = bytearray(data)
            other[at + position] ^= 1
            with pytest.raises(ValueError):
                read_published(bytes(other))
                pytest.fail(f'byte {position} of {data[at : at + 4]!r}')
        for position in free & set(range(length)):
            other = bytearray(data)
            other[at + position] ^= 1
            assert read_published(bytes(other)) == read_published(data)


# ---- the pickle --------------------------------------------------------------------------------------------------------
class Calls:
    """Calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def with_weight(value):
    values = content()
    values['state_dict']['d'] = value
    return values


def changed(**parts):
    return {**content(), **parts}


def setting():
    values = content()
    values['meta']['lineage'] = Calls(operator.setitem, values['state_dict'], 'd', torch.zeros(3))
    return values


def with_hooks():
    weight = torch.ones(3, requires_grad=True)
    weight._backward_hooks = OrderedDict({1: 'x'})
    return with_weight(weight)


def shared():
    values = content()
    values['state_dict']['e'] = values['state_dict']['d']
    return values


BASE = torch.arange(12.0)
PICKLES = {
    'negated': lambda: with_weight(torch._neg_view(torch.ones(3))),
    'conjugated': lambda: with_weight(torch.ones(3, dtype=torch.complex64).conj()),
    'complex': lambda: with_weight(torch.ones(3, dtype=torch.complex64)),
    'an offset': lambda: with_weight(BASE[2:]),
    'a part': lambda: with_weight(BASE[:3]),
    'every second': lambda: with_weight(BASE[::2]),
    'transposed': lambda: with_weight(BASE.reshape(3, 4).T),
    'expanded': lambda: with_weight(torch.ones(1).expand(3)),
    'channels last': lambda: with_weight(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)),
    'a parameter': lambda: with_weight(torch.nn.Parameter(torch.ones(3))),
    'a gradient': lambda: with_weight(torch.ones(3, requires_grad=True)),
    'hooks': with_hooks,
    'sparse': lambda: with_weight(torch.eye(3).to_sparse()),
    'quantized': lambda: with_weight(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)),
    'a number': lambda: with_weight(3.0),
    'an array': lambda: with_weight(np.ones(3)),
    'a storage': lambda: with_weight(torch.ones(3).storage()),
    'tied': shared,
    'views of one': lambda: changed(state_dict=dict(zip('ab', torch.ones(2, 3)))),
    'no weights': lambda: changed(state_dict={}),
    'an ordered dict': lambda: changed(state_dict=OrderedDict(content()['state_dict'])),
    'a name that is no text': lambda: changed(state_dict={1: torch.ones(3)}),
    'another key': lambda: changed(pictures=torch.rand(3)),
    'a plain key': lambda: changed(notes='x'),
    'a key less': lambda: {k: v for k, v in content().items() if k != 'meta'},
    'a tensor in meta': lambda: changed(meta={**META, 'lineage': torch.ones(3)}),
    'another key in meta': lambda: changed(meta={**META, 'seed': 3}),
    'a tensor in the statement': lambda: changed(privacy_statement={'x': [torch.ones(3)]}),
    'an array in meta': lambda: changed(meta={**META, 'lineage': np.ones(3)}),
    'a set in meta': lambda: changed(meta={**META, 'lineage': {1}}),
    'bytes in meta': lambda: changed(meta={**META, 'lineage': b'x'}),
    'a class in meta': lambda: changed(meta={**META, 'lineage': OrderedDict}),
    'code': lambda: changed(meta={**META, 'lineage': Calls(os.system, 'false')}),
    'a function of builtins': lambda: changed(meta={**META, 'lineage': Calls(print)}),
    'a dict with items': lambda: changed(meta={**META, 'lineage': OrderedDict(a=1)}),
    'a list': lambda: [content()],
    'set when loaded': setting,
}


@pytest.mark.parametrize('kind', PICKLES)
def test_a_pickle_that_publish_model_would_not_write_is_refused(kind):
    assert fault_of(saved(PICKLES[kind]()))


def with_pickle(change):
    return zipped([(name, change(data) if name.endswith('data.pkl') else data) for name, data in entries()])


def replaced(old, new):
    return lambda data: data.replace(old, new, 1)


@pytest.mark.parametrize(
    'change',
    [
        lambda data: data + b'x',
        lambda data: b'\x80\x04' + data[2:],
        lambda data: data[:2] + b'N' + data[2:],
        lambda data: data[:-1] + b'0N.',
        lambda data: data[:-1] + b'2.',
        lambda data: data[:-1] + b'}b.',
        replaced(b'FloatStorage', b'DoubleStorage'),
        replaced(b'FloatStorage', b'UntypedStorage'),
        replaced(b'cpu', b'xpu'),
        replaced(b'storage', b'Storage'),
        replaced(b'torch._utils\n_rebuild_tensor_v2', b'torch._utils\n_rebuild_tensor'),
        replaced(b'collections\nOrderedDict', b'collections\nCounter'),
        lambda data: pickle.dumps({}),
        lambda data: b'',
    ],
)
def test_a_pickle_that_was_edited_is_refused(change):
    assert fault_of(with_pickle(change))


def test_other_numbers_of_the_same_size_have_another_digest():
    other = read_published(with_pickle(replaced(b'FloatStorage', b'IntStorage')))
    assert other.weights_sha256 != read_published(HONEST).weights_sha256


# ---- safetensors -------------------------------------------------------------------------------------------------------
KINDS = {
    torch.float32: 'F32',
    torch.bool: 'BOOL',
    torch.float16: 'F16',
    torch.int64: 'I64',
    torch.bfloat16: 'BF16',
    torch.float64: 'F64',
}


def safetensors(change=lambda header: None, numbers=lambda data: data, text=None):
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, value in WEIGHTS.items():
        raw = value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.numpy().tobytes()
        header[name] = dict(
            dtype=KINDS[value.dtype], shape=list(value.shape), data_offsets=[len(data), len(data) + len(raw)]
        )
        data += raw
    change(header)
    written = (text or (lambda words: words))(json.dumps(header, separators=(',', ':')))
    return struct.pack('<Q', len(written)) + written.encode() + numbers(data)


def test_safetensors_have_the_digest_of_the_checkpoint():
    assert safetensors_sha256(safetensors()) == read_published(HONEST).weights_sha256
    assert safetensors_sha256(safetensors(text=lambda words: words + '  ')) == read_published(HONEST).weights_sha256
    changed = safetensors(numbers=lambda data: b'x' + data[1:])
    assert safetensors_sha256(changed) != read_published(HONEST).weights_sha256
    library = pytest.importorskip('safetensors.torch', reason='safetensors is no requirement')
    written = library.save(WEIGHTS, metadata={'format': 'pt'})
    assert safetensors_sha256(written) == read_published(HONEST).weights_sha256


def set_in(name, **values):
    return lambda header: header[name].update(values)


@pytest.mark.parametrize(
    'parts',
    [
        dict(change=set_in('d', data_offsets=[0, 24])),
        dict(change=set_in('d', data_offsets=[-24, 0])),
        dict(change=set_in('d', shape=[4])),
        dict(change=set_in('d', shape=[-3])),
        dict(change=set_in('d', shape=[3.0])),
        dict(change=set_in('d', dtype='F8')),
        dict(change=set_in('d', stride=[1])),
        dict(change=set_in('__metadata__', seed='3')),
        dict(change=lambda header: header.pop('d')),
        dict(change=lambda header: header.pop('a.weight')),
        dict(change=lambda header: header.update(x=3)),
        dict(numbers=lambda data: data + b'x'),
        dict(numbers=lambda data: data[:-1]),
        dict(text=lambda words: words.replace('{', '{ ', 1)),
        dict(text=lambda words: ' ' + words),
        dict(text=lambda words: words.replace('"d":', '"a.bias":', 1)),
        dict(text=lambda words: words[:-1] + ',"d":3}'),
        dict(text=lambda words: '[]'),
        dict(text=lambda words: 'x'),
    ],
)
def test_another_form_of_safetensors_is_refused(parts):
    with pytest.raises((ValueError, TypeError)):
        safetensors_sha256(safetensors(**parts))
