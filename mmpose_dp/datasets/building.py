"""Builds MMPose data sets from the configs of the private and the public part. A data set that cannot be used is refused.

Must not accept a data set or a pipeline in which one record reaches the sample of another.
"""

import copy
import os.path as osp
from collections.abc import Iterator, Set
from typing import Any, NoReturn

import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset, ClassBalancedDataset, Compose, ConcatDataset, RepeatDataset
from mmpose.datasets.dataset_wrappers import CombinedDataset
from mmpose.datasets.datasets import BaseCocoStyleDataset, MpiiDataset
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.datasets.transforms import GenerateTarget, GetBBoxCenterScale, KeypointConverter
from mmpose.registry import DATASETS, TRANSFORMS

from mmpose_dp.messages import failure
from mmpose_dp.privacy.errors import DataError, PrivacyError

from .annotation_file import faults_in_words, refuse_unusable_file, unused_in_words
from .annotations import look_at_annotations
from .converted_joints import refuse_misplaced_converter
from .file_format import reader_in_words
from .missing_files import missing_files, path_in_words, refuse_missing
from .mpii_files import JOINTS
from .nested import MIXING, is_mixing
from .privacy_units import picture_folder, real_path
from .resolving import is_kind, resolved, type_name
from .unreadable_files import warn_of_unreadable

_WRAPPERS = (CombinedDataset, ConcatDataset, RepeatDataset, ClassBalancedDataset)
_DATASETS = 'mmpose.datasets.datasets'  # where MMPose keeps them, by kind
_MPII_LAYOUT = """MMPose expects
  {root}/annotations/mpii_train.json, mpii_val.json, mpii_gt_val.mat
  {root}/images/*.jpg
Put MPII there (MMPose docs, "2D Body Keypoint Datasets"), set data_root to its folder, or generate synthetic people:
  python tools/make_synthetic_mpii.py --out {root} --domain {part} --train 6000 --val 1000"""


def build_part(cfg: dict, part: str, joints: int | None = None) -> BaseDataset:
    """Builds the data set of ``part`` ('private' or 'public') and checks its annotations. Raises DataError, naming the key.

    ``joints``: for the public part, those of the private one.
    """
    key = f'train_dataloader.dataset.{part}'
    _refuse_mixing(cfg.get('pipeline'), f'{key}.pipeline')
    cls = _dataset_class(cfg, key)
    _refuse_missing_mpii(cfg, cls, key, joints)
    path = _annotation_file(cfg, cls, key)
    refuse_unusable_file(path, cls, key)
    try:
        dataset = DATASETS.build(dict(cfg, lazy_init=False))
    except Exception as error:  # a damaged file can make a parser raise anything
        _refuse_steps(cfg.get('pipeline') or [], f'{key}.pipeline')
        if _is_empty(cfg):
            _refuse_empty(path, cfg, cls, key)
        own = issubclass(cls, BaseCocoStyleDataset)
        fault = (_metainfo_fault(cfg) or _prefix_fault(cfg, error) or reader_in_words(path, cls, error)) if own else ''
        fault = fault or (faults_in_words(path, error) if own else '')
        raise DataError(
            f'{key}: {cls.__name__} cannot be built from {path}: {failure(error)}'
            + (f'. Probably since {fault}' if fault else '')
        ) from error
    if len(dataset) == 0:
        _refuse_empty(path, cfg, cls, key)
    if getattr(dataset, 'data_mode', 'topdown') != 'topdown':
        raise DataError(
            f"{key}.data_mode={dataset.data_mode!r}: a sample is one person here; write data_mode='topdown'"
        )
    _refuse_weights_of_zero(dataset, cfg, key)
    refuse_misplaced_converter(dataset, key, bool(cfg.get('metainfo')))
    paths = look_at_annotations(dataset, key)
    if _reads_local_files(cfg):
        _refuse_missing_images(paths, dataset, cfg, part)
    return dataset


def _refuse_weights_of_zero(dataset: BaseDataset, cfg: dict, key: str) -> None:
    weights = dataset.metainfo.get('dataset_keypoint_weights')
    targets = [step for step in _steps(cfg.get('pipeline')) if is_kind(TRANSFORMS, step, GenerateTarget)]
    used = any(step.get('use_dataset_keypoint_weights') for step in targets)
    if used and weights is not None and not np.any(weights):
        raise DataError(
            f'{key}.metainfo: joint_weights are all 0, and GenerateTarget has use_dataset_keypoint_weights=True, so there would '
            'be nothing to learn: write the weight of each joint in joint_weights, usually 1.0'
        )


def _prefix_fault(cfg: dict, error: BaseException) -> str:
    """What a data_prefix lacks, in words, if that is what ``error`` is about."""
    prefix = cfg.get('data_prefix') or {}
    lacks = isinstance(error, KeyError) and error.args == ('img',) and prefix and 'img' not in prefix
    return "data_prefix has no img: write data_prefix=dict(img='...'), the folder of the pictures" if lacks else ''


def _metainfo_fault(cfg: dict) -> str:
    """What MMPose cannot read in a metainfo, in words; empty if it can read it, or there is none."""
    metainfo = cfg.get('metainfo')
    if not metainfo:
        return ''
    try:
        parse_pose_metainfo(dict(metainfo))
    except FileNotFoundError as error:
        return (
            f'{failure(error)}: write metainfo=dict(from_file=...) with a path from the folder in which the command runs, or '
            "'configs/_base_/datasets/...', which is MMPose's"
        )
    except Exception as error:  # whatever MMPose meets in it
        return (
            f'metainfo cannot be read ({failure(error)}): it needs dataset_name, keypoint_info, skeleton_info, joint_weights and '
            'sigmas, or from_file with the path of a file that has them; the names in swap and skeleton_info must be those '
            'of joints in keypoint_info'
        )
    return ''


def _refuse_empty(path: str, cfg: dict, cls: type, key: str) -> NoReturn:
    folder = osp.join(cfg.get('data_root') or '', (cfg.get('data_prefix') or {}).get('img') or '')
    hint = (
        ''
        if not folder or '://' in folder or osp.isdir(folder)
        else f', and {folder} does not exist. {_hint(cfg, cls, key)}'
    )
    unused = unused_in_words(path)
    unused = f' ({unused})' if unused else ''
    raise DataError(f'{key}: {path} holds no annotated person whose box has a size{unused}{hint}')


def _is_empty(cfg: dict) -> bool:
    """Whether the data set has no samples. mmengine cannot serialize such a data set and raises its own error."""
    try:
        return len(DATASETS.build(dict(cfg, lazy_init=False, serialize_data=False))) == 0
    except Exception:
        return False


def seen_through(dataset: BaseDataset, cfg: dict, view: dict) -> BaseDataset:
    """The same samples with the public view right after GetBBoxCenterScale. Raises DataError if the pipeline has none.

    Args:
        dataset: the private data set.
        cfg: the config of the private data set.
        view: the config of the view.
    """
    key, steps = 'train_dataloader.dataset.public_view', list(cfg.get('pipeline') or [])
    place = next((i for i, step in enumerate(steps) if is_kind(TRANSFORMS, step, GetBBoxCenterScale)), None)
    if place is None:
        raise DataError(f'{key} needs a top-down pipeline with GetBBoxCenterScale')
    _refuse_mixing([view], key)
    views = copy.copy(dataset)
    try:
        views.pipeline = Compose([*steps[: place + 1], view, *steps[place + 1 :]])
    except PrivacyError:
        raise
    except Exception as error:
        raise DataError(f'{key}={view!r} cannot be built: {failure(error)}') from error
    return views


def left_out_by(dataset: BaseDataset) -> dict[str, list[dict]] | None:
    """The annotated people who are no samples, by the real path of their picture; None if that cannot be found out.

    MMPose makes no samples of crowds and of people without joints, who are two of five in COCO's annotations. A view that says
    that it hides the annotated people must hide them too.
    """
    try:
        used = {dataset.get_data_info(sample)['id'] for sample in range(len(dataset))}
        every = dataset._load_annotations()[0]
        found: dict[str, list[dict]] = {}
        for info in (info for info in every if info['id'] not in used and np.isfinite(info['bbox']).all()):
            if info.get('iscrowd'):  # several people, whatever joints it has: no single head is all there is to hide
                info['keypoints_visible'] = np.zeros_like(info['keypoints_visible'])
            found.setdefault(real_path(info['img_path']), []).append(info)
    except Exception:  # a data set of other code may read its files in any way
        return None
    finally:
        vars(dataset).pop('coco', None)  # as large as the file
    return found


def part_annotated(dataset: BaseDataset) -> str:
    """'hand' or 'face' for MMPose's data sets of these, whose boxes are not of whole people; empty for others."""
    modules = [kind.__module__ for kind in type(dataset).__mro__]
    return next((part for part in ('hand', 'face') for one in modules if one.startswith(f'{_DATASETS}.{part}')), '')


def _refuse_steps(steps: list, key: str) -> None:
    """Raises DataError, naming its place, for a transform that cannot be built, which mmengine builds with the data set."""
    for number, step in enumerate(steps):
        try:
            TRANSFORMS.build(copy.deepcopy(step)) if isinstance(step, dict) else Compose([step])
        except Exception as error:  # whatever the transform raises
            name = type_name(step['type']) if isinstance(step, dict) and 'type' in step else repr(step)
            raise DataError(f'{key}[{number}]: {name} cannot be built: {failure(error)}') from error


def _refuse_mixing(pipeline: Any, key: str) -> None:
    for step in _steps(pipeline):
        name, cls = type_name(step['type']), resolved(TRANSFORMS, step['type'])
        if name in MIXING or (isinstance(cls, type) and is_mixing(cls)):
            raise DataError(f'{key}: {name} mixes several records into one sample; remove it')


def _steps(node: Any) -> Iterator[dict]:
    """Every transform in a pipeline, including those inside others such as RandomApply."""
    if isinstance(node, dict):
        if node.get('type') is not None:
            yield node
        node = list(node.values())
    for child in node if isinstance(node, (list, tuple)) else ():
        yield from _steps(child)


def _dataset_class(cfg: dict, key: str) -> type:
    kind = cfg['type']
    cls, name = resolved(DATASETS, kind), type_name(kind)
    if cls is None:
        raise DataError(
            f'{key}.type={kind!r} is not registered: correct the name, or list the module that registers it in custom_imports'
        )
    if not isinstance(cls, type) or not issubclass(cls, BaseDataset) or issubclass(cls, CombinedDataset):
        if {'dataset', 'datasets'} & cfg.keys() or (isinstance(cls, type) and issubclass(cls, _WRAPPERS)):
            raise DataError(
                f'{key}.type={name}: a wrapper that joins or repeats data sets can use a record twice. Write the data set itself, '
                "one of MMPose's. If there are several, join their annotation files into one: docs/private_config.md has the lines"
            )
        raise DataError(
            f"{key}.type={name} is not derived from mmengine's BaseDataset, so its records are not known: write one of MMPose's "
            'data sets, or derive yours from BaseCocoStyleDataset'
        )
    return cls


def _refuse_missing_mpii(cfg: dict, cls: type, key: str, joints: int | None) -> None:
    """Refuses the recipes' public data, which are people with MPII's joints, where they are not there and would not fit."""
    converts = any(is_kind(TRANSFORMS, step, KeypointConverter) for step in _steps(cfg.get('pipeline')))
    path = osp.join(str(cfg.get('data_root') or ''), str(cfg.get('ann_file') or ''))
    if issubclass(cls, MpiiDataset) and joints not in (None, len(JOINTS)) and not converts and not osp.isfile(path):
        raise DataError(
            f"{key}: {path} does not exist, and it would not fit: {cls.__name__} has MPII's {len(JOINTS)} joints, and the private "
            f'set has {joints}. Write train_dataloader=dict(dataset=dict(public=...)) with a data set that is really public and '
            "has these joints, or take a method that needs none, such as 'dpsgd'"
        )


def _annotation_file(cfg: dict, cls: type, key: str) -> str:
    """The path of the annotation file. Raises DataError if it does not exist or is not on this machine."""
    root, path = cfg.get('data_root') or '', cfg.get('ann_file') or ''
    if not isinstance(root, str) or not isinstance(path, str):
        raise DataError(f'{key}: data_root={root!r} and ann_file={path!r} must be paths')
    if not isinstance(cfg.get('data_prefix', {}), dict):
        raise DataError(f"{key}.data_prefix={cfg['data_prefix']!r} must be a dict, such as dict(img='images/')")
    path = path if '://' in path else osp.join(root, path)
    if '://' in path:
        raise DataError(
            f'{key}: the annotation file {path} must be on this machine, since records are counted and compared by it: copy it '
            'here and set ann_file to its path. Pictures may stay where they are (data_prefix.img)'
        )
    if not cfg.get('ann_file'):
        raise DataError(f'{key} has no ann_file: write the path of its annotation file, relative to data_root')
    if osp.isdir(path):
        raise DataError(f'{key}.ann_file={cfg["ann_file"]!r} is the folder {path}: write the path of a file in it')
    if not osp.isfile(path):
        raise DataError(f'{key}: {path} does not exist. {path_in_words(path) or _hint(cfg, cls, key)}')
    return path


def _hint(cfg: dict, cls: type, key: str) -> str:
    if issubclass(cls, MpiiDataset):
        root = (cfg.get('data_root') or '').rstrip('/') or '.'
        return _MPII_LAYOUT.format(root=root, part=key.rpartition('.')[2])
    return f"Arrange the files as MMPose's docs say, or set {key}.data_root."


def _refuse_missing_images(paths: Set[str], dataset: BaseDataset, cfg: dict, part: str) -> None:
    missing = missing_files(paths)
    key, folder = f'train_dataloader.dataset.{part}', picture_folder(dataset)
    if len(missing) == len(paths) and folder and '://' not in folder and not osp.isdir(folder):
        raise DataError(f'{key}: {folder} does not exist. {_hint(cfg, type(dataset), key)}')
    if part == 'private':
        refuse_missing(missing, key, cfg.get('ann_file'))
    if all(_setting(step, 'imdecode_backend') in (None, 'cv2') for step in _loaders(cfg)):
        warn_of_unreadable({*paths} - {*missing}, key)


def _reads_local_files(cfg: dict) -> bool:
    """Whether img_path is a local file that LoadImage opens: no custom loader and no remote storage."""
    backends = [_setting(step, 'backend_args') or {} for step in _loaders(cfg)]
    return bool(backends) and all(backend.get('backend', 'local') == 'local' for backend in backends)


def _loaders(cfg: dict) -> list[Any]:
    """The steps of a data set's pipeline that open pictures, as they are in the config."""
    return [step for step in cfg.get('pipeline') or [] if is_kind(TRANSFORMS, step, LoadImageFromFile)]


def _setting(step: Any, name: str) -> Any:
    return step.get(name) if isinstance(step, dict) else getattr(step, name, None)
