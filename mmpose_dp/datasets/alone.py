"""Tests whether a sample depends on other records: a cache or a picture in its pipeline, or a data set that reads a neighbour.

It finds what mixes the few samples that are tried, not code that reads other files by itself. Must not show what a sample holds.
"""

import copy
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.structures import BaseDataElement
from torch import Tensor

from .nested import with_held
from .overlap import files_in, private_among
from .randomness import fixed_randomness

_ROUNDS = 4  # how often each sample is made: some transforms mix at random, or only when they have seen a few


def mixes(pipeline: Callable, infos: Sequence[Callable[[], dict]]) -> bool:
    """Whether a pipeline that has made other samples gives a sample that a fresh copy of it, with the same seeds, does not give.

    False for a pipeline that cannot be copied, or whose fresh copies differ with the same seeds: nothing can be concluded.

    Args:
        pipeline: it must have seen no sample; it is copied, and stays as it is.
        infos: each gives the input of one sample.
    """
    try:
        used = copy.deepcopy(pipeline)
    except Exception:  # it holds an open file, for example
        return False
    runs = [(info, [turn * len(infos) + number] * 6) for turn in range(_ROUNDS) for number, info in enumerate(infos)]
    alone = [_sample(copy.deepcopy(pipeline), *run) for run in runs]
    if alone == [_sample(used, *run) for run in runs]:
        return False
    return alone == [_sample(copy.deepcopy(pipeline), *run) for run in runs]


def sees_others(dataset: BaseDataset, numbers: Sequence[int]) -> bool:
    """Whether a data set gives another annotation for a sample if all its records are that one."""
    for number in numbers:
        same = dataset.get_subset([number] * min(number + 2, len(dataset)))
        if _content(same.get_data_info(number)) != _content(dataset.get_data_info(number)):
            return True
    return False


def pictures_read(transforms: Any, images: Set[str]) -> Iterator[tuple[str, str]]:
    """The transforms that hold the path of one of ``images``, or of a copy of it: the name of each, and the path.

    Albumentations' transforms that take a style from other pictures do (HistogramMatching, FDA).
    """
    for step in with_held(transforms):
        if files := files_in(getattr(step, '__dict__', {})):
            yield from ((type(step).__name__, path) for path in private_among(files, images))


def _sample(pipeline: Callable, info: Callable[[], dict], seeds: Sequence[int]) -> Any:
    """The content of a sample; the kind of the error if the pipeline fails."""
    given = info()
    try:
        with fixed_randomness(seeds):
            return _content(pipeline(given))
    except Exception as error:  # a transform can raise anything
        return type(error)


def _content(value: Any) -> Any:
    """What can be compared of a sample: its tensors, arrays, texts and numbers, in nested containers."""
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype), value.numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, repr(value) if value.dtype == object else value.tobytes()
    if isinstance(value, BaseDataElement):
        return _content({**dict(value.all_items())})
    if isinstance(value, dict):
        return {key: _content(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_content(one) for one in value]
    return value if isinstance(value, (str, int, float, np.generic, type(None))) else None
