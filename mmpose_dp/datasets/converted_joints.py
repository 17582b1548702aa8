"""Joints that a pipeline makes of the annotated ones (KeypointConverter): what would have the wrong names or numbers is refused.

A metainfo names one set of joints. MMPose flips, hides half a body and names the checkpoint's joints by it, and a public view finds
heads by it, whichever joints a sample has there. Must not look at pictures.
"""

from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.datasets.transforms import KeypointConverter, RandomFlip, RandomHalfBody

from mmpose_dp.privacy.errors import ConfigError, DataError


def refuse_misplaced_converter(dataset: BaseDataset, key: str, named: bool) -> None:
    """Raises DataError for a KeypointConverter where a transform would take joints for others.

    Args:
        dataset: a data set.
        key: its config key.
        named: whether its config has a metainfo; otherwise it is that of the annotations.
    """
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    converters = [step for step in steps if isinstance(step, KeypointConverter)]
    if converters:
        _refuse_other_number(converters[-1].num_keypoints, dataset, key)
    place = next((number for number, step in enumerate(steps) if _renumbers(step)), None)
    if place is None:
        return
    if not named:
        raise DataError(
            f'{key}: KeypointConverter gives joints other numbers, and the metainfo of {type(dataset).__name__} has those before, '
            f'so that a flip would exchange the wrong joints: {_advice(converters[-1].num_keypoints)}'
        )
    early = next((step for step in steps[:place] if isinstance(step, (RandomFlip, RandomHalfBody))), None)
    if early is not None:
        raise DataError(
            f'{key}.pipeline: {type(early).__name__} comes before KeypointConverter and would take the annotated joints for those '
            f'of the metainfo, which names what KeypointConverter gives: put KeypointConverter before {type(early).__name__}'
        )


def refuse_unnamed_joints(packed: dict, dataset: BaseDataset, key: str) -> None:
    """Raises DataError for a packed sample of another number of joints than the data set's metainfo names.

    The checkpoint would name joints that the model does not have, and plain MMPose could not run it.
    """
    _refuse_other_number(joints_of(packed['data_samples']), dataset, key)


def _refuse_other_number(joints: int | None, dataset: BaseDataset, key: str) -> None:
    named = dataset.metainfo.get('num_keypoints')
    if joints is not None and type(named) is int and joints != named:
        raise DataError(
            f'{key}: the pipeline gives {joints} joints, and the metainfo of {type(dataset).__name__} names {named}, so that flips '
            f'would exchange the wrong joints, and the checkpoint would have the wrong names: {_advice(joints)}'
        )


def names_of_annotations(dataset: BaseDataset) -> dict[int, str] | None:
    """The names of the annotated joints by number, whatever the pipeline makes of them; None if nothing says them."""
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    shape = np.shape(dataset.get_data_info(0).get('keypoints'))
    annotated = shape[-2] if len(shape) > 1 else None
    if annotated in (None, dataset.metainfo.get('num_keypoints')) and not any(map(_renumbers, steps)):
        return dataset.metainfo['keypoint_id2name']
    of_class = parse_pose_metainfo(dict(dataset.METAINFO)) if dataset.METAINFO else {}
    return of_class['keypoint_id2name'] if of_class.get('num_keypoints') == annotated else None


def refuse_view_of_other_joints(view: Any, dataset: BaseDataset) -> None:
    """Checks the joints that a view finds by number. Raises ConfigError for those of other names, or of unknown ones."""
    names = names_of_annotations(dataset)
    try:
        view.check_joints({} if names is None else names)
    except Exception as error:  # a view of other code may look its joints up in any way
        if names is not None:
            raise
        raise ConfigError(
            'train_dataloader.dataset.public_view finds its region by the annotated joints, and the metainfo names those that '
            'KeypointConverter makes of them, so that it could hide another part than it says: convert the annotation file '
            'itself (docs/private_config.md, "Several data sets"), and take KeypointConverter out'
        ) from error


def joints_of(sample: Any) -> int | None:
    """The number of joints of a data sample; None if it has none."""
    people = sample.get('gt_instances')
    return None if people is None or 'keypoints' not in people else people.keypoints.shape[-2]


def _renumbers(step: Any) -> bool:
    return isinstance(step, KeypointConverter) and (step.interpolation or step.source_index != step.target_index)


def _advice(joints: int) -> str:
    return (
        f"write metainfo=dict(from_file=...) of those {joints} joints, such as configs/_base_/datasets/mpii.py for MPII's 16, and "
        'put KeypointConverter before RandomFlip'
    )
