"""Where private pictures pay: the best private method beside the best public one, by how many people each side has.

    python tools/benchmarks/value.py --people FOLDER_OF_PEOPLE --weights FOLDER_OF_WEIGHTS

The start is MoveNet. Each cell is a pair of sets with the first people of both, and rows of accuracy.py on it, untuned. Rewrites
the tables and the plot of docs/accuracy_people.md between its marks, and value.csv beside it. An interrupted run continues, and a
run that has ended is not run again. Must not choose settings by the reported people.
"""

import argparse
import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from json import dumps, loads
from pathlib import Path
from statistics import mean

import accuracy
import matplotlib
from accuracy_rows import IN_PROCESS, Row, Settings, Size, adam, schedule
from accuracy_worker import REPO
from people_rows import STARTS, TRAINABLE, add_people_sets, new_set
from performance_page import table, write_between

from mmpose_dp.datasets.mpii_files import write_mpii_split
from mmpose_dp.extras import forecast
from mmpose_dp.privacy.plan import PrivacyPlan

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

MARKS = '<!-- value -->', '<!-- /value -->'
PRIVATE, PUBLIC, EPSILONS = (50, 100, 500, 2000, 7844), (3612, 500, 0), (0.2, 0.8, 2.0, 8.0)
STARTING = ['pretrain', 'public_people', 'public_turned', 'public_mean']
BEST_PUBLIC = 'public_mean'
# the private rows, and how many numbers each trains of MoveNet: two that mix public models, and one that needs none
NUMBERS = {'ours': 130, 'ours_channels': 35_040, 'alone': 28_024}
CHOICES = {'ours': 'experts', 'ours_channels': 'channel_experts'}


@dataclass(frozen=True)
class Cell:
    """How many people there are, and what a private row, the best public one and non-private training reached."""

    public: int
    private: int
    epsilon: float
    row: str
    score: float
    best_public: float
    nonprivate: float
    ratio: float  # of signal to noise, by the forecast of tools/plan_budget.py

    @property
    def gain(self) -> float:
        """Points above what public people alone reach."""
        return self.score - self.best_public

    @property
    def pays(self) -> bool:
        """Whether private training beat what public people alone reach."""
        return self.gain > 0

    @property
    def verdict(self) -> str:
        """What was expected."""
        return forecast.verdict(self.ratio, CHOICES[self.row])

    @property
    def forecast(self) -> bool:
        """Whether it was expected to pay."""
        return self.verdict != 'cannot learn'


def first_people(folder: Path, count: int, out: Path) -> Path:
    """A set with the first ``count`` people of ``folder`` to train on, and all that it tests with; returns ``out``."""
    if not out.exists():
        new_set(folder, out, ('images', 'annotations/mpii_val.json', 'annotations/mpii_gt_val.mat'))
        people = loads((folder / 'annotations/mpii_train.json').read_text())
        write_mpii_split(out, 'train', people[:count])
    return out


def alone(size: Size) -> dict[str, Row]:
    """The rows of a private side that has no public people: MoveNet's features under a new head."""
    settings = {
        **IN_PROCESS,
        'train_dataloader.batch_sampler.expected_batch_size': size.large_batch,
        TRAINABLE: STARTS['movenet'].few,
        **schedule(2 * size.epochs),
    }
    return {
        'alone': Row('DP-SGD, few parameters, without public people', 'dpsgd_eps08', None, settings, tuple(adam(1e-3)))
    }


def ratio(settings: Settings, private: int, epsilon: float, row: str) -> float:
    """Signal over noise of a private row with these settings, with the r that plan_budget.py takes where nobody measured it."""
    batch = settings['train_dataloader.batch_sampler.expected_batch_size']
    plan = PrivacyPlan.calibrate(
        target_epsilon=epsilon,
        method='dpsgd',
        privacy_unit='instance',
        target_delta=1 / 22000,
        num_records=private,
        expected_batch_size=batch,
        steps=settings['train_cfg.max_epochs'] * (private // batch),
        max_grad_norm=1.0,
    )
    return forecast.ratio(plan, forecast.OTHER_R, NUMBERS[row])


class Surface:
    """Runs the cells, each in a folder of its own in ``args.out``."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.seeds = args, range(args.seeds)

    def benchmark(self, private: int, public: int, out: Path) -> accuracy.Benchmark:
        """accuracy.py on the first people of both sets; at least one public person is there, for the score on that domain."""
        people, names = self.args.data / 'sets', (f'private_{private}', f'public_{public}')
        for source, name, count in zip(self.args.people_sets, names, (private, max(public, 1))):
            first_people(self.args.people / source, count, people / name)
        given = ['--people', people, '--people-sets', *names, '--weights', self.args.weights, '--out', out]
        given += ['--lanes', self.args.lanes, '--data', self.args.data / f'{private}_{public}']
        made = accuracy.Benchmark(accuracy.parse_args([str(part) for part in given]))
        made.rows.update(alone(made.size))
        if not public:
            made.rows['nonprivate'] = replace(made.rows['nonprivate'], start=None)
        return made

    def run(self) -> Iterator[Cell]:
        """The cells, of few private people first; those of one pair of sets when all of them have been run."""
        for private, public in product(self.args.private, self.args.public):
            starts = self.args.out / f'public_{public}'
            out = starts / f'private_{private}'
            first = self.benchmark(self.args.private[0], public, starts)
            cell = self.benchmark(private, public, out)
            if public:
                first.needed = {(name, seed) for name, seed in product(STARTING, self.seeds)}
                for name in STARTING:
                    first.run([self.job(first, name, None, seed) for seed in self.seeds])
            for path in starts.glob('start_*.pth'):
                if not (out / path.name).exists():
                    (out / path.name).symlink_to(path)
            names = ['ours', 'ours_channels'] if public else ['alone']
            cell.run([self.job(cell, 'nonprivate', None, seed) for seed in self.seeds])
            cell.run([self.job(cell, *of) for of in product(names, self.args.epsilons, self.seeds)])
            yield from self.cells(first, cell, names, private, public)

    @staticmethod
    def job(cell: accuracy.Benchmark, name: str, epsilon: float | None, seed: int) -> dict:
        """A run of a row, as the results know it."""
        return dict(row=name, epsilon=epsilon, seed=seed, split='reported', settings=dumps(cell.settings(name)))

    def mean(self, benchmark: accuracy.Benchmark, name: str, epsilon: float | None) -> float:
        """The mean score of a row over the seeds."""
        found = [benchmark.results.find(**self.job(benchmark, name, epsilon, seed)) for seed in self.seeds]
        return mean(float(line['pckh']) for line in found if line)

    def cells(
        self, first: accuracy.Benchmark, cell: accuracy.Benchmark, names: list[str], private: int, public: int
    ) -> Iterator[Cell]:
        """One for each epsilon and private row."""
        best_public = self.mean(first, BEST_PUBLIC, None) if public else 0.0
        nonprivate = self.mean(cell, 'nonprivate', None)
        for epsilon, name in product(self.args.epsilons, names):
            score, signal = self.mean(cell, name, epsilon), ratio(cell.settings(name), private, epsilon, name)
            yield Cell(public, private, epsilon, name, score, best_public, nonprivate, signal)


# ---- the page --------------------------------------------------------------------------------------------------------
def better_rows(cells: Sequence[Cell]) -> dict[tuple[int, int, float], Cell]:
    """The better private row, by (public people, private people, epsilon)."""
    found: dict[tuple[int, int, float], Cell] = {}
    for cell in sorted(cells, key=lambda cell: cell.score):
        found[cell.public, cell.private, cell.epsilon] = cell
    return found


def in_words(cell: Cell) -> str:
    """A cell of the table: the score, bold if private pictures pay, which row it is of, and whether the forecast was wrong.

    Without public people there is nothing to compare it with.
    """
    if not cell.public:
        return f'{cell.score:.1f}'
    letter = {'ours': 'l', 'ours_channels': 'c'}[cell.row]
    score = f'**{cell.score:.1f}**' if cell.pays else f'{cell.score:.1f}'
    return f'{score} {letter}' + (' (!)' if cell.pays != cell.forecast else '')


def page_part(cells: Sequence[Cell], epsilons: Sequence[float]) -> str:
    """The table of the better rows, and how often the forecast was right of each verdict."""
    lines, better = [], better_rows(cells)
    for public, private in dict.fromkeys((cell.public, cell.private) for cell in cells):
        mine = [better[public, private, epsilon] for epsilon in epsilons]
        best = f'{mine[0].best_public:.1f}' if public else ''
        lines.append([str(public), str(private), best, *map(in_words, mine), f'{mine[0].nonprivate:.1f}'])
    head = ['public people', 'private people', 'best public-only', *(f'epsilon {e:g}' for e in epsilons), 'non-private']
    return f'{table(head, lines)}\n{forecasts(cells)}'


def forecasts(cells: Sequence[Cell]) -> str:
    """How many runs of private people beside public ones had each verdict, and how many of them paid."""
    lines, tried = [], [cell for cell in cells if cell.public]
    for meaning, of_meaning in groupby(sorted(tried, key=lambda cell: -cell.ratio), lambda cell: cell.verdict):
        mine = list(of_meaning)
        ratios = f'{min(cell.ratio for cell in mine):.2g} to {max(cell.ratio for cell in mine):.2g}'
        paid = sum(cell.pays for cell in mine)
        lines.append([meaning, ratios, str(len(mine)), str(paid), f'{mean(cell.gain for cell in mine):+.1f}'])
    head, words = ['forecast', 'ratio', 'runs', 'of which paid', 'mean gain'], []
    for some, what in ((list(better_rows(tried).values()), 'cells with public people'), (tried, 'runs')):
        right, paid = (sum(map(ask, some)) for ask in (lambda c: c.pays == c.forecast, lambda c: c.pays))
        words.append(f'right in {right} of {len(some)} {what} ("it pays", always, in {paid})')
    return f'{table(head, lines)}\nThe forecast was {" and ".join(words)}.\n'


def plot(cells: Sequence[Cell], epsilons: Sequence[float], path: Path) -> None:
    """What private training adds to public people, a panel for each number of them."""
    counts = sorted({cell.public for cell in cells if cell.public})
    figure, axes = plt.subplots(1, len(counts), figsize=(4 * len(counts), 3), layout='constrained', squeeze=False)
    better = better_rows(cells)
    most = max(abs(cell.gain) for cell in cells if cell.public)
    for axis, public in zip(axes[0], counts):
        rows = sorted({cell.private for cell in cells if cell.public == public})
        values = [[better[public, private, epsilon].gain for epsilon in epsilons] for private in rows]
        axis.imshow(values, cmap='RdBu', vmin=-most, vmax=most, aspect='auto', origin='lower')
        for (y, line), x in product(enumerate(values), range(len(epsilons))):
            color = 'white' if abs(line[x]) > most / 2 else 'black'
            axis.text(x, y, f'{line[x]:+.1f}', ha='center', va='center', color=color)
        axis.set_xticks(range(len(epsilons)), [f'{epsilon:g}' for epsilon in epsilons])
        axis.set_yticks(range(len(rows)), [str(row) for row in rows])
        axis.set(xlabel='epsilon', ylabel='private people', title=f'{public} public people: PCKh gained')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_page(page: Path, cells: Sequence[Cell], epsilons: Sequence[float]) -> None:
    """Rewrites the part between the marks, and the plot and the CSV beside the page."""
    with page.with_name('value.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, list(asdict(cells[0])))
        writer.writeheader()
        writer.writerows(asdict(cell) for cell in cells)
    picture = page.with_name('value.png')
    part = page_part(cells, epsilons)
    if any(cell.public for cell in cells):
        plot(cells, epsilons, picture)
        part += f'\n![What private pictures add]({picture.name})\n'
    write_between(page, MARKS, part)


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--people', type=Path, required=True, metavar='FOLDER', help="two sets in MPII's layout")
    add_people_sets(parser)
    parser.add_argument('--weights', type=Path, required=True, metavar='FOLDER', help="where MoveNet's weights are")
    parser.add_argument('--private', type=int, nargs='+', default=PRIVATE, help='numbers of private people')
    parser.add_argument('--public', type=int, nargs='+', default=PUBLIC, help='numbers of public people')
    parser.add_argument('--epsilons', type=float, nargs='+', default=EPSILONS, help='budgets of the private rows')
    parser.add_argument('--seeds', type=int, default=1, help='seeds of each run (default 1)')
    parser.add_argument('--lanes', type=int, default=os.cpu_count(), help='trainings at once, one thread each')
    parser.add_argument('--out', type=Path, default=REPO / 'work_dirs/value', help='folder of the runs')
    parser.add_argument('--data', type=Path, default=REPO / 'data/value', help='folder of the smaller sets')
    parser.add_argument(
        '--page', type=Path, default=REPO / 'docs/accuracy_people.md', help='page whose table and plot are rewritten'
    )
    args = parser.parse_args()
    for name in ('people', 'weights', 'out', 'data'):
        setattr(args, name, getattr(args, name).resolve())
    return args


def main() -> None:
    """Runs what is missing, and writes the page after each pair of sets."""
    args = parse_args()
    os.environ['OMP_NUM_THREADS'] = '1'
    cells: list[Cell] = []
    for cell in Surface(args).run():
        cells.append(cell)
        if cell.epsilon == args.epsilons[-1]:
            write_page(args.page, cells, args.epsilons)
    print(args.page)


if __name__ == '__main__':
    main()
