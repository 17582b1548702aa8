"""Tests what a sample depends on: other records (a cache or a picture in its pipeline, a data set that reads a neighbour), or,
in the public part, the private picture behind the view.

It finds what mixes the few samples that are tried, not code that reads other files by itself. Must not show what a sample holds.
"""

import copy
import json
import os.path as osp
import tempfile
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from typing import Any

import cv2
import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.structures import BaseDataElement
from mmpose.registry import DATASETS
from torch import Tensor

from .annotation_file import content_of
from .nested import with_held
from .overlap import files_in, private_among
from .randomness import fixed_randomness

_ROUNDS = 4  # how often each sample is made: some transforms mix at random, or only when they have seen a few
_OF_RECORD = 2  # samples of a record of many that are compared
_OTHERS = 20  # annotations beside a record's own, in a file of copies of it
_LAST = 5000  # a record is tried if it is among so many entries of a file whose entries have no ids


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


def follows_others(dataset: BaseDataset, cfg: dict, records: Sequence[Sequence[int]]) -> bool:
    """Whether the samples of a record are others if the annotations of all other records are copies of its own.

    They are if a data set gives a record its neighbour's joints or a mean over all people, or gives itself to the transforms.
    False if a data set cannot be built from such a file: nothing can be concluded. Whole numbers do not count: they may be places.

    Args:
        dataset: has all records.
        cfg: its config.
        records: the samples of each record that is tried.
    """
    content = content_of(dataset.ann_file)
    try:
        ids = [dataset.get_data_info(number)['id'] for number in range(len(dataset))]
    except Exception:  # it numbers nothing
        return False
    return any(_follows_others(dataset, cfg, own, content, ids) for own in records)


def _follows_others(dataset: BaseDataset, cfg: dict, own: Sequence[int], content: Any, ids: Sequence[int]) -> bool:
    """The same for one record. ``ids``: those of all samples in ``content``, what the annotation file holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, osp.basename(dataset.ann_file))
        try:
            with open(path, 'w') as file:
                json.dump(_of_copies(content, [ids[number] for number in own], {*ids}), file)
            settings = {key: value for key, value in cfg.items() if key != 'indices'}
            other = DATASETS.build(dict(settings, ann_file=path, lazy_init=False, pipeline=[]))
            places = {other.get_data_info(number)['id']: number for number in range(len(other))}
            pairs = [(number, places[ids[number]]) for number in own[:_OF_RECORD]]
        except Exception:  # a data set of other code may want any other file, or number its samples anew
            return False
        return any(_differs(dataset, other, number, place) for number, place in pairs)


def _of_copies(content: Any, own: Sequence[int], ids: Set[int]) -> Any:
    """What an annotation file holds, with copies of the first of the annotations ``own`` in the place of other samples' ``ids``."""
    if isinstance(content, list):  # MPII's: ids are places
        if max(own) > _LAST:
            raise ValueError('too many entries')
        copies = [dict(content[own[0]], image=one['image']) for one in content[: max(own) + 2]]
        return [content[number] if number in own else copy for number, copy in enumerate(copies)]
    first = next(one for one in content['annotations'] if one['id'] == own[0])
    shown = {one['image_id'] for one in content['annotations'] if one['id'] in own}
    # whoever is no sample, such as a crowd, is of the picture
    kept = [one for one in content['annotations'] if one['image_id'] in shown]
    others = [one for one in content['annotations'] if one['image_id'] not in shown][:_OTHERS]
    annotations = [
        dict(first, id=one['id'], image_id=one['image_id']) if one['id'] in ids - {*own} else one
        for one in [*kept, *others]
    ]
    images = {one['id']: one for one in content['images']}
    pictures = [dict(images[first['image_id']], id=number) for number in {one['image_id'] for one in others}]
    return dict(content, images=[*(images[one] for one in shown), *pictures], annotations=annotations)


def _differs(dataset: BaseDataset, other: BaseDataset, number: int, place: int) -> bool:
    """Whether two data sets give something else for a sample, or lead the first one's pipeline to something else."""
    infos = partial(dataset.get_data_info, number), partial(other.get_data_info, place)
    one, two = (_content({key: x for key, x in info().items() if not _is_whole(x)}) for info in infos)
    if one != two:
        return True
    for turn in range(_ROUNDS):
        try:
            first, again, second = (
                _sample(copy.deepcopy(dataset.pipeline), info, [turn] * 6) for info in (infos[0], *infos)
            )
        except Exception:  # the pipeline cannot be copied
            return False
        if first == again != second:
            return True
    return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def files_read(transforms: Any, private: Set[str]) -> Iterator[tuple[str, str]]:
    """The transforms that hold the path of one of the ``private`` files, or of a copy of it: the name of each, and the path.

    Albumentations' transforms that take a style from other pictures do (HistogramMatching, FDA).
    """
    for step in with_held(transforms):
        if files := files_in(getattr(step, '__dict__', {})):
            yield from ((type(step).__name__, path) for path in private_among(files, private))


def passes_the_view(steps: Sequence[Callable], place: int, info: Callable[[], dict], seeds: Sequence[int]) -> Any:
    """The first step behind a public view whose result follows the private picture itself; None if there is none.

    The view is made black, once with the sample's own picture behind it and once with noise in a file of the same name: no step
    may then give something else. None too if the steps before the view cannot read such a file: nothing can be concluded.

    Args:
        steps: the transforms of a pipeline.
        place: the view's place among them.
        info: gives the input of one sample.
        seeds: of the random steps.
    """
    own = info()
    with tempfile.TemporaryDirectory() as folder, fixed_randomness(seeds):
        try:
            before = _after(steps[: place + 1], own)
            black = np.zeros_like(before['img'])
            noise = np.random.default_rng(0).integers(0, 256, (*black.shape[:2], 3), np.uint8)
            path = osp.join(folder, osp.basename(own['img_path']))
            with open(path, 'wb') as file:  # as cv2.imwrite, which takes the format from the name
                file.write(cv2.imencode('.bmp', noise)[1].tobytes())
            other = _after(steps[: place + 1], {**info(), 'img_path': path})
        except Exception:  # a record that cannot be used, or another loader
            return None
    pair = dict(before, img=black), dict(other, img=black.copy())
    for number, step in enumerate(steps[place + 1 :]):
        given: list[Any] = []
        for one in pair:
            with fixed_randomness([seed + number for seed in seeds]):
                try:
                    given.append(step(one))
                except Exception as error:  # a file beside the picture may be missing
                    given.append(type(error))
        if _pictures(given[0]) != _pictures(given[1]):
            return step
        if not all(isinstance(one, dict) for one in given):
            return None
        pair = given[0], given[1]
    return None


def _after(steps: Sequence[Callable], info: dict) -> dict:
    for step in steps:
        info = step(info)
    return info


def _pictures(given: Any) -> Any:
    """What a step may show of a picture: ``img``, and what is packed, but for the metainfo; the kind of an error."""
    if not isinstance(given, dict):
        return given if isinstance(given, type) else None
    samples = given.get('data_samples')
    packed = dict(samples.items()) if isinstance(samples, BaseDataElement) else None
    return _content([given.get('img'), given.get('inputs'), packed])


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
