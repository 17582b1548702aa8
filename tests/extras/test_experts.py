"""Mixing weights of experts: gradients against autograd's, checkpoints in plain MMPose, and what a statement says of experts."""

import json

import check_config
import pytest
import test as test_tool
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch import nn

from mmpose_dp.engine.hooks.provenance import idle_experts, refuse_other_experts, starts_of_experts
from mmpose_dp.engine.hooks.resuming import check_same_model
from mmpose_dp.extras.checkpoint_file import CheckpointFile, without_updates
from mmpose_dp.extras.evidence import file_sha256
from mmpose_dp.extras.experts import Mixed, add_experts, digest_of
from mmpose_dp.gradients import Engine, layer_rules
from mmpose_dp.gradients.blocks import PerSampleGradients
from mmpose_dp.models import choose_trainable, freeze_batch_norm
from mmpose_dp.privacy.errors import ConfigError
from tests.support.models import build, load
from tests.support.paths import REPO
from tests.support.runs import config, tiny, unvalidated

RES50 = 'body_2d_keypoint/topdown_heatmap/mpii/td-hm_res50_8xb64-210e_mpii-256x256.py'


class EveryLayer(nn.Module):
    """One layer of each kind that can be mixed."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.up, self.group = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.GroupNorm(2, 6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.point, self.sparse = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1, stride=(2, 1), padding=(0, 1), bias=False)
        self.linear, self.layer, self.axes = nn.Linear(6, 3), nn.LayerNorm(3), nn.LayerNorm((2, 3))

    def forward(self, x):
        x = self.group(self.up(self.norm(self.conv(x)).relu()))
        return self.axes(self.layer(self.linear(self.sparse(self.point(self.depthwise(x))).mean(3).mT[:, :2]))).sum(1)


def randomised(seed):
    torch.manual_seed(seed)
    model = EveryLayer().double()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize('trainable', ['experts', 'channel_experts'])
def test_gradients_are_autograds(trainable):
    model, experts = randomised(0), [randomised(seed).state_dict() for seed in (1, 2)]
    del experts[1]['linear.weight'], experts[0]['point.weight']  # an expert may lack a layer
    freeze_batch_norm(model)
    by_channel = trainable == 'channel_experts'
    channels = [4, 4, 6, 6, 6, 6, 6, 3, 3, 2]
    assert choose_trainable(model, trainable, experts=experts) == 2 * (sum(channels) if by_channel else len(channels))
    model.train()
    assert not model.norm.training
    params = [p for p in model.parameters() if p.requires_grad]
    for param in params:
        param.data.uniform_(-0.5, 1)
    images = torch.randn(3, 2, 6, 6, dtype=torch.float64)

    def losses():
        return (model(images) * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)).sin().sum(1).unbind()

    engine = Engine(model, params)
    assert set(engine.gradient_methods().values()) == {'rule'}
    with engine.capture():
        each = losses()
    found = PerSampleGradients(params, range(3))
    engine.backward(each, found)
    for sample, loss in enumerate(losses()):
        for param, got, want in zip(params, found.total, torch.autograd.grad(loss, params, retain_graph=True)):
            torch.testing.assert_close(got[sample].double(), want, rtol=1e-4, atol=1e-5)
            assert got.shape == (3, *param.shape) and param.shape[1:] == (param.shape[1:] if by_channel else ())


@pytest.mark.parametrize('by_channel', [False, True])
@pytest.mark.parametrize('weights', [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
def test_whole_experts(weights, by_channel):
    models = [randomised(seed).eval() for seed in (0, 1, 2)]
    x, mixed = torch.randn(2, 2, 6, 6, dtype=torch.float64), randomised(0).eval()
    add_experts(mixed, [m.state_dict() for m in models[1:]], by_channel)
    assert sum(isinstance(m, Mixed) for m in mixed.modules()) == 10
    for param in (p for name, p in mixed.named_parameters() if name.endswith('expert_weights')):
        torch.testing.assert_close(param.data, torch.full_like(param, 1 / 3))
        param.data = torch.tensor(weights, dtype=torch.float64).view(2, *[1] * (param.dim() - 1)).expand_as(param)
    want = models[weights.index(1) + 1 if 1 in weights else 0]
    torch.testing.assert_close(mixed(x), want(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('by_channel', [False, True])
def test_a_layer_keeps_the_type_of_its_input(by_channel):
    """Under mixed precision the parameters stay float32, as they are for the layer itself."""
    norm = nn.BatchNorm2d(3).eval()
    model = nn.Sequential(norm)
    add_experts(model, [{f'0.{name}': value + 1 for name, value in norm.state_dict().items()}], by_channel)
    assert model(torch.randn(2, 3, 4, 4).bfloat16()).dtype == torch.bfloat16


@pytest.fixture(scope='module')
def res50():
    return load(RES50, size=64)


def test_a_checkpoint_runs_in_plain_mmpose_and_resumes(res50):
    plain, private = build(res50, private=False), build(res50, private=True)
    experts = [
        {
            name: x + 0.01 * k * torch.rand(x.shape) if x.is_floating_point() else x
            for name, x in plain.state_dict().items()
        }
        for k in (1, 2)
    ]
    private.load_state_dict(plain.state_dict())
    freeze_batch_norm(private)
    choose_trainable(private, 'experts', experts=experts)
    for name, param in private.named_parameters():
        if name.endswith('expert_weights'):
            nn.init.uniform_(param, 0.1, 0.4)
    saved, image = private.state_dict(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    private.eval()
    _load_checkpoint_to_model(plain, dict(state_dict=without_updates(saved)), strict=True)
    plain.eval()
    torch.testing.assert_close(plain(image, None), private(image, None), rtol=1e-6, atol=1e-9)
    for order in (experts, experts[::-1]):
        again = build(res50, private=True)
        freeze_batch_norm(again)
        choose_trainable(again, 'experts', experts=order)
        if order is experts:
            again.load_state_dict(dict(saved))
            torch.testing.assert_close(again.eval()(image, None), private(image, None), rtol=1e-9, atol=1e-12)
        else:
            with pytest.raises(ConfigError, match=r'not those of the checkpoint.*publish_model\.py'):
                again.load_state_dict(dict(saved))


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        (dict(trainable='experts'), 'go together'),
        (dict(trainable='head', experts=[{}]), 'go together'),
        (dict(trainable='all', experts=[{}]), "trainable='experts'"),
        (dict(trainable='experts+head', experts=[{}]), 'write it alone'),
        (dict(trainable='experts', experts=[{'other.weight': torch.ones(1)}]), r'experts\[0\]: no layer of the model'),
        (dict(trainable='experts', experts=[EveryLayer().state_dict(), {}]), r'experts\[1\]: no layer of the model'),
    ],
)
def test_settings_that_have_no_meaning(settings, words):
    with pytest.raises(ConfigError, match=words):
        choose_trainable(EveryLayer(), **settings)


@pytest.mark.parametrize('trainable', ['experts', 'channel_experts'])
def test_mixing_may_begin_at_the_start_alone(trainable):
    """And has a gradient there, by which it leaves it."""
    model, plain, x = randomised(0).eval(), randomised(0).eval(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    expert = {name: value + 0.1 for name, value in randomised(1).state_dict().items()}
    choose_trainable(model, trainable, experts=[expert], mix_from='load_from')
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(gradient.any() for gradient in torch.autograd.grad(model(x).square().sum(), trained))


def test_a_training_with_an_expert(call, synthetic, tmp_path):
    """The statement names the expert and what is known of it; the published weights fit MMPose's own model."""
    cfg = tiny(config(synthetic, tmp_path / 'work', 'dpsgd', train_cfg__max_epochs=1))
    from mmpose.registry import MODELS

    weights, turned = (MODELS.build(cfg.model).state_dict() for _ in range(2))
    torch.save(dict(state_dict=turned), tmp_path / 'turned.pth')
    torch.save(dict(state_dict=weights), tmp_path / 'start.pth')
    cfg.load_from = str(tmp_path / 'start.pth')
    recipe = Config.fromfile(REPO / 'configs/_base_/experts.py').dp_optim_wrapper
    cfg.optim_wrapper.update(dict(recipe, trainable='experts', experts=[str(tmp_path / 'turned.pth')]))
    runner = Runner.from_cfg(cfg)
    runner.train()
    mixed = [m for m in runner.model.modules() if isinstance(m, Mixed)]
    assert len(runner.optim_wrapper.params) == len(mixed) > 10
    assert any(float(m.expert_weights) != 0.5 for m in mixed)
    statement = json.loads((tmp_path / 'work/privacy_statement.json').read_text())
    floats = sum(x.is_floating_point() for x in weights.values())  # mixing weights and the like are in no start
    for name, how in {'turned.pth': 'privately mixed with', 'start.pth': 'loaded from'}.items():
        digest = file_sha256(tmp_path / name)[:16]
        words = f'{how} {name} ({floats} of {floats} tensors of model; SHA-256 {digest}...), of unknown origin'
        assert words in statement['pretraining']
    saved = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=False)['state_dict']
    assert {*without_updates(saved)} == {*weights}
    torch.save(dict(state_dict=without_updates(saved)), tmp_path / 'published.pth')
    assert CheckpointFile.read(tmp_path / 'published.pth').weights_sha256 == statement['weights_sha256']
    # what is kept for a resume is no surprise to who tests
    cfg.dump(tmp_path / 'experts.py')
    done = call(test_tool, tmp_path / 'experts.py', tmp_path / 'work/epoch_1.pth', '--work-dir', tmp_path / 'test')
    assert done.returncode == 0 and 'PCK' in done.stdout and 'unexpected key' not in done.stdout + done.stderr
    both = f"optim_wrapper.experts=['{tmp_path}/turned.pth','{tmp_path}/start.pth']"
    done = call(check_config, tmp_path / 'experts.py', '--cfg-options', both)
    assert (
        f'Experts: {floats} of {floats} tensors of the model are mixed with those of {tmp_path}/turned.pth'
        in done.stdout
    )
    assert f'WARNING: optim_wrapper.experts: {tmp_path}/start.pth has the same weights as load_from' in done.stdout
    # a resume must have the same experts, to the bit, since its statement names these
    cfg.resume, cfg.load_from, cfg.train_cfg.max_epochs = True, None, 2
    turned['head.final_layer.bias'][0] += 1e-7
    torch.save(dict(state_dict=turned), tmp_path / 'turned.pth')
    with pytest.raises(ConfigError, match='its training had others'):
        Runner.from_cfg(cfg).train()


def test_a_resume_takes_no_weights_that_the_statement_does_not_name():
    """Neither from experts that the training did not have, nor from the init_cfg of another model."""
    model = EveryLayer()
    saved, private = dict(state_dict=model.state_dict(), privacy=dict(experts=[])), [('private.pth', '0a')]
    with pytest.raises(ConfigError, match='its training had none'):
        refuse_other_experts(private, saved)
    with pytest.raises(ConfigError, match='its training had none'):  # of an earlier version
        refuse_other_experts(private, dict(state_dict=model.state_dict(), privacy={}))
    refuse_other_experts(private, dict(privacy=dict(experts=['0a'])))
    refuse_other_experts([], saved)
    check_same_model(saved, model)
    model.linear = nn.Linear(4, 5)
    with pytest.raises(ConfigError, match=r'has no linear\.weight of shape \(5, 4\)'):
        check_same_model(saved, model)
    add_experts(model, [randomised(1).float().state_dict()])
    with pytest.raises(ConfigError, match=r'has no conv\.expert_weights'):
        check_same_model(saved, model)


def test_a_file_that_changes_while_training_is_set_up(tmp_path):
    path = tmp_path / 'expert.pth'
    model, weights = EveryLayer(), {'layer.weight': torch.zeros(3), 'layer.bias': torch.zeros(3)}
    torch.save(dict(state_dict=weights), path)
    choose_trainable(model, 'experts', experts=[weights])
    experts = [(str(path), digest_of(weights))]
    assert [{*start.shapes} for start in starts_of_experts(experts, model, {})] == [{*weights}]
    torch.save(dict(state_dict=dict(weights, other=torch.ones(2))), path)
    with pytest.raises(ConfigError, match='was changed after'):
        starts_of_experts(experts, model, {})


def test_names_of_a_model_of_ones_own_are_no_updates():
    """A layer of ours has a weight beside them."""
    ours = {'a.weight': 0, 'a.lora_up.weight': 1, 'a.expert_weights': 2, 'a.expert_own_weight': 3}
    others = {'b.lora.lora_up.weight': 0, 'b.original.weight': 1, 'expert_weights': 2}
    assert without_updates({**ours, **others}) == {'a.weight': 0, **others}


def test_a_mixed_variance_below_0_is_0_in_a_checkpoint():
    """As in training: plain MMPose would take the root of a negative number."""
    model, other, plain = randomised(0), randomised(1), EveryLayer().double().eval()
    freeze_batch_norm(model)
    choose_trainable(model, 'channel_experts', experts=[other.state_dict()])
    weights = model.norm.expert_weights.data.fill_(0.5)
    weights[0, :2] = 3 * model.norm.running_var[:2] / (model.norm.running_var - other.norm.running_var)[:2]
    assert (model.norm.mixed(weights)['running_var'][:2] < 0).all()
    saved, x = model.state_dict(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    plain.load_state_dict(without_updates(saved))
    torch.testing.assert_close(plain(x), model.train()(x), rtol=1e-6, atol=1e-6)
    model.load_state_dict(saved)


class Twice(nn.Linear):
    """A layer of one's own, with a rule of one's own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Unmixable(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.twice, self.other, self.tied = nn.Linear(3, 3), Twice(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.tied.weight = self.other.weight

    def forward(self, x):
        return self.tied(self.other(self.twice(self.first(x))))


def test_layers_that_mixing_would_change_stay_as_they_are(monkeypatch):
    monkeypatch.setitem(layer_rules._RULES, Twice, lambda module, a, b: layer_rules.outer_product(module, a, 2 * b))
    torch.manual_seed(0)
    model, other, plain, x = Unmixable(), Unmixable(), Unmixable(), torch.randn(2, 3)
    add_experts(model, [other.state_dict()])
    assert [name for name, m in model.named_modules() if isinstance(m, Mixed)] == ['first']
    nn.init.constant_(model.first.expert_weights, 2.0)
    plain.load_state_dict(without_updates(model.state_dict()))
    torch.testing.assert_close(plain(x), model(x))


def test_an_expert_that_changes_nothing_is_warned_of():
    weights, others = EveryLayer().state_dict(), [EveryLayer().state_dict() for _ in range(2)]
    names = [('a.pth', digest_of(others[0])), ('b.pth', digest_of(others[1]))]
    assert idle_experts(names, dict(state_dict=weights)) == idle_experts([], dict(state_dict=weights)) == []
    again, start = ('c.pth', names[0][1]), ('d.pth', digest_of(weights))
    found = idle_experts([*names, again, start, names[1]], dict(state_dict=weights))
    assert [' '.join(words.split()[1:8]) for words in found] == [
        'c.pth has the same weights as a.pth,',
        'd.pth has the same weights as load_from,',
        'b.pth has the same weights as b.pth,',
    ]


@pytest.mark.parametrize(
    ('broken', 'name'), [('turned', 'backbone.bn1.running_var'), ('start', 'head.final_layer.bias')]
)
def test_weights_that_are_not_finite_spend_nothing(synthetic, tmp_path, broken, name):
    cfg = unvalidated(synthetic, tmp_path / 'work', optim_wrapper__trainable='experts')
    from mmpose.registry import MODELS

    for file in ('turned', 'start'):
        weights = MODELS.build(cfg.model).state_dict()
        weights[name][0] = float('nan' if file == broken else 1)
        torch.save(dict(state_dict=weights), tmp_path / f'{file}.pth')
    cfg.load_from, cfg.optim_wrapper.experts = str(tmp_path / 'start.pth'), [str(tmp_path / 'turned.pth')]
    with pytest.raises(ConfigError, match=f'{name} holds NaN or infinity.*does so before training'):
        Runner.from_cfg(cfg).train()
    assert not (tmp_path / 'work' / 'privacy_ledger.jsonl').exists()


def test_an_expert_with_the_joints_in_another_order(tmp_path):
    """CrowdPose and AIC, say, have 14 joints each: no shape tells their output layers apart."""
    model, weights, path = EveryLayer(), EveryLayer().state_dict(), tmp_path / 'expert.pth'
    choose_trainable(model, 'experts', experts=[weights])
    one, other, fewer = (
        dict(num_keypoints=len(names), keypoint_id2name=dict(enumerate(names)))
        for names in (['nose', 'neck', 'hip'], ['neck', 'nose', 'hip'], ['neck', 'nose'])
    )
    torch.save(dict(state_dict=weights, meta=dict(dataset_meta=one)), path)
    experts = [(str(path), digest_of(weights))]
    assert starts_of_experts(experts, model, one) and starts_of_experts(experts, model, fewer)
    with pytest.raises(ConfigError, match='has 2 joints in another place than the data set, such as neck'):
        starts_of_experts(experts, model, other)
