"""The GPU part of docs/performance.md, with its bars, from what gpu.py measured. Must not measure anything."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from performance_page import short_name, table
from performance_peers import PEERS
from performance_worker import PLAIN

PLAIN_BF16 = 'plain, bfloat16'
TWINS = {'dpsgd, bfloat16': PLAIN_BF16}  # what a method is compared with, if not the plain step
TIME = {'dpsgd': 1.15, 'hybrid': 1.30, 'dpsgd, bfloat16': 1.15}  # at most, times the plain step's
MEMORY = {'dpsgd': 1.20, 'hybrid': 1.60}
PEER_TIME = 2.0  # at least, times ours
ERRORS = {'float32': 1e-5, 'TF32': 0.1, 'bfloat16': 0.1}  # with TF32 and bfloat16 what the replay allows
PVALUE, NOISE_SHARE, EPOCH = 1e-4, 0.03, 1.4


@dataclass
class Results:
    """What was measured; empty where it was not."""

    speed: dict[tuple[str, str, int], dict] = field(default_factory=dict)  # by config, method and samples
    errors: dict[str, dict[str, float | str]] = field(default_factory=dict)  # by config and precision
    noise: dict[str, float] = field(default_factory=dict)
    refused: bool | None = None
    epoch: dict[str, float] = field(default_factory=dict)

    def ratio(self, config: str, method: str, samples: int, key: str) -> float | None:
        """A method's 'seconds' or 'bytes' as a multiple of its plain step's."""
        one, plain = (self.speed.get((config, m, samples), {}) for m in (method, TWINS.get(method, PLAIN)))
        return one[key] / plain[key] if one.get(key) and plain.get(key) else None


def verdicts(results: Results) -> Iterator[tuple[str, str, str, str]]:
    """What is asked, its bar, what was found, and whether that is 'met' or 'MISSED'."""
    yield from _speed_verdicts(results)
    for config, errors in results.errors.items():
        for name, found in errors.items():
            met = not isinstance(found, str) and found <= ERRORS[name]
            shown = found if isinstance(found, str) else f'{found:.1e}'
            yield f'error, {name}, {short_name(config)}', f'<= {ERRORS[name]:g}', shown, _word(met)
    step = next((r['seconds'] for (_, m, _), r in results.speed.items() if m == 'dpsgd' and 'seconds' in r), None)
    if noise := results.noise:
        p = noise['pvalue']
        yield 'noise, Kolmogorov-Smirnov p', f'> {PVALUE:g}', f'{p:.3g}', _word(p > PVALUE)
        if step:
            share = noise['seconds'] / step
            yield 'noise, share of a step', f'<= {NOISE_SHARE:.0%}', f'{share:.1%}', _word(share <= NOISE_SHARE)
    if results.refused is not None:
        found = 'refused' if results.refused else 'NOT refused'
        yield 'records that begin to mix', 'refused', found, _word(results.refused)
    if results.epoch:
        ratio = results.epoch['private'] / results.epoch['plain']
        found = f'{ratio:.2f} x, {results.epoch["waiting"]:.0%} waiting for data'
        yield 'an epoch of private steps', f'<= {EPOCH} x', found, _word(ratio <= EPOCH)


def _speed_verdicts(results: Results) -> Iterator[tuple[str, str, str, str]]:
    for (config, method, samples), found in results.speed.items():
        where = f'{short_name(config)}, {samples} samples'
        if method in TIME and 'failed' in found:
            yield f'{method}, {where}', 'runs', found['failed'], _word(False)
        for what, key, bars in (('time', 'seconds', TIME), ('memory', 'bytes', MEMORY)):
            ratio = results.ratio(config, method, samples, key) if method in bars else None
            if ratio is not None:
                yield (
                    f'{what}, {method}, {where}',
                    f'<= {bars[method]} x',
                    f'{ratio:.2f} x',
                    _word(ratio <= bars[method]),
                )
        ours = results.speed.get((config, 'dpsgd', samples), {})
        if method in PEERS and found.get('seconds') and ours.get('seconds'):
            ratio = found['seconds'] / ours['seconds']
            yield f'time of {method}, {where}', f'>= {PEER_TIME} x ours', f'{ratio:.2f} x', _word(ratio >= PEER_TIME)


def _word(met: bool) -> str:
    return 'met' if met else 'MISSED'


def cell(results: Results, config: str, method: str, samples: int) -> str:
    """Time and memory of a method as multiples of its plain step's; milliseconds per image for a plain step."""
    one = results.speed.get((config, method, samples), {})
    if 'seconds' not in one:
        return 'does not run' if one else ''
    absolute = f'{1000 * one["seconds"] / samples:.2f} ms, {one["bytes"] / 1e9:.2f} GB'
    time, memory = (results.ratio(config, method, samples, key) for key in ('seconds', 'bytes'))
    if method in (PLAIN, PLAIN_BF16) or time is None:
        return absolute
    return f'{time:.2f} x' + ('' if memory is None else f', {memory:.2f} x')


def page_of(results: Results, methods: Sequence[str], precisions: Sequence[str], card: str) -> str:
    """The Markdown between the marks."""
    parts = [f'## {card}\n\n`python tools/benchmarks/gpu.py`, torch {torch.__version__}. Time per image and memory.\n']
    configs = list(dict.fromkeys(config for config, _, _ in results.speed))
    for samples in dict.fromkeys(samples for _, _, samples in results.speed):
        rows = [[m, *(cell(results, c, m, samples) for c in configs)] for m in methods]
        parts.append(f'### {samples} samples\n\n' + table(['method', *map(short_name, configs)], rows))
    if results.errors:
        head = ['model', *precisions]
        rows = [[short_name(c), *(_error(errors[p]) for p in precisions)] for c, errors in results.errors.items()]
        parts.append('### Difference from single records in float64\n\n' + table(head, rows))
    parts.append('### Bars\n\n' + table(['what', 'bar', 'found', ''], verdicts(results)))
    failed = {f'- {m} on {short_name(c)}: {r["failed"]}' for (c, m, _), r in results.speed.items() if 'failed' in r}
    return '\n'.join(parts) + ('\n' + '\n'.join(sorted(failed)) + '\n' if failed else '')


def _error(found: float | str) -> str:
    return found if isinstance(found, str) else f'{found:.1e}'
