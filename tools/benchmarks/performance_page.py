"""The tables and the plot of docs/performance.md, from the results of performance.py. Must not measure anything."""

import re
from collections.abc import Iterable
from pathlib import Path

from matplotlib import pyplot as plt

MARKS = '<!-- benchmark -->', '<!-- /benchmark -->'


def short_name(config: str) -> str:
    """The model in a config's file name."""
    return re.sub(r'^td-hm_|(_mpii)?_hybrid.*', '', Path(config).stem)


def cell(result: dict) -> str:
    """Time and memory of a method as multiples of the plain step's."""
    if 'failed' in result:
        return 'does not run'
    low, high = result['spread']
    return f'{result["time"]:.2f} x ({low:.2f} to {high:.2f}), {result["memory"]:.2f} x'


def write_between(page: Path, marks: tuple[str, str], part: str) -> None:
    """Replaces what stands between two marks of a page; they are added at the end of a page that has none."""
    text = page.read_text() if page.exists() else ''
    if marks[0] not in text:
        text += '\n'.join(marks) + '\n'
    begin, end = (text.index(mark) for mark in marks)
    page.write_text(f'{text[: begin + len(marks[0])]}\n{part}{text[end:]}')


def table(head: Iterable[str], rows: Iterable[Iterable[str]], texts: int = 1) -> str:
    """A Markdown table, whose first ``texts`` columns are words and the others numbers."""
    head = list(head)
    lines = [head, ['---'] * texts + ['---:'] * (len(head) - texts), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n'


def _plain(result: dict) -> str:
    return f'{1000 * result["plain_seconds"]:.0f} ms, {result["plain_bytes"] / 1e9:.2f} GB'


def _models(found: dict) -> str:
    models = list(dict.fromkeys(short_name(config) for config, _ in found))
    by_model = {(short_name(config), method): result for (config, method), result in found.items()}
    methods = list(dict.fromkeys(method for _, method in found))
    first = [next((r for (m, _), r in by_model.items() if m == model and 'failed' not in r), None) for model in models]
    rows = [['plain step, per image', *('' if r is None else _plain(r) for r in first)]]
    for method in methods:
        every = (by_model.get((model, method)) for model in models)
        rows.append([method, *('' if r is None else cell(r) for r in every)])
    why = {(m, r['failed'].split('. ')[0]) for (_, m), r in found.items() if 'failed' in r}
    notes = [f'- {method} does not run on some: {reason}' for method, reason in sorted(why)]
    return table(['method', *models], rows) + '\n' + '\n'.join(notes) + '\n'


def _growth(found: list[dict], key: str, head: str) -> str:
    values = sorted({r[key] for r in found})
    rows = []
    for method in dict.fromkeys(r['method'] for r in found):
        mine = {r[key]: r for r in found if r['method'] == method}
        rows.append(
            [f'{method}, {short_name(found[0]["config"])}', *(cell(mine[v]) if v in mine else '' for v in values)]
        )
        rows.append(['', *(_absolute(mine[v]) if v in mine else '' for v in values)])
    return table([head, *map(str, values)], rows)


def _absolute(result: dict) -> str:
    return '' if 'failed' in result else f'{1000 * result["seconds"]:.1f} ms, {result["bytes"] / 1e9:.2f} GB'


TITLES = {
    'samples': 'Samples in memory at once',
    'rank': "The projector's rank",
    'batch': 'Expected batch, with a fixed number of samples in memory, each in its own process',
    'processes': 'Processes that share a batch, one core each',
    'basis': 'Public records from which a basis is found: preconditioned and of rank 25 at most, or Kronecker coordinates',
}
KEYS = {'batch': 'expected_batch_size', 'basis': 'expected_batch_size'}
HEADS = {**KEYS, 'basis': 'public records'}


def write_page(page: Path, suites: dict[str, list[dict]], results: list[dict]) -> None:
    """Rewrites what is between the marks of the page, and the plot beside it, for each machine in the results."""
    parts = []
    for machine in dict.fromkeys(r['machine'] for r in results):
        mine = [r for r in results if r['machine'] == machine]
        steps = sorted({r['steps'] * r.get('rounds', 1) for r in mine})
        taken = ' to '.join(map(str, dict.fromkeys((steps[0], steps[-1]))))
        version = f'torch {mine[-1]["torch"]}, opacus {mine[-1]["opacus"]}, medians of {taken} steps'
        parts.append(
            f'## {machine}\n\n`python tools/benchmarks/performance.py` (`--steps`, 3 by default), {version}.\n'
        )
        for suite, jobs in suites.items():
            found = [r for r in mine if any(_same(job, r) for job in jobs)]
            if not found:
                continue
            if suite == 'models':
                parts.append(_models({(r['config'], r['method']): r for r in found}))
                plot = page.with_suffix('.png') if len(parts) < 3 else page.with_suffix(f'.{len(parts)}.png')
                _draw(found, plot, machine)
                parts.append(f'![Time and memory beside the plain step]({plot.name})\n')
            else:
                key, head = KEYS.get(suite, suite), HEADS.get(suite, suite)
                standard = [r for r in mine if any(_same(r, job, key) for job in jobs)]
                parts.append(f'### {TITLES[suite]}\n\n{_growth(standard, key, head)}')
    write_between(page, MARKS, '\n'.join(parts))


def _same(one: dict, other: dict, *but: str) -> bool:
    keys = {'config', 'method', 'samples', 'expected_batch_size', 'rank', 'device', 'threads', 'processes'} - {*but}
    return all(one[key] == other[key] for key in keys)


def _draw(found: list[dict], path: Path, machine: str) -> None:
    models = list(dict.fromkeys(r['config'] for r in found))
    methods = list(dict.fromkeys(r['method'] for r in found))
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    height = 0.8 / len(models)
    for axis, key in zip(axes, ('time', 'memory')):
        for i, model in enumerate(models):
            values = [
                next((r.get(key, 0) for r in found if (r['config'], r['method']) == (model, m)), 0) for m in methods
            ]
            axis.barh([y + i * height for y in range(len(methods))], values, height, label=short_name(model))
        axis.axvline(1, color='black', linewidth=1)
        axis.set_yticks([y + 0.4 for y in range(len(methods))], methods)
        axis.set_xlabel(f'{key}, times the plain step')
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False)
    figure.suptitle(machine, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
