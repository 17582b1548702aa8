"""How well the forecasts of tools/plan_budget.py fit the runs of docs/accuracy.csv; rewrites the tables of docs/plan.md.

    python tools/plan_fit.py
    python tools/plan_fit.py --measure work_dirs/accuracy/start_pretrain_seed0.pth   # prints r, on synthetic people

For each private run it computes the ratio of signal to noise as plan_budget.py would (the default r of the choice, the run's own
noise and steps), takes the verdict, and asks whether the run scored better than the public start that it began from. docs/plan.csv
holds runs at far smaller epsilons, made by accuracy.py to find where learning ends. Must not choose anything by these tables: the
thresholds are in mmpose_dp/extras/forecast.py.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
from mmengine.config import Config
from mmpose.registry import MODELS
from mmpose.utils import register_all_modules
from plan_budget import SUBSETS, measured_on, subsets
from trial import trial

from mmpose_dp.datasets.synthetic import make_synthetic_mpii
from mmpose_dp.engine.hooks.preflight import indices_of_parts
from mmpose_dp.extras import forecast
from mmpose_dp.models import choose_trainable, freeze_batch_norm
from mmpose_dp.privacy.plan import PrivacyPlan

REPO = Path(__file__).resolve().parents[1]
MARKS = '<!-- fit -->', '<!-- /fit -->'
RECORDS, DELTA, EPOCH = 8000, 1 / 22000, 'train_cfg.max_epochs'  # of the benchmark (accuracy_rows.py)
# the row that a row starts from, as accuracy_rows.py has it; the others start from the public-only row
STARTS = {
    **dict.fromkeys(
        ('dpsgd', 'dpsgd_paper', 'projected', 'projected_sgd', 'feature', 'hybrid_paper', 'no_views_first'), 'pretrain'
    ),
    'ours_pictures': 'public_pictures',
}
VIEWS = 200  # that the subspace is found on
SMALL = dict(type='ResNet', depth=18, base_channels=16, stem_channels=16, strides=(1, 2, 2, 1), init_cfg=None)
SHARES = {'norms+backbone.conv1.*+backbone.layer1.*': 'norms+first_stage'}  # a pattern that means a named choice


@dataclass(frozen=True)
class Trial:
    """A private run, what was forecast of it, and what came out.

    Attributes:
        row: of the benchmark.
        choice: what is trained, for r.
        numbers: d.
        ratio: signal to noise of the whole training.
        useful: r times the cosine between update and signal.
        score, start: PCKh of the run, and of the start that it began from.
        learning_rate: the run's optimizer and its learning rate, in words.
        noise_first: whether the noised gradient was projected, the paper's order.
        group: runs of one group differ in the choice alone: start, seed, people, view and epsilon.
    """

    row: str
    epsilon: float
    batch: int
    choice: str
    numbers: int
    ratio: float
    useful: float
    score: float
    start: float
    learning_rate: str
    noise_first: bool
    group: tuple

    @property
    def forecast(self) -> bool:
        """Whether it is expected to beat its start."""
        return forecast.verdict(self.ratio) != 'cannot learn'

    @property
    def learned(self) -> bool:
        """Whether it did."""
        return self.score > self.start


# ---- the forecast of a run -------------------------------------------------------------------------------------------
def choice_of(settings: dict) -> tuple[str, int]:
    """What a run trains, for its r, and how many numbers are noised."""
    projector, trainable = settings.get('optim_wrapper.projector'), settings.get('optim_wrapper.trainable', 'all')
    if projector:
        return 'subspace', projector['rank']
    return SHARES.get(trainable, trainable), numbers_of(json.dumps(settings['model.backbone']), trainable)


@cache
def numbers_of(backbone: str, trainable: str) -> int:
    """How many numbers ``trainable`` leaves of the benchmark's model with that backbone."""
    register_all_modules()
    cfg = with_model(Config.fromfile(REPO / 'configs/dp/hrnet_synthetic_dpsgd_eps08.py'), json.loads(backbone))
    model = MODELS.build(cfg.model)
    freeze_batch_norm(model)
    return choose_trainable(model, trainable)


def with_model(cfg: Config, backbone: dict) -> Config:
    """The config with the benchmark's model."""
    cfg.merge_from_dict({'model.backbone': {**backbone, '_delete_': True}})
    sizes = {'model.head.in_channels': 8 * backbone['base_channels'], 'model.head.in_featuremap_size': (4, 4)}
    cfg.merge_from_dict(sizes)
    return cfg


@cache
def plan_for(epsilon: float, batch: int, epochs: int) -> PrivacyPlan:
    """The plan of a run."""
    sizes = dict(num_records=RECORDS, expected_batch_size=batch, steps=epochs * (RECORDS // batch))
    return PrivacyPlan.calibrate(
        target_epsilon=epsilon, method='dpsgd', privacy_unit='instance', max_grad_norm=0.1, target_delta=DELTA, **sizes
    )


def trials(lines: Sequence[dict]) -> Iterator[Trial]:
    """Every private run of the benchmark on synthetic people."""
    shift = people_apart(lines)
    for number, line in enumerate(lines):
        settings = json.loads(line['settings'])
        if line['epsilon'] == 'None' or 'model.backbone' not in settings:
            continue
        start = start_of(lines, number, shift)
        if start is None:
            continue
        choice, numbers = choice_of(settings)
        batch = settings['train_dataloader.batch_sampler.expected_batch_size']
        plan, r = plan_for(float(line['epsilon']), batch, settings[EPOCH]), forecast.default_r(choice)
        ratio = forecast.ratio(plan, r, numbers)
        optimizer = settings['optim_wrapper.optimizer']
        view = settings.get('train_dataloader.dataset.public_view', {}).get('mode', '')
        yield Trial(
            line['row'],
            float(line['epsilon']),
            batch,
            choice,
            numbers,
            ratio,
            forecast.useful(ratio, r),
            float(line['pckh']),
            start,
            f'{optimizer["type"]} {optimizer["lr"]:g}',
            (settings.get('optim_wrapper.projector') or {}).get('order') == 'noise-then-project',
            (line['row'].startswith('wide_'), start, line['seed'], line['split'], view, line['epsilon']),
        )


def people_apart(lines: Sequence[dict]) -> float:
    """How much higher the tuning people score than the reported ones: the mean over runs that have both."""
    keys = ('row', 'epsilon', 'seed', 'settings')
    reported = {
        tuple(line[k] for k in keys): float(line['pckh']) for line in lines[::-1] if line['split'] == 'reported'
    }
    found = [
        float(line['pckh']) - reported[key]
        for line in lines
        if line['split'] == 'tuning' and (key := tuple(line[k] for k in keys)) in reported
    ]
    return mean(found) if found else 0.0


def start_of(lines: Sequence[dict], number: int, shift: float) -> float | None:
    """The score of the weights that run ``number`` started from: the last such run before it, on the same people.

    On the tuning people a start was scored only if it was tuned itself; otherwise it is its reported score plus ``shift``.
    """
    line = lines[number]
    wide, plain = ('wide_', line['row'][5:]) if line['row'].startswith('wide_') else ('', line['row'])
    wanted = dict(row=wide + STARTS.get(plain, 'publiconly'), seed=line['seed'], split='reported')
    found = [(at < number, at, one) for at, one in enumerate(lines) if wanted.items() <= one.items()]
    if not found:
        return None
    before = [one for is_before, _, one in found if is_before]
    start = before[-1] if before else found[0][2]
    if line['split'] == 'reported':
        return float(start['pckh'])
    same = dict(row=start['row'], split='tuning', settings=start['settings'])
    tuned = next((one for one in lines if same.items() <= one.items()), None)
    return float(tuned['pckh']) if tuned else float(start['pckh']) + shift


# ---- the page --------------------------------------------------------------------------------------------------------
def share(found: Sequence[Any], holds: Callable[[Any], bool]) -> str:
    """'12 of 15 (80 %)'."""
    right = sum(map(holds, found))
    return f'{right} of {len(found)} ({100 * right / max(len(found), 1):.0f} %)'


def table(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers on the right."""
    lines = [head, ['---', *['---:'] * (len(head) - 1)], *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n'


def by_row(found: Sequence[Trial]) -> str:
    """What was forecast and what came out, row by row of the benchmark."""
    rows = []
    for name in dict.fromkeys(run.row for run in found):
        mine = [run for run in found if run.row == name]
        ratios = [run.ratio for run in mine]
        span = f'{min(ratios):.2g}' if min(ratios) == max(ratios) else f'{min(ratios):.2g} to {max(ratios):.2g}'
        numbers = ', '.join(f'{n:,}' for n in sorted({run.numbers for run in mine}))
        gain = mean(run.score - run.start for run in mine)
        rows.append([name, str(len(mine)), numbers, span, f'{gain:+.1f}', share(mine, _right)])
    return table(['row', 'runs', 'numbers d', 'ratio', 'mean gain over the start', 'forecast right'], rows)


def _right(run: Trial) -> bool:
    return run.forecast == run.learned


def wrong(found: Sequence[Trial]) -> str:
    """The runs whose forecast was wrong, worst first."""
    rows = [
        [run.row, f'{run.epsilon:g}', str(run.batch), run.learning_rate, f'{run.ratio:.2g}']
        + [f'{run.start:.1f}', f'{run.score:.1f}']
        for run in sorted(found, key=lambda run: run.score - run.start)
        if not _right(run)
    ]
    return table(['row', 'epsilon', 'batch', 'optimizer', 'ratio', 'start', 'run'], rows)


def pairs(found: Sequence[Trial]) -> list[tuple[Trial, Trial]]:
    """Runs that differ in the choice of what is trained (and in what was tuned with it), the one with the higher forecast first."""
    return [
        (one, other)
        for one in found
        for other in found
        if one.group == other.group and one.choice != other.choice and one.useful > other.useful
    ]


def _in_order(pair: tuple[Trial, Trial]) -> bool:
    return pair[0].score > pair[1].score


def write_page(page: Path, found: Sequence[Trial], small: Sequence[Trial]) -> None:
    """Rewrites what is between the marks."""
    small_rows = [
        [run.row, run.choice, f'{run.epsilon:g}', f'{run.numbers:,}', f'{run.ratio:.2g}']
        + [forecast.verdict(run.ratio), f'{run.score - run.start:+.1f}']
        for run in sorted(small, key=lambda run: -run.ratio)
    ]
    tried = pairs(found)
    ours = [pair for pair in tried if not any(run.noise_first for run in pair)]
    parts = [
        f'The verdict is right in **{share(found, _right)}** of the private runs. A forecast that always says "it '
        f'learns" would be right in {share(found, lambda run: run.learned)} too.\n',
        by_row(found),
        'Where it is wrong:\n',
        wrong(found),
        'Far smaller epsilons, where learning ends:\n',
        table(['row', 'trained', 'epsilon', 'numbers d', 'ratio', 'verdict', 'gain over the start'], small_rows),
        'Of two choices from one start, with one epsilon, view and seed, the one with the larger *useful* scored better in '
        f'{share(tried, _in_order)} of the pairs; without the runs that project the noised gradient, in '
        f'{share(ours, _in_order)}.\n',
    ]
    text = page.read_text()
    start, end = (text.index(mark) for mark in MARKS)
    page.write_text(text[: start + len(MARKS[0])] + '\n' + '\n'.join(parts) + text[end:])


# ---- r ---------------------------------------------------------------------------------------------------------------
def measured(start: Path, samples: int, folder: Path) -> str:
    """r of each choice with the weights of ``start``, on public views and on pictures, of synthetic people of the private domain.

    They are declared public here, as nobody could with real ones. The basis of the subspace is from views.
    """
    root = make_synthetic_mpii(folder / 'people', 'private', samples + VIEWS, 2, seed=2, image_size=96)
    cfg = with_model(Config.fromfile(REPO / 'configs/dp/hrnet_synthetic_hybrid_eps08.py'), SMALL)
    others = make_synthetic_mpii(folder / 'others', 'private', samples, 2, seed=3, image_size=96)
    cfg.optim_wrapper.projector = dict(rank=25, preconditioned=True, dtype='bfloat16')
    cfg.train_dataloader.dataset.public_view = dict(type='PublicView', mode='blur')
    cfg.train_dataloader.dataset.private.data_root = f'{root}/'
    cfg.train_dataloader.dataset.public = dict(cfg.train_dataloader.dataset.private, data_root=f'{others}/')
    cfg.train_dataloader.batch_sampler.expected_batch_size = 32
    cfg.merge_from_dict({'train_dataloader.num_workers': 0, 'train_dataloader.persistent_workers': False})
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.load_from = str(start)
    register_all_modules()
    runner = trial(cfg, str(folder / 'work'))
    runner.load_or_resume()
    found = subsets(runner.model, list(SUBSETS), 8)
    names = {name: keys for name, (_, keys) in found.items()}
    parts = dict(indices_of_parts(runner.train_dataloader.dataset))
    views, pictures = parts['public_view'], parts['public']
    fitted = list(views[:VIEWS])
    tried = [measured_on(runner, names, 'all', fitted, list(chosen)) for chosen in (views[VIEWS:], pictures)]
    rows = [[name, *(f'{r[name]:.3f}' for r in tried)] for name in tried[0]]
    return table(['r', 'on public views', 'on pictures'], rows)


def main() -> None:
    """Reads the runs, rewrites the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--page', type=Path, default=REPO / 'docs/plan.md', help='whose tables are replaced')
    parser.add_argument('--measure', type=Path, metavar='START', help='a start of accuracy.py: prints its r instead')
    parser.add_argument('--samples', type=int, default=400, help='people that r is measured on')
    args = parser.parse_args()
    if args.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(measured(args.measure, args.samples, Path(folder)))
        return
    lines, small = (list(csv.DictReader((REPO / f'docs/{name}.csv').open())) for name in ('accuracy', 'plan'))
    write_page(args.page, list(trials(lines)), list(trials(small)))
    print(args.page)


if __name__ == '__main__':
    main()
