"""Speed and memory of private steps relative to the plain step on the same images, measured in the same run.

    python tools/benchmarks/performance.py                     # measures and rewrites docs/performance.md: over an hour on 2 cores
    python tools/benchmarks/performance.py --only models --configs configs/dp/my_config.py
    python tools/benchmarks/performance.py --only quick        # each method once on a tiny model

Suites:
    models     the methods that matter most on every model, and the others on two
    processes  a batch that two processes share
    batch      from 64 to 1024 records per step
    samples    what grows with the samples in memory
    rank       what grows with the projector's rank
    basis      what grows with the public records from which the basis is found
    quick      every method once on a tiny model

Each method runs in its own process and takes turns with a plain one, step by step (of a long step, 64 images at a time), so that
a slow minute of the machine affects both. Every method gets the same number of random images per step (feature and hybrid: half of
them public views). Results are appended to work_dirs/benchmark/results.jsonl, one JSON object per line, and what is already there
is not measured again: an interrupted run continues, and you may add lines from another machine. The page is rewritten from
all of them after each result.
"""

import argparse
import json
import multiprocessing
import platform
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median

import opacus
import torch
from performance_page import cell, short_name, write_page
from performance_worker import BASES, METHODS, PLAIN, PROJECTED, serve, turns_of

REPO = Path(__file__).resolve().parents[2]
CONFIGS = tuple(
    f'configs/dp/{name}_hybrid_eps08.py'
    for name in ('hrnet_mpii', 'td-hm_res50_mpii', 'rtmpose-m_mpii', 'vitpose-small_mpii', 'td-hm_mobilenetv2_mpii')
)
HRNET, SMALL, TINY = CONFIGS[0], CONFIGS[-1], 'configs/dp/hrnet_synthetic_hybrid_eps08.py'
MAIN = 'dpsgd', 'hybrid', 'opacus, hooks'  # measured on every model
SAMPLES, BATCH, RANK = 8, 32, 50  # in memory at once; in a logical batch, as in the paper; rank of the projector
LOGICAL = 64, 256, 1024  # batches, for the suite 'batch'


class Worker:
    """A method on a model in processes of its own, one or several that share the batch."""

    def __init__(self, job: dict, method: str) -> None:
        context = multiprocessing.get_context('spawn')
        self._pipes, self._processes = [], []
        self._folder = tempfile.TemporaryDirectory()  # for the file by which processes find each other
        for i in range(job['processes'] if method == job['method'] else 1):
            pipe, other = context.Pipe()
            process = context.Process(
                target=serve, args=(other, job, method, i, f'{self._folder.name}/group'), daemon=True
            )
            process.start()
            other.close()
            self._pipes.append(pipe)
            self._processes.append(process)

    def ask(self, what: str) -> float:
        """What ``serve`` answers to 'reset', 'time' or 'peak'. Raises RuntimeError with the failure of the process."""
        try:
            for pipe in self._pipes:
                with suppress(OSError):  # it failed, and sent the reason before it ended
                    pipe.send(what)
            answers = [pipe.recv() for pipe in self._pipes]
        except (EOFError, OSError) as error:
            raise RuntimeError('the process died, perhaps out of memory') from error
        failed = [answer for answer in answers if isinstance(answer, str)]
        if failed:
            raise RuntimeError(failed[0])
        return max(answers)

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def measure(job: dict, steps: int, rounds: int = 1) -> dict:
    """The job with its result, or with the reason why it 'failed'.

    A ratio is that of the times for one record, or of the peaks: the method's to that of the plain steps beside it. The allocator
    makes a peak differ from one process to another, so of several ``rounds``, with processes of their own, the median counts.
    """
    steps = job.get('steps', steps)
    result = dict(job, torch=torch.__version__, opacus=opacus.__version__, steps=steps, rounds=rounds)
    taken: dict[str, list[float]] = {name: [] for name in (PLAIN, job['method'])}
    held: dict[str, list[float]] = {name: [] for name in taken}
    for _ in range(rounds):
        workers = {name: Worker(job, name) for name in taken}
        try:
            for worker in workers.values():
                worker.ask('reset')
                worker.ask('time')  # is not counted: it allocates again what was freed
            for _ in range(steps):
                turns = [
                    [worker.ask('time') for worker in workers.values()]
                    for _ in range(turns_of(job['method'], job['expected_batch_size']))
                ]
                beside, whole = zip(*turns)
                taken[PLAIN].append(fmean(beside))
                taken[job['method']].append(sum(whole))
            for name, worker in workers.items():
                held[name].append(worker.ask('peak'))
        except RuntimeError as error:
            return dict(result, failed=str(error))
        finally:
            for worker in workers.values():
                worker.close()
    peaks = [median(peaks) for peaks in held.values()]
    plain, method = (
        [t / n for t in times] for times, n in zip(taken.values(), (job['samples'], job['expected_batch_size']))
    )
    ratios = [b / a for a, b in zip(plain, method)]
    result.update(plain_seconds=median(plain), seconds=median(method), plain_bytes=peaks[0], bytes=peaks[1])
    result.update(time=median(ratios), spread=(min(ratios), max(ratios)), memory=peaks[1] / peaks[0])
    return result


def machine(device: str) -> str:
    """What the figures were measured on."""
    if device != 'cpu':
        return torch.cuda.get_device_name()
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    name = next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), platform.machine())
    return f'{name}, {torch.get_num_threads()} cores'


def suites(configs: Sequence[str]) -> dict[str, list[dict]]:
    """What is measured, by the name of its suite."""
    both = ('dpsgd', 'hybrid')
    return {
        'models': [
            job(config, method)
            for method in METHODS
            for config in configs
            if method != PLAIN and (method in MAIN or config in (HRNET, SMALL, *{*configs} - {*CONFIGS}))
        ],
        'processes': [job(HRNET, 'dpsgd', threads=1, processes=n) for n in (1, 2)],
        'batch': [job(SMALL, method, expected_batch_size=batch, steps=1) for method in both for batch in LOGICAL],
        'samples': [job(HRNET, 'dpsgd', samples=samples) for samples in (2, 4, 16)],
        'rank': [job(SMALL, f'projected, {order}', rank=rank) for order in PROJECTED for rank in (10, 25, 100)],
        'basis': [job(HRNET, one, expected_batch_size=records, rank=25) for one in BASES for records in (24, 48)],
        'quick': [
            job(TINY, method, samples=4, expected_batch_size=12) for method in (*METHODS, *BASES) if method != PLAIN
        ],
    }


def job(config: str, method: str, **settings: int) -> dict:
    """One measurement, see ``performance_worker.serve``."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    standard = dict(samples=SAMPLES, expected_batch_size=BATCH, rank=RANK, threads=torch.get_num_threads(), processes=1)
    return dict(config=config, method=method, device=device, machine=machine(device), **standard | settings)


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', choices=suites(()), help='suites, see above (default: all but "quick")')
    parser.add_argument('--configs', nargs='+', default=CONFIGS, help='private configs, for the suite "models"')
    parser.add_argument('--steps', type=int, default=3, help='timed steps; the median of their ratios counts')
    parser.add_argument('--rounds', type=int, default=1, help='how often to repeat with new processes; medians count')
    parser.add_argument('--out', type=Path, default=REPO / 'work_dirs/benchmark', help='folder of the results')
    parser.add_argument(
        '--page',
        type=Path,
        help='page whose tables and plot to replace (default docs/performance.md; with --only, one in --out)',
    )
    args = parser.parse_args()
    args.page = args.page or (args.out if args.only else REPO / 'docs') / 'performance.md'
    return args


def main() -> None:
    """Measures what is not in the results yet, prints a line per result, and rewrites the page."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / 'results.jsonl'
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    every = suites(args.configs)
    chosen = args.only or [name for name in every if name != 'quick']
    on_page = suites(list(dict.fromkeys([*CONFIGS, *args.configs])))
    for number, wanted in enumerate(jobs := [one for suite in chosen for one in every[suite]], 1):
        found = next((r for r in results if wanted.items() <= r.items()), None)
        measured = found is None
        if found is None:
            found = measure(wanted, args.steps, args.rounds)
            results.append(found)
            with open(path, 'a') as file:
                file.write(json.dumps(found) + '\n')
        if chosen != ['quick'] and (measured or number == len(jobs)):
            write_page(args.page, {name: jobs for name, jobs in on_page.items() if name != 'quick'}, results)
        settings = ' '.join(f'{key}={wanted[key]}' for key in ('samples', 'expected_batch_size', 'rank', 'processes'))
        print(
            f'[{number}/{len(jobs)}] {short_name(wanted["config"])}, {wanted["method"]}, {settings}: {cell(found)}',
            flush=True,
        )


if __name__ == '__main__':
    main()
