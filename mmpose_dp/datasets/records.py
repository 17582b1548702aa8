"""Which rows make up a record, and what the annotations say of each: its subject, its owner's own budget.

Must not look at pictures or keypoints.
"""

import json
import os.path as osp
from typing import Any

from mmengine.dataset import BaseDataset

from mmpose_dp.privacy import PrivacyError
from mmpose_dp.privacy.schedule import is_number

UNITS = ('instance', 'image', 'subject')
_KEY = 'train_dataloader.dataset'


def group_rows(dataset: BaseDataset, unit: str, subjects: str | None) -> list[list[int]]:
    """The rows of each record. Raises PrivacyError for an unknown unit or a row without subject.

    Args:
        dataset: the private data set.
        unit: 'instance', 'image' or 'subject'.
        subjects: with 'subject', where a row's subject is found, see ``annotated``.
    """
    if unit not in UNITS:
        raise PrivacyError(f'{_KEY}.privacy_unit={unit!r} is unknown; write one of {UNITS}')
    if (unit == 'subject') != (subjects is not None):
        raise PrivacyError(
            f"{_KEY}: privacy_unit='subject' and subjects=<annotation field or mapping file> go together; "
            f'here they are {unit!r} and {subjects!r}'
        )
    if unit == 'instance':
        return [[row] for row in range(len(dataset))]
    if subjects is None:
        owners: list[Any] = image_paths(dataset)
    else:
        owners = annotated(dataset, subjects, 'subjects')
        for row, owner in enumerate(owners):
            if not isinstance(owner, (str, int)) or isinstance(owner, bool):
                raise PrivacyError(
                    f'{_KEY}.subjects={subjects!r} gives {owner!r} for {_name(dataset, row)}: every annotation needs a '
                    'subject, a text or a whole number'
                )
    records: dict[Any, list[int]] = {}
    for row, owner in enumerate(owners):
        records.setdefault(owner, []).append(row)
    return list(records.values())


def personal_epsilons(dataset: BaseDataset, records: list[list[int]], source: str | None) -> list[float | None]:
    """Each record's own epsilon, the smallest of its rows; None where the general target holds. Raises PrivacyError."""
    if source is None:
        return [None] * len(records)
    values = annotated(dataset, source, 'personal_epsilon')
    for row, value in enumerate(values):
        if value is not None and not (is_number(value) and value > 0):
            raise PrivacyError(
                f'{_KEY}.personal_epsilon={source!r} gives {value!r} for {_name(dataset, row)}: write a number above 0, or '
                'leave it out for target_epsilon'
            )
    own = [[values[row] for row in rows if values[row] is not None] for rows in records]
    return [min(found) if found else None for found in own]


def annotated(dataset: BaseDataset, source: str, key: str) -> list[Any]:
    """What the annotations say of every row, None where they are silent.

    Args:
        dataset: a data set with MPII's (a list) or COCO's annotation format.
        source: the name of a field of each annotation, or the path of a JSON file ``{image file name: value}``.
        key: the setting that gave ``source``, for messages.
    """
    if not isinstance(source, str):
        raise PrivacyError(
            f'{_KEY}.{key}={source!r} must be the name of an annotation field or the path of a JSON file'
        )
    if source.endswith('.json'):
        mapping = _read(source, key)
        if not isinstance(mapping, dict):
            raise PrivacyError(f'{_KEY}.{key}: {source} must hold {{image file name: value}}')
        return [mapping.get(osp.basename(path)) for path in image_paths(dataset)]
    content = _read(dataset.ann_file, key)
    listed = content if isinstance(content, list) else content['annotations']
    by_id = dict(enumerate(listed)) if isinstance(content, list) else {ann['id']: ann for ann in listed}
    values = [by_id[dataset.get_data_info(row)['id']].get(source) for row in range(len(dataset))]
    if all(value is None for value in values):
        raise PrivacyError(f'{_KEY}.{key}={source!r}: no annotation in {dataset.ann_file} has that field')
    return values


def image_paths(dataset: BaseDataset) -> list[str]:
    """The image file of every row; a link and what it points to are one."""
    paths = [dataset.get_data_info(row)['img_path'] for row in range(len(dataset))]
    return [path if '://' in path else osp.realpath(path) for path in paths]


def _name(dataset: BaseDataset, row: int) -> str:
    info = dataset.get_data_info(row)
    return f'annotation {info.get("id", row)} ({osp.basename(info["img_path"])})'


def _read(path: str, key: str) -> Any:
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise PrivacyError(f'{_KEY}.{key}: {path} cannot be read: {error}') from error
