"""Tries validation before the first step: a few samples as they are, and every annotation with a blank picture.

An annotation or a picture in the middle of the validation set would otherwise end training at its first validation, when privacy
has been spent. Must not keep or show anything: what metrics keep is restored.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from mmengine.dist import get_rank, get_world_size
from mmengine.evaluator import BaseMetric
from mmengine.runner.loops import ValLoop
from mmpose.datasets.transforms import LoadImage
from mmpose.structures import PoseDataSample

from mmpose_dp.datasets.annotation_file import missing_key_in_words
from mmpose_dp.datasets.converted_joints import joints_of
from mmpose_dp.datasets.missing_files import missing_files, refuse_missing
from mmpose_dp.messages import failure, owner_in_words, warn_in_terminal
from mmpose_dp.privacy.errors import DataError

_KEY = 'val_dataloader.dataset'
# keys of an annotation
_READ_BY_COCO = frozenset('area bbox category_id id image_id iscrowd keypoints num_keypoints'.split())
_MOST = 10_000  # samples that are tried; of more, as many, evenly spaced


def ends_of(dataset: Any) -> list[int]:
    """The first and the last sample of a data set, and of each one in it that MMPose joins: each may have its own metric."""
    joined = getattr(dataset, '_lens', None) or [len(dataset)]
    starts = np.cumsum([0, *joined])
    return sorted({int(i) for start, end in zip(starts, starts[1:]) if end > start for i in (start, end - 1)})


@contextmanager
def untouched(metrics: Sequence[Any]) -> Iterator[None]:
    """Restores afterwards what metrics hold. CocoMetric without an annotation file keeps the people of its first evaluation."""
    before = [(metric, dict(vars(metric))) for metric in metrics]
    try:
        yield
    finally:
        for metric, kept in before:
            vars(metric).clear()
            vars(metric).update(kept)
            metric.results.clear()


def try_annotations(loop: ValLoop, output: PoseDataSample) -> int:
    """Gives the evaluator every sample, with a blank picture and the prediction of ``output``, a sample that was predicted.

    Each process has its share. Data sets whose pipeline does not begin with MMPose's LoadImage are passed over, since a blank
    picture cannot be given to them.

    Returns:
        the number of samples that the evaluators of all processes were given.

    Raises:
        DataError: if a picture is missing, if an annotation cannot be used, or if some have another number of joints.
    """
    dataset = loop.dataloader.dataset
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', None) or [None]
    if type(steps[0]) is not LoadImage or steps[0].color_type != 'color' or not output.get('ori_shape'):
        return 0
    paths: set[str] = set()
    blank = _with_blank_pictures(dataset, (*output.ori_shape, 3), paths)
    try:
        joints = joints_of(blank[0]['data_samples'])
    except Exception:  # its way to read samples is another one
        return 0
    tried = sorted({*ends_of(dataset), *range(0, len(dataset), 1 + len(dataset) // _MOST)})
    for index in tried[get_rank() :: get_world_size()]:
        sample = _packed(blank, index)
        if joints_of(sample) != joints:
            raise DataError(
                f'{_KEY}: annotation {sample.get("id", index)} has {joints_of(sample)} joints and others have {joints}: give every '
                'annotation the same joints, with visibility 0 for unknown ones'
            )
        sample.pred_instances = output.pred_instances.clone()
        loop.evaluator.process(data_samples=[sample], data_batch=dict(inputs=[], data_samples=[sample]))
    if getattr(steps[0], 'backend_args', None) is None and not steps[0].ignore_empty:
        refuse_missing(missing_files(paths), _KEY, getattr(dataset, 'ann_file', 'the annotations'))
    return len(tried)


def warn_of_other_order(trained: dict, validated: dict) -> None:
    """Warns if the metainfo of validation has a joint of training in another place: a score compares joints by their places."""
    places, names = trained.get('keypoint_name2id') or {}, validated.get('keypoint_id2name') or {}
    moved = [(name, number) for number, name in names.items() if places.get(name, number) != number]
    if moved and len(places) == len(names):
        name, number = moved[0]
        warn_in_terminal(
            f'{_KEY}: {name} is joint {number} in its metainfo, and joint {places[name]} in that of '
            f'train_dataloader.dataset.private, so that scores compare different joints ({len(moved)} of {len(names)}). Give both '
            "the joints of one order: the model's"
        )


def in_words(dataset: Any, error: Exception) -> str:
    """An error of an evaluator, and the annotation that it is probably about."""
    path = getattr(dataset, 'ann_file', None)
    known = isinstance(error, KeyError) and error.args and error.args[0] in _READ_BY_COCO
    fault = missing_key_in_words(path, error) if known and isinstance(path, str) else ''
    instead = ': write it there, or use_area=False in the metric' if fault.endswith(' area') else ''
    return f'{failure(error)}{owner_in_words(error, BaseMetric)}' + (
        f'. Probably since {fault}{instead}' if fault else ''
    )


def _with_blank_pictures(dataset: Any, shape: tuple[int, ...], paths: set[str]) -> Any:
    """The data set without its pictures, whose paths are added to ``paths``."""
    pipeline, picture = dataset.pipeline, np.zeros(shape, np.uint8)

    def run(info: dict) -> Any:
        if isinstance(info.get('img_path'), str):
            paths.add(info['img_path'])
        return pipeline(dict(info, img=picture))

    twin = copy.copy(dataset)
    twin.pipeline = run
    return twin


def _packed(dataset: Any, index: int) -> PoseDataSample:
    try:
        return dataset[index]['data_samples']
    except Exception as error:  # a transform can raise anything
        number = dataset.get_data_info(index).get('id', index)
        raise DataError(f'{_KEY}: its pipeline fails on annotation {number}: {failure(error)}') from error
