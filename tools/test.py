"""Test a checkpoint: MMPose's tools/test.py, with its arguments, for private and plain configs.

A score on private data reveals something about them: no guarantee covers it. Must not train, and must not change the
checkpoint.
"""

import argparse

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import mmengine
from cli import (
    add_common_arguments,
    building,
    default_hook,
    merge_common,
    merge_options,
    read_config,
    refuse_no_checkpoint,
    run,
    start_ranks_on_cpu,
)
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmpose_dp.extras.checkpoint_file import without_updates
from mmpose_dp.messages import failure, step_in_words
from mmpose_dp.privacy.errors import PrivacyError


class SaveMetrics(Hook):
    """Writes the scores to a file (json, yaml or pickle, by its name)."""

    def __init__(self, file: str) -> None:
        self.file = file

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Called by mmengine with all scores."""
        if metrics is not None:
            mmengine.dump(metrics, self.file)


class WholeLayers(Hook):
    """Leaves out what trainable='lora' and 'experts' keep beside the layers, for which a model to test has no place.

    The layers' own tensors contain it. mmengine would list each name as unexpected.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Called by mmengine before the weights are put into the model."""
        weights = checkpoint.get('state_dict', {})
        for name in weights.keys() - without_updates(weights).keys():
            del weights[name]


def parse_args() -> argparse.Namespace:
    """MMPose's arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='file to write the scores to')
    parser.add_argument('--dump', help='pickle file to write all predictions to')
    parser.add_argument('--badcase', action='store_true', help='collect the worst predictions')
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.dump and not args.dump.endswith(('.pkl', '.pickle')):
        parser.error(f'--dump {args.dump}: the name must end in .pkl or .pickle')
    if args.out and not args.out.endswith(('.json', '.yaml', '.yml', '.pkl', '.pickle')):
        parser.error(f'--out {args.out}: the name must end in .json, .yaml or .pkl')
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Writes the arguments into the config."""
    show = args.show
    args.show = show and not args.badcase  # one window: the worst predictions instead of all
    merge_common(cfg, args)
    cfg.load_from = args.checkpoint
    if args.badcase:
        hook = default_hook(cfg, 'badcase', 'BadCaseAnalysisHook')
        hook.update(enable=True, show=show, interval=args.interval)
        if show:
            hook.update(wait_time=args.wait_time)
        if not hook.get('metric'):
            by_loss = hook.get('metric_type', 'loss') == 'loss'
            hook.update(metric=cfg.model.head.loss if by_loss else cfg.test_evaluator)
    if args.dump:
        scores = cfg.test_evaluator
        scores = list(scores) if isinstance(scores, (list, tuple)) else [scores]
        cfg.test_evaluator = [*scores, dict(type='DumpResults', out_file_path=args.dump)]
    return merge_options(cfg, args.cfg_options)


def refuse_no_test_set(cfg: Config, path: str) -> None:
    """Raises PrivacyError for a config without what a test needs beside its data, as the one in a published folder is."""
    missing = [key for key in ('test_cfg', 'test_evaluator') if cfg.get(key) is None]
    if missing:
        raise PrivacyError(
            f'{path} has no {" and no ".join(missing)}: give the config of the training, or the plain one that it inherits from. '
            'The config.py of a published folder has no test set'
        )


def main() -> None:
    """Builds the runner and tests."""
    args = parse_args()
    cfg = merge_args(read_config(args.config, 'model', 'test_dataloader'), args)
    refuse_no_test_set(cfg, args.config)
    refuse_no_checkpoint(cfg.load_from)
    start_ranks_on_cpu(cfg)
    with building(cfg):
        runner = Runner.from_cfg(cfg)
    runner.register_hook(WholeLayers())
    if args.out:
        runner.register_hook(SaveMetrics(args.out), 'LOWEST')
    try:
        runner.test()
    except (PrivacyError, OSError):  # these have words of their own
        raise
    except Exception as error:  # of a picture, an annotation, a metric, or of the checkpoint
        raise PrivacyError(f'the test fails: {failure(error)}{step_in_words(error)}. Correct that') from error


if __name__ == '__main__':
    run(main)
