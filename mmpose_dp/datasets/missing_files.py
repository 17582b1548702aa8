"""Refuses pictures that annotations name and that are not there, with the name that a file has instead. Must not open a picture."""

import os
import os.path as osp
import unicodedata
from collections.abc import Iterable
from urllib.parse import unquote

from mmpose_dp.privacy.errors import DataError


def missing_files(paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` that are local and do not exist, sorted."""
    return sorted(path for path in paths if '://' not in path and not osp.isfile(path))


def refuse_missing(missing: list[str], key: str, named_in: str | None) -> None:
    """Raises DataError if there are image files that annotations name and that do not exist; ``key`` is that of the data set."""
    if not missing:
        return
    first, found = missing[0], named_otherwise(missing[0])
    advice = 'Set data_prefix.img, or remove them from the annotations'
    if found:
        why = ', with \\ between folders, which only Windows reads' if '\\' in first else ''
        if unicodedata.normalize('NFC', first) == unicodedata.normalize('NFC', found):
            why = ', the same letters in another form of Unicode (NFC and NFD)'
        advice = f'There is {found}{why}: write the names as the files have them'
    raise DataError(
        f'{key}: {len(missing)} image files named in {named_in} do not exist, for example {first}. {advice}'
    )


def path_in_words(path: str) -> str:
    """What is probably wrong with the path of a file that is not there, and what to write; empty if nothing is known."""
    if path.startswith('~'):
        return 'MMPose does not replace ~ by a folder: write the whole path.'
    if '$' in path:
        return (
            'An environment variable is not replaced there: write {{$NAME:}} in its place, with the colon, in a text config, and '
            "set the variable before the command. In a new-style config, write os.environ['NAME']."
        )
    near = named_otherwise(path)
    return f'There is {near}: write its name as it is.' if near else ''


def named_otherwise(path: str) -> str:
    """The file that a path seems to mean; empty if there is none.

    Annotation tools write names with a backslash, in another case or Unicode form than the file's, or with %20 for a space.
    """
    whole = path.replace('\\', '/')
    below = osp.join(osp.dirname(path), osp.basename(whole))  # a whole path of another machine
    return next((found for found in map(_alike, dict.fromkeys((whole, below))) if osp.isfile(found)), '')


def _alike(path: str) -> str:
    """The path that differs from ``path`` in the spelling of its parts alone; empty if there is none."""
    folder, name = osp.split(path)
    if osp.exists(path) or not name:
        return path if osp.exists(path) else ''
    folder = _alike(folder) if folder else os.curdir
    names = sorted(os.listdir(folder)) if osp.isdir(folder) else []
    return next((osp.join(folder, one) for one in names if _folded(one) == _folded(name)), '')


def _folded(name: str) -> str:
    return unicodedata.normalize('NFC', unquote(name)).casefold().strip()
