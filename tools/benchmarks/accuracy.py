"""Accuracy of each method at each epsilon, all rows tuned alike; rewrites docs/accuracy.md.

    python tools/benchmarks/accuracy.py                        # the whole page: some hours on 2 cores
    python tools/benchmarks/accuracy.py --only dpsgd ours --epsilons 0.8 --seeds 1
    python tools/benchmarks/accuracy.py --mpii start.pth       # the same on data/mpii, from a checkpoint trained on public data
    python tools/benchmarks/accuracy.py --people ../shared/data/people --start movenet --weights ../shared/data/weights

The people are synthetic (tools/make_synthetic_mpii.py): pretraining uses the public domain, private training the other one.
With --people they are real: two sets in MPII's layout (tools/convert_people.py), and docs/accuracy_people.md is the page; by
default their grid fits in one night on 2 cores. With --tuned, the settings of a row are chosen among its candidates with one
seed at the first epsilon, on people that the table does not report; each row has the same number of candidates. Each run is
written to results.csv in --out when it ends and is not run again: an interrupted benchmark continues, and with a copy of
docs/accuracy.csv there, the published one does. Must not choose anything by the reported people.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from itertools import product
from pathlib import Path

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
from accuracy_page import write_page
from accuracy_rows import DEFAULT_VIEW, FULL, MPII, PAPERS_VIEW, QUICK, SYNTHETIC, Row, Size, rows_of, wide_rows
from accuracy_worker import REPO, run_job, set_up
from people_rows import STARTS, add_people_sets, make_tuning_people, make_unusual_people, people_rows, people_size

from mmpose_dp.datasets.synthetic import make_synthetic_mpii

SPLITS = {'reported': 'private', 'tuning': 'tuning', 'other domain': 'public'}  # folder of each split's people
FIELDS = ('row', 'epsilon', 'seed', 'split', 'settings', 'pckh', 'pckh_other_domain', 'epsilon_spent', 'seconds')


def make_people(data: Path, size: Size) -> None:
    """Makes the data sets that are missing: people to train on, to tune with and to report, nobody in two of them."""
    for domain, count in (('public', size.public), ('private', size.private)):
        make_synthetic_mpii(data / domain, domain, count, size.tested, image_size=96)
    make_synthetic_mpii(data / 'tuning', 'private', 1, size.tested // 2, seed=1, image_size=96)


class Results:
    """results.csv: the runs that have ended, each found by its settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict] = list(csv.DictReader(path.open())) if path.exists() else []

    def find(self, **wanted: object) -> dict | None:
        """The line with these values, or None."""
        return next((r for r in self.lines if all(r[k] == str(v) for k, v in wanted.items())), None)

    def add(self, **line: object) -> None:
        """Writes a line at once, so that no run that has ended is lost."""
        self.lines.append({key: str(line[key]) for key in FIELDS})
        new = not self.path.exists()
        with self.path.open('a', newline='') as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerow(self.lines[-1])


class Benchmark:
    """Runs what is missing in the results, in ``lanes`` processes of one thread each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.data = args.out.resolve(), args.data.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.folders = {split: self.data / folder for split, folder in SPLITS.items()}
        self.levers, self.wide = {}, {}
        view = PAPERS_VIEW if args.papers_blur else DEFAULT_VIEW
        if args.people:
            self._set_people(args, view)
        else:
            self._set_usual(args, view)
        self.trains_on = {**self.folders, 'tuning': self.folders['tuning' if args.people else 'reported']}
        self.rows: dict[str, Row] = {**self.table, **self.levers, **self.wide}
        if not (self.size.tuned if args.tuned is None else args.tuned):
            self.rows = {name: replace(row, candidates=row.candidates[:1]) for name, row in self.rows.items()}
        self.epsilons, self.seeds = args.epsilons or self.size.epsilons, args.seeds or self.size.seeds
        # whose weights others need
        self.starts = {name for row in self.rows.values() for name in (row.start, *row.experts)}
        self.needed: set[tuple[str, int]] = set()
        self.start, self.lanes = args.mpii, args.lanes
        self.results = Results(self.out / 'results.csv')

    def _set_usual(self, args: argparse.Namespace, view: dict) -> None:
        self.family, self.weights, self.page_part = 'mpii' if args.mpii else 'synthetic', None, ''
        self.size = MPII if args.mpii else QUICK if args.quick else FULL
        self.table, self.levers = rows_of(self.size, {} if args.mpii else SYNTHETIC, view)
        if args.mpii:  # the start is given, and MPII's config has no public people
            self.table = {n: row for n, row in self.table.items() if n != 'pretrain' and not row.pictures}
        else:
            self.wide = wide_rows({**self.table, **self.levers})
            make_people(self.data, self.size)

    def _set_people(self, args: argparse.Namespace, view: dict) -> None:
        start = STARTS[args.start]
        self.family, self.weights, self.page_part = start.model, str(args.weights.resolve()), f'_{args.start}'
        private, public = (args.people.resolve() / name for name in args.people_sets)
        self.size = people_size(private, public, args.quick)
        self.table = people_rows(self.size, start, view)
        tuning = make_tuning_people(private, self.data / f'{private.name}_tuning')
        unusual = make_unusual_people(public, self.data / f'{public.name}_unusual')
        self.folders = {'reported': private, 'tuning': tuning, 'other domain': public, 'unusual': unusual}

    # ---- what to run ---------------------------------------------------------------------------------------------
    def settings(self, name: str) -> dict:
        """The row's settings with the candidate that was best on the tuning people."""
        row = self.rows[name]
        if row.like:
            return {**self.settings(row.like), **row.settings}
        if len(row.candidates) == 1:
            return dict(row.settings, **row.candidates[0])
        tuned = [line for candidate in row.candidates if (line := self.tuned(name, candidate)) is not None]
        return json.loads(max(tuned, key=lambda line: float(line['pckh']))['settings'])

    def tuned(self, name: str, candidate: dict) -> dict | None:
        """The line of a candidate on the tuning people, or None."""
        return self.results.find(**self._identity(name, candidate, *self._tuning(self.rows[name])))

    def _tuning(self, row: Row) -> tuple[float | None, int, str]:
        return self.size.epsilons[0] if row.private else None, 0, 'tuning'

    def _identity(self, name: str, candidate: dict, epsilon: float | None, seed: int, split: str) -> dict:
        settings = json.dumps(dict(self.rows[name].settings, **candidate))
        return dict(row=name, epsilon=epsilon, seed=seed, split=split, settings=settings)

    def tuning_jobs(self, names: list[str]) -> Iterator[dict]:
        """Every candidate of the rows that have several."""
        for name in names:
            candidates = self.rows[name].candidates
            for candidate in candidates if len(candidates) > 1 else ():
                yield self._identity(name, candidate, *self._tuning(self.rows[name]))

    def reported_jobs(self, names: list[str], seeds: Iterable[int] | None = None) -> Iterator[dict]:
        """Each row as it was tuned, seed by seed; levers and the wide model at the first epsilon."""
        for seed in range(self.seeds) if seeds is None else seeds:
            for number, epsilon in enumerate(self.epsilons):
                for name in names if number == 0 else [n for n in names if n in self.table and self.rows[n].private]:
                    own = epsilon if self.rows[name].private else None
                    settings = json.dumps(self.settings(name))
                    yield dict(row=name, epsilon=own, seed=seed, split='reported', settings=settings)

    def with_starts(self, names: list[str]) -> list[str]:
        """These rows and what they start from, starts first."""
        wanted: list[str] = []
        for name in names:
            before = [start for start in (self.rows[name].start, *self.rows[name].experts) if start in self.rows]
            wanted += [n for n in [*self.with_starts(before), name] if n not in wanted]
        return wanted

    def needed_starts(self, names: list[str]) -> set[tuple[str, int]]:
        """The rows, with their seeds, from whose weights a missing run starts."""
        needed = set()
        for name in names:
            try:
                jobs = [*self.tuning_jobs([name]), *self.reported_jobs([name])]
                seeds = {job['seed'] for job in jobs if self.results.find(**job) is None}
            except ValueError:  # not tuned yet
                seeds = set(range(self.seeds))
            needed |= {(start, seed) for start in self.with_starts([name])[:-1] for seed in seeds}
        return needed

    # ---- running ---------------------------------------------------------------------------------------------------
    def _folder(self, identity: dict) -> Path:
        number = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
        return self.out / f'{identity["row"]}_eps{identity["epsilon"]}_seed{identity["seed"]}_{number}'

    def _checkpoint(self, name: str, seed: int) -> Path:
        return self.out / f'start_{name}_seed{seed}.pth'

    def _job(self, identity: dict) -> dict:
        row, seed = self.rows[identity['row']], identity['seed']
        start = self.start if row.start == 'pretrain' and self.start else self._checkpoint(str(row.start), seed)
        splits = [identity['split']] + (['other domain'] if identity['split'] == 'reported' else [])
        roots = {split: f'{folder}/' for split, folder in self.folders.items()}
        public = 'unusual' if row.unusual else 'other domain'
        train_on = public if row.public_alone or row.config == 'pretrain' else identity['split']
        return dict(
            family=self.family,
            weights=self.weights,
            config=row.config,
            settings=json.loads(identity['settings']),
            epsilon=identity['epsilon'],
            seed=seed,
            folder=str(self._folder(identity)),
            load_from=str(start) if row.start else None,
            experts=[str(self._checkpoint(name, seed)) for name in row.experts],
            mean=row.mean,
            train_on=None if self.family == 'mpii' else f'{self.trains_on[train_on]}/',
            pictures=row.pictures,
            public=None if self.family == 'mpii' else roots[public],
            test_on=[None] if self.family == 'mpii' else [roots[split] for split in splits],
        )

    def _start_is_lost(self, identity: dict) -> bool:
        wanted = identity['split'] == 'reported' and (identity['row'], identity['seed']) in self.needed
        return wanted and not self._checkpoint(identity['row'], identity['seed']).exists()

    def _describe(self, identity: dict) -> str:
        row = self.rows[identity['row']]
        fixed = self.settings(row.like) if row.like else row.settings
        own = {key: value for key, value in json.loads(identity['settings']).items() if key not in fixed}
        return f'{identity["row"]}, epsilon {identity["epsilon"]}, seed {identity["seed"]}, {identity["split"]} people, {own}'

    def run(self, identities: list[dict]) -> None:
        """Runs those that are not in the results and prints a line for each. Raises what a training raised."""
        todo = [i for i in identities if self.results.find(**i) is None or self._start_is_lost(i)]
        done, began = 0, time.time()
        context = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(self.lanes, context, set_up) as pool:
            running = {pool.submit(run_job, self._job(identity)): identity for identity in todo}
            for future in as_completed(running):
                if future.exception() is not None:
                    pool.shutdown(cancel_futures=True)
                identity, result = running[future], future.result()
                own, *other = result['scores']
                keep = dict(pckh=own, pckh_other_domain=other[0] if other else '', seconds=result['seconds'])
                if self.results.find(**identity) is None:  # else a lost start was trained again
                    self.results.add(**identity, **keep, epsilon_spent=result['epsilon_spent'])
                if identity['row'] in self.starts and identity['split'] == 'reported':
                    os.replace(result['checkpoint'], self._checkpoint(identity['row'], identity['seed']))
                done += 1
                left = (time.time() - began) / done * (len(todo) - done) / 60
                bar = '#' * (20 * done // len(todo))
                print(
                    f'[{bar:<20}] {done}/{len(todo)}, {left:.0f} min left: {self._describe(identity)}: {own:.1f}',
                    flush=True,
                )


def parse_args(given: list[str] | None = None) -> argparse.Namespace:
    """The arguments, those of the command by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', metavar='ROW', help='rows of accuracy_rows.py; all of them by default')
    parser.add_argument('--epsilons', nargs='+', type=float, help='instead of the default ones')
    parser.add_argument('--seeds', type=int, help='instead of three; one on real people')
    parser.add_argument('--lanes', type=int, default=os.cpu_count(), help='trainings at once, one thread each')
    parser.add_argument('--quick', action='store_true', help='a small one: fewer people, one seed, epsilon 8, untuned')
    parser.add_argument(
        '--papers-blur',
        action='store_true',
        help="with the paper's public view, which can be inverted, in place of the default; docs/accuracy_papers_blur.md",
    )
    parser.add_argument('--mpii', type=Path, metavar='CHECKPOINT', help='use data/mpii, and start from this checkpoint')
    parser.add_argument(
        '--people', type=Path, metavar='FOLDER', help="real people: two sets in MPII's layout, one folder each"
    )
    add_people_sets(parser)
    parser.add_argument(
        '--start', choices=STARTS, default='movenet', help='real people: what training starts from (default movenet)'
    )
    parser.add_argument(
        '--weights', type=Path, metavar='FOLDER', help='real people: folder that holds the weights of --start'
    )
    parser.add_argument(
        '--tuned',
        action=argparse.BooleanOptionalAction,
        help='compare the candidates of each row; by default on synthetic people alone, without --quick',
    )
    parser.add_argument('--out', type=Path, help='folder of results.csv (work_dirs/accuracy...)')
    parser.add_argument('--data', type=Path, default=REPO / 'data/accuracy', help='folder of the synthetic people')
    parser.add_argument('--page', type=Path, help='replace its tables, plot and CSV (in docs; of a part, in --out)')
    args = parser.parse_args(given)
    if args.people and not args.weights:
        parser.error('--people needs --weights: the folder with the weights that --start names')
    for name in args.people_sets if args.people else ():
        if not (args.people / name / 'annotations/mpii_train.json').exists():
            parser.error(
                f"{args.people / name} is not a set in MPII's layout: see --people-sets and tools/convert_people.py"
            )
    fewer_seeds = args.seeds and args.seeds < 3 and not args.people
    of_a_part = args.only or args.epsilons or fewer_seeds or args.quick or args.mpii
    args.out = args.out or REPO / 'work_dirs' / (f'accuracy_people_{args.start}' if args.people else 'accuracy')
    name = 'accuracy_people.md' if args.people else 'accuracy_papers_blur.md' if args.papers_blur else 'accuracy.md'
    args.page = args.page or (args.out if of_a_part else REPO / 'docs') / name
    return args


def main() -> None:
    """Runs the starts first, then what starts from them; each is tuned before, and the page is written after."""
    args = parse_args()
    os.environ['OMP_NUM_THREADS'] = '1'
    benchmark = Benchmark(args)
    names = benchmark.with_starts(args.only or list(benchmark.rows))
    benchmark.needed = benchmark.needed_starts(names)
    starts = [name for name in names if name in benchmark.starts]
    stages = (*([name] for name in starts), [name for name in names if name not in starts])
    for seed, stage in product(range(benchmark.seeds), stages):
        benchmark.run(list(benchmark.tuning_jobs(stage)))
        benchmark.run(list(benchmark.reported_jobs(stage, [seed])))
        write_page(args.page, benchmark)
    print(f'{args.page} and {benchmark.results.path}')


if __name__ == '__main__':
    main()
