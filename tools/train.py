"""Train a pose model: MMPose's tools/train.py, with its arguments, for private and plain configs.

Must hold nothing of the guarantee, which is in the config and the package.
"""

import argparse
import copy
import traceback
from pathlib import Path

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import torch
from cli import (
    add_common_arguments,
    building,
    merge_common,
    merge_options,
    merged,
    read_config,
    refuse_no_checkpoint,
    refuse_unwritable,
    run,
    start_ranks_on_cpu,
)
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner, ValLoop
from mmpose.registry import OPTIM_WRAPPERS

from mmpose_dp.datasets.resolving import resolved
from mmpose_dp.engine import DPOptimWrapper, PrivacyBudgetHook, ProvenanceHook, checkpoint_settings, newest_checkpoint
from mmpose_dp.engine.hooks.resuming import refuse_nothing_to_resume
from mmpose_dp.engine.hooks.showing import without_recordings
from mmpose_dp.messages import failure
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME


def parse_args() -> argparse.Namespace:
    """MMPose's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='checkpoint to resume from; without a value, the latest one in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision (bfloat16 if private)')
    parser.add_argument('--no-validate', action='store_true', help='train without validation')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate to the batch size (plain training only)'
    )
    add_common_arguments(parser)
    return parser.parse_args()


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Writes the arguments into the config. Raises PrivacyError for one that private training cannot use."""
    wrapper = resolved(OPTIM_WRAPPERS, cfg.optim_wrapper.get('type', 'OptimWrapper'))
    private = isinstance(wrapper, type) and issubclass(wrapper, DPOptimWrapper)
    merge_common(cfg, args)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp and private:
        cfg.optim_wrapper.amp_dtype = 'bfloat16'  # norms and sums stay in float32
    elif args.amp:
        if wrapper not in (OptimWrapper, AmpOptimWrapper):
            raise PrivacyError(
                f"--amp does not know optim_wrapper.type={cfg.optim_wrapper.type!r}: write type='OptimWrapper', or leave out --amp"
            )
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.resume == 'auto' and private and _newest(cfg, args.cfg_options) is None:
        # killed before its first checkpoint: starts again, from load_from if it is set, and continues the ledger
        refuse_nothing_to_resume(_whole(cfg, args.cfg_options).work_dir)
    elif args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.auto_scale_lr:
        if private:
            raise PrivacyError(
                '--auto-scale-lr cannot be used: in private training the batch size is '
                'train_dataloader.batch_sampler.expected_batch_size, a part of the guarantee and '
                'not of the machine. Set optim_wrapper.optimizer.lr itself'
            )
        if not cfg.get('auto_scale_lr'):
            raise PrivacyError(
                '--auto-scale-lr: the config does not say for which batch size its learning rate is: write '
                'auto_scale_lr = dict(base_batch_size=...)'
            )
        cfg.auto_scale_lr.enable = True
    if 'preprocess_cfg' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.preprocess_cfg)
    cfg = merge_options(
        cfg, _without_start(cfg, args.cfg_options) if private and cfg.get('resume') else args.cfg_options
    )
    return without_recordings(cfg) if private else cfg


def _without_start(cfg: Config, options: dict) -> dict:
    """The options of a resume without a ``load_from`` elsewhere: the command is that of the start, and the weights are loaded.

    mmengine would resume from that file. One in the work dir is kept: it is a checkpoint of this training.
    """
    start = options.get('load_from')
    if not start:
        return options
    folder = Path(_whole(cfg, options).work_dir).expanduser().resolve()
    if Path(str(start)).expanduser().resolve().parent == folder:
        return options
    return {key: value for key, value in options.items() if key != 'load_from'}


def _whole(cfg: Config, options: dict) -> Config:
    """A copy of ``cfg`` with ``options`` merged into it."""
    return merged(copy.deepcopy(cfg), options)


def _newest(cfg: Config, options: dict) -> str | None:
    """The checkpoint from which ``--resume`` continues, in the folder that the config and ``options`` name."""
    whole = _whole(cfg, options)
    kept = (whole.get('default_hooks') or {}).get('checkpoint') or {}
    return newest_checkpoint(whole.work_dir, kept.get('out_dir'), kept.get('filename_tmpl'))


def _kept(runner: Runner) -> str:
    """What an interrupted training has spent and kept, and how it goes on."""
    budget = next((hook for hook in runner.hooks if isinstance(hook, PrivacyBudgetHook)), None)
    spent = '' if budget is None else budget.progress(runner)
    checkpoint = newest_checkpoint(runner.work_dir, **checkpoint_settings(runner))
    if checkpoint is None:
        flag = '--resume starts again' if (Path(runner.work_dir) / LEDGER_NAME).is_file() else 'start again'
        return f'{spent}No checkpoint is written yet: {flag} from the beginning.'
    return f'{spent}{checkpoint} is kept: the same command with --resume goes on from there.'


def _hook_that_cannot_begin(error: Exception) -> str | None:
    """The class of the hook whose before_run raised ``error``, which is before the first step; None if it was raised elsewhere."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == 'call_hook' and frame.f_locals.get('fn_name') == 'before_run':
            return type(frame.f_locals.get('hook')).__name__
    return None


def _about_machine(error: Exception) -> str:
    """What to change where memory was too small, or a worker process was ended, as a machine does then; empty otherwise."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            'the GPU has too little memory: lower train_dataloader.batch_size, which changes nothing of the guarantee'
        )
    if isinstance(error, RuntimeError) and str(error).startswith('DataLoader worker'):
        return (
            f'a worker process of a data loader was ended ({error}), often for lack of memory, or of shared memory (/dev/shm, '
            'which a container sets by --shm-size): lower num_workers or batch_size of train_dataloader and val_dataloader'
        )
    return ''


def _is_of_validation(error: Exception) -> bool:
    """Whether a validation of the training raised ``error``."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == 'run')
    return any(isinstance(frame.f_locals.get('self'), ValLoop) for frame in frames)


def main() -> None:
    """Builds the runner and trains."""
    args = parse_args()
    cfg = merge_args(read_config(args.config, 'model', 'train_dataloader', 'optim_wrapper'), args)
    refuse_unwritable(cfg.work_dir)
    refuse_no_checkpoint(cfg.get('load_from'))
    start_ranks_on_cpu(cfg)
    with building(cfg):
        runner = Runner.from_cfg(cfg)
    if not any(isinstance(hook, (PrivacyBudgetHook, ProvenanceHook)) for hook in runner.hooks):
        runner.register_hook(ProvenanceHook())  # so that a plain training passes on what is known of those before it
    try:
        runner.train()
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_kept(runner)) from stop
    except PrivacyError:
        raise
    except Exception as error:
        machine = _about_machine(error)
        if machine:
            raise PrivacyError(f'{machine}. {_kept(runner)}') from error
        if _is_of_validation(error):
            raise PrivacyError(f'validation fails: {failure(error)}. Correct that. {_kept(runner)}') from error
        if isinstance(error, OSError):
            raise
        hook = _hook_that_cannot_begin(error)
        if hook is None:
            raise
        words = failure(error, 300).partition(' in <')[0]  # mmengine appends the hook's address
        raise PrivacyError(f'the hook {hook} fails before training: {words}') from error


if __name__ == '__main__':
    run(main, may_lose_its_output=True)
