"""What a private training may show while it runs: a list of what is allowed, for the log, the message hub and every backend.

mmengine shows whatever any part of a training calls a scalar. Here a name that is not on the list is dropped, with one warning,
whoever logs it. Must not compute what is shown, and must not let a picture or a gradient of a training batch through.
"""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.logging import MessageHub
from mmengine.runner import Runner
from mmengine.visualization import BaseVisBackend, LocalVisBackend, Visualizer, WandbVisBackend
from mmpose.registry import VISBACKENDS

from mmpose_dp.datasets.resolving import is_kind

from .provenance import part_of

# epsilon follows from the settings; loss_public comes from public samples; max_grad_norm is there only if it is adaptive, and
# follows from noised votes; rates and momenta follow from the schedule, or from released weights
SCALARS = {
    'epsilon',
    'epsilon_target',
    'loss_public',
    'max_grad_norm',
    'lr',
    'base_lr',
    'momentum',
    'epoch',
    'iter',
    'step',
}
_TIMES = {'time', 'data_time'}  # hint at how many records were sampled: for the log and the file beside it alone
# endings that a backend may upload: not the log, not the ledger (.jsonl), and not .json, as step times are in scalars.json
_FILES = {'.py', 'yaml', '.pth'}
_STAGES = ('val/', 'test/')
_VALIDATED = (*_STAGES, 'best_')  # best_score and best_ckpt of CheckpointHook
# what mmengine and MMPose keep in the hub while training is at work: counts, names and settings. By name, or its end, its type
_INFO: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(('epoch', 'iter', 'max_epochs', 'max_iters'), int),
    **dict.fromkeys(('loop_stage', 'last_ckpt', 'experiment_name', 'cfg', 'mmengine_version', '_ann_file'), str),
    'seed': (int, type(None)),
    'keep_ckpt_ids': list,
    'eta': (int, float),
    'dataset_meta': dict,
}
_UNRECORDED = dict(console='off', x_disable_stats=True)  # W&B's settings
_EVERY = 50  # steps between two values of epsilon where nothing logs


class ShownScalars:
    """The scalars of a training step that may be shown.

    Args:
        exposed: whether those that DPOptimWrapper calls ``*_private`` are among them, as the user asked.
    """

    def __init__(self, exposed: bool = False) -> None:
        self.exposed = exposed
        self._dropped: set[str] = set()

    def warn_once(self, name: str, words: str) -> None:
        """Warns of a name that is dropped, once."""
        if name not in self._dropped:
            self._dropped.add(name)
            warnings.warn(words, stacklevel=3)

    def allows(self, name: str, times: bool = False) -> bool:
        """Whether a scalar of a training step may be shown; warns once of each that may not. ``times``: step times may be."""
        plain, last = name.removeprefix('train/'), name.rpartition('/')[2]
        if plain in SCALARS or (times and plain in _TIMES) or (self.exposed and last.endswith('_private')):
            return True
        if last not in {*_TIMES, 'memory'}:
            self.warn_once(
                last,
                f'{name} is not shown, since it may depend on private samples. Private training shows only '
                f'{", ".join(sorted(SCALARS))} and the metrics of validation',
            )
        return False


def is_training(hub: MessageHub) -> bool:
    """Whether a training step is at work, and not validation."""
    return hub.runtime_info.get('loop_stage', 'train') == 'train'


class GuardedMessageHub(MessageHub):
    """mmengine's message hub, from which the log line is made and which is in every checkpoint, with what is allowed alone.

    Attributes:
        shown: the scalars that are allowed.
        informed: the names of what validation and testing have kept, which may be of any kind.
    """

    shown: ShownScalars
    informed: set[str]

    def update_scalar(self, key: str, value: Any, count: int = 1, resumed: bool = True) -> None:
        """As in mmengine, for what may be shown."""
        validating = key.startswith(_STAGES) and not is_training(self)
        if validating or (key.startswith('train/') and self.shown.allows(key, times=True)):
            super().update_scalar(key, value, count, resumed)

    def update_info(self, key: str, value: Any, resumed: bool = True) -> None:
        """As in mmengine; during training, only what is on the list."""
        if not is_training(self):
            self.informed.add(key)
        elif not _may_be_kept(key, value):
            self.shown.warn_once(key, f'{key} is not kept in the message hub, since it may depend on private samples')
            return
        super().update_info(key, value, resumed)

    def load_state_dict(self, state_dict: dict) -> None:
        """As in mmengine; what validation had kept may be kept again."""
        super().load_state_dict(state_dict)
        self.informed.update(name for name in self.runtime_info if name.startswith(_VALIDATED))

    def state_dict(self) -> dict:
        """What a checkpoint gets: without what came in by another way than the methods above."""
        found = super().state_dict()
        scalars, info = found['log_scalars'], found['runtime_info']
        scalars = {
            name: x for name, x in scalars.items() if name.startswith(_STAGES) or self.shown.allows(name, times=True)
        }
        info = {name: x for name, x in info.items() if name in self.informed or _may_be_kept(name, x)}
        kept = {name: x for name, x in found['resumed_keys'].items() if name in scalars or name in info}
        return dict(log_scalars=scalars, runtime_info=info, resumed_keys=kept)


def _may_be_kept(name: str, value: Any) -> bool:
    """Whether something in the hub is on the list of what training may keep there."""
    known = '_ann_file' if name.endswith('_ann_file') else name
    numbers = not isinstance(value, list) or all(type(one) is int for one in value)
    return known in _INFO and isinstance(value, _INFO[known]) and numbers


class GuardedVisBackend(BaseVisBackend):
    """One of mmengine's backends (TensorBoard, W&B, MLflow, ...), which gets what a private training may show.

    Validation may show what it likes, pictures too: its data are not protected.

    Args:
        backend: the backend.
        shown: the scalars that are allowed.
        hub: knows whether training or validation is at work.
    """

    def __init__(self, backend: BaseVisBackend, shown: ShownScalars, hub: MessageHub) -> None:
        self.backend, self._shown, self._hub = backend, shown, hub
        self._times = isinstance(backend, LocalVisBackend)
        endings: Any = getattr(backend, '_artifact_suffix', None)
        if endings is not None:
            endings = (endings,) if isinstance(endings, str) else tuple(endings)
            backend._artifact_suffix = tuple(x for x in endings if x in _FILES)

    @property
    def experiment(self) -> Any:
        """The backend's own."""
        return self.backend.experiment

    def _init_env(self) -> Any:
        return self.backend._init_env()

    def _allows(self, name: str) -> bool:
        return not is_training(self._hub) or self._shown.allows(name, self._times)

    def add_config(self, config: Any, **kwargs: Any) -> None:
        """The config, which holds settings and paths."""
        self.backend.add_config(config, **kwargs)

    def add_graph(self, model: Any, data_batch: Any, **kwargs: Any) -> None:
        """Nothing: W&B would watch the gradients of private samples from then on."""
        warnings.warn('add_graph is left out in private training: it may show gradients or a batch', stacklevel=2)

    def add_image(self, name: str, image: Any, step: int = 0, **kwargs: Any) -> None:
        """A picture, outside of training."""
        if not is_training(self._hub):
            self.backend.add_image(name, image, step=step, **kwargs)

    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        """A scalar, if it may be shown."""
        if self._allows(name):
            self.backend.add_scalar(name, value, step=step, **kwargs)

    def add_scalars(self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs: Any) -> None:
        """The scalars that may be shown."""
        allowed = {name: value for name, value in scalar_dict.items() if self._allows(name)}
        if allowed:
            self.backend.add_scalars(allowed, step=step, file_path=file_path, **kwargs)

    def close(self) -> None:
        """Closes the backend."""
        self.backend.close()


def guard(runner: Runner, exposed: bool) -> None:
    """From now on, a runner's message hub and backends show what is allowed. What the hub holds already is dropped."""
    release(runner)  # of a run that an error ended
    hub: Any = runner.message_hub
    hub.__class__ = GuardedMessageHub
    hub.shown, hub.informed = ShownScalars(exposed), set()
    hub.log_scalars.clear()
    _take_own_backends(runner)
    visualizer = runner.visualizer
    for name, backend in _backends(visualizer).items():
        _warn_of_recordings(backend)
        _backends(visualizer)[name] = GuardedVisBackend(backend, hub.shown, hub)


def without_recordings(cfg: Config) -> Config:
    """Switches off what W&B records by itself: the terminal, which shows step times, and the machine's load.

    In place, before the runner is built; what the config sets itself stays.
    """
    for backend in (cfg.get('visualizer') or {}).get('vis_backends') or ():
        if is_kind(VISBACKENDS, backend, WandbVisBackend):
            given = backend.get('init_kwargs') or {}
            settings = given.get('settings') or {}
            if isinstance(settings, dict):
                backend['init_kwargs'] = dict(given, settings={**_UNRECORDED, **settings})
    return cfg


def _warn_of_recordings(backend: BaseVisBackend) -> None:
    """Warns if W&B records what hints at how many records were sampled."""
    if not isinstance(backend, WandbVisBackend) or not hasattr(backend, '_wandb') or backend._wandb.run is None:
        return
    settings = backend._wandb.run.settings
    if any(getattr(settings, name, value) != value for name, value in _UNRECORDED.items()):
        warnings.warn(
            "W&B records the terminal or the machine's load, which show step times and so hint at how many records were sampled. "
            'Train with tools/train.py, which switches that off, or write init_kwargs=dict(settings=dict('
            f'{", ".join(f"{name}={value!r}" for name, value in _UNRECORDED.items())}))',
            stacklevel=2,
        )


def release(runner: Runner) -> None:
    """Takes the guard off again, and the visualizer out of mmengine's table: a later runner of this process gets its own."""
    hub: Any = runner.message_hub
    if isinstance(hub, GuardedMessageHub):
        hub.__class__ = MessageHub
        table = type(runner.visualizer)._instance_dict
        for name in [name for name, visualizer in table.items() if visualizer is runner.visualizer]:
            del table[name]
    for name, backend in _backends(runner.visualizer).items():
        if isinstance(backend, GuardedVisBackend):
            _backends(runner.visualizer)[name] = backend.backend


def drop_resumed(checkpoint: dict) -> None:
    """Drops scalars that may not be shown from what a checkpoint brings into the hub: it may be of an older version."""
    scalars, shown = part_of(part_of(checkpoint, 'message_hub'), 'log_scalars'), ShownScalars()
    for name in [*scalars]:
        if not name.startswith(_STAGES) and not shown.allows(name, times=True):
            del scalars[name]


def is_logged(hooks: Sequence[Any], batch_idx: int) -> bool:
    """Whether a LoggerHook writes a line after step ``batch_idx`` of an epoch."""
    intervals = [hook.interval for hook in hooks if isinstance(hook, LoggerHook)] or [_EVERY]
    return any((batch_idx + 1) % interval == 0 for interval in intervals)


def _take_own_backends(runner: Runner) -> None:
    """Gives a runner the backends that its config names, if those of its visualizer are another runner's.

    MMPose names all visualizers alike, and mmengine makes one of each name: what a second training of a process shows would go to
    the folder of the first.
    """
    settings = runner.cfg.get('visualizer')
    if not isinstance(settings, dict):
        return
    folder, wanted = settings.get('save_dir', runner.log_dir), copy.deepcopy(settings.get('vis_backends'))
    own, found = _backends(Visualizer('own', vis_backends=wanted, save_dir=folder)), _backends(runner.visualizer)
    if any(_place(backend) != _place(found.get(name)) for name, backend in own.items()):
        runner.visualizer._vis_backends = own
        runner.visualizer.add_config(runner.cfg)


def _place(backend: Any) -> tuple[type, Any]:
    return type(backend), getattr(backend, '_save_dir', None)


def _backends(visualizer: Visualizer) -> dict[str, BaseVisBackend]:
    return visualizer._vis_backends
