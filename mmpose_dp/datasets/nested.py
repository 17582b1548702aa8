"""Walks through what pipelines and data sets hold: transforms inside others, codecs, inner data sets, texts.

Must not call any of it, and must not read a record.
"""

import os
from collections.abc import Iterator
from typing import Any

from mmpose.datasets.transforms.mix_img_transforms import MixImageTransform
from torch.utils.data import Dataset

# they mix several records into one sample; MMPose's own are found by their base class
MIXING = ('Mosaic', 'MixUp', 'CutMix', 'CopyPaste', 'YOLOXMixUp', 'CachedMosaic', 'CachedMixUp')


def is_mixing(kind: type) -> bool:
    """Whether a transform's class, or one that it is derived from, is MMPose's for mixing transforms or has a name of MIXING."""
    return issubclass(kind, MixImageTransform) or any(one.__name__ in MIXING for one in kind.__mro__)


def nested(transforms: Any) -> Iterator[Any]:
    """Every transform, including those inside others such as RandomApply."""
    for step in transforms if isinstance(transforms, (list, tuple)) else [transforms]:
        if isinstance(step, (list, tuple)):
            yield from nested(step)
            continue
        yield step
        yield from nested(getattr(step, 'transforms', ()))


def with_held(transforms: Any) -> Iterator[Any]:
    """Every transform, with what it holds in attributes: the codecs of GenerateTarget, which make the targets, and the like."""
    for step in nested(transforms):
        yield step
        for one in held_by(step):
            if hasattr(one, '__dict__') and not isinstance(one, dict):
                yield from nested(one)


def held_by(owner: Any) -> list[Any]:
    """What is in the attributes of an object, alone or in lists and dicts."""
    held: list[Any] = []
    for value in getattr(owner, '__dict__', {}).values():
        held += value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
    return held


def with_inner(dataset: Any) -> list[Any]:
    """A data set and all that it holds, under whatever names, each once."""
    found = [dataset]
    for one in found:
        found += [part for part in inner_datasets(one) if not any(part is other for other in found)]
    return found


def inner_datasets(dataset: Any) -> list[Dataset]:
    """What a data set holds that is a data set too, under whatever names."""
    return [one for one in held_by(dataset) if isinstance(one, Dataset)]


def texts_in(value: Any) -> Iterator[str]:
    """Every text, and every path, in nested containers."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    if isinstance(value, (str, os.PathLike)):
        yield os.fsdecode(value)
    for one in parts:
        yield from texts_in(one)
