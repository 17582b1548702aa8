"""plan_budget.py: the plan of the config as training makes it, without a data set too, r on public samples, and what it refuses."""

import json
import math
from types import SimpleNamespace

import plan_budget
import pytest
import torch
from forecast_page import best_batch_in_words
from mmpose.registry import MODELS

from mmpose_dp.engine.training_settings import out_of_subspace
from mmpose_dp.extras import forecast
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.statement import build_statement
from tests.support.paths import REPO
from tests.support.runs import unvalidated


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('plan')


@pytest.fixture(scope='module', autouse=True)
def _quick():
    """Each figure once, but for fewer batch sizes and people."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, '_RATES', (8,))
        patch.setattr(forecast, 'PEOPLE', (1,))
        yield


@pytest.fixture
def plan(call, synthetic, folder):
    """plan(method, *arguments, **options): the tool's exit status and output for a tiny config, its JSON in ``found``."""

    def planned(method, *arguments, **options):
        small = dict(default_hooks__privacy_budget__target_epsilon=0.5)  # whose noise is found quickly
        cfg = unvalidated(synthetic, folder / 'work', method, **{**small, **options})
        cfg.dump(folder / 'own.py')
        done = call(plan_budget, folder / 'own.py', '--json', folder / 'plan.json', *arguments)
        done.found = json.loads((folder / 'plan.json').read_text()) if done.returncode == 0 else None
        return done

    return planned


def row(done, trainable):
    return next(row for row in done.found['choices'] if row['trainable'] == trainable)


def test_the_records_of_the_data_set_are_counted(plan, folder):
    done = plan('dpsgd', '--plot', folder / 'plan.png', '--r', '0.2')
    assert done.returncode == 0, done.stderr
    assert done.found['num_records'] == 40 and done.found['steps'] == 12 and 0.49 < done.found['epsilon'] <= 0.5
    whole = row(done, 'all')
    assert whole['configured'] and whole['r'] == 0.2 and whole['source'] == 'given'
    sigma, steps, size = (done.found[key] for key in ('noise_multiplier', 'steps', 'expected_batch_size'))
    assert whole['ratio'] == pytest.approx(0.2 * size * math.sqrt(steps) / sigma / math.sqrt(whole['numbers']))
    assert row(done, 'norms')['numbers'] < row(done, 'norms+first_stage')['numbers'] < whole['numbers']
    assert (folder / 'plan.png').read_bytes()[:4] == b'\x89PNG'
    for words in ('epsilon spent', 'expected batch', '10 more epochs', 'records of one person', 'A second training'):
        assert words in done.stdout
    assert "Careful: the ratio does not see that optim_wrapper.trainable='" in done.stdout  # no load_from
    assert 'head (' in done.stdout and 'at random weights that nothing trains' in done.stdout
    assert f'{whole["numbers"]:,}' in done.stdout and 'The config trains the whole model, which' in done.stdout


@pytest.mark.parametrize('trainable', ['experts', 'channel_experts'])
def test_both_ways_to_mix_experts_are_compared(plan, synthetic, folder, trainable):
    model = MODELS.build(unvalidated(synthetic, folder / 'work', 'dpsgd').model)
    torch.save(model.state_dict(), folder / 'turned.pth')
    done = plan('dpsgd', optim_wrapper__trainable=trainable, optim_wrapper__experts=[str(folder / 'turned.pth')])
    assert done.returncode == 0, done.stderr
    layers, channels = row(done, 'experts'), row(done, 'channel_experts')
    assert 10 < layers['numbers'] < channels['numbers'] < row(done, 'all')['numbers']
    assert row(done, trainable)['configured'] and not row(done, 'norms')['configured']
    for mixing in (layers, channels):  # they need more than weights do
        assert mixing['thresholds']['can_learn'] > row(done, 'all')['thresholds']['can_learn']
        assert mixing['verdict'] == forecast.verdict(mixing['ratio'], mixing['trainable'])


def test_without_a_data_set(plan):
    """Of 75 subjects, as a hospital has: every person is one record."""
    options = dict(train_dataloader__dataset__privacy_unit='subject', train_dataloader__dataset__subjects='subject_id')
    missing = dict(train_dataloader__dataset__private__ann_file='nowhere.json')
    done = plan('dpsgd', '--subjects', '75', '--num-records', '5000', **options, **missing)
    assert done.returncode == 0, done.stderr
    assert done.found['num_records'] == 75 and 'With 75 subjects at epsilon 0.5' in done.stdout
    assert done.found['people'] == [[1, done.found['epsilon']]]
    records = plan('dpsgd', '--subjects', '20', '--num-records', '40', **missing)
    assert [count for count, _ in records.found['people']] == [1, 2]  # 40 records of 20 people: two each
    assert records.found['people'][1][1] > records.found['epsilon']


def test_a_budget_too_small_for_anything_says_what_it_takes(plan):
    done = plan('dpsgd', '--r', '0.01', default_hooks__privacy_budget__target_epsilon=0.05)
    assert {row['verdict'] for row in done.found['choices']} == {'cannot learn'}
    assert 'times as many records' in done.stdout and 'train on public data alone' in done.stdout


def test_r_is_measured_on_public_samples(synthetic, folder):
    cfg = unvalidated(
        synthetic,
        folder / 'measured',
        'hybrid',
        load_from=str(folder / 'start.pth'),
        default_hooks__public_data__num_samples=12,
    )
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'start.pth')
    found = choices(cfg, folder / 'trial', measure=24)
    assert {choice.source for choice in found.values()} == {'measured'}
    assert all(0 <= choice.r <= 1 for choice in found.values()) and found['all'].r > 0
    assert found['subspace of rank 6'].configured and found['subspace of rank 6'].numbers == 6
    assert not (folder / 'measured').exists()
    cfg.optim_wrapper.projector = dict(type='KroneckerProjector', rank=9, width=2)
    found = choices(cfg, folder / 'trial', measure=24)
    assert found['subspace of rank 9'].numbers == 9 and 0 <= found['subspace of rank 9'].r <= 1
    with pytest.raises(PrivacyError, match='needs 1012 public samples and train_dataloader.dataset has 40'):
        choices(cfg, folder / 'trial', measure=1000)


def choices(cfg, folder, **arguments):
    args = SimpleNamespace(**{**dict(r=None, measure=None), **arguments})
    return {choice.trainable: choice for choice in plan_budget.choices_of(cfg, args, str(folder))}


def test_an_optimizer_that_leaves_the_subspace_is_named(synthetic, synthetic_public, folder):
    cfg = unvalidated(synthetic, folder / 'leaves', 'projected', public_root=synthetic_public)
    assert out_of_subspace(cfg) == []  # of the recipe
    for kind in ('AdamW', 'NAdam', 'RMSprop', 'Adagrad', torch.optim.Adam):
        cfg.optim_wrapper.optimizer = dict(type=kind, lr=1e-3)
        (found,) = out_of_subspace(cfg)
        assert f'optim_wrapper.optimizer is {getattr(kind, "__name__", kind)}, beside optim_wrapper.projector' in found
        assert found.endswith("recipe 'projected': optimizer=dict(type='SGD', lr=0.2, momentum=0.9)")
    cfg.optim_wrapper.projector.preconditioned = True
    assert out_of_subspace(cfg)[0].endswith("recipe 'hybrid': optimizer=dict(type='SGD', lr=25, momentum=0.9)")
    cfg.optim_wrapper.projector = dict(type='KroneckerProjector')
    cfg.optim_wrapper.max_grad_norm = 5e-3  # the recipe's: a step is as long as the rate times this norm
    assert "recipe 'kronecker': optimizer=dict(type='SGD', lr=10," in out_of_subspace(cfg)[0]
    cfg.optim_wrapper.projector = None
    assert out_of_subspace(cfg) == []


def test_lora_is_counted_where_it_is_configured(synthetic, folder):
    cfg = unvalidated(synthetic, folder / 'lora', optim_wrapper__trainable='lora+norms', optim_wrapper__lora_rank=2)
    found = choices(cfg, folder / 'lora')
    assert found['lora+norms'].configured and found['lora+norms'].numbers > found['norms'].numbers
    assert found['lora+norms'].source == 'default'


@pytest.mark.parametrize(
    ('method', 'arguments', 'options', 'message'),
    [
        ('dpsgd', ['--r', '1.5'], {}, 'r=1.5 must be between 0 and 1'),
        ('dpsgd', ['--num-records', '5'], {}, 'must be between 1 and the number of private records, 5'),
        ('dpsgd', ['--num-records', '0'], {}, '--num-records'),
        ('dpsgd', ['--subjects', '50'], {}, '--subjects 50 must be between 1 and the number of records, 40'),
        ('dpsgd', ['--num-records', '9'], dict(train_dataloader__dataset__privacy_unit='subject'), 'give --subjects'),
        ('dpsgd', ['--measure'], {}, 'set load_from'),
        ('dpsgd', [], dict(train_dataloader__dataset__private__ann_file='no.json'), 'give --num-records'),
        ('dpsgd', [], dict(optim_wrapper__trainable='nothing.*'), 'matches no trainable parameter'),
        ('dpsgd', [], dict(optim_wrapper__noise_multiplier=0.0), 'target_epsilon'),
        ('feature', [], dict(train_cfg__public_epochs=3), 'no private step'),
        (
            'dpsgd',
            ['--num-records', '9'],
            dict(train_dataloader__batch_sampler__expected_batch_size=None),
            'expected_batch_size is',
        ),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(plan, method, arguments, options, message):
    done = plan(method, *arguments, **options)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1


def test_a_file_that_cannot_be_written(plan, folder):
    done = plan('dpsgd', '--num-records', '400', '--plot', folder / 'nowhere/plan.png')
    assert done.returncode == 2 and 'cannot be written' in done.stderr


@pytest.mark.parametrize('config', [f'{REPO}/configs/dp/hrnet_synthetic_nonprivate.py', 'no_such.py'])
def test_a_config_that_is_not_private_or_missing(call, config):
    done = call(plan_budget, config)
    assert done.returncode == 2 and ('not a private config' in done.stderr or 'no such config' in done.stderr)


def test_the_best_batch_is_compared_with_those_that_make_enough_steps():
    def found(*batches):
        return dict(
            best_batch=9, batches=[dict(size=size, steps=steps, strength=ratio) for size, steps, ratio in batches]
        )

    words = best_batch_in_words(found((9, 48, 0.83), (18, 24, 1.0), (37, 12, 1.2)))
    assert words.startswith('Best: 9. Of the batches with 30 steps or more') and 'train more epochs' in words
    assert 'train more' not in best_batch_in_words(found((9, 48, 0.83), (18, 24, 0.8)))
    assert '30 steps' not in best_batch_in_words(found((9, 12, 0.83)))


def test_people_with_several_records_get_what_the_statement_says():
    plan = PrivacyPlan.calibrate(
        target_epsilon=4.0, target_delta=1e-3, method='dpsgd', privacy_unit='image', num_records=40, expected_batch_size=10,
        steps=8, max_grad_norm=1.0, accountant='rdp',
    )  # fmt: skip
    of = dict(forecast.for_people(plan, (1, 2, 5)))
    assert of[1] <= 4 < of[2] < math.inf == of[5]
    ledger = Ledger()
    ledger.count(plan.event, 8)
    stated = build_statement(plan, ledger, pretraining='none')['epsilon_for_a_person_with_k_records']
    assert stated == {'2': of[2], **dict.fromkeys(('5', '10'), 'not computed (k times epsilon is above 15)')}
