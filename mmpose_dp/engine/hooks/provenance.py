"""Where the weights of a training come from: what the checkpoints that it descends from were trained on, hop by hop.

Must not let a private training, or one on public views, be forgotten because another one lies in between, and must not claim
to know what nobody recorded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import PretrainedInit, is_model_wrapper
from mmengine.runner import CheckpointLoader, Runner
from mmpose.registry import HOOKS
from torch import nn

from mmpose_dp.models import LoadWatch, explain_misfit, is_within, weights_of
from mmpose_dp.privacy.errors import PrivacyError

CHECKPOINT_KEY = 'privacy'  # of what a checkpoint says about its own privacy: ledger, statement, pretraining, descent

_UNKNOWN = 'of unknown origin: what it was trained on is not recorded, and is treated as public'


@dataclass(frozen=True)
class Descent:
    """What is known of the trainings behind some weights.

    Attributes:
        private: one of them took private steps.
        public_views: what their public views kept of each record, in words.
        public_data_sets: the data sets that they took as public, in words.
        plain_data_sets: the data sets that they were trained on without privacy, by name.
        unknown: the files among them of which nobody recorded what they were trained on.
    """

    private: bool = False
    public_views: tuple[str, ...] = ()
    public_data_sets: tuple[str, ...] = ()
    plain_data_sets: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Any, name: str = 'a file') -> 'Descent':
        """That of a checkpoint of ours or a published one; of any other, called ``name``, nothing is known."""
        statement, privacy = part_of(checkpoint, 'privacy_statement'), part_of(checkpoint, CHECKPOINT_KEY)
        if not statement and not privacy:
            return cls(unknown=(name,))
        # a published checkpoint (tools/publish_model.py) has a statement, and the rest beside its joints
        kept = part_of(privacy, 'descent') or part_of(part_of(checkpoint, 'meta'), 'descent')
        private = bool(statement or spent_in(checkpoint) or kept.get('private', False))
        lists = ('public_views', 'public_data_sets', 'plain_data_sets', 'unknown')
        return cls(private, *(_each_once(kept.get(key), statement.get(key)) for key in lists))

    def joined(self, other: 'Descent') -> 'Descent':
        """What is known of both."""
        lists = ('public_views', 'public_data_sets', 'plain_data_sets', 'unknown')
        return Descent(
            self.private or other.private, *(_each_once(getattr(self, key), getattr(other, key)) for key in lists)
        )

    def in_words(self, name: str = '') -> str:
        """What a statement says of it, after the file's ``name``; empty where there is nothing to say."""
        told = []
        if self.private:
            told.append(', which a private training made: if it was on the same records, its ledger is to be added')
        told += [
            f', which were trained on public views ({view}): if these were of the same records, what they show is not protected'
            for view in self.public_views
        ]
        told += [
            f', which were trained on {data} as public data: what is in it is not protected'
            for data in self.public_data_sets
        ]
        told += [
            f', which were trained on {data} without privacy: what is in it is treated as public, and is not protected'
            for data in self.plain_data_sets
        ]
        told += [
            f', {_UNKNOWN}' if name == file else f', which descend from {file}, {_UNKNOWN}' for file in self.unknown
        ]
        return ''.join(told)


@dataclass(frozen=True)
class Start:
    """A file of weights that a training starts from.

    Attributes:
        key: the config key that names it, 'load_from' or that of an ``init_cfg``.
        path: the file, or its address.
        module: the part of the model that it is loaded into, '' for all of it.
        shapes: of the tensors in it that are to be loaded, by name.
        descent: what is known of it.
        fault: why it has none, in words.
    """

    key: str
    path: str
    module: str
    shapes: dict[str, torch.Size]
    descent: Descent
    fault: str = ''

    @classmethod
    def of(cls, key: str, path: str, module: str, checkpoint: Any, prefix: str | None = None) -> 'Start':
        """That of a checkpoint, of whose tensors those under ``prefix`` are loaded.

        Raises PrivacyError where there are none under the prefix, and for ``load_from`` where there are none at all. A backbone
        may have a loader of its own, so of an ``init_cfg`` that is known only after it was loaded.
        """
        where, descent = _named(key, path), Descent.of(checkpoint, Path(path).name)
        try:
            shapes = {name: value.shape for name, value in weights_of(checkpoint, where).items()}
        except PrivacyError as error:
            if key == 'load_from':
                raise
            return cls(key, path, module, {}, descent, str(error))
        if prefix:
            start = prefix.rstrip('.') + '.'
            inside = {name[len(start) :]: shape for name, shape in shapes.items() if name.startswith(start)}
            if not inside:
                raise PrivacyError(
                    f'{where} has no tensor under prefix={prefix!r}: it has {", ".join([*list(shapes)[:3], "..."])}'
                )
            shapes = inside
        return cls(key, path, module, shapes, descent)

    def in_words(self, watch: LoadWatch, start: int, end: int | None) -> str:
        """Where the weights come from and how much of the model they are, by loads ``start`` to ``end`` of the ``watch``.

        Raises PrivacyError where they fit nothing of it.
        """
        found, wanted = watch.found(self.module, start, end), watch.inside(self.module)
        how, name = 'loaded' if self.key == 'load_from' else 'loaded by init_cfg', Path(self.path).name
        into = '.'.join(['model', *filter(None, [self.module])])
        if found is None:  # by code that does not go through load_state_dict
            return f'{how} from {name} (how much of {into} is not known){self.descent.in_words(name)}'
        if not found:
            raise PrivacyError(
                f'{_named(self.key, self.path)} fits nothing of {into}, which would start from random weights. '
                f'{self.fault or explain_misfit(self.shapes, wanted, into)}'
            )
        share = f'{len(found):,} of {len(wanted):,} tensors of {into}'
        return f'{how} from {name} ({share}){self.descent.in_words(name)}'


def pretraining_of(starts: Sequence[Start], watch: LoadWatch, own_loads: int | None) -> str:
    """Where the weights of a training come from, in words. Raises PrivacyError for a file that fits nothing.

    Args:
        starts: the files, that of load_from last.
        watch: what was loaded.
        own_loads: how many loads there were before that of load_from; None without it.
    """
    told = [
        start.in_words(watch, *((own_loads or 0, None) if start.key == 'load_from' else (0, own_loads)))
        for start in starts
    ]
    modules = [start.module for start in starts if start.key != 'load_from']
    for module, tensors in watch.loads[:own_loads]:
        if tensors and not any(is_within(module, known) for known in modules):
            told.append(f'loaded by the code of {".".join(["model", *filter(None, [module])])}, {_UNKNOWN}')
    return f'weights {"; and ".join(told)}' if told else 'none: random weights'


def _named(key: str, path: str) -> str:
    """A file and the config key that names it, for messages."""
    return f'{key}={path}' if key == 'load_from' else f'{key}: checkpoint={path}'


def spent_in(checkpoint: Any) -> list:
    """The ledger's entries in a checkpoint; none where there is no ledger, or nothing that can be read as one."""
    return part_of(part_of(checkpoint, CHECKPOINT_KEY), 'ledger').get('entries') or []


def pretraining_in(checkpoint: Any) -> str:
    """What a checkpoint of ours says of the weights that its training started from."""
    privacy = part_of(checkpoint, CHECKPOINT_KEY)
    told = str(privacy.get('pretraining', 'not known'))
    if 'unknown' in part_of(privacy, 'descent') or told.startswith('none'):
        return told
    return f'{told}. What it was trained on is treated as public'  # an older version, which did not say so there


def part_of(whole: Any, key: str) -> dict:
    """A dict inside a dict; of a foreign or damaged file, an empty one."""
    found = whole.get(key) if isinstance(whole, dict) else None
    return found if isinstance(found, dict) else {}


def _each_once(*lists: Any) -> tuple[str, ...]:
    """The texts of several lists, some of which may be missing."""
    return tuple(dict.fromkeys(str(value) for values in lists for value in (values or ())))


def loaded_by_init_cfg(model: nn.Module) -> list[tuple[str, dict]]:
    """Each ``init_cfg=dict(type='Pretrained', checkpoint=...)`` of MMPose's, anywhere in a model, and the name of its module."""
    return [
        (name, one) for name, module in model.named_modules() for one in _pretrained(getattr(module, 'init_cfg', None))
    ]


def _pretrained(settings: Any) -> Iterator[dict]:
    for one in settings if isinstance(settings, (list, tuple)) else [settings]:
        if isinstance(one, dict):
            kind = one.get('type')
            if kind is PretrainedInit or str(kind).rpartition('.')[2] in ('Pretrained', 'PretrainedInit'):
                yield one
            yield from _pretrained(one.get('override'))


def starts_of_init_cfg(model: nn.Module) -> list[Start]:
    """The files that a model loads by itself. Raises PrivacyError for one that cannot be read or has no weights."""
    starts = []
    for module, settings in loaded_by_init_cfg(model):
        key, path = '.'.join(filter(None, ['model', module, 'init_cfg'])), str(settings.get('checkpoint'))
        try:
            checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu')
        except Exception as error:  # whatever is wrong with a file or an address
            raise PrivacyError(f'{key}: checkpoint={path} cannot be read: {error}') from error
        starts.append(Start.of(key, path, module, checkpoint, settings.get('prefix')))
    return starts


@HOOKS.register_module()
class ProvenanceHook(Hook):
    """Hands on what is known of a start through a training without privacy; tools/train.py adds it to plain trainings.

    MMPose does nothing with the key that it puts into checkpoints. Must not stop or change a training.
    """

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.descent = Descent()

    def after_load_checkpoint(self, runner: Runner, checkpoint: Any) -> None:
        """Takes over what is known of ``load_from``, or of the checkpoint to resume from."""
        self.descent = self.descent.joined(Descent.of(checkpoint, Path(str(runner._load_from)).name))

    def before_train(self, runner: Runner) -> None:
        """Adds the files that the model loaded by itself, and the data that it is now trained on."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for _, settings in [] if runner._resume and runner._load_from else loaded_by_init_cfg(model):
            path = str(settings.get('checkpoint'))
            try:
                checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu')
            except Exception:  # the model found it, or did without
                checkpoint = None
            self.descent = self.descent.joined(Descent.of(checkpoint, Path(path).name))
        data = tuple(_data_in_words(runner.train_dataloader.dataset))
        self.descent = self.descent.joined(Descent(plain_data_sets=data))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Puts it into every checkpoint."""
        checkpoint[CHECKPOINT_KEY] = dict(
            descent=asdict(self.descent), marking='NOT PRIVATE: made by a training without privacy'
        )


def _data_in_words(dataset: Any) -> Iterator[str]:
    """The data sets in a data set, by name alone: they may be private."""
    parts = getattr(dataset, 'datasets', None) or filter(None, [getattr(dataset, 'dataset', None)])
    inner = [words for part in parts for words in _data_in_words(part)]
    annotations = Path(str(getattr(dataset, 'ann_file', '') or '')).name
    yield from inner or [f'{type(dataset).__name__} {annotations}'.strip()]
