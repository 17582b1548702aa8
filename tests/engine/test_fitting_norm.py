"""A clipping norm far above the gradients is warned of before training, by gradients of noise alone."""

import copy
import re
import statistics

import numpy as np
import pytest
import torch

from mmpose_dp.datasets import collate_samples
from mmpose_dp.engine.hooks import showing
from mmpose_dp.engine.hooks.fitting_norm import noise_with_joints, unfitting_norms
from mmpose_dp.engine.hooks.preflight import untouched_training
from tests.engine.test_preflight import ready
from tests.support.runs import train_until, unvalidated


@pytest.fixture(scope='module')
def runner(synthetic, tmp_path_factory):
    runner = ready(unvalidated(synthetic, tmp_path_factory.mktemp('norm')))
    runner.call_hook('before_run')
    yield runner
    showing.release(runner)


def logged(work_dir, words):
    """The lines of the log that have these words."""
    return [line for log in work_dir.glob('*/*.log') for line in log.read_text().splitlines() if words in line]


def advised(warnings):
    """The max_grad_norm that a warning names."""
    return float(re.search(r'Write .*max_grad_norm=(\S+?)[,.]?( |$)', warnings[0])[1])


def test_the_norm_that_is_advised_clips_most_people_and_nothing_else_changes(runner):
    dataset, mechanism = runner.train_dataloader.dataset, runner.optim_wrapper.mechanism
    before = {name: x.clone() for name, x in runner.model.state_dict().items()}
    secret, state = dataset.random, torch.get_rng_state()
    mechanism.max_grad_norm = 1.0
    norm = advised(unfitting_norms(runner))
    assert dataset.random is secret and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, before[name]) for name, x in runner.model.state_dict().items())
    with untouched_training(runner):
        people = [runner.optim_wrapper.norms_alone(collate_samples([dataset[i]]))[0] for i in range(20)]
    assert all(found > norm for found in people) and statistics.median(people) < 50 * norm
    mechanism.max_grad_norm = norm
    assert unfitting_norms(runner) == []


def test_a_buffer_that_a_forward_writes_is_as_before(runner):
    backbone, seen = runner.model.backbone, []
    backbone.register_buffer('count', torch.zeros(()))
    handle = backbone.register_forward_hook(lambda module, *_: seen.append(float(module.count.add_(1))))
    unfitting_norms(runner)
    handle.remove()
    assert seen == [1, 2, 3, 4, 5] and not backbone.count
    del backbone.count


def test_the_picture_of_a_record_does_not_enter(runner, monkeypatch):
    dataset, wrapper, seen = runner.train_dataloader.dataset, runner.optim_wrapper, []
    norms_alone = wrapper.norms_alone
    monkeypatch.setattr(wrapper, 'norms_alone', lambda batch: seen.append(copy.deepcopy(batch)) or norms_alone(batch))
    torch.manual_seed(0)
    unfitting_norms(runner)
    private = dataset[0][0]
    labels = private['data_samples'].gt_instance_labels
    for batch in seen:
        assert not torch.equal(batch['inputs'][0], private['inputs'])
        found = batch['data_samples'][0].gt_instance_labels
        assert {*found.keys()} == {*labels.keys()}
        assert all(found[name].shape == labels[name].shape for name in labels.keys())
        assert not any(torch.equal(found[name], labels[name]) for name in labels.keys() if name != 'keypoint_weights')
    assert len(seen) == 5


def test_nothing_else_that_a_record_holds_enters(runner):
    """A loss of other code may read the box, or its size, from there."""

    def held(record):
        torch.manual_seed(0)
        np.random.seed(0)
        batch = next(
            noise_with_joints(runner.train_dataloader.dataset[record][0], runner.train_dataloader.dataset.private)
        )
        sample, free = batch['data_samples'][0], {'flip', 'flip_direction', 'dp_record'}
        metainfo = {key: np.asarray(x).tolist() for key, x in sample.metainfo.items() if key not in free}
        labels = {name: sample.get(name).all_items() for name in ('gt_instances', 'gt_instance_labels')}
        return metainfo, {name: {key: np.asarray(x).tolist() for key, x in items} for name, items in labels.items()}

    with untouched_training(runner):
        one, other = held(0), held(7)
    assert one == other and {'input_scale', 'input_center'} <= {*one[0]} and 'bboxes' in one[1]['gt_instances']


def test_a_loss_that_wants_more_than_noise_has_gives_no_advice(runner, monkeypatch):
    def fail(batch):
        raise KeyError('segmentation')

    monkeypatch.setattr(runner.optim_wrapper, 'norms_alone', fail)
    assert unfitting_norms(runner) == []


@pytest.mark.parametrize('norm', [0.0, float('nan'), float('inf')])
def test_no_advice_follows_from_gradients_that_are_zero_or_not_finite(runner, monkeypatch, norm):
    monkeypatch.setattr(runner.optim_wrapper, 'norms_alone', lambda batch: [norm])
    assert unfitting_norms(runner) == []


@pytest.mark.parametrize(
    'projector', [dict(type='KroneckerProjector', rank=50, width=4), dict(rank=5, preconditioned=True)], ids=str
)
def test_scaled_coordinates_are_judged_by_public_samples(synthetic, synthetic_public, tmp_path, projector, monkeypatch):
    def warned(name, norm):
        cfg = unvalidated(synthetic, tmp_path / name, 'projected', public_root=synthetic_public)
        cfg.optim_wrapper.projector = projector
        cfg.optim_wrapper.update(max_grad_norm=norm, public_weight=0.5)
        cfg.default_hooks.public_data.num_samples = 12
        train_until(cfg, after=1)
        return logged(tmp_path / name, 'have a median norm')

    first = warned('long', 50.0)
    assert len(first) == 1 and 'coordinates of gradients of public samples have' in first[0]
    assert 'Divide public_weight by ' in first[0]
    assert not warned('short', advised([first[0]]))


def test_training_warns_of_it_once_and_not_where_c_moves_by_itself(synthetic, tmp_path):
    def warned(name, **options):
        train_until(unvalidated(synthetic, tmp_path / name, **options), after=1)
        return logged(tmp_path / name, 'noise, with')

    first = warned('flat', optim_wrapper__max_grad_norm=50.0)
    assert len(first) == 1 and 'max_grad_norm=50: ' in first[0] and "or clipping='adaptive'" in first[0]
    assert not warned('adaptive', optim_wrapper__max_grad_norm=50.0, optim_wrapper__clipping='adaptive')
    short = warned('automatic', optim_wrapper__clipping='automatic')
    assert len(short) == 1 and "Write clipping='flat' and max_grad_norm=" in short[0]
