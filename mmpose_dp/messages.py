"""What the user reads: errors of other code in words, and warnings in the terminal. Must not add values that the code held."""

import re
import sys
import traceback
from collections.abc import Callable
from itertools import dropwhile
from pathlib import Path
from types import FrameType

from .processes import is_first_process

_UNREAD = re.compile(r'occurs when loading `([^`]+)`')


def failure(error: BaseException, most: int | None = None) -> str:
    """The type of an error and its reason, of which at most ``most`` characters."""
    return f'{type(error).__name__}: {reason(error)[:most]}'


def step_in_words(error: BaseException) -> str:
    """', in NAME' with the transform that raised an error; empty if none did."""
    return _innermost(error, lambda frame: frame.f_code.co_name == 'transform' and 'self' in frame.f_locals)


def owner_in_words(error: BaseException, kind: type) -> str:
    """', in NAME' with the class of the object of this kind in whose code an error was raised; empty if none was."""
    return _innermost(error, lambda frame: isinstance(frame.f_locals.get('self'), kind))


def _innermost(error: BaseException, wanted: Callable[[FrameType], bool]) -> str:
    """', in NAME' with the class of the object whose method is the last of the wanted frames; empty if there is none."""
    names = [
        type(frame.f_locals['self']).__name__ for frame, _ in traceback.walk_tb(error.__traceback__) if wanted(frame)
    ]
    return f', in {names[-1]}' if names else ''


def reason(error: BaseException) -> str:
    """An error's own words in one line; if it has none, as after a bare ``assert``, the line of code that raised it."""
    words, frames = ' '.join(_said(error).split()), traceback.extract_tb(error.__traceback__)
    unread = _UNREAD.search(words)
    if unread and Path(unread[1]).is_file():  # MMPose asks whether it exists
        return f'{unread[1]} is there, but is no picture that OpenCV reads: save it as PNG or JPEG'
    if words or not frames:
        return words
    return f'{Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line}'


def _said(error: BaseException) -> str:
    """An error's text, without the traceback that torch puts into that of a data loader's worker process."""
    before, marked, inside = str(error).partition('\nOriginal Traceback (most recent call last):\n')
    if not marked:
        return before
    frames = inside.rpartition('\n  File "')[2].splitlines()
    own = dropwhile(lambda line: line.startswith('  '), frames[1:])
    return '\n'.join(own).removeprefix(f'{type(error).__name__}: ')


def warn_in_terminal(message: str) -> None:
    """Prints what follows from private records to the terminal: warnings can be switched off, and a log may be published."""
    if is_first_process():
        print(f'WARNING: {message}', file=sys.stderr)
