"""Which of MMPose's data sets reads an annotation file that another one does not. Must not build a data set."""

from typing import Any

from mmpose.datasets.datasets import CocoDataset, MpiiDataset

from .annotation_file import content_of, dicts_in, list_in


def reader_in_words(path: str, cls: type, error: BaseException) -> str:
    """What to write for a file that ``cls`` cannot read, since it has another format or lacks a key; empty if nothing is known.

    Args:
        path: the annotation file.
        cls: the class of the data set, one of MMPose's or derived from one.
        error: why it cannot be built.
    """
    content = content_of(path)
    if isinstance(content, list):
        entries = dicts_in(content)
        if issubclass(cls, MpiiDataset):
            return ''
        if entries and all('joints' in one for one in entries):
            return "the file has MPII's format: write type='MpiiDataset'"
        return "the file is a list, and COCO's format is an object with images, annotations and categories"
    if issubclass(cls, MpiiDataset):
        coco = "the file has COCO's format: write type='CocoDataset', with the metainfo of its joints"
        return coco if list_in(content, 'annotations') else ''
    return _without_a_key(content, cls, error)


def _without_a_key(content: Any, cls: type, error: BaseException) -> str:
    """Several of MMPose's data sets of hands, faces and whole bodies read keys that files of one's own do not have."""
    lost = error.args[0] if isinstance(error, KeyError) and error.args else None
    lacking = [one for one in dicts_in(list_in(content, 'annotations')) if lost not in one]
    joints = getattr(cls, 'METAINFO', {}).get('from_file')
    if (
        cls is CocoDataset
        or not cls.__module__.startswith('mmpose.')
        or not isinstance(lost, str)
        or not (lacking and joints)
    ):
        return ''
    return (
        f"annotation {lacking[0].get('id')!r} has no {lost}, which {cls.__name__} reads. If the file has only the keys of COCO's "
        f"format, write type='CocoDataset' and, if its joints are those of {cls.__name__}, metainfo=dict(from_file={joints!r})"
    )
