"""The accuracy benchmark at its smallest: the order of the methods, and that it continues after an interruption."""

import csv
import shutil
import sys

import accuracy
import pytest
from accuracy_page import gaps, lever_table, main_table, not_run, wide_table, write_page
from accuracy_rows import Row

from tests.support.paths import REPO
from tests.support.processes import run


@pytest.mark.slow
def test_the_order_of_the_methods(tmp_path):
    """Non-private above ours above DP-SGD, at epsilon 8 since there are few people."""
    page = tmp_path / 'accuracy.md'
    page.write_text((REPO / 'docs/accuracy.md').read_text())
    command = [sys.executable, 'tools/benchmarks/accuracy.py', '--quick', '--only', 'dpsgd', 'ours', 'nonprivate']
    command += ['--lanes', '1', '--out', tmp_path / 'out', '--data', tmp_path / 'data', '--page', page]
    for _ in range(2):
        done = run(*command, cwd=REPO, timeout=7200)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = list(csv.DictReader((tmp_path / 'out/results.csv').open()))
        once = ['dpsgd', 'nonprivate', 'ours', 'pretrain', 'publiconly']
        assert sorted(line['row'] for line in lines) == once
    pckh = {line['row']: float(line['pckh']) for line in lines}
    assert pckh['nonprivate'] > pckh['ours'] > pckh['dpsgd'] > pckh['pretrain'], pckh
    assert pckh['ours'] > pckh['publiconly'], pckh
    spent = {line['row']: line['epsilon_spent'] for line in lines}
    assert all(7.9 < float(spent[row]) <= 8.0 for row in ('dpsgd', 'ours')) and spent['nonprivate'] == 'None'
    assert all(line['pckh_other_domain'] for line in lines)
    text = page.read_text()
    assert f'| ours, from public-only on views | {pckh["ours"]:.1f} |' in text
    other = next(line['pckh_other_domain'] for line in lines if line['row'] == 'ours')
    assert f'| ours, from public-only on views | {float(other):.1f} |' in text.partition('## On the other domain')[2]
    assert (tmp_path / 'accuracy.png').exists() and (tmp_path / 'accuracy.csv').exists()


@pytest.mark.parametrize(('name', 'options'), [('accuracy.md', []), ('accuracy_papers_blur.md', ['--papers-blur'])])
def test_the_pages_are_those_of_the_runs(tmp_path, monkeypatch, name, options):
    """Of a view's page, no row that was run under another view alone, and no two rows of one name."""
    monkeypatch.setattr(accuracy, 'make_people', lambda *_: None)
    page = shutil.copy(REPO / 'docs' / name, tmp_path)
    (tmp_path / 'out').mkdir()
    shutil.copy(REPO / 'docs/accuracy.csv', tmp_path / 'out/results.csv')
    given = [*options, '--out', str(tmp_path / 'out'), '--page', str(page)]
    write_page(tmp_path / name, accuracy.Benchmark(accuracy.parse_args(given)))
    text = (tmp_path / name).read_text()
    assert text == (REPO / 'docs' / name).read_text()
    took = text.partition('## What a run takes')[2].partition('<!--')[0].splitlines()
    rows = [line.split('|')[1].strip() for line in took if line.startswith('| ')][2:]
    assert len(rows) > 10 and len({*rows}) == len(rows)
    assert all(text.count(f'| {row.removesuffix(", wide model")} |') > 1 for row in rows)


def test_a_part_of_a_page_with_no_row_of_its_own_is_left_out():
    rows = dict(lever=Row('a lever', 'ours'), wide_ours=Row('ours', 'ours', like='ours'))
    scores = dict(ours={'0': 45.0})
    assert lever_table(rows, lambda name, _: scores.get(name, {}), [0.8]) == ''
    assert wide_table(rows, lambda name, _: scores.get(name, {}), 0.8) == ''
    scores.update(lever={'0': 46.0}, wide_ours={'0': 47.0})
    assert '| a lever | 46.0 |' in lever_table(rows, lambda name, _: scores.get(name, {}), [0.8])
    assert '| ours | 45.0 | 47.0 |' in wide_table(rows, lambda name, _: scores.get(name, {}), 0.8)


def test_a_gap_that_nobody_won_back_has_no_table():
    rows = dict(
        dpsgd=Row('DP-SGD', 'dpsgd_eps08'), ours=Row('ours', 'ours'), nonprivate=Row('all', 'plain', private=False)
    )
    scores = dict(dpsgd={'0': 40.0}, ours={'0': 45.0}, nonprivate={'0': 50.0})
    assert '| ours | DP-SGD | 50 % |' in gaps(rows, lambda name, _: scores[name], [0.8], 'nonprivate')
    assert gaps(rows, lambda *_: {}, [0.8], 'nonprivate') == ''


def test_a_gap_of_real_people_begins_at_the_best_public_only_row():
    rows = dict(
        ours=Row('ours', 'ours'),
        people=Row('people', 'plain', private=False, public_alone=True),
        turned=Row('turned people', 'plain', private=False, public_alone=True),
        views=Row('views', 'plain', private=False),
        nonprivate=Row('all', 'plain', private=False),
    )
    scores = dict(ours={'0': 45.0}, people={'0': 30.0}, turned={'0': 40.0}, views={}, nonprivate={'0': 50.0})
    found = gaps(rows, lambda name, _: scores[name], [0.8], 'nonprivate')
    assert '| ours | turned people | 50 % |' in found and '| people |' not in found
    page = main_table(rows, lambda name, _: scores[name], [0.8])
    assert '| people | 30.0 |' in page and '| views |' not in page
    assert not_run(rows, lambda name, _: scores[name], [0.8]) == 'Not run: *views*.\n'
    scores['turned']['1'], scores['people'] = 20.0, {'0': 39.0}  # a mean of 30, and as good as 40 on the seed of both
    assert '| ours | turned people | 50 % |' in gaps(rows, lambda name, _: scores[name], [0.8], 'nonprivate')
