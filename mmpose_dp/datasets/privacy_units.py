"""Which samples make up a record, and what the annotations say about each: its subject, and its owner's personal budget.

Must not look at pictures or keypoints.
"""

import hashlib
import json
import os.path as osp
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset

from mmpose_dp.messages import warn_in_terminal
from mmpose_dp.privacy.errors import ConfigError, DataError
from mmpose_dp.privacy.plan import UNITS
from mmpose_dp.privacy.validation import as_positive

from .annotation_file import content_of, dicts_in, list_in

_KEY = 'train_dataloader.dataset'
_IN_A_FILE = 'Write the path of a JSON file {image file name: value} instead'
# the only data set of MMPose that makes several samples of one annotation
_SAMPLE_PER_HAND = 'CocoWholeBodyHandDataset'


def group_samples(dataset: BaseDataset, unit: str, subjects: str | None) -> list[list[int]]:
    """The samples of each record. Raises ConfigError for an unknown unit, DataError for a sample without a subject.

    An annotation that occurs twice, under two ids or in a list, is one record of two samples: it is one person.

    Args:
        dataset: the private data set.
        unit: 'instance', 'image' or 'subject'.
        subjects: with 'subject', the source of each sample's subject; see ``annotated``. 7 and '7' are one subject.
    """
    if unit not in UNITS:
        raise ConfigError(f'{_KEY}.privacy_unit={unit!r} is unknown; write one of {tuple(UNITS)}')
    if (unit == 'subject') != (subjects is not None):
        raise ConfigError(
            f"{_KEY}: privacy_unit='subject' and subjects=<annotation field or mapping file> go together; "
            f'here they are {unit!r} and {subjects!r}'
        )
    if unit == 'instance':
        if _has_sample_per_hand(dataset):
            raise DataError(
                f"{_KEY}: {type(dataset).__name__} has a sample for each hand of a person: write privacy_unit='image' "
                "or 'subject'"
            )
        owners: list[Any] = _annotations(dataset)
    elif subjects is None:
        owners = image_paths(dataset)
    else:
        owners = annotated(dataset, subjects, 'subjects')
        for sample, owner in enumerate(owners):
            if not isinstance(owner, (str, int)) or isinstance(owner, bool):
                raise DataError(
                    f'{_KEY}.subjects={subjects!r} gives {owner!r} for {_name(dataset, sample)}: every annotation needs a '
                    'subject, either a string or a whole number'
                )
        # 7, '7' and '7 ' are one person, who would have half the protection as two; so are two spellings of one 'é' in Unicode
        owners = [unicodedata.normalize('NFC', str(owner)).strip() for owner in owners]
        _warn_of_alike(owners, f'{_KEY}.subjects={subjects!r}')
    records: dict[Any, list[int]] = {}
    for sample, owner in enumerate(owners):
        records.setdefault(owner, []).append(sample)
    return list(records.values())


def _warn_of_alike(names: list[str], source: str) -> None:
    """Warns of subjects that may be one person, who would have a part of the protection as several."""
    alike: dict[str, set[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r'[\W_]+', ' ', name.casefold()).strip() or name, set()).add(name)
    groups = [sorted(group) for group in alike.values() if len(group) > 1]
    if groups:
        warn_in_terminal(
            f'{source}: {len(groups)} names are written in several ways, for example {" and ".join(map(repr, groups[0][:2]))}. '
            'These count as different subjects: if they are one person, write one name, or that person is protected less than the '
            'statement says'
        )


def personal_epsilons(
    dataset: BaseDataset, records: list[list[int]], source: str | None
) -> list[tuple[float | None, ...]]:
    """The budgets of each record's samples, of which the smallest counts; None for target_epsilon. Raises DataError."""
    if source is None:
        return [(None,)] * len(records)
    values = annotated(dataset, source, 'personal_epsilon')
    for sample, value in enumerate(values):
        try:
            values[sample] = None if value is None else as_positive(value, 'personal_epsilon')
        except ConfigError as error:
            raise DataError(
                f'{_KEY}.personal_epsilon={source!r} gives {value!r} for {_name(dataset, sample)}: write a number above 0, or '
                'leave it out to use target_epsilon'
            ) from error
    return [tuple({values[sample] for sample in samples}) for samples in records]


def source_in_words(source: str) -> str:
    """The source of the subjects, for the ledger and the statement: an annotation field or a file, by name only.

    Which record belongs to which subject is private, so nothing computed from it, not even a digest, may be published.
    """
    return osp.basename(source) if _is_file(source) else f'annotation field {source}'


def subjects_digest(source: str, records: list[list[int]]) -> str:
    """SHA-256 of the assignment of records to subjects. Must not be published; the ledger keeps it under a random key."""
    return digest(source) if _is_file(source) else hashlib.sha256(json.dumps(records).encode()).hexdigest()


def annotated(dataset: BaseDataset, source: str, key: str) -> list[Any]:
    """A value for each sample from its annotation, None if the annotation has none.

    Args:
        dataset: a data set with MPII's (a list) or COCO's annotation format.
        source: the name of a field of each annotation, or the path of a JSON file ``{image file name: value}``.
        key: the setting that gave ``source``, for messages.

    Raises ConfigError if ``source`` is not a string, and DataError if it cannot be read or gives no value at all.
    """
    if not isinstance(source, str):
        raise ConfigError(f'{_KEY}.{key}={source!r} must be the name of an annotation field or the path of a JSON file')
    infos = [dataset.get_data_info(sample) for sample in range(len(dataset))]
    if _is_file(source):
        mapping = _read(source, key)
        if not isinstance(mapping, dict):
            raise DataError(f'{_KEY}.{key}: {source} must hold {{image file name: value}}')
        values = _by_image(dataset, [info['img_path'] for info in infos], mapping, f'{_KEY}.{key}: {source}')
        if all(value is None for value in values):
            own, image = next(iter(mapping), 'no name'), osp.basename(infos[0]['img_path'])
            raise DataError(
                f'{_KEY}.{key}: {source} gives no value for any image of {dataset.ann_file}: it names {own!r}, for example, and an '
                f'image is {image!r}. Write {{image file name: value}}, with values that are not null'
            )
        if key == 'personal_epsilon':
            _refuse_unknown_names(dataset, infos, mapping, f'{_KEY}.{key}: {source}')
        return values
    values = [annotation.get(source) for annotation in _annotations_of(dataset, infos, source, key)]
    if all(value is None for value in values):
        added = any(source in info for info in infos)
        more = f', which {type(dataset).__name__} adds by itself. {_IN_A_FILE}' if added else ''
        raise DataError(f'{_KEY}.{key}={source!r}: no annotation in {dataset.ann_file} has that field{more}')
    return values


def _annotations_of(dataset: BaseDataset, infos: list[dict], source: str, key: str) -> list[dict]:
    """The annotation of each sample, found by its number. Raises DataError where that is the number of something else."""
    content = _read(dataset.ann_file, key, f'. In it, {source!r} would be looked for. {_IN_A_FILE}')
    listed = content if isinstance(content, list) else content['annotations']
    by_id = dict(enumerate(listed)) if isinstance(content, list) else {ann['id']: ann for ann in listed}
    names = {} if isinstance(content, list) else {one.get('id'): one for one in content.get('images') or ()}
    found = [by_id[info['id']] for info in infos if info['id'] in by_id]
    same = len(found) == len(infos) and all(_may_be_of(one, info, names) for one, info in zip(found, infos))
    if not same or _has_sample_per_hand(dataset):  # it renumbers its samples
        raise DataError(
            f'{_KEY}.{key}={source!r}: {type(dataset).__name__} does not say which annotation a sample comes from. '
            f'{_IN_A_FILE}'
        )
    return found


def _may_be_of(annotation: dict, info: dict, images: dict) -> bool:
    """Whether an annotation may be that of a sample: as far as both name a picture, it is the same one."""
    named = annotation.get('image') or images.get(annotation.get('image_id'), {}).get('file_name')
    path = info.get('img_path')
    return not isinstance(named, str) or not isinstance(path, str) or osp.basename(named) == osp.basename(path)


def _by_image(dataset: BaseDataset, paths: list[str], mapping: dict, source: str) -> list[Any]:
    """The value of each image, found by the name that annotations give it, whatever a link points to.

    A name may be the whole path, the path below data_prefix.img, or, if no other image has it, the file name alone.
    """
    folder = picture_folder(dataset)
    full = {osp.normpath(name): value for name, value in mapping.items()}
    owner: dict[str, str] = {}
    values = []
    for path in paths:
        name = osp.basename(path)
        below = osp.relpath(path, folder) if folder and path.startswith(folder) else path
        exact = [full[key] for key in (osp.normpath(path), osp.normpath(below)) if osp.dirname(key) and key in full]
        if not exact and name in mapping and owner.setdefault(name, path) != path:
            raise DataError(
                f'{source} names images by file name, but {path} and {owner[name]} have the same one: write their paths, or put '
                'the values into a field of each annotation and write the name of that field'
            )
        values.append(exact[0] if exact else mapping.get(name))
    return values


def _refuse_unknown_names(dataset: BaseDataset, infos: list[dict], mapping: dict, source: str) -> None:
    """Refuses names of no image, whose owners would have the budget of all others; an image may have no person who is used."""
    content = content_of(dataset.ann_file)
    entries = dicts_in(content) or dicts_in(list_in(content, 'images'))
    named = [one.get('file_name', one.get('image')) for one in entries]
    names = [info['img_path'] for info in infos] + [name for name in named if isinstance(name, str)]
    folder = picture_folder(dataset)
    known = {form for name in names for form in (osp.basename(name), *_paths(name, folder))}
    unknown = [name for name in mapping if not known & {name, *_paths(name, folder)}]
    if unknown:
        raise DataError(
            f'{source} names {len(unknown)} images that {dataset.ann_file} does not have, for example {unknown[0]!r}: their owners '
            'would have target_epsilon in place of their own budget. Write the names of images as the annotations do, and take '
            'those of other data sets out'
        )


def _paths(name: str, folder: str) -> set[str]:
    return {osp.normpath(name), osp.normpath(osp.join(folder, name))}


def picture_folder(dataset: BaseDataset) -> str:
    """The folder that the names of pictures begin in; empty if the data set names none."""
    return (getattr(dataset, 'data_prefix', None) or {}).get('img') or ''


def image_paths(dataset: BaseDataset) -> list[str]:
    """The image file of every sample; each must have one. A link and its target count as one file."""
    return [real_path(dataset.get_data_info(sample)['img_path']) for sample in range(len(dataset))]


def all_images(dataset: BaseDataset) -> set[str]:
    """The image files of all samples; a sample may have one, several (a video) or none."""
    found = [dataset.get_data_info(sample).get('img_path') for sample in range(len(dataset))]
    paths = [path for one in found for path in (one if isinstance(one, (list, tuple)) else [one])]
    return {real_path(path) for path in paths if isinstance(path, str)}


def real_path(path: str) -> str:
    """The identity of an image file: its path with links resolved, or the address of a remote file."""
    return path if '://' in path else osp.realpath(path)


def _annotations(dataset: BaseDataset) -> list[Any]:
    """An identifier of each sample's annotation, equal for samples with the same image, box and joints."""
    owners = []
    for sample in range(len(dataset)):
        info = dataset.get_data_info(sample)
        parts = _box_and_joints(info)
        owners.append((real_path(info['img_path']), *parts) if parts else sample)
    return owners


def _box_and_joints(info: dict) -> list[bytes]:
    return [np.asarray(info[key]).tobytes() for key in ('bbox', 'keypoints', 'keypoints_visible') if key in info]


def records_digest(dataset: BaseDataset, records: list[list[int]]) -> str:
    """SHA-256 of who is in which record, wherever a machine keeps the pictures. Must not be published, or kept."""
    whole = hashlib.sha256()
    for samples in records:
        for info in map(dataset.get_data_info, samples):
            whole.update(repr((osp.basename(info['img_path']), _box_and_joints(info))).encode())
        whole.update(b'\n')
    return whole.hexdigest()


def view_digest(read: Sequence[tuple[type, dict]], annotations: Iterable[tuple[dict, Iterable[Any]]]) -> str:
    """SHA-256, in words, of what public views are made from. It must be public.

    Args:
        read: the steps before, each with its settings.
        annotations: pairs of a sample and numbers of its annotation, in whatever order.
    """
    steps = json.dumps([[kind.__name__, own] for kind, own in read], default=lambda x: type(x).__name__)
    found = [(osp.basename(info['img_path']), *(np.asarray(x).tobytes() for x in own)) for info, own in annotations]
    return f'sha256 {hashlib.sha256(repr((steps, sorted(found))).encode()).hexdigest()[:16]}'


def digest(path: str) -> str:
    """SHA-256 of a file."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def file_in_words(path: str) -> str:
    """A file's name and a short digest of its content, for the ledger and the statement. For public data only."""
    return f'{osp.basename(path)} (sha256 {digest(path)[:12]})'


def _has_sample_per_hand(dataset: BaseDataset) -> bool:
    return any(kind.__name__ == _SAMPLE_PER_HAND for kind in type(dataset).__mro__)


def _is_file(source: str) -> bool:
    return source.endswith('.json')


def _name(dataset: BaseDataset, sample: int) -> str:
    info = dataset.get_data_info(sample)
    return f'annotation {info.get("id", sample)} ({osp.basename(info["img_path"])})'


def _read(path: str, key: str, more: str = '') -> Any:
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f'{_KEY}.{key}: {path} cannot be read as JSON: {error}{more}') from error
