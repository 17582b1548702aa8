"""From the configs of the two halves to data sets of MMPose's, each refused with one sentence where it could not be trained on.

Must not accept a data set or a pipeline in which one record reaches another's row.
"""

import copy
import os.path as osp
from collections.abc import Iterator, Set
from typing import Any, NoReturn

from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset, ClassBalancedDataset, Compose, ConcatDataset, RepeatDataset
from mmpose.datasets.dataset_wrappers import CombinedDataset
from mmpose.datasets.datasets import MpiiDataset
from mmpose.datasets.transforms import GetBBoxCenterScale
from mmpose.datasets.transforms.mix_img_transforms import MixImageTransform
from mmpose.registry import DATASETS, TRANSFORMS

from mmpose_dp.privacy.errors import PrivacyError

from .annotations import look_at_annotations, refuse_unusable_file
from .resolving import is_kind, resolved, type_name

# they put several records into one row; MMPose's own are found by their base class
MIXING = ('Mosaic', 'MixUp', 'CutMix', 'CopyPaste', 'YOLOXMixUp')
_WRAPPERS = (CombinedDataset, ConcatDataset, RepeatDataset, ClassBalancedDataset)
_MPII_LAYOUT = """MMPose expects
  {root}/annotations/mpii_train.json, mpii_val.json, mpii_gt_val.mat
  {root}/images/*.jpg
Put MPII there (MMPose docs, "2D Body Keypoint Datasets"), point data_root at it, or draw the synthetic set in its place:
  python tools/make_synthetic_mpii.py --out {root} --domain {half} --train 6000 --val 1000"""


def build_half(cfg: dict, half: str) -> BaseDataset:
    """The data set of ``half`` ('private' or 'public'), with all its annotations. Raises PrivacyError, naming the key."""
    key = f'train_dataloader.dataset.{half}'
    _refuse_mixing(cfg.get('pipeline'), f'{key}.pipeline')
    cls = _dataset_class(cfg, key)
    path = _annotation_file(cfg, cls, key)
    refuse_unusable_file(path, cls, key)
    try:
        dataset = DATASETS.build(dict(cfg, lazy_init=False))
    except Exception as error:  # whatever a damaged file makes of a parser
        if _is_empty(cfg):
            _refuse_empty(path, cfg, cls, key)
        raise PrivacyError(
            f'{key}: {cls.__name__} cannot be made from {path}: {type(error).__name__}: {error}'
        ) from error
    if len(dataset) == 0:
        _refuse_empty(path, cfg, cls, key)
    if getattr(dataset, 'data_mode', 'topdown') != 'topdown':
        raise PrivacyError(f"{key}.data_mode={dataset.data_mode!r}: a row is one person; write data_mode='topdown'")
    paths = look_at_annotations(dataset, key)
    if _reads_local_files(cfg):
        _refuse_missing_images(paths, dataset, cfg, half)
    return dataset


def _refuse_empty(path: str, cfg: dict, cls: type, key: str) -> NoReturn:
    folder = osp.join(cfg.get('data_root') or '', (cfg.get('data_prefix') or {}).get('img') or '')
    hint = (
        ''
        if not folder or '://' in folder or osp.isdir(folder)
        else f', and {folder} does not exist. {_hint(cfg, cls, key)}'
    )
    raise PrivacyError(f'{key}: {path} holds no annotated person whose box has a size{hint}')


def _is_empty(cfg: dict) -> bool:
    """Whether the data set is without rows, which mmengine cannot put into bytes."""
    try:
        return len(DATASETS.build(dict(cfg, lazy_init=False, serialize_data=False))) == 0
    except Exception:
        return False


def seen_through(dataset: BaseDataset, cfg: dict, view: dict) -> BaseDataset:
    """The same rows with the public view right behind GetBBoxCenterScale. Raises PrivacyError for a pipeline without that.

    Args:
        dataset: the private data set.
        cfg: its config.
        view: config of the view.
    """
    key, steps = 'train_dataloader.dataset.public_view', list(cfg.get('pipeline') or [])
    place = next((i for i, step in enumerate(steps) if is_kind(TRANSFORMS, step, GetBBoxCenterScale)), None)
    if place is None:
        raise PrivacyError(f'{key} needs a top-down pipeline with GetBBoxCenterScale')
    _refuse_mixing([view], key)
    views = copy.copy(dataset)
    try:
        views.pipeline = Compose([*steps[: place + 1], view, *steps[place + 1 :]])
    except PrivacyError:
        raise
    except Exception as error:
        raise PrivacyError(f'{key}={view!r} cannot be made: {type(error).__name__}: {error}') from error
    return views


def _refuse_mixing(pipeline: Any, key: str) -> None:
    for step in _steps(pipeline):
        name, cls = type_name(step['type']), resolved(TRANSFORMS, step['type'])
        if name in MIXING or type_name(cls) in MIXING or (isinstance(cls, type) and issubclass(cls, MixImageTransform)):
            raise PrivacyError(f'{key}: {name} mixes several records into one row; take it out')


def _steps(node: Any) -> Iterator[dict]:
    """Every transform in a pipeline, those within others (RandomApply's) too."""
    if isinstance(node, dict):
        if node.get('type') is not None:
            yield node
        node = list(node.values())
    for part in node if isinstance(node, (list, tuple)) else ():
        yield from _steps(part)


def _dataset_class(cfg: dict, key: str) -> type:
    kind = cfg['type']
    cls, name = resolved(DATASETS, kind), type_name(kind)
    if cls is None:
        raise PrivacyError(
            f'{key}.type={kind!r} is not registered: correct the name, or import the module that registers it, by custom_imports'
        )
    if not isinstance(cls, type) or not issubclass(cls, BaseDataset) or issubclass(cls, CombinedDataset):
        if {'dataset', 'datasets'} & cfg.keys() or (isinstance(cls, type) and issubclass(cls, _WRAPPERS)):
            raise PrivacyError(
                f'{key}.type={name}: a wrapper that joins or repeats data sets can use a record twice; give one of '
                "MMPose's data sets itself"
            )
        raise PrivacyError(
            f"{key}.type={name} is not derived from mmengine's BaseDataset, so its records are not known: give one of MMPose's "
            'data sets, or derive yours from BaseCocoStyleDataset'
        )
    return cls


def _annotation_file(cfg: dict, cls: type, key: str) -> str:
    """The path of the annotation file. Raises PrivacyError for one that is not there, or not on this machine."""
    root, path = cfg.get('data_root') or '', cfg.get('ann_file') or ''
    if not isinstance(root, str) or not isinstance(path, str):
        raise PrivacyError(f'{key}: data_root={root!r} and ann_file={path!r} must be paths')
    path = path if '://' in path else osp.join(root, path)
    if '://' in path:
        raise PrivacyError(
            f'{key}: the annotation file {path} must be on this machine, since records are counted and compared by it: copy it '
            'here and write its path as ann_file. Pictures may stay where they are (data_prefix.img)'
        )
    if not osp.isfile(path):
        raise PrivacyError(f'{key}: {path} does not exist. {_hint(cfg, cls, key)}')
    return path


def _hint(cfg: dict, cls: type, key: str) -> str:
    if issubclass(cls, MpiiDataset):
        root = (cfg.get('data_root') or '').rstrip('/') or '.'
        return _MPII_LAYOUT.format(root=root, half=key.rpartition('.')[2])
    return "Lay it out as MMPose's docs say, or set data_root."


def _refuse_missing_images(paths: Set[str], dataset: BaseDataset, cfg: dict, half: str) -> None:
    missing = sorted(path for path in paths if '://' not in path and not osp.isfile(path))
    key, folder = f'train_dataloader.dataset.{half}', (dataset.data_prefix or {}).get('img') or ''
    if len(missing) == len(paths) and folder and '://' not in folder and not osp.isdir(folder):
        raise PrivacyError(f'{key}: {folder} does not exist. {_hint(cfg, type(dataset), key)}')
    if missing and half == 'private':
        raise PrivacyError(
            f'{key}: {len(missing)} image files named in {cfg.get("ann_file")} do not exist, {missing[0]} among them. Set '
            'data_prefix.img, or take them out of the annotations'
        )


def _reads_local_files(cfg: dict) -> bool:
    """Whether img_path is a file that LoadImage opens here: no loader of the user's own, no storage elsewhere."""
    loaders = [step for step in cfg.get('pipeline') or [] if is_kind(TRANSFORMS, step, LoadImageFromFile)]
    backends = [step.get('backend_args') or {} for step in loaders if isinstance(step, dict)]
    return bool(loaders) and all(backend.get('backend', 'local') == 'local' for backend in backends)
