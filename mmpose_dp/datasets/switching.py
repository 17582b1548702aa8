"""Switches the pipeline of a data set in use, as mmdet's PipelineSwitchHook does by ``dataset.pipeline = ...``.

Must not change the public view of a record, which is already published, nor mix other records into a sample.
"""

from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import Compose
from mmpose.datasets.transforms import GetBBoxCenterScale

from mmpose_dp.privacy.errors import DataError

from .nested import is_mixing, nested

_KEY = 'train_dataloader.dataset.pipeline'


def switched(pipeline: Any, of_views: Compose | None) -> tuple[Compose, Compose | None]:
    """The pipeline of the private data set, and the same with the view transform in it, which the public views get.

    Args:
        pipeline: the new one: its transforms, built or as configs.
        of_views: the present pipeline of the public views; None if there are none.

    Raises:
        DataError: for a transform that mixes several records, and if views would look different than before.
    """
    transforms = list(pipeline.transforms if hasattr(pipeline, 'transforms') else Compose(pipeline).transforms)
    for step in nested(transforms):
        if is_mixing(type(step)):
            raise DataError(f'{_KEY}: {type(step).__name__} mixes several records into one sample; remove it')
    if of_views is None:
        return Compose(transforms), None
    old = of_views.transforms
    until = _index_of_box(old)
    start = transforms[: _index_of_box(transforms) + 1]
    if _in_words(start) != _in_words(old[: until + 1]):
        raise DataError(
            f'{_KEY}: the new pipeline must begin with the same LoadImage and GetBBoxCenterScale as '
            'train_dataloader.dataset.private, or every record would have a second public view'
        )
    return Compose(transforms), Compose([*start, old[until + 1], *transforms[len(start) :]])


def _index_of_box(transforms: list[Any]) -> int:
    found = [i for i, step in enumerate(transforms) if isinstance(step, GetBBoxCenterScale)]
    if not found:
        raise DataError(f'{_KEY}: a public_view needs a top-down pipeline with GetBBoxCenterScale')
    return found[0]


def _in_words(transforms: list[Any]) -> list[tuple[type, str]]:
    return [(kind, repr(own)) for kind, own in settings_of(transforms)]


def settings_of(transforms: list[Any]) -> list[tuple[type, dict]]:
    """The class and the settings of each transform, as far as they decide the pictures from which a view is made."""
    hidden = {'file_client', 'file_client_args', 'backend_args'}
    plain = [(type(step), {k: v for k, v in vars(step).items() if k not in hidden}) for step in transforms]
    return [(LoadImageFromFile if issubclass(kind, LoadImageFromFile) else kind, own) for kind, own in plain]
