"""Switches the pipeline of a data set in use, as mmdet's PipelineSwitchHook does by ``dataset.pipeline = ...``.

Must not change the public view of a record, which is already published, nor mix other records into a sample.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import Compose
from mmpose.datasets.transforms import GetBBoxCenterScale
from mmpose.datasets.transforms.mix_img_transforms import MixImageTransform

from mmpose_dp.privacy.errors import DataError

from .overlap import held_by

if TYPE_CHECKING:
    from .public_private_dataset import PublicPrivateDataset

_KEY = 'train_dataloader.dataset.pipeline'


def switch_pipeline(dataset: 'PublicPrivateDataset', pipeline: Any, mixing: tuple[str, ...]) -> None:
    """Gives the private data set another pipeline, and its public views the same one after their view transform.

    Other public data keeps its own. Raises DataError, before anything is changed, for a transform that is named in ``mixing``
    or derived from MMPose's mixing transforms, and if views would look different than before.
    """
    transforms = list(pipeline.transforms if hasattr(pipeline, 'transforms') else Compose(pipeline).transforms)
    for step in nested(transforms):
        if is_mixing(type(step), mixing):
            raise DataError(f'{_KEY}: {type(step).__name__} mixes several records into one sample; remove it')
    with_view = None
    views = dataset.views
    if views is not None:
        old = views.pipeline.transforms
        until = _index_of_box(old)
        start = transforms[: _index_of_box(transforms) + 1]
        if _settings(start) != _settings(old[: until + 1]):
            raise DataError(
                f'{_KEY}: the new pipeline must begin with the same LoadImage and GetBBoxCenterScale as '
                'train_dataloader.dataset.private, or every record would have a second public view'
            )
        with_view = Compose([*start, old[until + 1], *transforms[len(start) :]])
    dataset.private.pipeline = Compose(transforms)
    if views is not None:
        views.pipeline = with_view


def is_mixing(kind: type, names: tuple[str, ...]) -> bool:
    """Whether a transform's class, or one that it is derived from, is MMPose's for mixing transforms or has one of the names."""
    return issubclass(kind, MixImageTransform) or any(one.__name__ in names for one in kind.__mro__)


def fingerprint(dataset: 'PublicPrivateDataset') -> list[Any]:
    """All that decides what a sample looks like: data sets, pipelines, every transform, and the description of the view."""
    objects = [x for part in dataset.parts().values() for x in (part, part.pipeline, *nested(part.pipeline.transforms))]
    return [*objects, dataset.view_description]


def same(one: list[Any], other: list[Any]) -> bool:
    """Whether two fingerprints are of the same objects."""
    return len(one) == len(other) and all(a is b for a, b in zip(one[:-1], other[:-1])) and one[-1] == other[-1]


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


def _index_of_box(transforms: list[Any]) -> int:
    found = [i for i, step in enumerate(transforms) if isinstance(step, GetBBoxCenterScale)]
    if not found:
        raise DataError(f'{_KEY}: a public_view needs a top-down pipeline with GetBBoxCenterScale')
    return found[0]


def _settings(transforms: list[Any]) -> list[tuple[type, str]]:
    """The settings that decide the pictures from which a view is made."""
    hidden = {'file_client', 'file_client_args', 'backend_args'}
    plain = [(type(step), {k: v for k, v in vars(step).items() if k not in hidden}) for step in transforms]
    return [(LoadImageFromFile if issubclass(kind, LoadImageFromFile) else kind, repr(own)) for kind, own in plain]
