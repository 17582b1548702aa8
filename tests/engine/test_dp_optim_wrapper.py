"""One private step of DPOptimWrapper on real models, against plain MMPose looped over single records."""

import copy
import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch.optim import SGD, AdamW

from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.engine.basis import fit_basis, table_of
from mmpose_dp.engine.checks.replay import Replay
from mmpose_dp.engine.optim_wrappers.dp_optim_wrapper import all_finite
from mmpose_dp.extras.adaptive_norm import AdaptiveNorm
from mmpose_dp.privacy.clipping import clipping_norm
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.projection import Projector
from tests.support.core import place
from tests.support.models import (
    HRNET,
    RLE,
    batch,
    build,
    clip,
    flat,
    load,
    norms,
    reference_gradients,
    small_hrnet,
    take,
)

B = 4
PRIVATE, MIXED = [0, 1, 2], [0, None, 1, 2, None]


@pytest.fixture(scope='module')
def hrnet():
    return small_hrnet()


@pytest.fixture(scope='module')
def truth(hrnet):
    """Reference gradients of the samples of MIXED, a clipping norm that clips some of them, and a basis."""
    model = build(hrnet, private=False, loss_weight=1e3)
    each = reference_gradients(model, batch(hrnet, MIXED))
    private, public = each[[0, 2, 3]], each[[1, 4]]
    params = [p for p in model.parameters() if p.requires_grad]
    projector = Projector(rank=2)
    parts = [c.view(-1, *p.shape) for c, p in zip(public.split([p.numel() for p in params], 1), params)]
    fit_basis(projector, table_of([parts], len(public), torch.float32))
    return private, public, float(norms(private).mean()), projector.basis


def moved(model, data, **settings):
    """What one train_step with SGD, lr 1 takes off the parameters, flat, and the wrapper."""
    params = [p for p in model.parameters() if p.requires_grad]
    before = flat(params).clone()
    basis = settings.pop('basis', None)
    wrapper = DPOptimWrapper(SGD(params, lr=1.0), expected_batch_size=B, **{'noise_multiplier': 0.0, **settings})
    if basis is not None:
        place(wrapper.projector, basis)
    take(model, data, wrapper)
    return before - flat(params), wrapper


def assert_close(got, want, tolerance=1e-5):
    assert (got - want).double().norm() <= tolerance * want.double().norm()


@pytest.mark.parametrize('engine', ['rules', 'loop'])
@pytest.mark.parametrize('method', ['dpsgd', 'noise-then-project', 'project-then-clip', 'feature', 'hybrid'])
def test_a_step_without_noise_is_the_reference(hrnet, truth, method, engine):
    private, public, C, basis = truth
    V = torch.cat([b.flatten(1) for b in basis], 1).double()
    full, coordinates = (clip(private, C).double().sum(0) / B, clip(private.double() @ V.T, C / 2).double())
    inside = V.T @ coordinates.sum(0) / B
    want, settings = {
        'dpsgd': (full, {}),
        'noise-then-project': (V.T @ (V @ full), dict(projector=dict(order=method), basis=basis)),
        'project-then-clip': (inside, dict(projector=dict(), basis=basis, max_grad_norm=C / 2)),
        'feature': (full + 0.7 * public.mean(0), dict(public_weight=0.7)),
        'hybrid': (
            inside + 0.7 * public.mean(0),
            dict(projector={}, basis=basis, public_weight=0.7, max_grad_norm=C / 2),
        ),
    }[method]
    model = build(hrnet, private=True, loss_weight=1e3)
    got, _ = moved(model, batch(hrnet, MIXED), engine=engine, **{'max_grad_norm': C, **settings})
    assert (norms(private) > C).any() and (norms(private) < C).any()
    assert_close(got, want)


@pytest.mark.parametrize('projected', [False, True])
def test_where_all_are_clipped_a_shorter_norm_only_makes_the_step_shorter(hrnet, truth, projected):
    """With its noise, and with public_weight divided by the same factor: what the warning of a long norm says to write."""
    private, _, _, basis = truth
    V = torch.cat([b.flatten(1) for b in basis], 1).double()
    C = float(norms(private.double() @ V.T if projected else private).min()) / 2
    settings = dict(projector=dict(), basis=basis) if projected else {}
    steps = [
        moved(
            build(hrnet, True, 1e3), batch(hrnet, MIXED), max_grad_norm=C / factor, public_weight=0.7 * C / factor,
            noise_multiplier=0.5, debug_seed=1, **settings,
        )[0]
        for factor in (1, 100)
    ]  # fmt: skip
    assert_close(100 * steps[1], steps[0], 1e-4)  # the noise is rounded to another grid


def test_micro_batches_make_one_step(hrnet, truth):
    private, public, C, _ = truth
    model, data = build(hrnet, private=True, loss_weight=1e3), batch(hrnet, MIXED)
    params = [p for p in model.parameters() if p.requires_grad]
    before = flat(params).clone()
    wrapper = DPOptimWrapper(SGD(params, 1.0), C, noise_multiplier=0.0, expected_batch_size=B, public_weight=1.0)
    for samples, more in (([0, 2], True), ([1], True), ([3], True), ([4], False)):
        wrapper.accumulating = more
        model.train_step({k: [v[sample] for sample in samples] for k, v in data.items()}, wrapper)
        assert torch.equal(before, flat(params)) == more
    assert_close(before - flat(params), clip(private, C).sum(0) / B + public.mean(0))


def test_no_buffer_changes_and_adamw_works(hrnet):
    model = build(hrnet, private=True)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    wrapper = DPOptimWrapper(AdamW(model.parameters()), 1.0, noise_multiplier=1.0, expected_batch_size=B)
    model.train_step(batch(hrnet, PRIVATE), wrapper)
    assert buffers and all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert all(p.isfinite().all() for p in model.parameters())


def test_checkpointed_segments(hrnet, truth):
    """with_cp would hide the layers inside from the capture: it is switched off, and the step is the same."""
    private, _, C, _ = truth
    cfg = copy.deepcopy(hrnet)
    cfg.model.backbone.with_cp = True
    model = build(cfg, True, 1e3)
    assert any(getattr(m, 'with_cp', False) for m in model.modules())
    got, _ = moved(model, batch(cfg, PRIVATE[:2]), max_grad_norm=C)
    two = reference_gradients(build(hrnet, False, 1e3), batch(hrnet, PRIVATE[:2]))
    assert_close(got, clip(two, C).sum(0) / B)


def test_images_of_one_record_are_clipped_together(hrnet, truth):
    private, _, C, _ = truth
    got, _ = moved(build(hrnet, True, 1e3), batch(hrnet, [5, None, 5, 6, None]), max_grad_norm=C)
    want = clip(torch.stack([private[0] + private[1], private[2]]), C).sum(0) / B
    assert_close(got, want)


def test_samples_are_weighted_before_the_norm(hrnet, truth):
    """The mean over augmentations; a weight may be of either sign."""
    private, _, C, _ = truth
    data = batch(hrnet, [5, None, 5, 6, None])
    for sample, weight in zip(data['data_samples'], (0.5, 1.0, -0.5, 1.0, 1.0)):
        sample.set_metainfo(dict(dp_weight=weight))
    got, _ = moved(build(hrnet, True, 1e3), data, max_grad_norm=C)
    want = clip(torch.stack([(private[0] - private[1]) / 2, private[2]]), C).sum(0) / B
    assert_close(got, want)


@pytest.mark.parametrize('projected', [False, True])
def test_automatic_clipping(hrnet, truth, projected):
    private, _, C, basis = truth
    V = torch.cat([b.flatten(1) for b in basis], 1).double()
    seen = private.double() @ V.T if projected else private.double()
    want = (seen * (clipping_norm(C) / (norms(seen) + 0.01))[:, None]).sum(0) / B
    extra = dict(projector={}, basis=basis) if projected else {}
    got, _ = moved(build(hrnet, True, 1e3), batch(hrnet, MIXED), max_grad_norm=C, clipping='automatic', **extra)
    assert_close(got, (V.T @ want if projected else want).float())


def test_per_layer_clipping(hrnet, truth):
    private, _, C, _ = truth
    model = build(hrnet, True, 1e3)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    parts = private.split(sizes, 1)
    want = torch.cat([clip(part, C / len(sizes) ** 0.5) for part in parts], 1).sum(0) / B
    got, _ = moved(model, batch(hrnet, MIXED), max_grad_norm=C, clipping='per-parameter')
    assert_close(got, want)
    with pytest.raises(PrivacyError, match='no meaning with project-then-clip'):
        moved(model, batch(hrnet, MIXED), max_grad_norm=C, clipping='per-parameter', projector={})
    with pytest.raises(PrivacyError, match="clipping='none' must be one of"):
        moved(model, batch(hrnet, MIXED), max_grad_norm=C, clipping='none')


def test_bfloat16_forward_is_close(hrnet, truth):
    private, _, C, _ = truth
    data = batch(hrnet, MIXED, dtype=torch.float32)
    got, _ = moved(build(hrnet, True, 1e3).float(), data, max_grad_norm=C, amp_dtype='bfloat16')
    assert torch.cosine_similarity(got, clip(private, C).sum(0), dim=0) > 0.95
    assert got.norm() <= 3 * C / B


def test_a_step_is_counted_before_its_noise_exists(hrnet, monkeypatch):
    """Whatever fails later, and whenever the process is killed, the ledger does not say too little."""
    plan = PrivacyPlan(
        method='dpsgd',
        privacy_unit='instance',
        num_records=100,
        expected_batch_size=B,
        steps=5,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        target_delta=1e-3,
    )
    model = build(hrnet, private=True)
    wrapper = DPOptimWrapper(SGD(model.parameters(), 1.0), max_grad_norm=1.0)
    wrapper.mechanism.attach(plan)
    before = flat(model.parameters()).clone()

    def fail(flat, deviation):
        raise RuntimeError('killed')

    monkeypatch.setattr(wrapper.mechanism.random, 'add_gaussian', fail)
    with pytest.raises(RuntimeError, match='killed'):
        model.train_step(batch(hrnet, PRIVATE), wrapper)
    assert wrapper.ledger.history == ((plan.event, 1),) and torch.equal(before, flat(model.parameters()))


class TestNoise:
    """Over many empty steps, the update has the right mean, variance and dimension."""

    def run(self, steps=400, **settings):
        cfg = load(HRNET, size=64)
        model = build(cfg, private=True)
        params = list(model.head.parameters())
        wrapper = DPOptimWrapper(
            SGD(params, lr=1.0),
            max_grad_norm=0.5,
            noise_multiplier=2.0,
            expected_batch_size=8,
            debug_seed=1,
            **settings,
        )
        if wrapper.projector is not None:
            torch.manual_seed(0)
            parts = [torch.randn(5, *p.shape) for p in params]
            fit_basis(wrapper.projector, table_of([parts], 5, torch.float32))
        updates = []
        for _ in range(steps):
            before = flat(params).clone()
            wrapper.finish_step()
            updates.append(before - flat(params))
        return torch.stack(updates), wrapper

    def test_full_dimension(self):
        updates, _ = self.run()
        scaled = (updates / (2.0 * 0.5 / 8)).flatten().numpy()
        assert stats.kstest(scaled, 'norm').pvalue > 1e-3
        assert stats.kstest(scaled * 1.02, 'norm').pvalue < 1e-3
        assert torch.linalg.matrix_rank(updates) == 400

    @pytest.mark.parametrize('projector', [None, dict(order='project-then-clip')])
    def test_the_votes_that_move_c_are_noised(self, projector, monkeypatch):
        """Empty steps vote nothing, so what C follows is noise of the deviation of any other entry."""
        votes = []
        monkeypatch.setattr(AdaptiveNorm, 'follow', lambda self, mean_vote: votes.append(mean_vote))
        self.run(clipping='adaptive', projector=projector)
        assert len(votes) == 400
        assert stats.kstest(torch.tensor(votes).numpy() / (2.0 * 0.5 / 8), 'norm').pvalue > 1e-3

    @pytest.mark.parametrize('order', ['noise-then-project', 'project-then-clip'])
    def test_inside_the_subspace_only(self, order):
        updates, wrapper = self.run(projector=dict(order=order))
        V = torch.cat([b.flatten(1) for b in wrapper.projector.basis], 1).double()
        coordinates = updates @ V.T
        assert (updates - coordinates @ V).norm() < 1e-4 * updates.norm()
        assert V.shape[0] == 5
        assert stats.kstest((coordinates / (2.0 * 0.5 / 8)).flatten().numpy(), 'norm').pvalue > 1e-3


@pytest.mark.parametrize(
    ('method', 'value'),
    [('dpsgd', float('nan')), ('loop', float('nan')), ('dpsgd', 1e30), ('project-then-clip', float('inf'))],
)
def test_a_wild_record_moves_the_weights_by_at_most_c_over_b(hrnet, truth, method, value):
    """Through the whole model: its labels are NaN, infinite or enormous. The others count as if it were not there."""
    settings = dict(max_grad_norm=0.01, engine='loop' if method == 'loop' else 'auto')
    if method == 'project-then-clip':
        settings.update(projector={}, basis=truth[3])
    model, both = build(hrnet, private=True, loss_weight=1e3), []
    for wild in (True, False):
        data = batch(hrnet, [0, 1, 2])
        if wild:
            data['data_samples'][1].gt_fields.heatmaps *= value
        else:
            data = {key: [values[0], values[2]] for key, values in data.items()}
        both.append(moved(copy.deepcopy(model), data, **settings)[0])
    difference = (both[0] - both[1]).double().norm()
    assert difference <= 0.01 / B * (1 + 1e-4) and both[1].norm() > 0
    if value != 1e30:  # that one has a direction, and is clipped
        assert difference <= 1e-5 * both[1].double().norm()


@pytest.mark.parametrize(('clipping', 'norm', 'scale'), [('adaptive', 1e-3, 1e-3), ('automatic', 0.5, 0.01)])
def test_what_the_replay_takes_for_short_follows_c(hrnet, monkeypatch, clipping, norm, scale):
    """Adaptive clipping and schedules move C; automatic clipping lengthens gradients shorter than 0.01."""
    model, seen, whole = build(hrnet, private=True), [], Replay.check_for
    wrapper = DPOptimWrapper(SGD(model.parameters(), lr=1.0), 0.5, 0.0, B, clipping=clipping)
    if clipping == 'adaptive':
        wrapper.adaptive_norm.go_on_from(norm)

    def noted(self, samples, found):
        seen.append(found)
        return whole(self, samples, found)

    monkeypatch.setattr(Replay, 'check_for', noted)
    take(model, batch(hrnet, PRIVATE), wrapper)
    assert seen == [scale]


def test_a_loss_that_float32_cannot_hold_ends_no_training(hrnet):
    """In float64 the mean over the batch is a number of float32, and the record's own loss is not."""
    model, data = build(hrnet, private=True), batch(hrnet, PRIVATE)
    data['data_samples'][1].gt_fields.heatmaps *= 1e15
    alone = {key: values[1:2] for key, values in data.items()}
    found = float(copy.deepcopy(model).loss(**model.data_preprocessor(copy.deepcopy(alone), True))['loss_kpt'])
    data['data_samples'][1].gt_fields.heatmaps *= (6e38 / found) ** 0.5
    without = {key: [values[0], values[2]] for key, values in data.items()}
    both = [moved(copy.deepcopy(model), one, max_grad_norm=0.01)[0] for one in (data, without)]
    assert (both[0] - both[1]).double().norm() <= 0.01 / B * (1 + 1e-4)


def test_a_wild_record_and_a_loss_that_cannot_take_it():
    """RLE's density raises on NaN, and its message shows the record's values: that sample counts as NaN."""
    cfg = load(RLE, size=64)
    model, both = build(cfg, private=True), []
    for wild in (True, False):
        data = batch(cfg, [0, 1, 2])
        torch.manual_seed(0)
        for sample in data['data_samples']:
            sample.gt_instance_labels.keypoint_labels = torch.rand(1, 16, 2, dtype=torch.float64)
        if wild:
            data['data_samples'][0].gt_instance_labels.keypoint_labels[0, 3] = float('nan')
        else:
            data = {key: values[1:] for key, values in data.items()}
        both.append(moved(copy.deepcopy(model), data, max_grad_norm=0.01)[0])
    assert_close(both[0], both[1])
    assert both[1].norm() > 0
    good = batch(cfg, [0])
    good['data_samples'][0].gt_instance_labels.keypoint_labels = torch.rand(1, 5, 2)
    with pytest.raises((ValueError, RuntimeError)):  # a fault of the config is not taken for a wild record
        moved(model, good, max_grad_norm=0.01)


def test_dropout_does_not_follow_mmengines_seed(hrnet):
    """From a seed that checkpoints hold, one more record would change what the others meet."""
    model, seeds, numbers = build(hrnet, private=True), [], []

    def note(*_):
        seeds.append(torch.initial_seed())
        numbers.append((random.random(), np.random.rand()))  # of a layer of one's own

    model.backbone.register_forward_pre_hook(note)
    wrapper = DPOptimWrapper(SGD(model.parameters(), 1.0), 1.0, noise_multiplier=1.0, expected_batch_size=B)
    for _ in range(2):
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        model.train_step(batch(hrnet, PRIVATE[:1]), wrapper)
        after = random.random(), np.random.rand()
    assert len({7, *seeds}) == 3
    assert all(len({*found}) == 2 for found in zip(*numbers))
    random.seed(7)
    np.random.seed(7)
    assert after == (random.random(), np.random.rand())  # afterwards they go on as mmengine's seed has it


def test_finiteness_of_all_is_one_look():
    many = [torch.ones(3), torch.zeros(1), torch.zeros(0), torch.full((2, 2), 3e38)]
    assert all_finite(many) and all_finite([torch.zeros(0)])
    for bad in (float('nan'), float('inf'), -float('inf')):
        many[1].fill_(bad)
        assert not all_finite(many)
