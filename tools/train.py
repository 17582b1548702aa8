"""Train a pose model: MMPose's tools/train.py, with its arguments, for private and plain configs alike.

Must not hold anything of the guarantee: that is all in the config and the package.
"""

import argparse
import os
import os.path as osp
import sys

import mmpose_dp  # noqa: F401  (first: works around broken installs before mmpose is imported)
from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from mmpose_dp.privacy import PrivacyError


def parse_args() -> argparse.Namespace:
    """MMPose's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='where logs, checkpoints and the privacy statement go')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='checkpoint to resume from; without a value, the latest one in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--no-validate', action='store_true', help='train without validation')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate (plain training only)')
    parser.add_argument('--show-dir', help='where to save visualised validation results')
    parser.add_argument('--show', action='store_true', help='show visualised validation results in a window')
    parser.add_argument('--interval', type=int, default=1, help='visualise every so many samples')
    parser.add_argument('--wait-time', type=float, default=1, help='seconds a window stays')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='override config keys: key=value ...')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Puts the arguments into the config."""
    private = cfg.optim_wrapper.get('type') == 'DPOptimWrapper'
    cfg.launcher = args.launcher
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or osp.join('work_dirs', name)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp and private:
        cfg.optim_wrapper.amp_dtype = 'bfloat16'  # norms and sums stay in float32
    elif args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.resume:
        cfg.resume, cfg.load_from = True, None if args.resume == 'auto' else args.resume
    if args.auto_scale_lr:
        if private:
            raise PrivacyError('--auto-scale-lr: private training has no batch size to scale by; set optim_wrapper.optimizer.lr')
        cfg.auto_scale_lr.enable = True
    if args.show or args.show_dir:
        cfg.default_hooks.visualization.update(
            enable=True, show=args.show, out_dir=args.show_dir, interval=args.interval, wait_time=args.wait_time
        )
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def main() -> None:
    """Builds the runner and trains; a privacy setting that cannot be kept ends in one clear message."""
    args = parse_args()
    try:
        Runner.from_cfg(merge_args(Config.fromfile(args.config), args)).train()
    except PrivacyError as error:
        sys.exit(f'mmpose_dp: {error}')


if __name__ == '__main__':
    main()
