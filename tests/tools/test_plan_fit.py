"""plan_fit.py: which start a run is compared with, and that the page shows the runs that it says."""

import csv
import json

import plan_fit
import pytest

from tests.support.paths import REPO

SMALL = {'model.backbone': {'_delete_': True, **plan_fit.SMALL}}


def line(row, score, epsilon=None, split='reported', seed=0, **settings):
    settings = {**SMALL, **{key.replace('__', '.'): value for key, value in settings.items()}}
    return dict(
        row=row, epsilon=str(epsilon), seed=str(seed), split=split, settings=json.dumps(settings), pckh=str(score)
    )


def test_a_run_is_compared_with_the_last_start_before_it():
    lines = [
        line('pretrain', 30),
        line('dpsgd', 35, 0.8),
        line('pretrain', 36),
        line('pretrain', 50, seed=1),
        line('dpsgd', 35, 0.8),
        line('ours', 52, 0.8),
        line('publiconly', 51),
        line('wide_dpsgd', 47, 0.8),
        line('wide_pretrain', 41),
    ]
    assert [plan_fit.start_of(lines, number, 2.0) for number in (1, 4, 5, 7)] == [30, 36, 51, 41]
    assert plan_fit.start_of(lines[:2], 1, 2.0) == 30 and plan_fit.start_of(lines[1:2], 0, 2.0) is None


def test_tuning_people_have_scores_of_their_own():
    lines = [
        line('pretrain', 30),
        line('dpsgd', 35, 0.8),
        line('dpsgd', 38, 0.8, split='tuning'),
        line('publiconly', 53, lr=1),
        line('publiconly', 55, split='tuning', lr=1),
        line('publiconly', 59, split='tuning', lr=2),
        line('ours', 58, 0.8, split='tuning'),
    ]
    shift = plan_fit.people_apart(lines)
    assert shift == 2.5  # 3 and 2
    assert plan_fit.start_of(lines, 2, shift) == 32.5  # the start was never scored on them
    assert plan_fit.start_of(lines, 6, shift) == 55  # the same training as the start was


def test_the_numbers_are_those_of_the_choice():
    few = plan_fit.choice_of({**SMALL, 'optim_wrapper.trainable': 'norms+backbone.conv1.*+backbone.layer1.*'})
    assert few == ('norms+first_stage', 13968)
    assert plan_fit.choice_of(SMALL) == ('all', 708512)
    assert plan_fit.choice_of({**SMALL, 'optim_wrapper.projector': dict(rank=25)}) == ('subspace', 25)


@pytest.fixture(scope='module')
def small():
    return list(plan_fit.trials(list(csv.DictReader((REPO / 'docs/plan.csv').open()))))


def test_the_page_shows_the_runs_at_small_epsilons(small, tmp_path):
    page = tmp_path / 'plan.md'
    page.write_text('before <!-- fit -->old<!-- /fit --> after')
    plan_fit.write_page(page, small, small)
    text, published = page.read_text(), (REPO / 'docs/plan.md').read_text()
    assert text.startswith('before ') and text.endswith(' after') and 'old' not in text
    rows = [row for row in text.splitlines() if '| cannot learn |' in row or '| may learn a little |' in row]
    assert rows and all(row in published for row in rows)


def test_learning_ends_where_the_verdict_says(small):
    """The runs that the thresholds were taken from: a gain above LITTLE, a loss where the verdict is 'cannot learn'."""
    assert {run.learned for run in small if run.forecast} == {True}
    assert any(not run.forecast and not run.learned for run in small)
