"""Measure the share of a private step that the replay of one record and the comparison of bit sums take.

    python tools/benchmarks/replay.py                      # MobileNetV2 and HRNet-w32, steps of 64 and 1024 records
    python tools/benchmarks/replay.py --batches 64 --configs configs/dp/my_config.py

Both are timed inside the step that they are part of, so that a slow minute of the machine affects both. Must not switch anything
off: no step runs without them.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import torch
from mmengine.config import Config
from mmpose.utils import register_all_modules
from performance_worker import make_step

from mmpose_dp.engine.checks.replay import Replay, ReplayCheck
from mmpose_dp.engine.optim_wrappers import dp_optim_wrapper

CONFIGS = ('configs/dp/td-hm_mobilenetv2_mpii_hybrid_eps08.py', 'configs/dp/hrnet_mpii_hybrid_eps08.py')
SAMPLES = 8


class Stopwatch:
    """Adds up the seconds inside some methods, by what they belong to."""

    def __init__(self) -> None:
        self.seconds = {'replay': 0.0, 'bit sums': 0.0}

    def around(self, owner: Any, name: str, part: str) -> None:
        """Counts the time of the method for ``part`` from now on."""
        whole: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return whole(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        setattr(owner, name, timed)


def main() -> None:
    """Prints one line per model and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--configs', nargs='+', default=CONFIGS, help='private configs')
    parser.add_argument('--batches', nargs='+', type=int, default=(64, 1024), help='records per step')
    parser.add_argument('--steps', type=int, default=2, help='timed steps of each (default 2); their mean counts')
    args = parser.parse_args()
    register_all_modules()
    watch = Stopwatch()
    watch.around(Replay, '_look', 'replay')
    watch.around(Replay, 'judge', 'replay')
    watch.around(ReplayCheck, 'add', 'replay')
    for name in ('__init__', 'is_that_of'):
        watch.around(dp_optim_wrapper.Fingerprint, name, 'bit sums')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    for config in args.configs:
        for batch in args.batches:
            first, step = make_step(Config.fromfile(config), 'dpsgd', SAMPLES, batch, 1, device, 1)
            list(first())
            watch.seconds = dict.fromkeys(watch.seconds, 0.0)
            start = time.perf_counter()
            for _ in range(args.steps):
                list(step())
            whole = time.perf_counter() - start
            shares = ', '.join(f'{part} {100 * seconds / whole:.2f} %' for part, seconds in watch.seconds.items())
            print(f'{config}: {batch} records, {whole / args.steps:.1f} s per step: {shares}', flush=True)


if __name__ == '__main__':
    main()
