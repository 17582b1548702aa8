"""Private steps beside plain ones on a GPU: one process, under 8 minutes, on a machine that has nothing but torch and MMPose.

    python tools/benchmarks/gpu.py                # every model; writes the GPU part of docs/performance.md
    python tools/benchmarks/gpu.py --quick        # one tiny model, on the CPU too

Must not take its plain step from another run: each model's plain step is measured beside its private ones.
"""

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper
from mmpose.registry import MODELS
from mmpose.utils import register_all_modules
from performance import CONFIGS, TINY
from performance_page import short_name, table
from performance_peers import PEERS
from performance_worker import PLAIN, make_batch, make_step
from torch.optim import SGD

from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.models import freeze_batch_norm
from mmpose_dp.privacy.clipping import clipping_norm

MARKS = '<!-- gpu -->', '<!-- /gpu -->'
PLAIN_BF16 = 'plain, bfloat16'
TWINS = {'dpsgd, bfloat16': PLAIN_BF16}  # what a method is compared with, if not the plain step
METHODS = (PLAIN, 'dpsgd', 'hybrid', PLAIN_BF16, *TWINS, *PEERS)
RECORDS, C = 4, 0.05  # of the comparison with float64


def plain_in_bfloat16(cfg: Config, samples: int, device: str) -> Callable[[], Iterator[None]]:
    """MMPose's own step under autocast, without the accuracy, which NumPy cannot compute of bfloat16."""
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.backbone.init_cfg, model_cfg.train_cfg = None, dict(compute_acc=False)
    model_cfg.head.type = model_cfg.head.type.removeprefix('Private')
    model = MODELS.build(model_cfg).to(device).train()
    freeze_batch_norm(model)
    params = [p for p in model.parameters() if p.requires_grad]
    wrapper = AmpOptimWrapper(dtype='bfloat16', optimizer=SGD(params, lr=1e-4))
    batch = make_batch(cfg, samples, 0)

    def step() -> Iterator[None]:
        yield model.train_step(batch, wrapper)

    return step


def measured(cfg: Config, method: str, samples: int, device: str, steps: int) -> dict:
    """Median seconds of a step and, on a GPU, its peak memory in bytes; or why there are none."""
    gc.collect()
    try:
        if method == PLAIN_BF16:
            first = step = plain_in_bfloat16(cfg, samples, device)
        else:
            first, step = make_step(cfg, method, samples, samples, 25, device, 1)
        seconds = []
        for turns in (first, step, *[step] * steps):
            if device != 'cpu':
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            list(turns())
            if device != 'cpu':
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if device != 'cpu' else 0
        return dict(seconds=sorted(seconds[2:])[steps // 2], bytes=peak)
    except Exception as error:  # whatever a peer raises for a model
        return dict(failed=f'{type(error).__name__}: {str(error)[:200]}')


def in_float64(model: Any, batch: dict) -> dict:
    """What a model in float64 takes of a collated batch, which stays as it is."""
    ready = model.data_preprocessor(copy.deepcopy(batch), True)
    for sample in ready['data_samples']:
        for part in (sample.get('gt_instance_labels'), sample.get('gt_fields')):
            for key, value in part.items() if part is not None else ():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    part.set_field(value.double(), key)
    return dict(ready, inputs=ready['inputs'].double())


def error_of_a_step(cfg: Config, device: str, **settings: Any) -> float:
    """How far a step without noise is from the clipped sum of single records in float64, relative to its length."""
    torch.manual_seed(0)
    model_cfg = copy.deepcopy(cfg.model)
    model_cfg.backbone.init_cfg = None
    model = MODELS.build(model_cfg).to(device).train()
    freeze_batch_norm(model)
    for module in model.modules():
        if 'Drop' in type(module).__name__:
            module.eval()
    params = [p for p in model.parameters() if p.requires_grad]
    wrapper = DPOptimWrapper(SGD(params, lr=1.0), C, noise_multiplier=0.0, expected_batch_size=1, **settings)
    wrapper.prepare(model)
    batch, seen = make_batch(cfg, RECORDS, 0), []
    wrapper.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.double().flatten() for p in params))
    exact, total = copy.deepcopy(model).double(), torch.zeros(sum(p.numel() for p in params), device=device).double()
    ours = [p for p in exact.parameters() if p.requires_grad]
    for i in range(RECORDS):
        exact(**in_float64(exact, {key: values[i : i + 1] for key, values in batch.items()}), mode='loss')
        found = torch.autograd.grad(exact.head.take().losses[0], ours, allow_unused=True)
        gradient = torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(ours, found)])
        total += gradient * (clipping_norm(C) / gradient.norm()).clamp_max(1)
    model.train_step(batch, wrapper)
    return float((torch.cat(seen) - total).norm() / total.norm())


def exactness(cfg: Config, device: str) -> dict:
    """The errors in float32, with TF32 and in bfloat16; or why there are none."""
    allowed, found = torch.backends.cudnn.allow_tf32, {}
    for name, tf32, settings in (('float32', False, {}), ('TF32', True, {}), ('bfloat16', True, BF16)):
        torch.backends.cudnn.allow_tf32 = tf32
        try:
            found[name] = f'{error_of_a_step(cfg, device, **settings):.1e}'
        except Exception as error:
            found[name] = f'does not run: {type(error).__name__}'
    torch.backends.cudnn.allow_tf32 = allowed
    return found


BF16 = dict(amp_dtype='bfloat16')


def cell(results: dict, config: str, method: str, samples: int) -> str:
    """Time and memory of a method as multiples of its plain step's; milliseconds per image for a plain step."""
    one, plain = (results.get((config, m, samples), {}) for m in (method, TWINS.get(method, PLAIN)))
    if 'seconds' not in one:
        return 'does not run' if one else ''
    if method in (PLAIN, PLAIN_BF16):
        return f'{1000 * one["seconds"] / samples:.2f} ms, {one["bytes"] / 1e9:.2f} GB'
    if 'seconds' not in plain:
        return f'{1000 * one["seconds"] / samples:.2f} ms'
    memory = f', {one["bytes"] / plain["bytes"]:.2f} x' if plain['bytes'] else ''
    return f'{one["seconds"] / plain["seconds"]:.2f} x{memory}'


def page_of(results: dict, errors: dict, sizes: list[int], card: str) -> str:
    """The Markdown between the marks."""
    configs = list(dict.fromkeys(config for config, _, _ in results))
    names = [short_name(config) for config in configs]
    parts = [f'## {card}\n\n`python tools/benchmarks/gpu.py`, torch {torch.__version__}. Time per image and memory.\n']
    for samples in sizes:
        rows = [[m, *(cell(results, c, m, samples) for c in configs)] for m in METHODS]
        parts.append(f'### {samples} samples\n\n' + table(['method', *names], rows))
    kinds = ('float32', 'TF32', 'bfloat16')
    rows = [[kind, *(errors.get(c, {}).get(kind, '') for c in configs)] for kind in kinds]
    parts.append('### Difference from single records in float64\n\n' + table(['precision', *names], rows))
    failed = {f'- {m} on {short_name(c)}: {r["failed"]}' for (c, m, _), r in results.items() if 'failed' in r}
    return '\n'.join(parts) + ('\n' + '\n'.join(sorted(failed)) + '\n' if failed else '')


def main() -> None:
    """Measures until the time is up, the most important first, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--quick', action='store_true', help='one tiny model and few samples, to see that all of it runs'
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--minutes', type=float, default=7, help='nothing new is begun afterwards')
    parser.add_argument('--steps', type=int, default=5, help='timed steps of each method')
    parser.add_argument('--page', type=Path, default=Path('docs/performance.md'), help='its GPU part is rewritten')
    args = parser.parse_args()
    register_all_modules()
    configs, sizes = ([TINY], [2]) if args.quick else ([*CONFIGS[:5]], [32, 128])
    end, results, errors = time.monotonic() + 60 * args.minutes, {}, {}
    jobs = [
        (c, m, n)
        for n in sizes
        for m in METHODS
        for c in configs
        if m not in PEERS or (n == sizes[0] and not args.quick)
    ]
    for config, method, samples in jobs:
        if time.monotonic() > end - 60 * (not args.quick):  # the last minute is for exactness
            break
        found = measured(Config.fromfile(config), method, samples, args.device, 1 if args.quick else args.steps)
        results[config, method, samples] = found
        print(json.dumps(dict(config=config, method=method, samples=samples, **found)), flush=True)
    for config in configs:
        if time.monotonic() < end:
            errors[config] = exactness(Config.fromfile(config), args.device)
            print(json.dumps(dict(config=config, errors=errors[config])), flush=True)
    card = torch.cuda.get_device_name() if args.device != 'cpu' else 'CPU'
    text = args.page.read_text() if args.page.exists() else ''
    before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
    args.page.write_text(f'{before}{MARKS[0]}\n{page_of(results, errors, sizes, card)}{MARKS[1]}{after}')


if __name__ == '__main__':
    main()
