"""The tables and the plot of docs/accuracy.md, from the results of accuracy.py. Must not run anything."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use('Agg')
from accuracy_rows import Row
from matplotlib import pyplot as plt
from performance_page import table, write_between

TOPS, LOWS = ('nonprivate_pictures', 'nonprivate'), ('dpsgd_paper', 'dpsgd', 'publiconly', 'public_pictures')
LEVERS = (
    '## What each lever brings\n\n'
    '*The same* is *in a subspace of rank 100, SGD* with one change, from the same start: compare with that row.\n'
)

Rows = dict[str, Row]
Scores = Callable[[str, float | None], dict[str, float]]  # of a row at an epsilon, by seed


def cell(found: dict[str, float]) -> str:
    """Mean and spread over seeds."""
    values = list(found.values())
    if not values:
        return ''
    return f'{mean(values):.1f}' + (f' +- {stdev(values):.1f}' if len(values) > 1 else '')


def recovered(value: dict[str, float], low: dict[str, float], high: dict[str, float]) -> str:
    """(value - low) / (high - low) of the means over the seeds that all three have, in percent."""
    shared = value.keys() & low.keys() & high.keys()
    ours, bottom, top = (mean(found[seed] for seed in shared) if shared else 0.0 for found in (value, low, high))
    return f'{100 * (ours - bottom) / (top - bottom):.0f} %' if top > bottom else ''


def row_cells(name: str, row: Row, scores: Scores, epsilons: list[float]) -> list[str]:
    """A row's mean and spread at each epsilon; empty texts where it was not run."""
    return [cell(scores(name, epsilon if row.private else None)) for epsilon in epsilons]


def main_table(rows: Rows, scores: Scores, epsilons: list[float]) -> str:
    """PCKh of each row at each epsilon, without the rows that were not run."""
    lines = []
    for name, row in rows.items():
        cells = row_cells(name, row, scores, epsilons)
        if any(cells):
            lines.append([row.text, *cells])
    return table(['mean PCKh@0.5', *(f'epsilon {epsilon}' for epsilon in epsilons)], lines)


def not_run(rows: Rows, scores: Scores, epsilons: list[float]) -> str:
    """A sentence with the rows that were not run; empty if there are none."""
    missing = [f'*{row.text}*' for name, row in rows.items() if not any(row_cells(name, row, scores, epsilons))]
    return f'Not run: {"; ".join(missing)}.\n' if missing else ''


def bottoms(rows: Rows, scores: Scores) -> list[str]:
    """The rows at which a gap begins. On real people, of many public-only rows, only the best is one of them.

    Their means are compared over the seeds that all of them have: one good seed is not better than a good mean.
    """
    lows = [low for low in LOWS if low in rows]
    if not any(row.public_alone for row in rows.values()):
        return lows
    public = [name for name, row in rows.items() if not row.private and name not in TOPS and scores(name, None)]
    shared = set.intersection(*(set(scores(name, None)) for name in public)) if public else set()
    best = sorted(public, key=lambda name: -mean(scores(name, None)[seed] for seed in shared))[:1] if shared else []
    return [low for low in lows if rows[low].private] + best


def gaps(rows: Rows, scores: Scores, epsilons: list[float], top: str) -> str:
    """How much of each gap to ``top`` every private row recovers; rows that recover nothing at any epsilon are left out.

    Empty if there are none.
    """
    lines = []
    lows = {rows[low].text: low for low in bottoms(rows, scores)}
    for name, row in rows.items():
        if not row.private:
            continue
        for text, low in lows.items():
            if name == low:
                continue
            at = [(e, scores(low, e if rows[low].private else None)) for e in epsilons]
            cells = [recovered(scores(name, e), found, scores(top, None)) for e, found in at]
            if any(cell and not cell.startswith('-') for cell in cells):
                lines.append([row.text, text, *cells])
    head = [f'of the gap to {rows[top].text}, won back', 'the gap begins at']
    return table([*head, *(f'epsilon {epsilon}' for epsilon in epsilons)], lines, texts=2) if lines else ''


def wide_table(wide: Rows, scores: Scores, epsilon: float) -> str:
    """PCKh of each row on the wide model, beside the small one's; empty if none was run."""
    lines = []
    for name, row in wide.items():
        at = epsilon if row.private else None
        if scores(name, at):
            lines.append([row.text, cell(scores(str(row.like), at)), cell(scores(name, at))])
    return table([f'mean PCKh@0.5, epsilon {epsilon}', 'small model', 'wide model'], lines) if lines else ''


def lever_table(levers: Rows, scores: Scores, epsilons: list[float]) -> str:
    """The effect of each single change; empty if none was run."""
    lines = [['ours', *(cell(scores('ours', epsilon)) for epsilon in epsilons)]]
    for name, row in levers.items():
        if any(scores(name, epsilon) for epsilon in epsilons):
            lines.append([row.text, *(cell(scores(name, epsilon)) for epsilon in epsilons)])
    return table(['mean PCKh@0.5', *(f'epsilon {epsilon}' for epsilon in epsilons)], lines) if lines[1:] else ''


def in_words(settings: dict) -> str:
    """The values of a candidate, for a table."""
    parts = [v if isinstance(v, dict) else {k.rpartition('.')[2]: v} for k, v in settings.items()]
    hidden = ('_delete_', 'val_interval', 'param_scheduler')
    return ', '.join(f'{k} {v}' for part in parts for k, v in part.items() if k not in hidden) or 'as it is'


def tuning(benchmark: Any) -> str:
    """What was tried for each row on the tuning people, the best first."""
    lines = []
    for name, row in benchmark.rows.items():
        tried = [(benchmark.tuned(name, candidate), candidate) for candidate in row.candidates]
        found = [(float(line['pckh']), in_words(candidate)) for line, candidate in tried if line is not None]
        lines += [[row.text, text, f'{pckh:.1f}'] for pckh, text in sorted(found, reverse=True)]
    return (
        table(['row', 'tried', 'PCKh, tuning people, one seed'], lines) if lines else 'No candidates were compared.\n'
    )


def seconds_table(benchmark: Any, seconds: Scores, epsilons: list[float]) -> str:
    """Mean seconds of a run of each row on the page, training and scoring, on one thread."""
    lines = []
    for name, row in benchmark.rows.items():
        took = [x for e in (epsilons if row.private else [None]) for x in seconds(name, e).values()]
        if took:
            lines.append([f'{row.text}, wide model' if name in benchmark.wide else row.text, f'{mean(took):.0f}'])
    return table(['row', 'seconds per run'], lines)


def plot(rows: Rows, scores: Scores, epsilons: list[float], path: Path) -> None:
    """PCKh against epsilon, with the spread over seeds."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for name, row in rows.items():
        if not row.private:
            values = list(scores(name, None).values())
            if values:
                axis.axhline(mean(values), linestyle='--', color='grey', linewidth=1)
                axis.annotate(row.text, (epsilons[-1], mean(values)), fontsize=7, va='bottom', ha='right')
            continue
        points = [(epsilon, values) for epsilon in epsilons if (values := list(scores(name, epsilon).values()))]
        if points:
            spread = [stdev(v) if len(v) > 1 else 0.0 for _, v in points]
            axis.errorbar(
                [e for e, _ in points], [mean(v) for _, v in points], spread, marker='o', capsize=3, label=row.text
            )
    axis.set(xlabel='epsilon', ylabel='mean PCKh@0.5')
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_page(page: Path, benchmark: Any) -> None:
    """Rewrites the part between the marks, and the plot and the CSV beside the page.

    accuracy.csv holds the runs on synthetic people of every page. A page of real people has marks, a plot and a CSV per start.
    """
    results = benchmark.results
    start = benchmark.page_part
    picture = page.with_name(f'{page.stem}{start}.png')

    def scores(name: str, epsilon: float | None, kept: str = 'pckh') -> dict[str, float]:
        try:
            settings = json.dumps(benchmark.settings(name))
        except ValueError:  # not tuned yet
            return {}
        mine = dict(row=name, epsilon=str(epsilon), split='reported', settings=settings)
        found = [r for r in results.lines if mine.items() <= r.items() and r[kept]]
        # the first of two: if a start was run again because its checkpoint was lost, others started from the first
        return {r['seed']: float(r[kept]) for r in reversed(found)}

    epsilons = sorted(benchmark.epsilons)
    levers = lever_table(benchmark.levers, scores, epsilons)
    wide = wide_table(benchmark.wide, scores, benchmark.size.epsilons[0])
    level = '###' if start else '##'  # a page of real people has one part per start
    parts = [
        main_table(benchmark.table, scores, epsilons),
        not_run(benchmark.table, scores, epsilons),
        f'![PCKh against epsilon]({picture.name})\n',
        *(gaps(benchmark.table, scores, epsilons, top) for top in TOPS if top in benchmark.table),
        f'{level} On the other domain\n',
        main_table(benchmark.table, partial(scores, kept='pckh_other_domain'), epsilons),
        *([LEVERS, levers] if levers else []),
        *(['## On a model of millions of parameters\n', wide] if wide else []),
        f'{level} What was tried\n',
        tuning(benchmark),
        f'{level} What a run takes\n',
        seconds_table(benchmark, partial(scores, kept='seconds'), epsilons),
    ]
    plot(benchmark.table, scores, epsilons, picture)
    page.with_name(f'{page.stem}{start}.csv' if start else 'accuracy.csv').write_text(results.path.read_text())
    marks = f'<!-- accuracy{start} -->', f'<!-- /accuracy{start} -->'
    write_between(page, marks, '\n'.join(part for part in parts if part))
