"""The origin of a training's weights: the data on which the checkpoints before it were trained, however many there are.

Must not forget a private training, or one on public views, because of another training in between, and must not claim to know
what nobody recorded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import PretrainedInit
from mmengine.runner import CheckpointLoader, Runner
from mmpose.registry import HOOKS
from torch import nn

from mmpose_dp.extras.evidence import file_sha256
from mmpose_dp.extras.experts import WEIGHTS, digest_of, mixed_in
from mmpose_dp.models import LoadWatch, explain_misfit, is_within, moved_joints, read_checkpoint, unwrapped, weights_of
from mmpose_dp.privacy.errors import ConfigError

CHECKPOINT_KEY = 'privacy'  # of the ledger, the statement, pretraining and lineage in a checkpoint

_EXPERTS = 'optim_wrapper.experts'
_DIGITS = 16  # of a file's SHA-256: enough to tell files of one name apart
GIVEN = 'a model that had weights when its runner got it'
_UNKNOWN = 'of unknown origin: what it was trained on is not recorded, and is treated as public'


@dataclass(frozen=True)
class Lineage:
    """What is known about the trainings behind some weights.

    Attributes:
        private: whether one of them took private steps.
        public_views: descriptions of the public views of their records.
        public_data_sets: descriptions of the data sets that they treated as public.
        plain_data_sets: names of the data sets on which they trained without privacy.
        unknown: names of the files whose training data nobody recorded.
    """

    private: bool = False
    public_views: tuple[str, ...] = ()
    public_data_sets: tuple[str, ...] = ()
    plain_data_sets: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Any, name: str = 'a file') -> 'Lineage':
        """The lineage in a checkpoint of ours or a published one. Any other file is unknown, under its ``name``."""
        statement, privacy = part_of(checkpoint, 'privacy_statement'), part_of(checkpoint, CHECKPOINT_KEY)
        if not statement and not privacy:
            return cls(unknown=(name,))
        # a published checkpoint (tools/publish_model.py) has a statement, and its lineage in 'meta'
        kept = kept_lineage(privacy) or kept_lineage(part_of(checkpoint, 'meta'))
        private = bool(statement or spent_in(checkpoint) or kept.get('private', False))
        lists = ('public_views', 'public_data_sets', 'plain_data_sets', 'unknown')
        found = cls(private, *(_each_once(kept.get(key), statement.get(key)) for key in lists))
        marking = privacy.get('marking') if spent_in(checkpoint) else ''  # of steps with a debug seed, or without noise
        return found.joined(cls(plain_data_sets=(f'private records ({marking})',))) if marking else found

    def joined(self, other: 'Lineage') -> 'Lineage':
        """The union of both."""
        lists = ('public_views', 'public_data_sets', 'plain_data_sets', 'unknown')
        return Lineage(
            self.private or other.private, *(_each_once(getattr(self, key), getattr(other, key)) for key in lists)
        )

    def in_words(self, name: str = '') -> str:
        """The words of a statement, after the file's ``name``; empty if there is nothing to say."""
        words = []
        if self.private:
            words.append(', which a private training made: if it was on the same records, its ledger is to be added')
        words += [
            f', which were trained on public views ({view}): if these were of the same records, what they show is not protected'
            for view in self.public_views
        ]
        words += [
            f', which were trained on {data} as public data: what is in it is not protected'
            for data in self.public_data_sets
        ]
        words += [
            f', which were trained on {data} without privacy: what is in it is treated as public, and is not protected'
            for data in self.plain_data_sets
        ]
        words += [
            f', {_UNKNOWN}' if name == file else f', which descend from {file}, {_UNKNOWN}' for file in self.unknown
        ]
        return ''.join(words[:1]) + ''.join(one.replace(', which', '; they', 1) for one in words[1:])


@dataclass(frozen=True)
class Start:
    """A file of weights from which a training starts.

    Attributes:
        key: the config key that names it, 'load_from', 'optim_wrapper.experts' or that of an ``init_cfg``.
        path: the file, or its address.
        module: the part of the model into which it is loaded, '' for the whole model.
        shapes: the shapes of its tensors that are to be loaded, by name; of an expert, of those that are mixed in.
        lineage: what is known about it.
        sha256: of the file; empty for an address.
        fault: why it has no such tensors, in words.
    """

    key: str
    path: str
    module: str
    shapes: dict[str, torch.Size]
    lineage: Lineage
    sha256: str = ''
    fault: str = ''

    @classmethod
    def of(cls, key: str, path: str, module: str, checkpoint: Any, prefix: str | None = None) -> 'Start':
        """The start from a checkpoint, of which the tensors under ``prefix`` are loaded.

        Raises ConfigError if there are none under the prefix, and for ``load_from`` if there are none at all. With an
        ``init_cfg`` that is known only after loading, since a backbone may have its own loader.
        """
        where, lineage, file = _named(key, path), Lineage.of(checkpoint, Path(path).name), Path(path).expanduser()
        sha256 = file_sha256(file) if file.is_file() else ''
        try:
            shapes = {name: value.shape for name, value in weights_of(checkpoint, where).items()}
        except ConfigError as error:
            if key == 'load_from':
                raise
            return cls(key, path, module, {}, lineage, sha256, str(error))
        if prefix:
            start = prefix.rstrip('.') + '.'
            inside = {name[len(start) :]: shape for name, shape in shapes.items() if name.startswith(start)}
            if not inside:
                raise ConfigError(
                    f'{where} has no tensor under prefix={prefix!r}: it has {", ".join([*list(shapes)[:3], "..."])}'
                )
            shapes = inside
        return cls(key, path, module, shapes, lineage, sha256)

    def in_words(self, watch: LoadWatch, start: int, end: int | None) -> str:
        """Where the weights come from and how much of the model they fill, from loads ``start`` to ``end`` of ``watch``.

        Raises ConfigError if they fit nothing.
        """
        found, wanted = watch.found(self.module, start, end), watch.inside(self.module)
        how, name = 'loaded' if self.key == 'load_from' else 'loaded by init_cfg', Path(self.path).name
        into = '.'.join(['model', *filter(None, [self.module])])
        known = f'; SHA-256 {self.sha256[:_DIGITS]}...' if self.sha256 else ''
        if self.key == _EXPERTS:
            share = f'{len(self.shapes):,} of {len(wanted):,} tensors of {into}{known}'
            return f'privately mixed with {name} ({share}){self.lineage.in_words(name)}'
        if found is None:  # loaded by code that does not call load_state_dict
            return f'{how} from {name} (how much of {into} is not known{known}){self.lineage.in_words(name)}'
        if not found:
            raise ConfigError(self.misfit(wanted, into))
        share = f'{len(found):,} of {len(wanted):,} tensors of {into}{known}'
        return f'{how} from {name} ({share}){self.lineage.in_words(name)}'

    def misfit(self, wanted: dict[str, torch.Size], into: str = 'model') -> str:
        """A sentence on a file that fits nothing of what ``wanted`` has, ``into`` being its config key."""
        return (
            f'{_named(self.key, self.path)} fits nothing of {into}, which would start from random weights. '
            f'{self.fault or explain_misfit(self.shapes, wanted, into)}'
        )


def pretraining_of(starts: Sequence[Start], watch: LoadWatch, own_loads: int | None, held: bool = False) -> str:
    """Where the weights of a training come from, in words. Raises ConfigError for a file that fits nothing.

    Args:
        starts: the files; that of load_from is last.
        watch: records what was loaded.
        own_loads: number of loads before that of load_from; None without load_from.
        held: whether the model had weights when its runner got it.
    """
    words = [
        start.in_words(watch, *((own_loads or 0, None) if start.key == 'load_from' else (0, own_loads)))
        for start in starts
    ]
    modules = [start.module for start in starts if start.key not in ('load_from', _EXPERTS)]
    for module, tensors in watch.loads[:own_loads]:
        if tensors and not any(is_within(module, known) for known in modules):
            words.append(f'loaded by the code of {".".join(["model", *filter(None, [module])])}, {_UNKNOWN}')
    if held and watch.shapes.keys() - (watch.found('') or set()):
        words.append(f'of {GIVEN}, {_UNKNOWN}')
    return f'weights {"; and ".join(words)}' if words else 'none: random weights'


def _named(key: str, path: str) -> str:
    """A file and the config key that names it, for messages."""
    return f'{key}={path}' if key == 'load_from' else f'{key}: checkpoint={path}'


def spent_in(checkpoint: Any) -> list:
    """The ledger's entries in a checkpoint; empty if it has no ledger that can be read."""
    return part_of(part_of(checkpoint, CHECKPOINT_KEY), 'ledger').get('entries') or []


def pretraining_in(checkpoint: Any) -> str:
    """What a checkpoint of ours says about the weights from which its training started."""
    privacy = part_of(checkpoint, CHECKPOINT_KEY)
    words = str(privacy.get('pretraining', 'not known'))
    if 'unknown' in kept_lineage(privacy) or words.startswith('none'):
        return words
    return f'{words}. What it was trained on is treated as public'  # older versions did not say so


def kept_lineage(holder: dict) -> dict:
    """The fields of a Lineage in a part of a checkpoint, where older ones call them 'descent'; empty if there are none."""
    return part_of(holder, 'lineage') or part_of(holder, 'descent')


def part_of(whole: Any, key: str) -> dict:
    """A dict inside a dict; empty for a foreign or damaged file."""
    found = whole.get(key) if isinstance(whole, dict) else None
    return found if isinstance(found, dict) else {}


def _each_once(*lists: Any) -> tuple[str, ...]:
    """The strings of several lists, without repetitions; a list may be missing."""
    return tuple(dict.fromkeys(str(value) for values in lists for value in (values or ())))


def loaded_by_init_cfg(model: nn.Module) -> list[tuple[str, dict]]:
    """Each ``init_cfg=dict(type='Pretrained', checkpoint=...)`` in a model, with the name of its module."""
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
    """The files that a model loads by itself. Raises ConfigError for one that cannot be read or has no weights."""
    starts = []
    for module, settings in loaded_by_init_cfg(model):
        key, path = '.'.join(filter(None, ['model', module, 'init_cfg'])), str(settings.get('checkpoint'))
        starts.append(Start.of(key, path, module, read_checkpoint(path, key), settings.get('prefix')))
    return starts


def starts_of_experts(experts: Sequence[tuple[str, str]], model: nn.Module, metainfo: dict) -> list[Start]:
    """The files of ``optim_wrapper.experts``, each with its digest when the model was built from them.

    Raises ConfigError for one that was changed since, as what is said of it would be of other weights, and for one whose joints are
    in another order than in ``metainfo``, the data set's, as the channels of different joints would be mixed.
    """
    starts = []
    for number, (path, digest) in enumerate(experts):
        checkpoint, where = read_checkpoint(path, _EXPERTS), _named(_EXPERTS, path)
        if digest_of(weights_of(checkpoint, where)) != digest:
            raise ConfigError(f'{where} was changed after the model had been built from it: start again')
        if moved := moved_joints(checkpoint, metainfo):
            raise ConfigError(
                f'{where} has {len(moved)} joints in another place than the data set, such as {moved[0]}, so its output layer '
                "cannot be mixed. Train it with the data set's order, or delete from its file the output layer (in state_dict), "
                'which then stays as in load_from, and dataset_meta (in meta)'
            )
        starts.append(replace(Start.of(_EXPERTS, path, '', checkpoint), shapes=mixed_in(model, number)))
    return starts


def idle_experts(experts: Sequence[tuple[str, str]], start: Any) -> list[str]:
    """A sentence for each expert that adds nothing, having the weights of ``start``, the checkpoint of load_from, or another's."""
    known = {digest_of(weights_of(start, 'load_from')): 'load_from'} if experts else {}
    same = [(path, known.setdefault(digest, path)) for path, digest in experts]
    return [
        f'{_EXPERTS}: {path} has the same weights as {other}, so it adds nothing that could be learnt: take it out'
        for place, (path, other) in enumerate(same)
        if other != path or (path, other) in same[:place]
    ]


def refuse_other_experts(experts: Sequence[tuple[str, str]], checkpoint: Any) -> None:
    """Raises ConfigError if a resume would mix in experts that the training did not have: its statement would not name them."""
    had = part_of(checkpoint, CHECKPOINT_KEY).get('experts')
    if had is None and any(str(name).endswith(f'.{WEIGHTS}') for name in part_of(checkpoint, 'state_dict')):
        return  # of an earlier version: the mixtures are compared when they are loaded
    if experts and [digest for _, digest in experts] != had:
        raise ConfigError(
            f'{_EXPERTS} are not those of the checkpoint to resume from: its training had '
            f'{"others" if had else "none"}. Write the same files in the same order, or start a new training with load_from'
        )


@HOOKS.register_module()
class ProvenanceHook(Hook):
    """Passes the lineage of a start through a training without privacy; tools/train.py adds it to plain trainings.

    MMPose ignores the key that it puts into checkpoints, also into published ones. Must not stop or change a training.
    """

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.lineage = Lineage()

    def after_load_checkpoint(self, runner: Runner, checkpoint: Any) -> None:
        """Adds the lineage of ``load_from``, or of the checkpoint to resume from."""
        self.lineage = self.lineage.joined(Lineage.of(checkpoint, Path(str(runner._load_from)).name))

    def before_train(self, runner: Runner) -> None:
        """Adds the files that the model loaded by itself, and the training data."""
        for hook in runner.hooks:
            keys = getattr(hook, 'published_keys', None) if isinstance(hook, CheckpointHook) else None
            if keys:  # of the last checkpoint, the others are left out
                hook.published_keys = [*dict.fromkeys([*keys, CHECKPOINT_KEY])]
        model = unwrapped(runner.model)
        for _, settings in [] if runner._resume and runner._load_from else loaded_by_init_cfg(model):
            path = str(settings.get('checkpoint'))
            try:
                checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu')
            except Exception:  # the model found it elsewhere, or does not need it
                checkpoint = None
            self.lineage = self.lineage.joined(Lineage.of(checkpoint, Path(path).name))
        data = tuple(_data_in_words(runner.train_dataloader.dataset))
        self.lineage = self.lineage.joined(Lineage(plain_data_sets=data))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Puts the lineage into every checkpoint."""
        checkpoint[CHECKPOINT_KEY] = dict(
            lineage=asdict(self.lineage), marking='NOT PRIVATE: made by a training without privacy'
        )


def _data_in_words(dataset: Any) -> Iterator[str]:
    """The names of the data sets in a data set; only names, since they may be private."""
    parts = getattr(dataset, 'datasets', None) or filter(None, [getattr(dataset, 'dataset', None)])
    inner = [words for part in parts for words in _data_in_words(part)]
    annotations = Path(str(getattr(dataset, 'ann_file', '') or '')).name
    yield from inner or [f'{type(dataset).__name__} {annotations}'.strip()]
