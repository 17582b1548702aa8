"""One data set of two halves: private records first, public ones after them, public views before other public data.

One data loader then serves both, and each row carries its half in its metainfo. Must not let a private record reach a row
that is not its own, nor call public what is not.
"""

import copy
import os.path as osp
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmpose.datasets.dataset_wrappers import CombinedDataset
from mmpose.datasets.transforms import GetBBoxCenterScale
from mmpose.datasets.transforms.mix_img_transforms import MixImageTransform
from mmpose.registry import DATASETS, TRANSFORMS
from torch.utils.data import Dataset

from mmpose_dp.privacy import PrivacyError, RandomSource

from .overlap import refuse_shared_data
from .records import file_in_words, group_rows, image_paths, personal_epsilons, source_in_words
from .transforms import PublicView
from .transforms.public_view import REGION_MODES

# they put several records into one row; MMPose's own are found by their base class
_MIXING = ('Mosaic', 'MixUp', 'CutMix', 'CopyPaste', 'YOLOXMixUp')
_PADDING = 1.25  # GetBBoxCenterScale's own
_MPII_LAYOUT = """MMPose expects
  {root}/annotations/mpii_train.json, mpii_val.json, mpii_gt_val.mat
  {root}/images/*.jpg
Put MPII there (MMPose docs, "2D Body Keypoint Datasets"), point data_root at it, or draw the synthetic set in its place:
  python tools/make_synthetic_mpii.py --out {root} --domain {half} --train 6000 --val 1000"""


@DATASETS.register_module()
class PublicPrivateDataset(Dataset):
    """Private records 0..N-1 and public records N..N+M-1 of one training set.

    Args:
        private: config of the private data set, any MMPose top-down data set.
        public_view: config of a PublicView transform: the public half is then the private set seen through it (Feature DP
            and hybrid). It is put right after GetBBoxCenterScale, before anything random.
        public: config of a data set that is really public (Projected DP-SGD). With a public_view too, its rows follow the
            views in the public half and are drawn as they are: sharp pictures keep what the views lack from being unlearned.
        privacy_unit: 'instance' (each annotated person is a record), 'image' (all people of an image are one) or 'subject'
            (everything of one subject is one).
        subjects: with 'subject', the annotation field that names each annotation's subject, or a JSON file
            ``{image file name: subject}``.
        personal_epsilon: None, or the annotation field (or JSON file) with the budget that a record's owner allows;
            rows without one have the hook's target_epsilon. Of several people in a record the smallest budget counts.
        private_loss: 'full' (a record's gradient is that of its loss on x) or 'residual' (that less the gradient on its public
            view, from two rows under the same augmentation; with the views' gradient in the update, the sum is unbiased).
        augmentations: a drawn record's rows are augmented so many times and their mean gradient is taken (De et al. 2022).
        debug_seed: of the augmentations, for tests only; the run is then NOT PRIVATE.

    Each row is augmented by coins of its own from the system's entropy. By mmengine's seed, which checkpoints hold, the rows
    drawn before it would decide them: one record more, and all others, public ones too, would look different.

    A row whose picture or annotation the pipeline cannot use contributes nothing, and a warning says so.

    Raises PrivacyError, naming the key, for missing files, mixing transforms, data sets that repeat records, and public
    data that is not public.
    """

    def __init__(
        self,
        private: dict,
        public_view: dict | None = None,
        public: dict | None = None,
        privacy_unit: str = 'instance',
        subjects: str | None = None,
        personal_epsilon: str | None = None,
        private_loss: str = 'full',
        augmentations: int = 1,
        debug_seed: int | None = None,
    ) -> None:
        only_views = public_view is not None and public is None
        if private_loss not in ('full', 'residual') or (private_loss == 'residual' and not only_views):
            raise PrivacyError(
                f"train_dataloader.dataset.private_loss={private_loss!r} must be 'full', or 'residual' with a public_view and "
                'no public beside it'
            )
        if type(augmentations) is not int or augmentations < 1:
            raise PrivacyError(
                f'train_dataloader.dataset.augmentations={augmentations!r} must be a whole number above 0'
            )
        for name, value in (('private', private), ('public_view', public_view), ('public', public)):
            if value is not None and not (isinstance(value, dict) and 'type' in value):
                raise PrivacyError(f"train_dataloader.dataset.{name}={value!r} must be a config: dict(type='...', ...)")
        self.private = _build(private, 'private')
        self.views = None if public_view is None else _build(_with_view(private, public_view), 'private')
        self.public_view: Any = None if public_view is None else TRANSFORMS.build(public_view)
        if isinstance(self.public_view, PublicView):
            self.public_view.check_joints(self.private.metainfo['keypoint_id2name'])
        self.public = None if public is None else _build(public, 'public')
        self._same_image: dict[str, list[int]] = {}
        for row, path in enumerate(image_paths(self.private)):
            self._same_image.setdefault(path, []).append(row)
        if self.public is not None:
            refuse_shared_data(self.private, self.images, self.public)
        self.random = RandomSource()
        self.private_loss, self.augmentations = private_loss, augmentations
        self.privacy_unit = privacy_unit
        self.metainfo = self.private.metainfo
        _refuse_missing_images(self._same_image, private)
        self._records = group_rows(self.private, privacy_unit, subjects)
        self.subjects = None if subjects is None else source_in_words(subjects)
        self.personal_epsilons = personal_epsilons(self.private, self._records, personal_epsilon)
        self._record_of = {row: r for r, rows in enumerate(self._records) for row in rows}
        self._refuse_useless_pipeline()
        self.random = RandomSource(debug_seed)  # what the check took does not count

    def _refuse_useless_pipeline(self) -> None:
        """A fault of the pipeline is told before training; of a single record it may not be, then it is left out."""
        for part, name in ((self.private, 'private'), (self.views, 'public_view'), (self.public, 'public')):
            if part is None:
                continue
            failed = None
            for row in range(min(3, len(part))):
                try:
                    packed = self._packed(part, row, [0] * 6)
                    if packed is not None and not {'inputs', 'data_samples'} <= packed.keys():
                        raise ValueError('it does not end with PackPoseInputs')
                    break
                except Exception as error:
                    failed = error
            else:
                if failed is not None:
                    raise PrivacyError(
                        f'train_dataloader.dataset.{name}: the pipeline fails on its first rows: '
                        f'{type(failed).__name__}: {failed}'
                    ) from failed

    @property
    def images(self) -> Set[str]:
        """The image files of the private records."""
        return self._same_image.keys()

    @property
    def num_records(self) -> int:
        """N, in privacy units."""
        return len(self._records)

    @property
    def num_public(self) -> int:
        """M, rows of the public half."""
        return sum(len(part) for part in (self.views, self.public) if part is not None)

    @property
    def public_rows(self) -> range:
        """Indices of the public half."""
        return range(len(self.private), len(self))

    def rows_of(self, record: int) -> list[int]:
        """Indices that make up a private record."""
        return self._records[record]

    @property
    def rows_per_index(self) -> int:
        """Rows that a private index gives."""
        return self.augmentations * (2 if self.private_loss == 'residual' else 1)

    def __len__(self) -> int:
        return len(self.private) + self.num_public

    def __getitem__(self, index: int) -> list[dict]:
        """The packed rows of an index: one, or ``rows_per_index`` of a private one. None where the pipeline rejects or fails on
        them: they then contribute nothing, and no other takes their place. Nothing else may depend on what a private record
        holds, so training goes on.
        """
        record = None if index >= len(self.private) else self._record_of[index]
        part, row = self._located(index)
        rows = []
        try:
            for _ in range(1 if record is None else self.augmentations):
                coins = [int(x) for x in self.random.uint64(6)]
                rows.append((self._packed(part, row, coins), 1.0 / self.augmentations))
                if record is not None and self.private_loss == 'residual':  # seen through its view under the same coins
                    rows.append((self._packed(self.views, row, coins), -1.0 / self.augmentations))
        except Exception as error:  # whatever a damaged file or annotation makes of the pipeline
            # a warning, not the log: it names a record that was drawn
            warnings.warn(
                f'{part.get_data_info(row)["img_path"]} contributes nothing, since its pipeline failed: {error}',
                stacklevel=1,
            )
            return []
        if any(packed is None for packed, _ in rows):
            return []
        for packed, weight in rows:
            packed['data_samples'].set_metainfo(dict(dp_record=record, dp_weight=1.0 if record is None else weight))
        return [packed for packed, _ in rows]

    def _located(self, index: int) -> tuple[BaseDataset, int]:
        """The data set that an index is in, and the row there."""
        for part in (self.private, self.views, self.public):
            if part is not None and index < len(part):
                return part, index
            index -= 0 if part is None else len(part)
        raise IndexError(f'PublicPrivateDataset has {len(self)} rows')

    def _packed(self, part: BaseDataset, row: int, coins: Sequence[int]) -> dict | None:
        info = self._view_info(row) if part is self.views else part.get_data_info(row)
        with _fixed_randomness(coins):
            return part.pipeline(info)  # not prepare_data, which gives a pipeline all other records

    def _view_info(self, index: int) -> dict:
        """What the pipeline starts from, with the other people of the image, whom a region view hides too, and the size of the
        image's view where all of it is one."""
        info = self.private.get_data_info(index)
        rows = self._same_image[osp.realpath(info['img_path'])]
        others = [self.private.get_data_info(i) for i in rows if i != index]
        keys = ('bbox', 'keypoints', 'keypoints_visible')
        info = dict(info, people=[{key: other[key] for key in keys} for other in others])
        if self.one_view_per_image:
            info['view_box'] = max(self._padded_box(person) for person in (info, *others))
        return info

    @property
    def one_view_per_image(self) -> bool:
        """Whether all records of an image have one view, sized for its largest box."""
        return self.privacy_unit in ('image', 'subject')

    def _padded_box(self, info: dict) -> float:
        """The longer side of a person's box in pixels, as the pipeline pads it."""
        box = self._center_scale.transform(dict(info))
        return float(np.max(box['bbox_scale'][0]))

    @property
    def _center_scale(self) -> GetBBoxCenterScale:
        """The views' own; _with_view saw to it that there is one."""
        return next(s for s in self.views.pipeline.transforms if isinstance(s, GetBBoxCenterScale))

    @property
    def view_description(self) -> str | None:
        """What the public view keeps, for the statement."""
        if self.views is None:
            return None
        padding = self._center_scale.padding  # the sizes of the view follow the padded box
        told = self.public_view.description + (f', boxes padded by {padding:g}' if padding != _PADDING else '')
        blurs = isinstance(self.public_view, PublicView) and self.public_view.mode not in REGION_MODES
        return told + (', one view per image, sized for its largest box' if blurs and self.one_view_per_image else '')

    @property
    def public_description(self) -> str | None:
        """What data is public beside the views, for the statement."""
        if self.public is None:
            return None
        return f'{type(self.public).__name__} {file_in_words(self.public.ann_file)}'


@contextmanager
def _fixed_randomness(coins: Sequence[int]) -> Iterator[None]:
    """Inside, the generators that transforms draw from start from six ``coins``; afterwards they go on as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(coins[0])
    np.random.seed([x % 2**32 for x in coins[1:5]])
    torch.random.default_generator.manual_seed(coins[5])
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _build(cfg: dict, half: str) -> BaseDataset:
    key = f'train_dataloader.dataset.{half}'
    for step in _steps(cfg.get('pipeline', [])):
        name = str(step['type'])
        cls = TRANSFORMS.get(name)
        if name in _MIXING or (cls is not None and issubclass(cls, MixImageTransform)):
            raise PrivacyError(f'{key}.pipeline: {name} mixes several records into one row; take it out')
    cls = DATASETS.get(str(cfg['type']))
    if cls is None or not issubclass(cls, BaseDataset) or issubclass(cls, CombinedDataset):
        raise PrivacyError(
            f'{key}.type={cfg["type"]}: a wrapper that joins or repeats data sets can use a record twice; give one of '
            "MMPose's data sets itself"
        )
    _refuse_missing_files(cfg, key)
    try:
        dataset = DATASETS.build(dict(cfg, lazy_init=False))
    except Exception as error:  # whatever a damaged file makes of a parser
        path = osp.join(cfg.get('data_root') or '', cfg.get('ann_file') or '')
        raise PrivacyError(
            f'{key}: {cfg["type"]} cannot be made from {path}: {type(error).__name__}: {error}'
        ) from error
    if len(dataset) == 0:
        raise PrivacyError(f'{key}: {dataset.ann_file} holds no annotated person')
    return dataset


def _steps(node: Any) -> Iterator[dict]:
    """Every transform in a pipeline, those within others (RandomApply's) too."""
    if isinstance(node, dict):
        if 'type' in node:
            yield node
        node = list(node.values())
    for part in node if isinstance(node, (list, tuple)) else ():
        yield from _steps(part)


def _refuse_missing_files(cfg: dict, key: str) -> None:
    root, ann = cfg.get('data_root') or '', cfg.get('ann_file') or ''
    path = ann if osp.isabs(ann) else osp.join(root, ann)
    images = osp.join(root, (cfg.get('data_prefix') or {}).get('img') or '')
    for found, wanted in ((osp.isfile(path), path), (osp.isdir(images), images)):
        if not found:
            hint = "Lay it out as MMPose's docs say, or set data_root."
            if 'Mpii' in str(cfg['type']):
                hint = _MPII_LAYOUT.format(root=root.rstrip('/') or '.', half=key.rpartition('.')[2])
            raise PrivacyError(f'{key}: {wanted} does not exist. {hint}')


def _refuse_missing_images(paths: Iterable[str], cfg: dict) -> None:
    missing = [path for path in paths if '://' not in path and not osp.isfile(path)]
    if missing:
        raise PrivacyError(
            f'train_dataloader.dataset.private: {len(missing)} image files named in {cfg.get("ann_file")} do not exist, '
            f'{missing[0]} among them. Set data_prefix.img, or take them out of the annotations'
        )


def _with_view(cfg: dict, view: dict) -> dict:
    cfg = copy.deepcopy(cfg)
    names = [step['type'] for step in cfg['pipeline']]
    if 'GetBBoxCenterScale' not in names:
        raise PrivacyError('train_dataloader.dataset.public_view needs a top-down pipeline with GetBBoxCenterScale')
    before = {name for name in names[: names.index('GetBBoxCenterScale')] if name.split('.')[-1] != 'LoadImage'}
    if before:
        raise PrivacyError(
            f'train_dataloader.dataset.private.pipeline has {sorted(before)} before GetBBoxCenterScale, which could give a record '
            'more than one public view: move it behind'
        )
    cfg['pipeline'] = list(cfg['pipeline'])
    cfg['pipeline'].insert(names.index('GetBBoxCenterScale') + 1, view)
    return cfg
