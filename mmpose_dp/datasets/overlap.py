"""Checks whether the private set shares files with the public data set, the validation set or its metrics, or what is shown.

Images are compared by path and by content, annotation files by content. Must not decode a picture.
"""

import filecmp
import os.path as osp
from collections.abc import Collection, Iterable, Set
from typing import Any

from mmengine.dataset import BaseDataset

from mmpose_dp.messages import warn_in_terminal
from mmpose_dp.privacy.errors import DataError

from .nested import inner_datasets, texts_in, with_inner
from .privacy_units import all_images, digest, real_path


def refuse_shared_data(private: BaseDataset, images: Set[str], public: BaseDataset) -> None:
    """Raises DataError if the public data set has the private annotation file, or a private one of the ``images`` or its copy."""
    advice = 'so it is not public. Use other data, or public_view for Feature DP'
    if _same_annotations(private, public):
        raise DataError(f'train_dataloader.dataset.public has the private annotation file {private.ann_file}: {advice}')
    shared = private_among(all_images(public), images)
    if shared:
        raise DataError(
            f'train_dataloader.dataset.public shares {len(shared)} image files with the private set '
            f'({osp.basename(min(shared))}, ...): {advice}'
        )


def refuse_private_validation(private: BaseDataset, images: Set[str], validation: Any) -> None:
    """Refuses validation on private records: its scores, shown by logs and the best checkpoint, would have no noise.

    Args:
        private: the private data set.
        images: its image files, as ``PublicPrivateDataset.images`` names them.
        validation: a data set, or one that holds others.

    Raises:
        DataError: if it has the private annotation file. Shared images only raise a warning, since other people may be
            annotated in them.
    """
    for part in with_inner(validation):
        if _same_annotations(private, part):
            raise DataError(
                f'val_dataloader.dataset has the private annotation file {private.ann_file}: scores on private records are '
                'outside the guarantee. Validate on other people, or switch validation off: val_cfg=None, val_dataloader=None, '
                'val_evaluator=None'
            )
        shared = (
            private_among(all_images(part), images)
            if isinstance(part, BaseDataset) and not inner_datasets(part)
            else []
        )
        if shared:
            warn_in_terminal(
                f'val_dataloader.dataset shares {len(shared)} image files with the private set ({osp.basename(min(shared))}, '
                '...): its scores, which are outside the guarantee, depend on private pictures.'
            )


def refuse_private_metrics(private: BaseDataset, metrics: Iterable[Any]) -> None:
    """Raises DataError for a metric that has the private annotation file, or a copy: its scores would be on private records."""
    for metric in metrics:
        if private_among(files_in(getattr(metric, '__dict__', {})), {real_path(private.ann_file)}):
            raise DataError(
                f'val_evaluator: {type(metric).__name__} has the private annotation file {private.ann_file}: scores on private '
                "records are outside the guarantee. Write val_dataloader.dataset's annotation file"
            )


def private_among(shown: Collection[str], private: Collection[str]) -> list[str]:
    """The files of ``shown`` that are private image files, or copies of one: both by the path, or the same to the byte."""
    sizes: dict[int, list[str]] = {}
    for path in {path for path in private if osp.isfile(path)}:
        sizes.setdefault(osp.getsize(path), []).append(path)
    same_size = {path: sizes.get(osp.getsize(path), []) if osp.isfile(path) else [] for path in shown}
    known = {*private}
    # few files of one size are the same for longer than their first block, at which cmp stops
    return [
        path
        for path, others in same_size.items()
        if path in known or any(filecmp.cmp(path, other, shallow=False) for other in others)
    ]


def copies_among(paths: Iterable[str]) -> dict[str, str]:
    """The files that are copies of another one of ``paths`` to the byte, each with the first of them in the order of names."""
    alike = [sorted(path for path in paths if osp.isfile(path))]
    for look in (osp.getsize, _beginning, digest):  # few files are read whole
        groups: dict[tuple[int, Any], list[str]] = {}
        for number, group in enumerate(alike):
            for path in group:
                groups.setdefault((number, look(path)), []).append(path)
        alike = [group for group in groups.values() if len(group) > 1]
    return {path: first for first, *others in alike for path in others}


def _beginning(path: str) -> bytes:
    with open(path, 'rb') as file:
        return file.read(1 << 12)


def files_in(value: Any) -> set[str]:
    """The real path of every file that a text or a path in nested containers names."""
    texts = (text for text in texts_in(value) if '\0' not in text)
    return {real_path(text) for text in texts if osp.isfile(text)}


def _same_annotations(one: BaseDataset, other: Any) -> bool:
    first, second = one.ann_file, getattr(other, 'ann_file', None)
    both = isinstance(second, str) and osp.isfile(first) and osp.isfile(second)
    return both and filecmp.cmp(first, str(second), shallow=False)
