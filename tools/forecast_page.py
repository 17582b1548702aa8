"""The forecast of tools/plan_budget.py in words, tables and a plot.

Not a tool itself. Must not compute anything but the layout: all figures are in what ``forecast_of`` returns.
"""

import math
from pathlib import Path
from typing import Any

import matplotlib

from mmpose_dp.extras import forecast
from mmpose_dp.privacy.validation import as_given, rounded_up

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

SUBSPACE = 'subspace'  # the coordinates of the configured projector
BETTER = 1.1  # a smaller gain is not worth a change
UNITS = dict(instance='records', image='images', subject='subjects')


def page(found: dict[str, Any]) -> str:
    """The forecast as text."""
    head = (
        f'N {found["num_records"]:,} (one record: one {found["privacy_unit"]}), expected batch {found["expected_batch_size"]:,}, '
        f'{found["steps"]:,} private steps, epsilon {rounded_up(found["epsilon"])}, delta {as_given(found["delta"])} '
        f'({found["accountant"]})\nnoise_multiplier {found["noise_multiplier"]:.4f}; Gaussian DP: mu '
        f'{_or_unknown(found["gdp_mu"])}, of which the steps use {found["mu_of_the_steps"]:.4g} for the signal\n'
    )
    choices = [
        [
            row['trainable'] + (' *' if row['configured'] else ''),
            f'{row["numbers"]:,}',
            f'{row["r"]:.3f} {row["source"]}',
        ]
        + [f'{row["ratio"]:.3g}', f'{row["useful"]:.2g}', row['verdict']]
        for row in found['choices']
    ]
    epochs = [[f'{epoch:.1f}', rounded_up(spent)] for epoch, spent in found['epsilon_by_epoch']]
    batches = [
        [f'{batch["size"]:,}' + (' *' if batch['size'] == found['expected_batch_size'] else '')]
        + [f'{batch["steps"]:,}', f'{batch["noise_multiplier"]:.3f}', f'{batch["strength"] / found["strength"]:.2f}']
        for batch in found['batches']
    ]
    people = [[str(count), 'not computed' if spent is None else rounded_up(spent)] for count, spent in found['people']]
    more, second = found['more_epochs'], found['second_training']
    parts = [
        head,
        'What can be trained (* as configured)\n'
        '  ratio: signal to noise of the whole training, r N mu / sqrt(d). useful: r times the cosine of update and signal',
        _table(['trainable', 'numbers d', 'r', 'ratio', 'useful', 'verdict'], choices),
        *found['advice'],
        '\nEpsilon by private epoch',
        _table(['epoch', 'epsilon spent'], epochs),
        '\nWhich batch, for this epsilon and as many epochs (ratio: times that of the config)',
        _table(['expected batch', 'steps', 'noise_multiplier', 'ratio'], batches),
        best_batch_in_words(found),
        f'\n{more["epochs"]} more epochs: in the same budget noise_multiplier {more["noise_multiplier"]:.4f} and '
        f'{more["gain"]:.2f} times the ratio; with the same noise they spend epsilon '
        f'{rounded_up(more["epsilon_with_the_same_noise"])} in all.',
        '\nPeople with several records',
        _table(['records of one person', 'epsilon'], people),
        *(
            ['  not computed: k times epsilon is beyond any use, and the privacy statement says so too']
            if None in dict(found['people']).values()
            else []
        ),
        f'\nA second training like this one: epsilon {rounded_up(second["epsilon_of_both"])} for both together. If both are to '
        f'stay within the budget: noise_multiplier {second["noise_multiplier_for_one_budget"]:.4f}, and each has '
        f'{second["left_of_the_ratio"]:.2f} times the ratio.',
    ]
    return '\n'.join(parts)


def best_batch_in_words(found: dict[str, Any]) -> str:
    """Which batch is best, and what it was compared with."""
    enough = [batch for batch in found['batches'] if batch['steps'] >= forecast.LEAST_STEPS]
    if not enough:
        return f'Best: {found["best_batch"]:,}, the smallest with nine tenths of the largest ratio.'
    words = (
        f'Best: {found["best_batch"]:,}. Of the batches with {forecast.LEAST_STEPS} steps or more, it is the smallest with nine '
        'tenths of their largest ratio.'
    )
    most = max(batch['strength'] for batch in enough)
    if any(batch['strength'] > most for batch in found['batches'] if batch not in enough):
        words += ' Larger ones have a larger ratio but fewer steps: train more epochs to use them.'
    return words


def advice(found: dict[str, Any]) -> list[str]:
    """The verdict in words, and what to change."""
    rows, own = found['choices'], next(row for row in found['choices'] if row['configured'])
    people = f'{found["num_records"]:,} {UNITS[found["privacy_unit"]]} at epsilon {rounded_up(found["epsilon"], 3)}'
    lines = []
    for meaning in forecast.MEANINGS:
        names = [in_words(row['trainable']) for row in rows if row['verdict'] == meaning]
        if names:
            lines.append(f'With {people}, {meaning}: {", ".join(names)}.')
    whole = next(row for row in rows if row['trainable'] == 'all')
    above, most = found['most_numbers']
    if most is not None and most < whole['numbers']:
        lines.append(
            f'At r = {whole["r"]:.3g}, at most some {_two_digits(above):,} numbers stand above their noise (ratio 1), and '
            f'beyond some {_two_digits(most):,} nothing can learn.'
        )
    lines.append(f'The config trains {in_words(own["trainable"])}, which {own["verdict"]}.')
    best = max(rows, key=lambda row: row['useful'])
    if best['verdict'] == forecast.MEANINGS[2]:
        needed = best['thresholds']['may_learn_a_little'] / best['ratio'] if best['ratio'] else math.inf
        times = (
            f'{needed:.1f} times as many records, or about as much more epsilon' if needed < math.inf else 'a larger r'
        )
        lines.append(
            f'Change: {in_words(best["trainable"])} would need {times}. Without that, train on public data alone.'
        )
    elif not best['configured'] and best['useful'] > BETTER * own['useful']:
        bare = ' without a projector' if own['trainable'].startswith(SUBSPACE) else ''
        lines.append(
            f"Change: optim_wrapper.trainable='{best['trainable']}'{bare} should learn more (useful: {best['useful']:.2g} "
            f'instead of {own["useful"]:.2g}).'
        )
    by_size = {batch['size']: batch for batch in found['batches']}
    now, best_one = by_size.get(found['expected_batch_size']), by_size[found['best_batch']]
    if now is not None and best_one['strength'] > BETTER * now['strength']:
        lines.append(
            f'Change: write train_dataloader.batch_sampler.expected_batch_size={best_one["size"]}: the same epsilon then gives '
            f'{best_one["strength"] / now["strength"]:.1f} times the ratio, in {best_one["steps"]:,} steps.'
        )
    return lines


def in_words(trainable: str) -> str:
    """A choice of ``trainable`` in words."""
    return 'the whole model' if trainable == 'all' else trainable.replace('+', ' + ')


def _two_digits(number: int) -> int:
    """Rounded down to two significant digits."""
    unit = 10 ** max(len(str(number)) - 2, 0)
    return number // unit * unit


def _or_unknown(value: float | None) -> str:
    return 'not bounded' if value is None else f'{value:.4g}'


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Columns of one width each, numbers on the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        lines.append('  ' + '  '.join(cells).rstrip())
    return '\n'.join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Ratio by choice, epsilon by epoch, and ratio by batch."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout='constrained')
    rows = found['choices'][::-1]
    left.barh([row['trainable'] for row in rows], [max(row['ratio'], 1e-4) for row in rows])
    for name, color in (('can_learn', 'black'), ('may_learn_a_little', 'grey')):
        places = [row['thresholds'][name] for row in rows]
        left.plot(places, range(len(rows)), '|', markersize=20, color=color, label=name.replace('_', ' '))
    left.set(xscale='log', xlabel='signal / noise of the whole training')
    left.legend(fontsize=7)
    middle.plot(*zip(*[(0.0, 0.0), *found['epsilon_by_epoch']]), marker='o')
    middle.set(xlabel='private epoch', ylabel='epsilon spent')
    sizes, strengths = zip(*((batch['size'], batch['strength']) for batch in found['batches']))
    right.plot(sizes, [value / found['strength'] for value in strengths], marker='o')
    right.axvline(found['expected_batch_size'], linestyle='--', color='grey', label='as configured')
    right.set(xscale='log', xlabel='expected batch', ylabel='ratio, times that of the config')
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
