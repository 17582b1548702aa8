"""What a GPU shows of the project, beside its bars: one process, under 8 minutes, on a machine with nothing but torch and MMPose.

    python tools/benchmarks/gpu.py                # all of it; prints as it goes, and writes the GPU part of docs/performance.md
    python tools/benchmarks/gpu.py --stages zoo   # exactness of every MPII config instead, another 5 minutes
    python tools/benchmarks/gpu.py --quick        # a tiny model and few samples, on the CPU too

Stages, the most important first:
    speed    time and memory of each method beside a plain step at 32 and 128 samples, and of finding a basis (HRNet)
    exact    steps without noise against single records in float64
    noise    Kolmogorov and Smirnov's test of the noise made on the device, and its share of a step
    replay   a model whose records begin to mix is refused
    epoch    an epoch of private steps beside a plain one, loader included

Must not take its plain step from another run: each model's plain step is measured beside its private ones.
"""

import argparse
import copy
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import torch
from gpu_checks import PRECISIONS, epochs, exactness, leak_is_refused, noise, settle
from gpu_page import PLAIN_BF16, TWINS, Results, page_of, verdicts
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmpose.registry import MODELS
from mmpose.utils import register_all_modules
from performance import CONFIGS, HRNET, TINY
from performance_page import write_between
from performance_peers import PEERS
from performance_worker import BASIS, PLAIN, make_batch, make_step
from torch.optim import SGD
from torch.utils._pytree import tree_map

from mmpose_dp.models import freeze_batch_norm

MARKS = '<!-- gpu -->', '<!-- /gpu -->'
METHODS = (PLAIN, 'dpsgd', 'hybrid', PLAIN_BF16, *TWINS, BASIS, *PEERS)
STAGES = 'speed', 'exact', 'noise', 'replay', 'epoch'
HRNETS_PARAMETERS = 28_500_000


def plain_in_bfloat16(cfg: Config, samples: int, device: str) -> Callable[[], Iterator[None]]:
    """MMPose's own step under autocast. What its head gives is float32: NumPy cannot compute an accuracy of bfloat16."""
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.backbone.init_cfg = None
    model_cfg.head.type = model_cfg.head.type.removeprefix('Private')
    model = MODELS.build(model_cfg).to(device).train()
    freeze_batch_norm(model)
    forward = model.head.forward
    model.head.forward = lambda feats: tree_map(lambda x: x.float(), forward(feats))
    wrapper = OptimWrapper(SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4))
    batch = make_batch(cfg, samples, 0)

    def step() -> Iterator[None]:
        with torch.autocast(device, dtype=torch.bfloat16):  # AmpOptimWrapper does no more, and refuses a CPU
            losses = model(**model.data_preprocessor(batch, True), mode='loss')
        yield wrapper.update_params(model.parse_losses(losses)[0])

    return step


def measured(cfg: Config, method: str, samples: int, device: str, steps: int) -> dict:
    """Median seconds of a step and, on a GPU, its peak memory in bytes; or why there are none."""
    gc.collect()
    gc.freeze()  # as PrivateTrainLoop does
    try:
        if method == PLAIN_BF16:
            first = step = plain_in_bfloat16(cfg, samples, device)
        else:
            first, step = make_step(cfg, method, samples, samples, 25, device, 1)
        seconds = []
        for turns in (first, step, *[step] * steps):
            settle(device)
            if device != 'cpu':
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            list(turns())
            settle(device)
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if device != 'cpu' else 0
        return dict(seconds=sorted(seconds[2:])[steps // 2], bytes=peak)
    except Exception as error:  # whatever a peer raises for a model
        return dict(failed=f'{type(error).__name__}: {str(error)[:200]}')


class Benchmark:
    """The stages, each of which begins nothing new when its time is up.

    Args:
        args: of the command.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.results = args, Results()
        self.configs = [TINY] if args.quick else list(dict.fromkeys(CONFIGS))
        self.sizes = [2] if args.quick else [32, 128]
        self._end = time.monotonic() + 60 * args.minutes

    def _has_time(self, seconds: float = 0.0) -> bool:
        return self.args.quick or time.monotonic() < self._end - seconds

    @staticmethod
    def _say(**figures: object) -> None:
        print(json.dumps(figures), flush=True)

    def speed(self, samples: int, left: float) -> None:
        """Every method at one size, until only so many seconds are left."""
        for method in METHODS:
            for config in self.configs:
                peer, basis = method in PEERS, method == BASIS
                if not self._has_time(left) or (peer and (samples != self.sizes[0] or self.args.quick)):
                    continue
                if basis and config not in (HRNET, TINY):
                    continue
                steps = 1 if self.args.quick else self.args.steps
                found = measured(Config.fromfile(config), method, samples, self.args.device, steps)
                self.results.speed[config, method, samples] = found
                self._say(config=config, method=method, samples=samples, **found)

    def exact(self, configs: list[str]) -> None:
        """Exactness of some configs."""
        for config in configs:
            if self._has_time():
                self.results.errors[config] = exactness(Config.fromfile(config), self.args.device)
                self._say(config=config, errors=self.results.errors[config])

    def noise(self) -> None:
        """The noise that the device makes."""
        numbers, tested = (50_000, 50_000) if self.args.quick else (HRNETS_PARAMETERS, 2_000_000)
        self.results.noise = noise(self.args.device, numbers, tested)
        self._say(noise=self.results.noise)

    def replay(self) -> None:
        """What the replay does with a leak."""
        self.results.refused = leak_is_refused(Config.fromfile(self.configs[-1]), self.args.device)
        self._say(leak_is_refused=self.results.refused)

    def epoch(self) -> None:
        """Epochs of whole trainings."""
        people = 8 if self.args.quick else self.args.people
        plain = self.configs[0].replace('hybrid_eps08', 'nonprivate')
        with tempfile.TemporaryDirectory() as folder:
            count = 1 if self.args.quick else 2
            self.results.epoch = epochs(self.configs[0], plain, Path(folder), people, count, self.args.device)
        self._say(people=people, epoch=self.results.epoch)

    def run(self) -> None:
        """The chosen stages; 128 samples come last."""
        later: dict[str, Callable[[], None]] = {
            'exact': lambda: self.exact(self.configs),
            'zoo': lambda: self.exact(sorted(map(str, Path('configs/dp').glob('*_mpii*_hybrid_eps08.py')))),
            'noise': self.noise,
            'replay': self.replay,
            'epoch': self.epoch,
        }
        chosen = self.args.stages
        if 'speed' in chosen:
            self.speed(self.sizes[0], left=180)
        for stage in (stage for stage in later if stage in chosen):
            if self._has_time(120 if stage == 'epoch' else 0):
                later[stage]()
        for samples in self.sizes[1:] if 'speed' in chosen else []:
            self.speed(samples, left=0)


def main() -> None:
    """Measures until the time is up, prints each bar, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='a tiny model and few samples, to see that all of it runs')
    parser.add_argument('--stages', nargs='+', default=STAGES, choices=(*STAGES, 'zoo'), help='see above')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='default: a GPU if torch finds one'
    )
    parser.add_argument('--minutes', type=float, default=7, help='nothing new is begun afterwards (default 7)')
    parser.add_argument('--steps', type=int, default=5, help='timed steps of each method (default 5)')
    parser.add_argument('--people', type=int, default=2000, help='people in the epoch (default 2000)')
    parser.add_argument('--page', type=Path, default=Path('docs/performance.md'), help='its GPU part is rewritten')
    args = parser.parse_args()
    register_all_modules()
    benchmark = Benchmark(args)
    benchmark.run()
    for verdict in verdicts(benchmark.results):
        print(' | '.join(verdict), flush=True)
    card = torch.cuda.get_device_name() if args.device != 'cpu' else 'CPU'
    write_between(args.page, MARKS, page_of(benchmark.results, METHODS, tuple(PRECISIONS), card))


if __name__ == '__main__':
    main()
