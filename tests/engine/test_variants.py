"""Schedules, personal budgets, subjects, hardened noise and mixed precision, each in a whole training."""

import json
from fractions import Fraction

import pytest
import torch

from mmpose_dp.engine.hooks.planning import warn_of_many_budgets
from mmpose_dp.extras.adaptive_norm import AdaptiveNorm, shares
from mmpose_dp.extras.personal_budgets import of_group
from mmpose_dp.privacy.accounting import StepEvent, epsilon
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, NOISE, Ledger
from mmpose_dp.privacy.mechanism import GaussianMechanism
from mmpose_dp.verify import verify
from tests.support.runs import config, logged, tiny, train, train_until
from tests.support.runs import unvalidated as short


def annotated(folder, target, name, value):
    """The data set with a field of each annotation."""
    (target / 'annotations').mkdir(parents=True)
    (target / 'images').symlink_to(folder / 'images')
    people = json.loads((folder / 'annotations/mpii_train.json').read_text())
    people = [{**person, name: value(i)} for i, person in enumerate(people)]
    (target / 'annotations/mpii_train.json').write_text(json.dumps(people))
    return target


def statement_of(work_dir):
    return json.loads((work_dir / 'privacy_statement.json').read_text())


def test_a_schedule_is_used_and_accounted_for(synthetic, tmp_path, monkeypatch):
    """sigma is halved and C is doubled; the ledger has one event per part."""
    used, whole = [], GaussianMechanism.release

    def recorded(self, fault=''):
        used.append(self.noise_and_norm())
        return whole(self, fault)

    monkeypatch.setattr(GaussianMechanism, 'release', recorded)
    schedule = dict(noise_multiplier=0.5, max_grad_norm=2.0, pieces=3)
    runner = train(short(synthetic, tmp_path, optim_wrapper__schedule=schedule))
    wrapper = runner.optim_wrapper
    sigma, norm, rate = wrapper.mechanism.noise_multiplier, wrapper.mechanism.max_grad_norm, Fraction(1, 4)
    expected = [(sigma * 0.5 ** (i / 2), norm * 2 ** (i / 2)) for i in range(3) for _ in range(4)]
    assert torch.allclose(torch.tensor(used), torch.tensor(expected))
    history = tuple((StepEvent(sigma * 0.5 ** (i / 2), rate), 4) for i in range(3))
    assert Ledger.read(tmp_path / LEDGER_NAME).history == wrapper.ledger.history == history
    assert 7.9 < epsilon(history, 1e-3) <= 8.0
    assert 'going to' in statement_of(tmp_path)['noise_multiplier']


def test_many_personal_budgets_are_announced(capsys):
    for count in (8, 9):
        warn_of_many_budgets(count)
    (words,) = capsys.readouterr().err.splitlines()
    assert 'personal_epsilon has 9 different values' in words
    warn_of_many_budgets(2, parts=10)  # a minute
    assert 'for 10 parts of optim_wrapper.schedule' in capsys.readouterr().err


def test_personal_budgets(synthetic, tmp_path):
    """A tenth of the people allow epsilon 1, the rest 8: they are sampled less often, and each group keeps its own."""
    data = annotated(synthetic, tmp_path / 'data', 'wish', lambda i: 1.0 if i % 10 == 0 else None)
    options = dict(default_hooks__privacy_budget__accountant='rdp', train_dataloader__dataset__personal_epsilon='wish')
    runner = train(short(data, tmp_path / 'work', **options))
    plan, sampler = runner.optim_wrapper.plan, runner.train_loop.sampler
    low, high = plan.budgets
    assert (low.epsilon, low.num_records, high.epsilon, high.num_records) == (1.0, 4, 8.0, 36)
    assert low.sample_rate < high.sample_rate and low.sample_rate * 4 + high.sample_rate * 36 == 10
    sampled = torch.bincount(
        torch.tensor([record for _ in range(6000) for (record,) in sampler.sample()]), minlength=40
    )
    rates = torch.tensor([float(low.sample_rate if i % 10 == 0 else high.sample_rate) for i in range(40)])
    assert (sampled / 6000 - rates).abs().max() < 0.04  # seven deviations: by chance once in 10 billion runs
    ledger = Ledger.read(tmp_path / 'work' / LEDGER_NAME)
    for group, budget in enumerate(plan.budgets):
        own = epsilon([(of_group(event, group), steps) for event, steps in ledger.history], 1e-3, 'rdp')
        assert 0.9 * budget.epsilon < own <= budget.epsilon
    assert len(statement_of(tmp_path / 'work')['personal_epsilon']) == 2
    other = annotated(
        synthetic, tmp_path / 'other', 'wish', lambda i: 1.0 if i % 10 == 1 else None
    )  # as many, not the same
    with pytest.raises(PrivacyError, match='personal_assignment'):
        train(short(other, tmp_path / 'work', resume=True, **{**options, 'train_cfg__max_epochs': 5}))


def test_a_subject_is_one_record(synthetic, tmp_path):
    """Four pictures per subject: sampled together, clipped as one."""
    data = annotated(synthetic, tmp_path / 'data', 'subject_id', lambda i: f'patient {i // 4}')
    options = dict(
        train_dataloader__dataset__privacy_unit='subject',
        train_dataloader__dataset__subjects='subject_id',
        train_dataloader__batch_sampler__expected_batch_size=2,
        train_cfg__max_epochs=1,
    )
    runner = train(short(data, tmp_path / 'work', **options))
    assert runner.optim_wrapper.plan.num_records == 10
    for record in runner.train_loop.sampler.sample():
        assert [index // 4 for index in record] == [record[0] // 4] * 4
    statement = statement_of(tmp_path / 'work')
    assert statement['privacy_unit'].startswith('subject') and 'epsilon_for_k_subjects' in statement
    assert statement['privacy_unit'].endswith(', by annotation field subject_id')
    coarse = annotated(data, tmp_path / 'coarse', 'clinic', lambda i: i // 8)
    for resume in (True, False):  # a subject is then something else, and one epsilon could not hold for both
        again = {**options, 'train_dataloader__dataset__subjects': 'clinic', 'train_cfg__max_epochs': 2}
        again['default_hooks__privacy_budget__target_epsilon'] = 20.0
        with pytest.raises(PrivacyError, match='subjects=.*clinic.*another work_dir'):
            train(short(coarse, tmp_path / 'work', resume=resume, **again))
    capped = short(data, tmp_path / 'capped', train_dataloader__batch_sampler__max_rows_per_record=2, **options)
    sampler = train(capped).train_loop.sampler
    records = [record for _ in range(50) for record in sampler.sample()]
    assert {len(record) for record in records} == {2}
    assert {index % 4 for record in records for index in record} == set(range(4))


def test_subjects_from_a_mapping_file(synthetic, tmp_path):
    names = [p['image'] for p in json.loads((synthetic / 'annotations/mpii_train.json').read_text())]
    path = tmp_path / 'subjects.json'
    options = dict(train_dataloader__dataset__privacy_unit='subject', train_dataloader__dataset__subjects=str(path))
    path.write_text(json.dumps({name: i // 6 for i, name in enumerate(dict.fromkeys(names))}))
    options['train_dataloader__batch_sampler__expected_batch_size'] = 1
    runner = train(short(synthetic, tmp_path / 'work', train_cfg__max_epochs=1, **options))
    assert runner.optim_wrapper.plan.num_records == -(-len(set(names)) // 6)
    path.write_text(json.dumps({names[0]: 1}))
    with pytest.raises(PrivacyError, match='every annotation needs a subject'):
        train(short(synthetic, tmp_path / 'again', **options))


def test_an_older_config_with_secure_mode_trains(synthetic, tmp_path):
    with pytest.warns(UserWarning, match='secure_mode is deprecated'):
        train(short(synthetic, tmp_path, optim_wrapper__secure_mode=True, train_cfg__max_epochs=1))
    assert NOISE in statement_of(tmp_path)['noise_source'] and statement_of(tmp_path)['private']


@pytest.mark.parametrize(('dtype', 'max_grad_norm'), [('bfloat16', 1e3), ('float16', 1e3), ('float16', 1e-3)])
def test_mixed_precision(synthetic, tmp_path, dtype, max_grad_norm, monkeypatch):
    """The clipped sum is near that in float32, whatever the loss scale, where nothing is clipped and where all is."""
    sums, whole = {}, GaussianMechanism.release

    def recorded(self, fault=''):
        sums[amp and getattr(torch, amp)].append(torch.zeros(1) if self._sum is None else self._sum.clone())
        return whole(self, fault)

    monkeypatch.setattr(GaussianMechanism, 'release', recorded)
    for amp in (None, dtype):
        sums[amp and getattr(torch, amp)] = []
        cfg = short(
            synthetic,
            tmp_path / str(amp),
            train_cfg__max_epochs=1,
            optim_wrapper__amp_dtype=amp,
            optim_wrapper__max_grad_norm=max_grad_norm,
            optim_wrapper__debug_seed=1,
            train_dataloader__batch_sampler__debug_seed=2,
            train_dataloader__dataset__debug_seed=3,
        )
        cfg.optim_wrapper.optimizer, cfg.randomness = dict(type='SGD', lr=0.0), dict(seed=0)
        train(cfg)
    exact, near = sums[None], sums[getattr(torch, dtype)]
    for a, b in zip(exact, near, strict=True):
        assert (a - b).norm() <= 0.1 * a.norm()


def test_an_overflow_is_skipped_and_counted(synthetic, tmp_path):
    """Public samples overflow float16: the step leaves the weights as they are and the ledger has it."""
    options = dict(
        optim_wrapper__amp_dtype='float16',
        optim_wrapper__loss_scale=1e30,
        train_cfg__max_epochs=1,
        train_cfg__val_interval=9,
    )
    cfg = tiny(config(synthetic, tmp_path, 'feature', **options))
    runner = train(cfg)
    assert runner.optim_wrapper.ledger.steps == 4
    assert not runner.optim_wrapper.optimizer.state  # no step was made
    assert all(p.isfinite().all() for p in runner.model.parameters())


@pytest.mark.parametrize(('method', 'public_steps'), [('dpsgd', 0), ('hybrid', 5)])
def test_an_adaptive_norm_is_used_logged_kept_and_stated(synthetic, tmp_path, method, public_steps, monkeypatch):
    """Noise and clipping follow the same C; a resume goes on from it."""
    used, votes, whole, follow = [], [], GaussianMechanism.release, AdaptiveNorm.follow

    def recorded(self, fault=''):
        norm = self.noise_and_norm()[1]
        used.append(norm)
        if self._sum is not None:  # a whole number of votes: the records were clipped to the C of the noise
            counted = float(self._sum[-1]) / shares(norm)[1]
            assert counted == pytest.approx(round(counted), abs=1e-4)
        return whole(self, fault)

    monkeypatch.setattr(GaussianMechanism, 'release', recorded)
    monkeypatch.setattr(AdaptiveNorm, 'follow', lambda self, vote: votes.append(vote) or follow(self, vote))
    options = dict(optim_wrapper__clipping='adaptive', optim_wrapper__max_grad_norm=0.5)
    train_until(
        short(synthetic, tmp_path, method, **options), public_steps + 6
    )  # the last checkpoint is after 4 of them
    assert used[0] == 0.5 and len(used) == len(votes) == 6
    # C moves at every step, unless its noised votes are exactly 0: they are on a grid, and so are once in 5,000 times
    assert [a != b for a, b in zip(used, used[1:])] == [vote != 0 for vote in votes[:5]] and any(votes)
    runner = train(short(synthetic, tmp_path, method, resume=True, **options))
    assert used[6] == used[4] and len(used) == runner.train_loop.private_steps  # the two lost ones are spent
    norm = runner.optim_wrapper.adaptive_norm.max_grad_norm
    assert runner.message_hub.get_scalar('train/max_grad_norm').current() == pytest.approx(norm)
    assert 'votes of the records' in statement_of(tmp_path)['max_grad_norm']


def test_an_adaptive_norm_beside_a_schedule_of_c_is_refused(synthetic, tmp_path):
    options = dict(optim_wrapper__clipping='adaptive', optim_wrapper__schedule=dict(max_grad_norm=0.5))
    with pytest.raises(PrivacyError, match='both move C'):
        train(short(synthetic, tmp_path, **options))


def test_public_pictures_beside_the_views(synthetic, synthetic_public, tmp_path):
    """The public epochs pass over both, the statement names both, and a resume keeps both."""
    cfg = short(synthetic, tmp_path, 'hybrid')
    dataset = cfg.train_dataloader.dataset
    dataset.public = dict(dataset.private, data_root=str(synthetic_public))
    runner = train(cfg)
    assert runner.train_loop.sampler.steps_per_epoch(True) == (40 + 40) // 8
    statement = statement_of(tmp_path)
    assert statement['private'] and statement['guarantee'].endswith('feature DP')
    assert 'blur' in statement['public_data'] and 'MpiiDataset mpii_train.json' in statement['public_data']
    assert statement['recoverable_from_view'] == 'not examined: run tools/audit_view.py CONFIG'
    assert len(statement['public_views']) == 1 and any('public data set' in line for line in statement['not_protected'])
    with pytest.raises(PrivacyError, match="public_data='MpiiDataset"):
        train(short(synthetic, tmp_path, 'hybrid', resume=True, train_cfg__max_epochs=4))


def test_who_names_no_budget_keeps_the_general_one_beside_others(synthetic, tmp_path):
    """Some allow 8 and some were promised target_epsilon: a picture with both has the smaller."""
    data = annotated(synthetic, tmp_path / 'data', 'wish', lambda i: 8.0 if i % 2 == 0 else None)
    pictures = {}
    for person in json.loads((data / 'annotations/mpii_train.json').read_text()):
        pictures.setdefault(person['image'], set()).add(person['wish'])
    small = sum(None in wishes for wishes in pictures.values())
    assert {8.0, None} in pictures.values() and 0 < small < len(pictures)
    options = dict(
        train_dataloader__dataset__personal_epsilon='wish',
        train_dataloader__dataset__privacy_unit='image',
        default_hooks__privacy_budget__target_epsilon=4.0,
        default_hooks__privacy_budget__accountant='rdp',
    )
    plan = train(short(data, tmp_path / 'work', train_cfg__max_epochs=1, **options)).optim_wrapper.plan
    assert [(budget.epsilon, budget.num_records) for budget in plan.budgets] == [
        (4.0, small),
        (8.0, len(pictures) - small),
    ]
    # statement, ledger and log name the same budget, the largest
    found = verify(tmp_path / 'work')
    assert not found.wrong and statement_of(tmp_path / 'work')['target_epsilon'] == 8.0, str(found)
    assert logged(tmp_path / 'work')['epsilon_target'][-1] == 8.0
