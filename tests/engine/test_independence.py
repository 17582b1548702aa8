"""Models whose records depend on one another in ways that no look at the first batch shows: each is stopped before a release.

Every one is right on the first steps, and begins to mix later, as in the middle of a training.
"""

import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.models.data_preprocessors import PoseDataPreprocessor
from mmpose.models.pose_estimators import TopdownPoseEstimator
from mmpose.registry import MODELS
from mmpose.structures import PoseDataSample
from torch import nn
from torch.optim import SGD

from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.engine.checks.fingerprint import Fingerprint
from mmpose_dp.engine.checks.replay import HalfPrecision, Replay, ReplayCheck
from mmpose_dp.engine.padding import padded
from mmpose_dp.gradients.blocks import StackBlock
from mmpose_dp.models import freeze_batch_norm
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.records import PADDING
from tests.support.datasets import CODEC
from tests.support.models import batch, flat
from tests.support.runs import train, unvalidated

C, N = 0.1, 8
CFG = Config(dict(codec=CODEC))


class Trunk(nn.Module):
    """A backbone of two convolutions; ``late`` begins to act when ``wake`` was called."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.awake = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 3, padding=1), False

    def late(self, h):
        return h

    def wake(self):
        self.awake = True

    def forward(self, x):
        h = torch.relu(self.a(x))
        return (torch.relu(self.b(self.late(h) if self.awake else h)),)


class GatedNorm(Trunk):
    """Batch statistics behind a gate that is 0 at the start and that a schedule opens."""

    def __init__(self):
        super().__init__()
        self.awake, self.gate = True, nn.Parameter(torch.zeros(8, 1, 1), requires_grad=False)

    def late(self, h):
        return h + self.gate * (h - h.mean(0)) / (h.std(0, unbiased=False) + 1e-3)

    def wake(self):
        self.gate.data.fill_(1.0)


class GradientNorm(Trunk):
    """A tensor hook that normalises gradients over the batch."""

    def late(self, h):
        if h.requires_grad:
            h.register_hook(lambda g: g / (g.norm() + 1e-12))
        return h


class Maximum(Trunk):
    """A maximum over the batch under detach."""

    def late(self, h):
        return h / h.detach().abs().amax() * 3


class Slight(Trunk):
    """A gain of less than the replay lets pass, by how loud a sample is: that ``whose`` names, or the loudest of the batch."""

    whose = 'loudest'

    def late(self, h):
        loud = h.detach().amax((1, 2, 3), keepdim=True)
        of = dict(loudest=loud.amax(0), own=loud, before=loud.roll(1, 0), behind=loud.roll(-1, 0))
        return h * (1 + 0.009 * torch.sigmoid(of[self.whose]))


class Memory(Trunk):
    """Remembers the last batch in an attribute."""

    seen = 0.0

    def late(self, h):
        out = h - self.seen
        self.seen = h.detach().mean(0)
        return out


class Routed(Trunk):
    """The loudest places of the batch, whosever they are, go through an expert."""

    def __init__(self):
        super().__init__()
        self.expert = nn.Linear(8, 8)

    def late(self, h):
        places = h.flatten(2).transpose(1, 2).reshape(-1, 8)
        chosen = places.sum(1).topk(len(places) // 2).indices
        routed = torch.zeros_like(places).index_copy(0, chosen, torch.relu(self.expert(places[chosen])))
        return h + routed.view(len(h), -1, 8).transpose(1, 2).reshape(h.shape)


class Standardised(PoseDataPreprocessor):
    """Statistics of the batch before the model begins."""

    awake = False

    def forward(self, data, training=False):
        data = super().forward(data, training)
        if self.awake:
            data['inputs'] = data['inputs'] + 50 * data['inputs'].mean()
        return data


class Rebuilt(PoseDataPreprocessor):
    """Makes data samples anew, without their metainfo: nobody then knows which record a sample belongs to."""

    awake = False

    def forward(self, data, training=False):
        data = super().forward(data, training)
        if self.awake:
            fresh = [dict(gt_instance_labels=x.gt_instance_labels, gt_fields=x.gt_fields) for x in data['data_samples']]
            data['data_samples'] = [PoseDataSample(**fields) for fields in fresh]
        return data


class Labelled(PoseDataPreprocessor):
    """Makes pictures a little brighter where the batch has many visible joints."""

    def forward(self, data, training=False):
        data = super().forward(data, training)
        seen = torch.stack([x.gt_instance_labels.keypoint_weights.mean() for x in data['data_samples']]).mean()
        return {**data, 'inputs': data['inputs'] * (1 + 0.005 * seen)}


class Observed(Trunk):
    """A buffer that the second forward writes first (an observer that begins after its warm-up)."""

    def __init__(self):
        super().__init__()
        self.register_buffer('seen', torch.zeros(()))

    def late(self, h):
        self.seen.copy_(h.detach().mean())
        return h


class Written(Trunk):
    """A frozen weight that the forward writes, past autograd's version counter."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def late(self, h):
        self.frozen.data = h.detach().mean().view(1)
        return h


class Dropping(Trunk):
    """Dropout and drop paths: honest, and random."""

    def __init__(self):
        super().__init__()
        self.awake, self.drop = True, nn.Dropout(0.5)

    def late(self, h):
        keep = torch.rand(len(h), 1, 1, 1).add_(0.7).floor_()
        places = self.drop(h.flatten(2).transpose(1, 2))
        return h * keep + places.transpose(1, 2).reshape(h.shape) * h.new_empty(h.shape).bernoulli_(0.9)


class Kinked(Trunk):
    """Honest in forwards of one shape: rounding, which follows the size of the batch, decides about ReLUs at their kinks."""

    def __init__(self):
        super().__init__()
        self.awake = True

    def late(self, h):
        level = h.detach().to(torch.promote_types(h.dtype, torch.float32)).mean((1, 2, 3), keepdim=True)
        far = 1e3 * len(h)
        return torch.where(level + far - far - level > 1e-6, h, 0.9 * h)


class Coins(Trunk):
    """Features are mixed a little, in one batch of four, as a coin says (manifold mixup)."""

    coin = staticmethod(random.random)

    def late(self, h):
        return 0.95 * h + 0.05 * h.roll(1, 0) if self.coin() < 0.25 else h


class TorchCoins(Coins):
    """The coin is torch's."""

    coin = staticmethod(lambda: float(torch.rand(())))


class CoinsOfOthers(Trunk):
    """Each sample has a coin of its own, which decides whether a little of it goes into the next one."""

    def late(self, h):
        gives = (torch.rand(len(h), 1, 1, 1) < 0.1).float()
        return h + 0.05 * (gives * h.detach()).roll(1, 0)


class Placed(Trunk):
    """Each place in the batch has a factor of its own: one record less moves the others to other places."""

    def late(self, h):
        return h * torch.linspace(1, 1.3, len(h)).view(-1, 1, 1, 1)


class Refusing(Trunk):
    """A layer that has no answer for some pictures, in its forward or in the backward behind it."""

    def late(self, h):
        def refuse(grad=None):
            raise ArithmeticError('the matrix is singular')

        if h.requires_grad and self.where == 'backward':
            h.register_hook(refuse)
        return h if self.where == 'backward' else refuse()


class Normed(Trunk):
    """A layer norm over many places: in bfloat16 autograd's own sums over them are far off on CPUs."""

    def __init__(self):
        super().__init__()
        self.awake, self.norm = True, nn.LayerNorm(8)

    def late(self, h):
        return self.norm(h.repeat(1, 1, 4, 4).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)[..., : h.shape[2], : h.shape[3]]


class Turned(Trunk):
    """A BatchNorm behind a layer norm over places, samples, channels, as transformers have it: see freeze_batch_norm."""

    def __init__(self):
        super().__init__()
        self.awake, self.norm = True, nn.BatchNorm2d(8)

    def late(self, h):
        places = F.layer_norm(h.permute(2, 3, 0, 1).contiguous(), (8,))
        return self.norm(places.permute(2, 3, 0, 1)).contiguous()  # so that the gradient has its channels first


TRUNKS = (
    Trunk,
    Turned,
    Kinked,
    Placed,
    Coins,
    TorchCoins,
    CoinsOfOthers,
    Refusing,
    Normed,
    GatedNorm,
    GradientNorm,
    Maximum,
    Slight,
    Memory,
    Routed,
    Observed,
    Written,
    Dropping,
)
for _cls in (*TRUNKS, Standardised, Rebuilt, Labelled):
    MODELS.register_module(module=_cls, name=f'Independence{_cls.__name__}', force=True)


def made(trunk='Trunk', preprocessor='PoseDataPreprocessor', **settings):
    """A model with the trunk, a wrapper with a plan, and the ledger's count."""
    torch.manual_seed(0)
    head = dict(type='PrivateHeatmapHead', in_channels=8, out_channels=16, deconv_out_channels=None)
    head['loss'] = dict(type='KeypointMSELoss', use_target_weight=True, loss_weight=1e3)
    model = MODELS.build(
        dict(
            type='TopdownPoseEstimator',
            data_preprocessor=dict(type=preprocessor, mean=[127.0] * 3, std=[60.0] * 3),
            backbone=dict(type=f'Independence{trunk}'),
            head=head,
        )
    )
    freeze_batch_norm(model)
    model.train()
    plan = PrivacyPlan(
        method='dpsgd',
        privacy_unit='instance',
        num_records=100,
        expected_batch_size=N,
        steps=10,
        max_grad_norm=C,
        noise_multiplier=1.0,
        target_delta=1e-3,
    )
    params = [p for p in model.parameters() if p.requires_grad]
    wrapper = DPOptimWrapper(SGD(params, lr=1e-3), max_grad_norm=C, noise_multiplier=1.0, **settings)
    wrapper.prepare(model)
    wrapper.mechanism.attach(plan)
    return model, wrapper


def step(model, wrapper, seed=0, count=N):
    model.train_step(batch(CFG, list(range(count)), seed=seed, dtype=torch.float32), wrapper)


def refused_step(model, wrapper, match, seed=5):
    """The step counts, and what is trained stays as it was."""
    before, counted = flat(wrapper.params).clone(), wrapper.ledger.steps
    with pytest.raises(PrivacyError, match=match):
        step(model, wrapper, seed)
    assert wrapper.ledger.steps == counted + 1
    assert torch.equal(flat(wrapper.params), before)


MIXING = {
    'GatedNorm': 'from backbone.b on',
    'GradientNorm': 'from the backward at backbone.a.weight on',
    'Maximum': 'from backbone.b on',
    'Memory': 'from backbone.b on',
    'Routed': 'from backbone.(expert|b) on|leading entries',
}


@pytest.mark.parametrize('fixed_shape', [False, True])  # True: with a second look
@pytest.mark.parametrize('trunk', MIXING)
def test_mixing_that_begins_late_stops_before_a_release(trunk, fixed_shape):
    model, wrapper = made(trunk)
    wrapper.replay.fixed_shape = fixed_shape
    for seed in range(3):
        step(model, wrapper, seed)
    model.backbone.wake()
    wrapper._fingerprint = None  # the gate is opened by hand here, by the optimizer in a training
    wrapper.replay.chosen = 1  # the one record that holds the maximum is the same alone and among others
    refused_step(model, wrapper, MIXING[trunk])


def test_one_record_alone_has_its_gradient_in_any_layout():
    model, wrapper = made('Turned')
    for seed in range(3):
        step(model, wrapper, seed)
    assert wrapper.ledger.steps == 3


@pytest.fixture
def looks(monkeypatch):
    """What each second look found."""
    found, whole = [], Replay._agrees_in_one_shape
    monkeypatch.setattr(Replay, '_agrees_in_one_shape', lambda *args: found.append(whole(*args)) or found[-1])
    return found


@pytest.mark.parametrize('amp', [None, 'bfloat16'])
def test_rounding_that_follows_the_shape_is_looked_at_in_one_shape(amp, looks, monkeypatch):
    model, wrapper = made('Kinked', amp_dtype=amp)
    wrapper.replay.fixed_shape = True
    if amp:  # rounding has more room there
        monkeypatch.setattr('mmpose_dp.engine.checks.replay.tolerance', lambda dtype, device: 1e-2)
    states = random.getstate(), np.random.get_state()[1].tolist()
    for seed in range(8):
        step(model, wrapper, seed)
    while not looks and seed < 100:  # which record is replayed is random, and most do not need a second look
        seed += 1
        step(model, wrapper, seed)
    assert wrapper.ledger.steps == seed + 1 and looks and all(looks)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())
    wrapper.replay.fixed_shape = False  # the shape follows what was sampled: then this is no excuse
    with pytest.raises(PrivacyError, match='is not the same alone and among'):
        for seed in range(100, 200):
            step(model, wrapper, seed)


@pytest.mark.parametrize('gate', [0.1, 0.3])
def test_mixing_is_still_there_in_one_shape(gate, looks):
    model, wrapper = made('GatedNorm')
    wrapper.replay.fixed_shape = True
    step(model, wrapper)
    model.backbone.gate.data.fill_(gate)
    wrapper._fingerprint, before = None, Fingerprint(model)
    refused_step(model, wrapper, 'from backbone.b on')
    assert looks == [False] and not before.changed(model)


@pytest.mark.parametrize('place', [1, 4, 7])
def test_what_follows_the_place_in_a_batch_is_not_excused(place, looks):
    model, wrapper = made('Placed')
    wrapper.replay.fixed_shape = True
    step(model, wrapper)
    model.backbone.wake()
    wrapper.replay.chosen = place
    refused_step(model, wrapper, 'from backbone.b on')
    assert looks == [False]


@pytest.mark.parametrize('trunk', ['Coins', 'TorchCoins', 'CoinsOfOthers'])
def test_a_second_look_takes_the_random_numbers_of_the_first(trunk, looks):
    model, wrapper = made(trunk, debug_seed=0)
    wrapper.replay.fixed_shape = True
    step(model, wrapper)
    model.backbone.wake()
    random.seed(0)
    with pytest.raises(PrivacyError, match='from backbone.b on'):
        for seed in range(1, 40):
            step(model, wrapper, seed)
    assert looks == [False]


@pytest.mark.parametrize('where', ['forward', 'backward'])
@pytest.mark.parametrize('replayed', [True, False])
def test_a_step_that_an_error_ends_is_counted(where, replayed):
    model, wrapper = made('Refusing')
    step(model, wrapper)
    model.backbone.where = where
    model.backbone.wake()
    wrapper.begin_micro_batch(is_last=True, replayed=0 if replayed else None)
    with pytest.raises(ArithmeticError, match='singular'):
        step(model, wrapper)
    assert wrapper.ledger.steps == 2 and wrapper.mechanism._sum is None


def test_a_step_in_which_a_layer_ends_the_program_is_counted():
    model, wrapper = made()
    step(model, wrapper)
    model.backbone.register_forward_hook(lambda *_: sys.exit(3))
    with pytest.raises(SystemExit):
        step(model, wrapper)
    assert wrapper.ledger.steps == 2 and wrapper.mechanism._sum is None


def test_sums_are_compared_in_full_precision_before_training():
    model, wrapper = made('Normed', amp_dtype='bfloat16')
    wrapper.rehearse(batch(CFG, [0, 1], dtype=torch.float32))
    step(model, wrapper)
    assert wrapper.ledger.steps == 1
    model, wrapper = made('Routed')
    model.backbone.wake()
    with pytest.raises(PrivacyError, match='from backbone.expert on|leading entries'):
        wrapper.rehearse(batch(CFG, [0, 1], dtype=torch.float32))
    assert not wrapper.ledger.steps


@pytest.mark.parametrize('whose', ['loudest', 'before', 'behind'])
def test_mixing_too_slight_for_the_replay_is_found_before_training(whose, monkeypatch):
    """A record changes each of the others by less than a hundredth, and their sum by many C."""
    monkeypatch.setattr(Slight, 'whose', whose)
    model, wrapper = made('Slight')
    model.backbone.wake()
    step(model, wrapper)
    with pytest.raises(
        PrivacyError, match='is another one if other samples are beside it, by .* let every layer treat'
    ):
        wrapper.rehearse(padded(batch(CFG, [0, 1], dtype=torch.float32), 3))
    monkeypatch.setattr(Slight, 'whose', 'own')
    wrapper.rehearse(padded(batch(CFG, [0, 1], dtype=torch.float32), 3))


def test_slight_mixing_by_labels_is_found_before_training():
    model, wrapper = made(preprocessor='IndependenceLabelled')
    step(model, wrapper)
    with pytest.raises(PrivacyError, match='is another one if other samples are beside it'):
        wrapper.rehearse(padded(batch(CFG, [0, 1], dtype=torch.float32), 3))


def test_random_layers_have_the_same_numbers_in_both_looks_before_training():
    model, wrapper = made('Dropping')
    states = random.getstate(), np.random.get_state()[1].tolist()
    for seed in range(3):
        wrapper.rehearse(padded(batch(CFG, [0, 1], seed=seed, dtype=torch.float32), 3))
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


def test_statistics_of_the_batch_in_the_preprocessor():
    model, wrapper = made(preprocessor='IndependenceStandardised')
    step(model, wrapper)
    model.data_preprocessor.awake = True
    refused_step(model, wrapper, 'from the data_preprocessor on')


@pytest.mark.parametrize('keys', [[3] * 6, [3, 4, PADDING, PADDING]], ids=['of one record', 'blank ones among them'])
def test_samples_that_lose_their_record_are_refused(keys):
    """Six samples of one record would be six records, each of which weighs C, and blank samples would be somebody's."""
    model, wrapper = made(preprocessor='IndependenceRebuilt')
    step(model, wrapper)
    model.data_preprocessor.awake = True
    before = flat(wrapper.params).clone()
    with pytest.raises(PrivacyError, match='do not name the records'):
        model.train_step(batch(CFG, keys, dtype=torch.float32), wrapper)
    assert wrapper.ledger.steps == 2
    assert torch.equal(flat(wrapper.params), before)


@pytest.mark.parametrize(('trunk', 'name'), [('Observed', 'backbone.seen'), ('Written', 'backbone.frozen')])
def test_what_only_the_second_forward_writes(trunk, name):
    model, wrapper = made(trunk)
    step(model, wrapper)
    model.backbone.wake()
    refused_step(model, wrapper, f'{name} was changed by the training forward')


def test_what_a_hook_writes_between_two_steps():
    model, wrapper = made('Observed')
    step(model, wrapper)
    model.backbone.seen.fill_(3.0)
    assert wrapper.changed_outside().startswith('backbone.seen')
    refused_step(model, wrapper, 'backbone.seen was changed')


@pytest.mark.parametrize('engine', ['auto', 'loop'])
@pytest.mark.parametrize('amp', [None, 'bfloat16'])
def test_random_layers_do_not_blur_the_comparison(engine, amp):
    model, wrapper = made('Dropping', engine=engine, amp_dtype=amp)
    for seed in range(6):
        if engine == 'loop':
            wrapper.accumulating = True
            step(model, wrapper, seed, 1)
            wrapper.accumulating = False
            step(model, wrapper, seed, 1)
        else:
            step(model, wrapper, seed)
        assert not wrapper.replay.fault
    assert wrapper.ledger.steps == 6


def test_records_of_several_samples_are_replayed_together():
    model, wrapper = made('Dropping')
    keys = [3, 1, 3, 2, 1, 3]
    for seed in range(4):
        model.train_step(batch(CFG, keys, seed=seed, dtype=torch.float32), wrapper)
    assert wrapper.ledger.steps == 4


def test_a_record_that_is_not_finite_is_no_mismatch():
    model, wrapper = made()
    for chosen in (0, 1):
        data = batch(CFG, [0, 1, 2], dtype=torch.float32)
        data['data_samples'][1].gt_fields.heatmaps[:] = torch.nan
        wrapper.replay.chosen = chosen
        model.train_step(data, wrapper)
    assert wrapper.ledger.steps == 2


@pytest.mark.parametrize('name', ['backward', 'step', 'zero_grad'])
def test_the_parts_of_a_plain_step_are_refused(name):
    model, wrapper = made()
    with pytest.raises(PrivacyError, match=rf'{name}\(\) would train without clipping'):
        getattr(wrapper, name)(*([torch.tensor(1.0)] if name == 'backward' else []))


def test_update_params_without_a_forward():
    bare = DPOptimWrapper(SGD(nn.Linear(1, 1).parameters(), 0.1), max_grad_norm=1.0)
    for wrapper in (bare, made()[1]):
        with pytest.raises(PrivacyError, match='without a training forward'):
            wrapper.update_params(torch.tensor(1.0))


def test_a_train_step_that_preprocesses_elsewhere():
    model, wrapper = made()
    data = model.data_preprocessor(batch(CFG, [0, 1], dtype=torch.float32), True)
    with pytest.raises(PrivacyError, match='did not call self.data_preprocessor'):
        with wrapper.optim_context(model):
            losses = model(**data, mode='loss')
        wrapper.update_params(model.parse_losses(losses)[0])


class Bypassing(TopdownPoseEstimator):
    """A train_step of its own that never ends a step, ends two, leaves batches out (those that are not finite, say) or takes them
    twice."""

    calls = 0

    def train_step(self, data, optim_wrapper):
        first = optim_wrapper.accumulating
        for _ in range(2 if first and self.calls == 'twice' else 1):
            with optim_wrapper.optim_context(self):
                losses = self._run_forward(self.data_preprocessor(data, True), mode='loss')
            loss, log = self.parse_losses(losses)
            if self.calls and not (first and self.calls == 'left out'):
                optim_wrapper.update_params(loss)
            if self.calls == 2 and not first:
                optim_wrapper.finish_step()
        return log


@pytest.mark.parametrize(
    ('calls', 'size', 'match'),
    [
        (0, 64, '0 forwards of one batch'),
        (2, 64, 'made 2 counted steps'),
        ('left out', 1, '0 forwards of one batch'),
        ('twice', 1, '2 forwards of one batch'),
    ],
)
def test_each_batch_counts_once_in_one_counted_step(synthetic, tmp_path, calls, size, match, monkeypatch):
    MODELS.register_module(module=Bypassing, name='IndependenceBypassing', force=True)
    monkeypatch.setattr(Bypassing, 'calls', calls)
    cfg = unvalidated(synthetic, tmp_path, 'dpsgd', train_cfg__max_epochs=1, train_dataloader__batch_size=size)
    cfg.train_dataloader.batch_sampler.expected_batch_size = (
        40  # all of them, so that the first step has several batches
    )
    cfg.model.type = 'IndependenceBypassing'
    with pytest.raises(PrivacyError, match=match):
        train(cfg)
    # that a batch was left out may be a record's doing
    assert Ledger.read(tmp_path / LEDGER_NAME).steps == (2 if calls == 2 else 1)


class Recalibrating(Hook):
    """What a hook for precise BatchNorm does: it changes buffers between two steps."""

    def after_train_epoch(self, runner):
        next(runner.model.buffers()).add_(1)


def test_what_a_hook_writes_is_in_no_checkpoint(synthetic, tmp_path):
    cfg = unvalidated(synthetic, tmp_path, 'dpsgd', train_cfg__max_epochs=1, train_dataloader__batch_size=64)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Recalibrating())
    with pytest.raises(PrivacyError, match='no checkpoint is written: data_preprocessor.mean was changed'):
        runner.train()
    assert not list(tmp_path.glob('*.pth'))


def test_bit_sums_name_what_was_changed():
    model = nn.Sequential(nn.Linear(700, 3), nn.BatchNorm1d(3), nn.Linear(3, 1100, dtype=torch.float64))
    model.register_buffer('empty', torch.zeros(0))
    model.register_buffer('flags', torch.zeros(513, dtype=torch.bool))
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        before, last = Fingerprint(model), x.data.view(-1)[-1:]
        assert not before.changed(model)
        last.copy_(~last if x.dtype == torch.bool else last + 1)
        assert before.changed(model) == (name if x.numel() else '')
    model.register_buffer('more', torch.zeros(1))
    assert before.changed(model) == 'more'


ORDERS = [
    ([1.0, 2.0], [1, 0]),
    ([1.0, -1.0], [1, 0]),  # they differ in the highest bit alone
    ([1.0, 2.0, 2.0, 1.0], [1, 0, 3, 2]),
    ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [5, 4, 3, 2, 1, 0]),
]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize('kind', ['buffer', 'parameter'])
def test_bit_sums_see_the_order_and_the_form_of_a_tensor(kind, dtype):
    model = nn.Module()
    for numbers, order in ORDERS:
        table = torch.tensor(numbers, dtype=dtype)
        if kind == 'buffer':
            model.register_buffer('table', table)
        else:
            model.table = nn.Parameter(table, requires_grad=False)
        before = Fingerprint(model)
        assert not before.changed(model)
        for other in (table[order], table.view(1, -1), table.view(-1, 1), torch.cat([table, table])[::2]):
            model.table.data = other
            assert before.changed(model) == 'table' and not before.is_that_of(model)
        del model.table


@pytest.mark.parametrize(('second', 'far'), [(3.0, False), (3.1, True)])
def test_samples_that_cancel_leave_rounding_and_nothing_else(second, far):
    """Two samples of one record whose gradients cancel: each is long, and their sum is rounding."""
    grads = torch.tensor([[3.0, 4.0], [-3.0, -4.0]]) + torch.tensor([[1e-6], [0.0]])
    check = ReplayCheck([HalfPrecision.of(torch.tensor([second - 3.0, 0.0]))], [0, 1], 1e-6)
    check.add(StackBlock([0], grads))
    assert (check.gap(1e-3) > 0.01) == far


def test_hooks_that_average_buffers_are_left_out(synthetic, tmp_path):
    cfg = unvalidated(synthetic, tmp_path, 'dpsgd', train_cfg__max_epochs=1, train_dataloader__batch_size=64)
    names = 'SyncBuffersHook', 'SyncNormHook', 'mmdet.SyncNormHook'
    cfg.custom_hooks = [dict(type=name) for name in names]
    runner = train(cfg)
    assert not [hook for hook in runner.hooks if type(hook).__name__.startswith('Sync')]


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('get_lr', ()),
        ('get_momentum', ()),
        ('scale_loss', (torch.tensor(2.0),)),
        ('should_update', ()),
        ('should_sync', ()),
        ('state_dict', ()),
        ('finish_step', ()),
    ],
)
def test_each_public_method_of_an_optim_wrapper_by_itself(name, arguments):
    """A step without a batch is one of noise alone; the others change nothing."""
    model, wrapper = made()
    wrapper.initialize_count_status(model, 0, 10)
    before = flat(wrapper.params).clone()
    getattr(wrapper, name)(*arguments)
    assert torch.equal(flat(wrapper.params), before) == (name != 'finish_step')
    assert wrapper.ledger.steps == (name == 'finish_step')
