"""One data set of two halves: private records first, public ones after them, public views before other public data.

One data loader then serves both, and each row carries its half in its metainfo. Must not let a private record reach a row
that is not its own, nor call public what is not.
"""

import os.path as osp
import warnings
from collections.abc import Iterable, Sequence, Set
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmpose.datasets.transforms import GetBBoxCenterScale
from mmpose.registry import DATASETS, TRANSFORMS
from torch.utils.data import Dataset

from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.noise import RandomSource

from .building import MIXING, build_half, seen_through
from .overlap import refuse_shared_data
from .privacy_units import (
    file_in_words,
    group_samples,
    image_paths,
    personal_epsilons,
    real_path,
    source_in_words,
    subjects_digest,
)
from .randomness import fixed_randomness, random_step
from .sample_form import IMAGE, Form, difference, form_of
from .steps import OfStep
from .switching import switch_pipeline
from .transforms import PublicView
from .transforms.public_view import REGION_MODES

_LOOKED_AT = 5  # rows, before training: enough for no single one to decide anything
_PADDING = 1.25  # GetBBoxCenterScale's own


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
        augmentations: a drawn record's rows are augmented so many times and their mean gradient is taken (De et al. 2022).
        debug_seed: of the augmentations, for tests only; the run is then NOT PRIVATE.

    Each row is augmented by seeds of its own from the system's entropy. By mmengine's seed, which checkpoints hold, the rows
    drawn before it would decide them: one record more, and all others, public ones too, would look different.

    A row whose picture or annotation the pipeline cannot use contributes nothing, and a warning says so.

    Raises PrivacyError, naming the key, for missing files, mixing transforms, data sets that repeat records, and public
    data that is not public.
    """

    switched = False  # whether ``pipeline`` was set since training last looked

    def __init__(
        self,
        private: dict,
        public_view: dict | None = None,
        public: dict | None = None,
        privacy_unit: str = 'instance',
        subjects: str | None = None,
        personal_epsilon: str | None = None,
        augmentations: int = 1,
        debug_seed: int | None = None,
    ) -> None:
        if type(augmentations) is not int or augmentations < 1:
            raise PrivacyError(
                f'train_dataloader.dataset.augmentations={augmentations!r} must be a whole number above 0'
            )
        for name, value in (('private', private), ('public_view', public_view), ('public', public)):
            if value is not None and not (isinstance(value, dict) and 'type' in value):
                raise PrivacyError(f"train_dataloader.dataset.{name}={value!r} must be a config: dict(type='...', ...)")
        self.private = build_half(private, 'private')
        self.views = None if public_view is None else seen_through(self.private, private, public_view)
        self.public_view: Any = None if public_view is None else TRANSFORMS.build(public_view)
        if isinstance(self.public_view, PublicView):
            self.public_view.check_joints(self.private.metainfo['keypoint_id2name'])
        self.public = None if public is None else build_half(public, 'public')
        self._same_image: dict[str, list[int]] = {}
        for row, path in enumerate(image_paths(self.private)):
            self._same_image.setdefault(path, []).append(row)
        if self.public is not None:
            refuse_shared_data(self.private, self.images, self.public)
        self.random = RandomSource()
        self.augmentations = augmentations
        self.privacy_unit = privacy_unit
        self.metainfo = self.private.metainfo
        self._records = group_samples(self.private, privacy_unit, subjects)
        self.subjects = None if subjects is None else source_in_words(subjects)
        self.subjects_digest = None if subjects is None else subjects_digest(subjects, self._records)
        self.personal_epsilons = personal_epsilons(self.private, self._records, personal_epsilon)
        self._record_of = {row: r for r, rows in enumerate(self._records) for row in rows}
        self.look_at_first_samples()
        self.random = RandomSource(debug_seed)  # what the check took does not count

    def _name(self, part: BaseDataset) -> str:
        return next(name for name, one in self.parts().items() if one is part)

    def look_at_first_samples(self) -> None:
        """Finds the form of all rows, for the pipelines as they are. Raises PrivacyError for a pipeline that cannot be used."""
        self._forms: dict[str, Form] = {}
        self._probes = {name: self._looked_at(part, name) for name, part in self.parts().items()}
        self._refuse_random_views()

    def parts(self) -> dict[str, BaseDataset]:
        """The data sets that there are, in the order of their indices, by the key that made them."""
        parts = dict(private=self.private, public_view=self.views, public=self.public)
        return {name: part for name, part in parts.items() if part is not None}

    def _looked_at(self, part: BaseDataset, name: str) -> list[tuple[int, list[int]]]:
        """The rows of several records that the pipeline can use, with the seeds they were tried with.

        A fault of the pipeline is told before training. Of a single record it may not be: it is left out then. That all these
        rows have one form means that no single record decides which form that is.
        """
        key = f'train_dataloader.dataset.{name}'
        tried, found = self._first_samples(part), []
        failed = 'it gives nothing'
        for number, row in enumerate(tried):
            seeds = [number] * 6
            try:
                packed = self._packed(part, row, seeds)
                form = None if packed is None else form_of(packed)
            except Exception as error:
                failed = f'{type(error).__name__}: {error}'
                continue
            if form is None:
                continue
            self._refuse_other_form(name, form)
            found.append((row, seeds))
        if len(found) < min(2, len(tried)):
            raise PrivacyError(f'{key}: the pipeline fails on its first rows: {failed}')
        return found

    def _refuse_other_form(self, name: str, form: Form) -> None:
        """The rows of a half have one form, and the images of all halves."""
        key = f'train_dataloader.dataset.{name}'
        images = {IMAGE: next(iter(self._forms.values()), form)[IMAGE]}
        other = difference(images, {IMAGE: form[IMAGE]})
        if other:
            raise PrivacyError(
                f'{key}: the pipeline gives images of different form, {other}, and rows are stacked: read pictures with one '
                "number of channels (LoadImage's color_type='color') and bring all to one size (TopdownAffine with one input_size)"
            )
        other = difference(self._forms.setdefault(name, form), form)
        if other:
            raise PrivacyError(
                f'{key}: the pipeline gives rows of different form, {other}: give every annotation the same joints and fields'
            )

    def _first_samples(self, part: BaseDataset) -> list[int]:
        """A row each of a few records, or public rows, that have pictures of their own, in as many folders as there are."""
        rows: Iterable[int] = range(len(part)) if part is self.public else (record[0] for record in self._records)
        pictures: dict[str, int] = {}
        for row in rows:
            pictures.setdefault(part.get_data_info(row)['img_path'], row)
        folders: dict[str, int] = {}
        for path, row in pictures.items():
            folders.setdefault(osp.dirname(path), row)
        return list(dict.fromkeys([*folders.values(), *pictures.values()]))[:_LOOKED_AT]

    def _refuse_random_views(self) -> None:
        """Before the view, transforms may read and change a picture, but each time alike: a record has one public view."""
        if self.views is None:
            return
        steps = self.views.pipeline.transforms
        before = steps[: next(i for i, step in enumerate(steps) if isinstance(step, GetBBoxCenterScale))]
        for row, _ in self._probes['public_view']:
            step = random_step(before, self._view_info(row))
            if step is not None:
                name = getattr(step, '__name__', type(step).__name__)
                raise PrivacyError(
                    f'train_dataloader.dataset.private.pipeline has {name} before GetBBoxCenterScale, which is random and could '
                    'give a record more than one public view: move it behind'
                )

    def _refuse_lost_data(self, part: BaseDataset) -> None:
        """A row that is left out costs nothing but itself; data that is gone would cost every step that is left.

        Several records decide, all of which could be read when the data set was built, and never the one that was drawn.
        """
        name = self._name(part)
        failed, lost = 'nothing is read', len(self._probes[name]) > 1
        for row, seeds in self._probes[name]:
            folder = osp.dirname(part.get_data_info(row)['img_path'])
            if folder and '://' not in folder and not osp.isdir(folder):
                failed, lost = 'a folder is gone', True
                break
            try:
                lost = lost and self._packed(part, row, seeds) is None
            except Exception as error:
                failed = type(error).__name__
        if lost:
            raise PrivacyError(
                f'train_dataloader.dataset.{name}: pictures that could be read when training began no longer can ({failed}): is '
                f'{(part.data_prefix or {}).get("img") or "their folder"} still there? The step that was begun is not counted. Go '
                'on with --resume when the data is back'
            )

    @property
    def pipeline(self) -> Any:
        """The private data set's pipeline. Setting it, as mmdet's PipelineSwitchHook does, reaches the public views too."""
        return self.private.pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Any) -> None:
        switch_pipeline(self, pipeline, MIXING)
        self.look_at_first_samples()
        self.switched = True

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
    def public_samples(self) -> range:
        """Indices of the public half."""
        return range(len(self.private), len(self))

    def samples_of(self, record: int) -> list[int]:
        """Indices that make up a private record."""
        return self._records[record]

    def record_of(self, row: int) -> int:
        """The private record that an index belongs to."""
        return self._record_of[row]

    @property
    def samples_per_index(self) -> int:
        """Samples that a private index gives."""
        return self.augmentations

    def __len__(self) -> int:
        return len(self.private) + self.num_public

    def __getitems__(self, indices: list[int]) -> list[list[dict]]:
        """The packed rows of each index, with the step that the sampler gave them; data loaders ask for a batch at once."""
        return OfStep((self[index] for index in indices), getattr(indices, 'step', None))

    def __getitem__(self, index: int) -> list[dict]:
        """The packed rows of an index: one, or ``samples_per_index`` of a private one. None where the pipeline rejects or fails on
        them, or gives them another form than other rows have: they then contribute nothing, and no other takes their place.
        Nothing else may depend on what a private record holds, so training goes on.

        Raises PrivacyError where other records cannot be read either, since the data is gone then.
        """
        record = None if index >= len(self.private) else self._record_of[index]
        part, row = self._located(index)
        half = self._name(part)
        rows = []
        try:
            for _ in range(1 if record is None else self.augmentations):
                seeds = [int(x) for x in self.random.uint64(6)]
                rows.append((self._packed(part, row, seeds), 1.0 / self.augmentations))
            for packed, _ in rows:
                other = '' if packed is None else difference(self._forms[half], form_of(packed))
                if other:
                    raise ValueError(f'it gives another form than other rows have, {other}')
        except Exception as error:  # whatever a damaged file or annotation makes of the pipeline
            self._refuse_lost_data(part)
            # a warning, not the log: it names a record that was drawn
            path = part.get_data_info(row).get('img_path')
            warnings.warn(f'{path} contributes nothing, since its pipeline failed: {error}', stacklevel=1)
            return []
        if any(packed is None for packed, _ in rows):
            self._refuse_lost_data(part)
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

    def _packed(self, part: BaseDataset, row: int, seeds: Sequence[int]) -> dict | None:
        info = self._view_info(row) if part is self.views else part.get_data_info(row)
        with fixed_randomness(seeds):
            return part.pipeline(info)  # not prepare_data, which gives a pipeline all other records

    def _view_info(self, index: int) -> dict:
        """What the pipeline starts from, with the other people of the image, whom a region view hides too, and the size of the
        image's view where all of it is one."""
        info = self.private.get_data_info(index)
        rows = self._same_image[real_path(info['img_path'])]
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
        """The views' own; seen_through saw to it that there is one."""
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
