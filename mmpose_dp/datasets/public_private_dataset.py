"""One data set of two parts: private records first, then public ones, with public views before other public data.

One data loader serves both, and each sample names its record in its metainfo. Must not let a private record reach a sample
that is not its own, nor treat as public what is not.
"""

import os.path as osp
import warnings
from collections.abc import Iterable, Sequence, Set
from functools import partial
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmpose.datasets.transforms import GetBBoxCenterScale
from mmpose.registry import DATASETS, TRANSFORMS
from torch.utils.data import Dataset

from mmpose_dp.messages import failure, reason, step_in_words, warn_in_terminal
from mmpose_dp.privacy.errors import ConfigError, DataError
from mmpose_dp.privacy.noise import RandomSource
from mmpose_dp.privacy.validation import as_whole

from .alone import files_read, follows_others, mixes, passes_the_view, sees_others
from .annotation_file import declared_sizes
from .building import build_part, left_out_by, part_annotated, seen_through
from .converted_joints import refuse_unnamed_joints, refuse_view_of_other_joints
from .nested import texts_in, with_held
from .overlap import copies_among, refuse_shared_data
from .own_code import own_name
from .privacy_units import (
    file_in_words,
    group_samples,
    image_paths,
    personal_epsilons,
    picture_folder,
    real_path,
    records_digest,
    source_in_words,
    subjects_digest,
    view_digest,
)
from .randomness import fixed_randomness, random_step
from .sample_form import IMAGE, Form, difference, form_of
from .steps import OfStep
from .switching import settings_of, switched
from .transforms import View
from .transforms.view import changed_before, check_view

_TRIED = 5  # samples that are tried before training, so many that no single one decides anything
_PADDING = 1.25  # GetBBoxCenterScale's default
_BLACK = 16  # of 255; 12 bits in files of 16 are below


@DATASETS.register_module()
class PublicPrivateDataset(Dataset):
    """Private records 0..N-1 and public records N..N+M-1 of one training set.

    Args:
        private: config of the private data set, any MMPose top-down data set.
        public_view: config of a PublicView transform, or of your own ``View``. The public part is then the private set
            seen through it (Feature DP and hybrid). It is inserted right after GetBBoxCenterScale, before anything random.
        public: config of a data set that is really public (Projected DP-SGD). Beside a public_view, its samples follow the
            views in the public part and are used as they are: with sharp pictures the model does not unlearn the detail that
            views lack.
        privacy_unit: 'instance' (each annotated person is a record), 'image' (all people of an image are one) or 'subject'
            (everything of one subject is one).
        subjects: with 'subject', the annotation field that names each annotation's subject, or a JSON file
            ``{image file name: subject}``.
        personal_epsilon: None, or the annotation field (or JSON file) with the budget that a record's owner allows.
            Samples without one have the hook's target_epsilon. Of several people in a record, the smallest budget counts.
        augmentations: how many times each sample of a sampled record is augmented; the record's gradient is their mean (De et
            al. 2022).
        debug_seed: seed of the augmentations, for tests only; the run is then NOT PRIVATE.

    Each sample is augmented with its own seeds from the system's entropy. Under mmengine's seed, which checkpoints hold,
    augmentation would depend on the samples before: with one record more, all others would look different, public ones too.

    If the pipeline fails on a sample's picture or annotation, the sample contributes nothing and a warning says so.

    Raises DataError, naming the key, for missing files, mixing transforms, data sets that repeat records, and public data
    that is not public; ConfigError for settings out of range.
    """

    switched = False  # whether ``pipeline`` was set since the train loop last checked

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
        self.augmentations = as_whole(augmentations, 'train_dataloader.dataset.augmentations')
        for name, value in (('private', private), ('public_view', public_view), ('public', public)):
            if value is not None and not (isinstance(value, dict) and 'type' in value):
                raise ConfigError(f"train_dataloader.dataset.{name}={value!r} must be a config: dict(type='...', ...)")
        self._private_cfg, self.private = private, build_part(private, 'private')
        self.views: Any = None if public_view is None else seen_through(self.private, private, public_view)
        self.public_view: Any = None if public_view is None else TRANSFORMS.build(public_view)
        if self.public_view is not None:
            check_view(self.public_view)
        if isinstance(self.public_view, View):
            refuse_view_of_other_joints(self.public_view, self.private)
        # a view whose strength follows the box hides nobody by an annotation
        hides = self.public_view is not None and not getattr(self.public_view, 'follows_box', False)
        self._left_out = left_out_by(self.private) if hides else {}
        folder, sizes = picture_folder(self.private), declared_sizes(self.private.ann_file).items()
        self._hides, self._sizes = hides, {real_path(osp.join(folder, name)): size for name, size in sizes}
        self.metainfo = self.private.metainfo
        self.public: Any = None if public is None else build_part(public, 'public', self.metainfo.get('num_keypoints'))
        self._same_image: dict[str, list[int]] = {}
        for sample, path in enumerate(image_paths(self.private)):
            self._same_image.setdefault(path, []).append(sample)
        if self.public is not None:
            refuse_shared_data(self.private, self.images, self.public)
        self._join_copies()
        self.random = RandomSource()
        self.privacy_unit = privacy_unit
        self._records = group_samples(self.private, privacy_unit, subjects)
        self.subjects = None if subjects is None else source_in_words(subjects)
        self.subjects_digest = None if subjects is None else subjects_digest(subjects, self._records)
        self.personal_epsilons = personal_epsilons(self.private, self._records, personal_epsilon)
        self._record_of = {sample: record for record, samples in enumerate(self._records) for sample in samples}
        self.try_first_samples()
        self._warn_of_pictures()
        self.random = RandomSource(debug_seed)  # the numbers that the trial used do not count

    def _join_copies(self) -> None:
        """Finds who is in a picture, whatever name it has there: views of its copies must hide the same people, or be as strong."""
        left_out = self._left_out or {}
        self._copy_of = {} if self.views is None else copies_among({*self.images, *left_out})
        self._samples_in: dict[str, list[int]] = {}
        self._others_in: dict[str, list[dict]] = {}
        for path, samples in self._same_image.items():
            self._samples_in.setdefault(self._copy_of.get(path, path), []).extend(samples)
        for path, people in left_out.items():
            self._others_in.setdefault(self._copy_of.get(path, path), []).extend(people)
        if self._copy_of:
            one, other = next(iter(self._copy_of.items()))
            warn_in_terminal(
                f'train_dataloader.dataset.private: {len(self._copy_of)} pictures are copies of others, such as '
                f'{osp.basename(one)} of {osp.basename(other)}. Their public views are made alike, but a person in both is several '
                'records: join them'
            )

    def _name(self, part: BaseDataset) -> str:
        return next(name for name, one in self.parts().items() if one is part)

    def try_first_samples(self) -> None:
        """Finds the form of all samples under the current pipelines. Raises DataError for a pipeline that cannot be used."""
        self._forms: dict[str, Form] = {}
        self._refuse_mixing()
        self._probes = {name: self._tried(part, name) for name, part in self.parts().items()}
        self._refuse_random_views()
        self._refuse_other_people()
        self._refuse_what_passes_the_view()

    def _refuse_mixing(self) -> None:
        """Refuses pipelines and data sets of other code in which one record reaches the sample of another."""
        samples, key = self._first_samples(self.private), 'train_dataloader.dataset.private'
        name = own_name(self.private)
        if name and sees_others(self.private, samples):
            raise DataError(
                f'{key}.type={name.rpartition(".")[2]}: get_data_info gives a record something of another one, so that a record '
                'could reach the samples of others: let it return its own picture and annotation alone'
            )
        if name and any(self._names_others(sample) for sample in samples):
            raise DataError(
                f'{key}.type={name.rpartition(".")[2]}: the annotation of a record names a picture of another record, so that a '
                "transform could read it: leave it out, or make them one record (privacy_unit='subject')"
            )
        if name and follows_others(
            self.private, self._private_cfg, [self.samples_of(self.record_of(one)) for one in samples]
        ):
            raise DataError(
                f'{key}.type={name.rpartition(".")[2]}: a record is not the same if all others are copies of it, so the data set '
                'gives it something of the others (their annotations, a mean or a count over them, or itself, by which a transform '
                'reads them): make each sample of its own annotation and picture alone'
            )
        for part, info in ((self.private, self.private.get_data_info), (self.views, self.view_info)):
            own = [] if part is None else [*filter(None, map(own_name, with_held(part.pipeline.transforms)))]
            if own and mixes(part.pipeline, [partial(info, sample) for sample in samples]):
                raise DataError(
                    f'{key}.pipeline: a sample is not the same after other records as it is alone, so one of '
                    f'{", ".join(own)} keeps something of the samples before (a cache, its own random generator): let it use '
                    'its input alone, and the generators of random, numpy.random and torch'
                )
        for part in self.parts().values():
            for name, path in files_read(part.pipeline.transforms, {*self.images, real_path(self.private.ann_file)}):
                raise DataError(
                    f'train_dataloader.dataset.{"public" if part is self.public else "private"}.pipeline: {name} has the path of '
                    f'{osp.basename(path)}, a file of the private set, which would be in the samples of other records: give it '
                    'public pictures or annotations'
                )

    def _names_others(self, sample: int) -> bool:
        """Whether a sample's annotation has the path, or the name in its folder, of a picture that its record does not have."""
        info, own = self.private.get_data_info(sample), self._records[self._record_of[sample]]
        folder = osp.dirname(info['img_path'])
        named = {
            real_path(path) for text in texts_in(info) for path in (text, osp.join(folder, text)) if '\0' not in text
        }
        return bool((named & self.images) - {real_path(self.private.get_data_info(one)['img_path']) for one in own})

    def parts(self) -> dict[str, BaseDataset]:
        """The data sets by config key, in the order of their indices."""
        parts = dict(private=self.private, public_view=self.views, public=self.public)
        return {name: part for name, part in parts.items() if part is not None}

    def _tried(self, part: BaseDataset, name: str) -> list[tuple[int, list[int]]]:
        """Samples of several records that the pipeline can use, with the seeds they were tried with.

        A pipeline that fails on all of them is refused before training. If it fails on one, that one is left out. All of them
        must have one form, so that no single record decides which form that is.
        """
        key = f'train_dataloader.dataset.{name}'
        tried, found = self._first_samples(part), []
        failed = 'it returns nothing'
        for number, sample in enumerate(tried):
            seeds = [number] * 6
            try:
                packed = self._packed(part, sample, seeds)
                form = None if packed is None else form_of(packed)
            except Exception as error:
                failed = f'{failure(error)}{step_in_words(error)}'
                continue
            if packed is None or form is None:
                continue
            self._refuse_other_form(name, form)
            refuse_unnamed_joints(packed, part, key)
            found.append((sample, seeds))
        if len(found) < min(2, len(tried)):
            raise DataError(f'{key}: the pipeline fails on its first samples: {failed}')
        return found

    def _refuse_other_form(self, name: str, form: Form) -> None:
        """Refuses samples of different form within a part, and images of different form in any part."""
        key = f'train_dataloader.dataset.{name}'
        images = {IMAGE: next(iter(self._forms.values()), form)[IMAGE]}
        other = difference(images, {IMAGE: form[IMAGE]})
        if other:
            raise DataError(
                f'{key}: the pipeline gives images that cannot be stacked into a batch, since {other}: read pictures with one '
                "number of channels (LoadImage's color_type='color') and bring all to one size (TopdownAffine with one input_size)"
            )
        other = difference(self._forms.setdefault(name, form), form)
        if other:
            raise DataError(
                f'{key}: the pipeline gives samples of different form, {other}: give every annotation the same joints and fields'
            )

    def _first_samples(self, part: BaseDataset) -> list[int]:
        """A few samples with different records and pictures, from as many folders as there are."""
        samples: Iterable[int] = range(len(part)) if part is self.public else (record[0] for record in self._records)
        pictures: dict[str, int] = {}
        for sample in samples:
            pictures.setdefault(part.get_data_info(sample)['img_path'], sample)
        folders: dict[str, int] = {}
        for path, sample in pictures.items():
            folders.setdefault(osp.dirname(path), sample)
        return list(dict.fromkeys([*folders.values(), *pictures.values()]))[:_TRIED]

    def _refuse_random_views(self) -> None:
        """Refuses a random view, and random transforms before it: a record must have only one public view."""
        if self.views is None:
            return
        steps = self.views.pipeline.transforms
        place = 1 + steps.index(self._center_scale)
        key = 'train_dataloader.dataset'
        for sample, _ in self._probes['public_view']:
            step = random_step(steps[: place + 1], self.view_info(sample))
            name = getattr(step, '__name__', type(step).__name__)
            if step is steps[place]:
                raise DataError(
                    f'{key}.public_view: {name} is random and could give a record more than one public view: make its result a '
                    'function of the picture and its annotation'
                )
            if step is not None:
                raise DataError(
                    f'{key}.private.pipeline has {name} before GetBBoxCenterScale, which is random and could '
                    'give a record more than one public view: move it behind GetBBoxCenterScale'
                )

    def _refuse_other_people(self) -> None:
        """Refuses transforms before the view after which a person is not as annotated: the view would hide something else."""
        if self.views is None:
            return
        steps, follows = self.views.pipeline.transforms, getattr(self.public_view, 'follows_box', False)
        before = steps[: steps.index(self._center_scale)]
        for sample, _ in self._probes['public_view']:
            if changed := changed_before(before, self.view_info(sample), follows):
                raise DataError(
                    f'train_dataloader.dataset.private.pipeline changes {changed} before GetBBoxCenterScale, so that the public '
                    'view would hide other parts of a person than it says: move what changes it (KeypointConverter, say) behind '
                    'GetBBoxCenterScale'
                )

    def _refuse_what_passes_the_view(self) -> None:
        """Refuses transforms behind the view that read the private picture: the public part would show what the view hides."""
        if self.views is None:
            return
        steps = self.views.pipeline.transforms
        place = 1 + steps.index(self._center_scale)
        for sample, seeds in self._probes['public_view']:
            step = passes_the_view(steps, place, partial(self.view_info, sample), seeds)
            if step is not None:
                raise DataError(
                    f'train_dataloader.dataset.private.pipeline: {getattr(step, "__name__", type(step).__name__)} comes after '
                    'GetBBoxCenterScale, where the public view is put, and reads the private picture itself (from img_path, or '
                    'kept from before), so that the public samples would show what the view hides: move it before '
                    'GetBBoxCenterScale, or take it out'
                )

    def _refuse_lost_data(self, part: BaseDataset) -> None:
        """Refuses to go on if the data is gone, since the remaining steps would cost privacy and learn nothing.

        Several records decide, all of which could be read when the data set was built, and never the sampled one.
        """
        name = self._name(part)
        failed, lost = 'nothing is read', len(self._probes[name]) > 1
        for sample, seeds in self._probes[name]:
            folder = osp.dirname(part.get_data_info(sample)['img_path'])
            if folder and '://' not in folder and not osp.isdir(folder):
                failed, lost = 'a folder is missing', True
                break
            try:
                lost = lost and self._packed(part, sample, seeds) is None
            except Exception as error:
                failed = type(error).__name__
        if lost:
            raise DataError(
                f'train_dataloader.dataset.{name}: pictures that could be read when training began no longer can ({failed}): is '
                f'{picture_folder(part) or "their folder"} still there? The step that was begun is not counted. '
                'Continue with --resume when the data is back'
            )

    @property
    def pipeline(self) -> Any:
        """The private data set's pipeline. Setting it, as mmdet's PipelineSwitchHook does, changes that of the public views too."""
        return self.private.pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Any) -> None:
        self.private.pipeline, with_view = switched(pipeline, getattr(self.views, 'pipeline', None))
        if self.views is not None:
            self.views.pipeline = with_view
        self.try_first_samples()
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
        """M, the number of samples in the public part."""
        return sum(len(part) for part in (self.views, self.public) if part is not None)

    @property
    def public_samples(self) -> range:
        """Indices of the public part."""
        return range(len(self.private), len(self))

    def records_digest(self) -> str:
        """SHA-256 of who is in which record: processes that share them out must have the same ones. Not to be published."""
        return records_digest(self.private, self._records)

    def samples_of(self, record: int) -> list[int]:
        """Indices that make up a private record."""
        return self._records[record]

    def record_of(self, index: int) -> int:
        """The private record that an index belongs to."""
        return self._record_of[index]

    @property
    def samples_per_index(self) -> int:
        """Samples that a private index gives."""
        return self.augmentations

    def __len__(self) -> int:
        return len(self.private) + self.num_public

    def __getitems__(self, indices: list[int]) -> list[list[dict]]:
        """The packed samples of each index, with the sampler's step. Data loaders call this with a whole batch."""
        return OfStep((self[index] for index in indices), getattr(indices, 'step', None))

    def __getitem__(self, index: int) -> list[dict]:
        """The packed samples of an index: one, or ``samples_per_index`` of a private index.

        If the pipeline rejects one, fails on one or gives one another form, the list is empty: the index then contributes
        nothing, and no other takes its place. Nothing else may depend on what a private record holds, so training continues.

        Raises DataError if other records cannot be read either, since the data is then gone.
        """
        record = None if index >= len(self.private) else self._record_of[index]
        part, number = self._located(index)
        form = self._forms[self._name(part)]
        samples = []
        try:
            for _ in range(1 if record is None else self.augmentations):
                packed = self._packed(part, number, [int(x) for x in self.random.uint64(6)])
                other = '' if packed is None else difference(form, form_of(packed))
                if other:
                    raise ValueError(f'it gives a sample of another form, {other}')
                samples.append(packed)
        except Exception as error:  # a damaged file or annotation can make a pipeline raise anything
            self._refuse_lost_data(part)
            # a warning, not the log, since it names a sampled record
            path = part.get_data_info(number).get('img_path')
            warnings.warn(f'{path} contributes nothing, since its pipeline failed: {reason(error)}', stacklevel=1)
            return []
        usable = [packed for packed in samples if packed is not None]
        if len(usable) < len(samples):
            self._refuse_lost_data(part)
            return []
        for packed in usable:
            packed['data_samples'].set_metainfo(dict(dp_record=record, dp_weight=1.0 / len(usable)))
        return usable

    def _located(self, index: int) -> tuple[BaseDataset, int]:
        """The data set that an index is in, and the number of the sample there."""
        for part in self.parts().values():
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(f'PublicPrivateDataset has {len(self)} samples')

    def _packed(self, part: BaseDataset, number: int, seeds: Sequence[int]) -> dict | None:
        info = self.view_info(number) if part is self.views else part.get_data_info(number)
        with fixed_randomness(seeds):
            packed = part.pipeline(info)  # not prepare_data, which lets a pipeline reach all other records
        if self._hides and part is self.views and (words := self._other_size(info)):
            raise DataError(f'{words}. People would stay visible')
        return packed

    def _other_size(self, info: dict) -> str:
        """A sentence if a picture that was read has another size than its annotation file says; else empty."""
        declared, size = self._sizes.get(real_path(info['img_path'])), info.get('ori_shape')
        if declared is None or size is None or tuple(size) == declared:
            return ''
        return (
            f'{info["img_path"]} has a height and width of {size[0]} and {size[1]} pixels, and {self.private.ann_file} says '
            f'{declared[0]} and {declared[1]}, to which MMPose cuts boxes: correct them there'
        )

    def _warn_of_pictures(self) -> None:
        """Says of the first samples if a picture has another size than is said (an orientation in its EXIF data, say), or if all
        are nearly black, as pictures of 12 bits in files of 16 are when 8 are read."""
        key, brightest = 'train_dataloader.dataset.private', []
        for sample in self._first_samples(self.private):
            try:
                info = self.private.pipeline.transforms[0](self.private.get_data_info(sample))
                words, image = self._other_size(info), info.get('img')
            except Exception:  # this record contributes nothing
                continue
            if words:
                return warn_in_terminal(f'{key}: {words}')
            brightest.append(int(image.max()) if getattr(image, 'dtype', None) == np.uint8 else _BLACK)
        if brightest and max(brightest) < _BLACK:
            warn_in_terminal(
                f'{key}: the first pictures are nearly black, with no value above {max(brightest)} of 255. Of files with 16 bits, '
                'such as depth or X-ray pictures, the upper 8 are read: save pictures whose values fill the range'
            )

    def view_info(self, number: int) -> dict:
        """The input of the views' pipeline: the annotation, the other people of the image, whom a region view hides too, and the
        size of the largest box in the image: views sized for several boxes would together hold more than one."""
        info = self.private.get_data_info(number)
        path = real_path(info['img_path'])
        picture = self._copy_of.get(path, path)
        others = [self.private.get_data_info(other) for other in self._samples_in[picture] if other != number]
        info['view_box'] = max(self._padded_box(person)[1] for person in (info, *others))
        return dict(info, people=[self._hidden(person) for person in (*others, *self._others_in.get(picture, ()))])

    def _hidden(self, person: dict) -> dict:
        """What a view needs to hide a person as that person's own view does."""
        center, side = self._padded_box(person)
        kept = {key: person[key] for key in ('bbox', 'keypoints', 'keypoints_visible')}
        return dict(kept, padded_box=np.concatenate([center - side / 2, center + side / 2]))

    def _padded_box(self, info: dict) -> tuple[np.ndarray, float]:
        """The centre of a person's box, (2,), and its longer side, both in pixels, as the pipeline pads it."""
        box = self._center_scale.transform(dict(info))
        return box['bbox_center'][0], float(np.max(box['bbox_scale'][0]))

    @property
    def _center_scale(self) -> GetBBoxCenterScale:
        """The GetBBoxCenterScale of the views' pipeline; seen_through ensures that there is one."""
        return next(s for s in self.views.pipeline.transforms if isinstance(s, GetBBoxCenterScale))

    @property
    def view_description(self) -> str | None:
        """What the public view keeps, for the statement."""
        if self.views is None:
            return None
        padding = self._center_scale.padding  # the sizes of the view follow the padded box
        words = self.public_view.description + (f', boxes padded by {padding:g}' if padding != _PADDING else '')
        words += ', of those people alone who are records' if self._left_out is None else ''
        if self._hides and (part := part_annotated(self.private)):
            words += f', whose boxes are of {part}s alone: the rest of them is visible, and so is whoever has no box of a {part}'
        follows = isinstance(self.public_view, View) and self.public_view.follows_box
        return words + (', one view per image, sized for its largest box' if follows else '')

    @property
    def view_source(self) -> str | None:
        """What the public view follows, in words, with a SHA-256 of that: by anything else, a picture would get a second view.

        All of it is public wherever there is a view.
        """
        if self.views is None:
            return None
        steps = self.views.pipeline.transforms
        read = settings_of(steps[: steps.index(self._center_scale)])
        infos = [self.private.get_data_info(sample) for sample in range(len(self.private))]
        if not self._hides:
            return f'boxes ({view_digest(read, ((info, self._padded_box(info)) for info in infos))})'
        infos += [info for left_out in (self._left_out or {}).values() for info in left_out]
        return f'boxes and joints ({view_digest(read, ((info, self._hidden(info).values()) for info in infos))})'

    @property
    def public_description(self) -> str | None:
        """The data that is public beside the views, for the statement."""
        if self.public is None:
            return None
        return f'{type(self.public).__name__} {file_in_words(self.public.ann_file)}'
