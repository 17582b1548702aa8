"""A program that test_killing.py starts: imports everything once, then trains in a new process per line of its input.

A line is JSON: work_dir, data, resume. It answers '>' and the child's process id and, when the child has ended, its status.
"""

import json
import os
import sys

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.utils import register_all_modules

from mmpose_dp.privacy.plan import PrivacyPlan
from tests.support.runs import unvalidated

STEPS = 12
QUICK = dict(default_hooks__privacy_budget__interval=1000, default_hooks__logger__interval=1000)


class Release(Hook):
    """Writes one byte per finished step: how much anybody can have seen when the process is killed."""

    priority = 'VERY_HIGH'

    def __init__(self, path):
        self.file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        os.write(self.file, b'.')


def calibrate():
    """Calibrates the plan that every training calibrates."""
    PrivacyPlan.calibrate(
        target_epsilon=8.0,
        method='dpsgd',
        privacy_unit='instance',
        num_records=40,
        expected_batch_size=10,
        steps=STEPS,
        max_grad_norm=1.0,
        target_delta=1e-3,
    )
    return True


def main():
    """Serves until the input ends."""
    register_all_modules()
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    calibrated = False
    for line in sys.stdin:
        task = json.loads(line)
        if not calibrated:  # the accounting of all these trainings, remembered for the children
            calibrated = calibrate()
        child = os.fork()
        if child == 0:
            cfg = unvalidated(task['data'], task['work_dir'], 'dpsgd', train_cfg__max_epochs=STEPS // 4, **QUICK)
            cfg.resume = task['resume']
            runner = Runner.from_cfg(cfg)
            runner.register_hook(Release(os.path.join(task['work_dir'], 'released')))
            runner.train()
            os._exit(0)
        print('>', child, file=answers, flush=True)
        print('>', os.waitpid(child, 0)[1], file=answers, flush=True)


if __name__ == '__main__':
    main()
