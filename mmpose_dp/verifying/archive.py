"""Reads the zip archive that torch writes, in the one form in which every reader finds the same in it.

The readers of torch, of Python and of others differ: in which of two files of one name they take, in whether upper case matters,
in where they look for the directory. So everything is refused that torch does not write. Must not accept a byte that belongs to
no file, and must not import torch.
"""

import re
import struct
import zlib

_END, _END64, _LOCATOR, _ENTRY, _LOCAL, _AFTER = (
    b'PK' + kind for kind in (b'\5\6', b'\6\6', b'\6\7', b'\1\2', b'\3\4', b'\7\10')
)
_NAME = re.compile(
    r'([^/\\\0]+)/(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/(?:0|[1-9][0-9]{0,8}))'
)
_CONTENT = {  # of the small files
    'byteorder': rb'little',
    'version': rb'3\n',
    '.format_version': rb'1',
    '.storage_alignment': rb'64',
    '.data/serialization_id': rb'[0-9]{40}',
}
_NEEDED = ('data.pkl', 'byteorder', 'version')
_DESCRIBED = 8  # the flag of a size that stands behind the content
_UTF8 = 0x800


def read_archive(data: bytes) -> dict[str, bytes]:
    """The files of an archive by their names, without the folder. Raises ValueError for what torch would not have written."""
    files: dict[str, bytes] = {}
    folder, position = None, 0
    entries, directory = _directory(data)
    for name, crc, size, offset, flags in entries:
        match = _NAME.fullmatch(name)
        _require(match is not None, f'it holds a file {name!r}, which torch does not write')
        assert match is not None
        folder = folder or match[1]
        _require(match[1] == folder, f'it holds two archives, {folder!r} and {match[1]!r}')
        _require(match[2] not in files, f'it holds {name!r} twice')
        _require(offset == position, f'there is something else before {name!r}')
        content, position = _file(data, position, name, crc, size, flags)
        _require(
            re.fullmatch(_CONTENT.get(match[2], rb'(?s:.*)'), content) is not None,
            f'{match[2]} in it is {content!r:.40}',
        )
        files[match[2]] = content
    _require(position == directory, 'there is something between its files and its directory')
    missing = [name for name in _NEEDED if name not in files]
    _require(not missing, f'it lacks {", ".join(missing)}')
    return files


def _require(holds: bool, fault: str) -> None:
    if not holds:
        raise ValueError(fault)


def _directory(data: bytes) -> tuple[list[tuple[str, int, int, int, int]], int]:
    """(name, CRC, size, offset, flags) of each file, and where the directory begins."""
    end = len(data) - 22
    _require(end >= 0 and data[end : end + 4] == _END, 'its end is not that of an archive')
    disk, first, here, count, size, start, comment = struct.unpack('<HHHHIIH', data[end + 4 :])
    _require(disk == first == comment == 0 and here == count, 'it has a comment, or parts')
    if data[end - 20 : end - 16] == _LOCATOR:
        end -= 76
        where, found = (
            struct.unpack('<IQI', data[end + 60 : end + 76]),
            struct.unpack('<QHHIIQQQQ', data[end + 4 : end + 56]),
        )
        _require(data[end : end + 4] == _END64 and where == (0, end, 1), 'its end is not that of an archive')
        same = (found[0], *found[3:]) == (44, 0, 0, count, count, size, start)
        _require(same, 'it has two directories, or is larger than 4 GB')
    _require(start + size == end, 'there is something behind its directory')
    entries, position = [], start
    while position < end:
        kind, fields = data[position : position + 4], data[position + 4 : position + 46]
        _require(kind == _ENTRY and len(fields) == 42, 'its directory is damaged')
        _, _, flags, method, _, crc, packed, full, long, extra, note, part, _, _, offset = struct.unpack(
            '<HHHHIIIIHHHHHII', fields
        )
        _require(method == extra == note == part == 0 and packed == full, 'it has compressed files, or notes on them')
        name = data[position + 46 : position + 46 + long].decode()
        entries.append((name, crc, full, offset, flags))
        position += 46 + long
    _require(position == end and len(entries) == count, 'its directory is damaged')
    return entries, start


def _file(data: bytes, position: int, name: str, crc: int, size: int, flags: int) -> tuple[bytes, int]:
    """The content of the file whose header is at ``position``, and where the next one begins."""
    fields = data[position + 4 : position + 30]
    _require(data[position : position + 4] == _LOCAL and len(fields) == 26, f'the header of {name!r} is damaged')
    _, own, method, _, *sums, long, extra = struct.unpack('<HHHIIIIHH', fields)
    begin = position + 30 + long
    _require(data[position + 30 : begin] == name.encode(), f'{name!r} has two names')
    padding, begin = data[begin : begin + extra], begin + extra
    _require(own == flags and not flags & ~(_DESCRIBED | _UTF8) and method == 0, f'{name!r} is compressed or encrypted')
    # torch fills up to the next multiple of 64 bytes
    plain = extra == 0 or extra >= 4 and padding == b'FB' + struct.pack('<H', extra - 4) + b'Z' * (extra - 4)
    _require(plain, f'there is something in the header of {name!r}')
    content, end = data[begin : begin + size], begin + size
    _require(len(content) == size and zlib.crc32(content) == crc, f'{name!r} does not match its checksum')
    if flags & _DESCRIBED:
        _require(sums == [0, 0, 0], f'the header of {name!r} is damaged')
        _require(data[end : end + 16] == _AFTER + struct.pack('<III', crc, size, size), f'{name!r} has two sizes')
        return content, end + 16
    _require(sums == [crc, size, size], f'{name!r} has two sizes')
    return content, end
