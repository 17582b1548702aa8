"""What the tools share: MMPose's common arguments and how they change a config, and how an error becomes one message.

Not a tool itself. Must not decide anything about privacy.
"""

import argparse
import difflib
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from mmengine.config import Config, DictAction

from mmpose_dp.messages import failure, warn_in_terminal
from mmpose_dp.privacy.errors import PrivacyError


class CfgOptions(DictAction):
    """mmengine's ``--cfg-options``, but texts keep their spaces: mmengine makes 'my data/a.pth' 'mydata/a.pth'.

    Refuses a dict, which mmengine would cut to pieces at its commas, and what is no pair.
    """

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Parses KEY=VALUE pairs."""
        for one in values:
            key, equals, value = one.partition('=')
            if not key or not equals:
                parser.error(f'--cfg-options {one}: {_no_pair(one)}')
            if _DICT.match(value):
                parser.error(
                    f'--cfg-options {key}=...: a dict cannot be written here. Write each of its keys, as in '
                    "param_scheduler.0.end=500, or a config with _base_ = '...' and this setting"
                )
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:  # mmengine's, for brackets
            parser.error(f'--cfg-options: {error}: close each bracket, and put quotation marks around the pair')

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        """A value. Spaces beside commas and brackets of a list are left out."""
        text = val.strip('\'" ')
        if ',' not in text and text[:1] not in ('(', '['):
            parsed = DictAction._parse_iterable(text)
            return text if isinstance(parsed, str) else parsed
        return _with_spaces(DictAction._parse_iterable(re.sub(' *([][(),]) *', r'\1', text).replace(' ', _SPACE)))


def _no_pair(text: str) -> str:
    """What to write in place of what is no KEY=VALUE."""
    if text.endswith(('.py', '.pth')) and '=' not in text:
        return 'this is no KEY=VALUE. Give config and checkpoint before --cfg-options, which takes all that follows it'
    return 'write KEY=VALUE, without spaces around =, and with quotation marks around the pair if the value has spaces'


def _with_spaces(value: Any) -> Any:
    """A parsed value whose texts have their spaces again."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_with_spaces, value))
    return value.replace(_SPACE, ' ') if isinstance(value, str) else value


_SPACE = '\0'  # in place of a space while mmengine parses; no argument of a command can hold it


_DICT = re.compile(r'([\[(].*)?(dict\(|\{.*:)|\{\}$')


def positive(text: str) -> int:
    """An option that is a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} must be a whole number above 0')
    return int(text)


def fraction(text: str) -> float:
    """An option that is a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f'{text!r} must be a number above 0 and below 1')
    return value


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """The option that every tool with a config has."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        default={},
        metavar='KEY=VALUE',
        help='override config keys: a.b=1 c="[1,2]" d="[(1,2),(3,4)]" e="a text"; what is given after it belongs to it',
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that MMPose's train.py and test.py both have."""
    parser.add_argument(
        '--work-dir',
        help='where logs, checkpoints and the privacy statement go (default: work_dirs/NAME_OF_THE_CONFIG)',
    )
    parser.add_argument('--show-dir', help='where to save pictures of the predictions')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--interval', type=int, default=1, help='save or show every N-th sample (default 1)')
    parser.add_argument('--wait-time', type=float, default=1, help='seconds that a window stays open (default 1)')
    add_cfg_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what starts several processes (default none: a single process)',
    )
    # torchrun sets LOCAL_RANK; torch.distributed.launch passes it as an argument
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help='set by torch.distributed.launch; leave it out'
    )


def merge_common(cfg: Config, args: argparse.Namespace) -> None:
    """Writes launcher, work dir and visualization into the config."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    default = Path('work_dirs') / Path(args.config).stem
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(default)
    if args.show or args.show_dir:
        hook = default_hook(cfg, 'visualization', 'PoseVisualizationHook')
        hook.update(enable=True, show=args.show, out_dir=args.show_dir, interval=args.interval)
        if args.show:
            hook.update(wait_time=args.wait_time)


def _close_to(path: str) -> str:
    """', did you mean NAME?' if the folder of a missing file has one of a similar name."""
    names = [file.name for file in Path(path).parent.glob('*')]
    close = difflib.get_close_matches(Path(path).name, names, 1, 0.8)
    return f', did you mean {close[0]}?' if close else ''


def _about_imports(error: Exception, words: str) -> str:
    """What mmengine's reason for not reading a config means, if it is about imports: empty for another."""
    if words.startswith('Failed to import custom modules'):
        first: BaseException = error
        while first.__cause__ or first.__context__:
            first = first.__cause__ or first.__context__ or first
        return (
            f'custom_imports fail: {type(first).__name__}: {first}. Correct the name or install what is missing; the folder of '
            'a module of your own must be in PYTHONPATH'
        )
    if 'import_modules_from_strings' in words:
        return "custom_imports must be a dict: write custom_imports = dict(imports=['my_module'], allow_failed_imports=False)"
    if 'inheritance chain must match' in words:
        return (
            "a text config has _base_ = '...' above every import, and a new-style config has `with read_base(): from ... "
            'import *` in its place, also in every file that it inherits from'
        )
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, RuntimeError) and not words and frames[-1].filename.endswith('lazy.py'):
        return (
            "without _base_ = '...' above every import it is a new-style config, in which nothing imported can be called: in "
            'place of `from mmpose_dp.configs import private`, write `from importlib import import_module` and '
            "`globals().update(import_module('mmpose_dp.configs').private(globals(), 'dpsgd'))`, or whichever method"
        )
    return ''


def _about_inheritance(words: str) -> str:
    """What to write where mmengine cannot merge a dict into what a config inherits; empty for other words."""
    found = re.search(r'because (\w+) is a dict in the child config but is of type <class \'(\w+)\'> in base', words)
    if found is None:
        return ''
    key, kind = found.groups()
    if kind in ('list', 'tuple'):
        return (
            f'{key} is a list in a config that it inherits from: write {key} = [dict(...)], also for a single one, which '
            'replaces the whole list'
        )
    return f'{key} is no dict in a config that it inherits from: write {key} = dict(_delete_=True, ...)'


def _about_encoding(error: Exception, words: str) -> str:
    """What to do about a file that is no UTF-8, as editors on Windows write it; empty for another error."""
    if isinstance(error, UnicodeDecodeError) or 'U+FEFF' in words:
        return '. Save it, and each file of yours that it inherits from, as UTF-8 without a byte order mark (BOM)'
    return ''


def read_config(path: str, *keys: str) -> Config:
    """The config of a file. Raises PrivacyError for a file that cannot be read, or that lacks one of ``keys``."""
    if os.path.isdir(path):
        raise PrivacyError(f'{path} is a folder: give a config file in it')
    if not os.path.isfile(path):
        raise PrivacyError(f'{path}: there is no such config file{_close_to(path)}')
    if Path(path).suffix in ('.pth', '.pt', '.safetensors'):
        raise PrivacyError(f'{path} is a checkpoint, and a config is wanted in its place: give the config first')
    from mmpose_dp.datasets.resolving import every_dict  # here, as below

    try:
        cfg = Config.fromfile(path)
        for part in every_dict(cfg._cfg_dict):  # imports what a new-style config names
            part.values()
    except PrivacyError:
        raise
    except Exception as error:  # a config is a program, and so are those that it inherits from
        words = ' '.join(str(error).split())
        base = re.search(r'file "([^"]+)" does not exist', words)  # mmengine's words for a missing _base_
        reason = _about_imports(error, words) or _about_inheritance(words)
        reason = reason or failure(error) + _about_encoding(error, words)
        raise PrivacyError(f'{path} cannot be read: {reason}{_close_to(base[1]) if base else ""}') from error
    missing = [key for key in keys if not cfg.get(key)]
    if missing:
        raise PrivacyError(
            f'{path} has no {" and no ".join(missing)}: give a config of MMPose, or one that inherits from it'
        )
    return cfg


def merged(cfg: Config, options: dict) -> Config:
    """Merges ``--cfg-options`` as mmengine does, in place. Raises PrivacyError for a key that leads through what is no dict."""
    for key, value in options.items():
        try:
            cfg.merge_from_dict({key: value})
        except (KeyError, TypeError, ValueError) as error:
            reason = error.args[0] if error.args else error
            raise PrivacyError(f'--cfg-options {key}={value!r} cannot be merged into the config: {reason}') from error
    return cfg


def merge_options(cfg: Config, options: dict) -> Config:
    """Merges ``--cfg-options`` and removes leftovers of inheritance, in place. Raises PrivacyError for a key that nothing reads."""
    from mmpose_dp.engine import refuse_misspelled, refuse_unknown_top, without_leftovers  # here, as below
    from mmpose_dp.engine.half_private import is_private
    from mmpose_dp.engine.spelling import refuse_unregistered
    from mmpose_dp.engine.unbuildable import refuse_unbuildable, refuse_unwritable_values
    from mmpose_dp.engine.unread import refuse_lost, refuse_unread

    refuse_unknown_top((key.split('.')[0] for key in options), cfg, (), '--cfg-options {}')
    merged(cfg, options)
    without_leftovers(cfg)
    trains = bool(cfg.get('train_dataloader') and cfg.get('optim_wrapper'))
    private = trains and is_private(cfg)
    if trains and not private:
        refuse_lost(cfg)
    refuse_unread(cfg)  # first: what follows would name what a lost custom_imports registers
    if private:
        warn_of_variables(options)
        refuse_unregistered(cfg)
    refuse_misspelled(cfg)
    refuse_unwritable_values(cfg)
    if private:
        refuse_unbuildable(cfg)
    return cfg


def warn_of_variables(options: dict) -> None:
    """Warns of ``--cfg-options`` for a variable of MMPose's configs, by which the file has made its settings already."""
    from mmpose_dp.engine.spelling import VARIABLES

    for key in options:
        if key.partition('.')[0] in VARIABLES:
            where = 'train_dataloader.dataset.private.data_root' if key == 'data_root' else 'those that were made of it'
            warn_in_terminal(
                f'--cfg-options {key} changes nothing: it is a variable of the file, and what was made of it is there already. '
                f'Write the keys themselves, {where}'
            )


@contextmanager
def building(cfg: Config) -> Iterator[None]:
    """Inside, a runner or a model is built: an error is a PrivacyError that names the part of the model, or the config."""
    from mmpose_dp.engine.unbuildable import unbuildable_in_words

    try:
        yield
    except (PrivacyError, FileNotFoundError, URLError):
        raise
    except Exception as error:  # whatever the class of a part raises
        raise PrivacyError(unbuildable_in_words(cfg, error)) from error


def refuse_no_checkpoint(path: str | Path | None) -> None:
    """Raises PrivacyError for a checkpoint that is not there or is damaged. Those on a server are not looked at."""
    # here, since most tools need no MMPose
    from mmpose_dp.engine.hooks.resuming import damage_in_words, is_intact, newest_checkpoint, refuse_no_path

    refuse_no_path(path)
    if not path or '://' in str(path):
        return
    file = Path(path).expanduser()
    if file.is_dir():
        newest = newest_checkpoint(str(file))
        instead = f'give a checkpoint in it, such as {newest}' if newest else 'give a checkpoint, there is none in it'
        raise PrivacyError(f'{path} is a folder: {instead}')
    if not file.is_file():
        raise PrivacyError(f'{path}: there is no such checkpoint{_close_to(str(path))}')
    if not is_intact(file):
        raise PrivacyError(damage_in_words(file))


def refuse_unwritable(folder: str) -> None:
    """Raises PrivacyError for a work dir that cannot be made or written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PrivacyError(
            f'work_dir={folder}: nothing can be written there ({error}). Give another --work-dir'
        ) from error


_LAUNCHERS = {
    'pytorch': ('RANK', 'torchrun'),
    'slurm': ('SLURM_PROCID', 'srun'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'mpirun'),
}


def start_ranks_on_cpu(cfg: Config) -> None:
    """Starts this process of several on the CPU. mmengine cannot: it sets a CUDA device.

    Does nothing with a GPU, or without --launcher pytorch. Exits if the backend needs a GPU. Raises PrivacyError if the launcher
    did not start this process.
    """
    on_cpu = cfg.launcher == 'pytorch' and not torch.cuda.is_available()
    if on_cpu and cfg.env_cfg.dist_cfg.backend != 'gloo':
        sys.exit('no GPU found. To use the CPU: --cfg-options env_cfg.dist_cfg.backend=gloo')
    rank, starter = _LAUNCHERS.get(cfg.launcher, ('', ''))
    if rank and rank not in os.environ:
        raise PrivacyError(
            f'--launcher {cfg.launcher}: {starter} did not start this process, since the environment has no {rank}. Start it '
            f'with {starter}, or leave out --launcher for a single process'
        )
    if not on_cpu:
        return
    torch.distributed.init_process_group('gloo')
    unused = cfg.get('find_unused_parameters', False)
    wrapper = dict(broadcast_buffers=False, find_unused_parameters=unused, device_ids=None)
    cfg.setdefault('model_wrapper_cfg', dict(type='MMDistributedDataParallel', **wrapper))


def default_hook(cfg: Config, key: str, kind: str) -> dict:
    """The config of a default hook. Exits if the config has none."""
    if key not in cfg.default_hooks:
        sys.exit(f"the config has no default_hooks.{key}: write default_hooks=dict({key}=dict(type='{kind}'))")
    return cfg.default_hooks[key]


@contextmanager
def _ended_by_a_closed_pipe(end: bool) -> Iterator[None]:
    """Inside, a pipe that is closed early (``| head``) ends the process, as it ends other commands, if ``end``.

    Otherwise the error is raised somewhere in a print of other code, where it looks like that code's own.
    """
    if not end or not hasattr(signal, 'SIGPIPE') or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGPIPE, before)


def run(main: Callable[[], None], may_lose_its_output: bool = False) -> None:
    """Runs a tool. What is refused, a file that cannot be used, and a failed download are one message, with exit
    status 2; Ctrl-C is 130.

    ``may_lose_its_output``: whether the tool goes on if nobody reads what it prints, as a training does.
    """
    try:
        with _ended_by_a_closed_pipe(not may_lose_its_output):
            main()
    except PrivacyError as error:
        print(f'mmpose_dp: {error}', file=sys.stderr)
        sys.exit(2)
    except URLError as error:
        print(
            f'mmpose_dp: a download failed ({error}). Save the file on this machine, and write its path in place of the '
            'address, as load_from or in init_cfg',
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError as error:
        print(
            f'mmpose_dp: nobody reads what is printed any more ({error}): write the output to a file', file=sys.stderr
        )
        sys.exit(2)
    except OSError as error:
        if error.filename is None and not isinstance(error, FileNotFoundError):
            raise
        print(f'mmpose_dp: {error}', file=sys.stderr)  # it says what cannot be done, and with which file
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f'\nmmpose_dp: interrupted. {stop}'.rstrip(), file=sys.stderr)
        sys.exit(130)
    if torch.distributed.is_initialized():  # a rank that ends first would abort the others
        torch.distributed.barrier()
        if torch.distributed.get_backend() == 'gloo':  # its threads sometimes abort while the ranks shut it down
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        torch.distributed.destroy_process_group()
