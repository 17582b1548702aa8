"""Private heads: same parameters and predictions as their parents, one loss a record, nothing else reported."""

import copy
import pickle

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData
from mmpose.registry import MODELS
from mmpose.structures import MultilevelPixelData, PoseDataSample

from mmpose_dp.models import FeatureMaskingHead, freeze_batch_norm, make_private
from mmpose_dp.models.heads import KNOWN
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.models import HRNET, RTMPOSE, SIMCC, batch, build, load


@pytest.fixture(scope='module', params=[HRNET, SIMCC, RTMPOSE], ids=['heatmap', 'simcc', 'rtmcc'])
def pair(request):
    cfg = load(request.param)
    return cfg, build(cfg, private=False).float(), build(cfg, private=True).float()


def features(model, n):
    torch.manual_seed(1)
    channels = model.head.in_channels
    return (torch.randn(n, channels, *((64, 64) if channels == 32 else (8, 8))),)


def test_keys_and_weights_are_the_parents(pair):
    _, plain, private = pair
    ours, theirs = private.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    plain.load_state_dict(ours), private.load_state_dict(theirs)


def test_each_loss_is_the_parents_on_a_batch_of_one(pair):
    cfg, plain, private = pair
    data = batch(cfg, [0, None, 1], dtype=torch.float32)
    feats = features(plain, 3)
    losses = private.head.loss(feats, data['data_samples'])
    assert set(losses) == {'loss_kpt'} and losses['loss_kpt'].shape == (3,)
    for i in range(3):
        alone = plain.head.loss((feats[0][i : i + 1],), data['data_samples'][i : i + 1])['loss_kpt']
        torch.testing.assert_close(losses['loss_kpt'][i], alone, rtol=1e-4, atol=1e-7)
    assert private.head.take().samples.records == (0, -1, 1)


def test_a_sample_does_not_depend_on_the_others(pair):
    cfg, _, private = pair
    data, other = batch(cfg, [0, 1, 2], seed=1, dtype=torch.float32), batch(cfg, [0, 1, 2], seed=2, dtype=torch.float32)
    feats = features(private, 3)[0]
    first = private.head.loss((feats,), data['data_samples'])['loss_kpt'][0]
    swapped = torch.cat([feats[:1], 3 * feats[1:].flip(0)])
    samples = data['data_samples'][:1] + other['data_samples'][1:]
    again = private.head.loss((swapped,), samples)['loss_kpt'][0]
    torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-8)


def test_predictions_are_the_parents(pair):
    cfg, plain, private = pair
    plain.load_state_dict(private.state_dict())
    feats = features(plain, 2)
    for model in (plain, private):
        model.eval()
    for a, b in zip(plain.head.predict(feats, []), private.head.predict(feats, [])):
        assert (a.keypoints == b.keypoints).all() and (a.keypoint_scores == b.keypoint_scores).all()
    plain.train(), private.train()


K = 5
HEATMAP = dict(in_channels=4, out_channels=K, deconv_out_channels=None)
POINTS = dict(in_channels=4, num_joints=K)
CLASSES = dict(in_channels=4, out_channels=K, input_size=(16, 16), in_featuremap_size=(8, 8), simcc_split_ratio=2.0)
CLASSES.update(loss=dict(type='KLDiscretLoss', use_target_weight=True), final_layer_kernel_size=1)
CLASSES.update(
    gau_cfg=dict(
        hidden_dims=8,
        s=8,
        expansion_factor=2,
        dropout_rate=0.0,
        drop_path=0.0,
        act_fn='SiLU',
        use_rel_bias=False,
        pos_enc=False,
    )
)
BOTH = dict(type='MultipleLossWrapper', losses=[dict(type='SmoothL1Loss', use_target_weight=True),
                                                dict(type='JSDiscretLoss', use_target_weight=True)])  # fmt: skip
HEADS = {
    'mean': dict(type='HeatmapHead', **HEATMAP),
    'hard keypoints': dict(type='HeatmapHead', **HEATMAP, loss=dict(type='KeypointOHKMMSELoss', topk=2)),
    'adaptive wing': dict(type='HeatmapHead', **HEATMAP, loss=dict(type='AdaptiveWingLoss')),
    'stages': dict(type='CPMHead', in_channels=4, out_channels=K, num_stages=2, deconv_out_channels=None),
    'stages, a loss each': dict(
        type='CPMHead', in_channels=4, out_channels=K, num_stages=2, deconv_out_channels=None,
        loss=[dict(type='KeypointMSELoss'), dict(type='KeypointOHKMMSELoss', topk=2)]),
    'levels': dict(
        type='MSPNHead', num_stages=2, num_units=2, out_shape=(8, 8), unit_channels=4, out_channels=K,
        level_indices=[0, 1, 1, 0], loss=dict(type='KeypointMSELoss')),
    'searched': dict(type='ViPNASHead', in_channels=4, out_channels=K, deconv_out_channels=[8], deconv_kernel_sizes=[4],
                     deconv_num_groups=[4]),
    'classes': dict(type='RTMCCHead', **CLASSES),
    'classes, whole body': dict(type='RTMWHead', **CLASSES),
    'points': dict(type='RegressionHead', **POINTS),
    'points, learned density': dict(type='RLEHead', **POINTS),
    'integral': dict(type='IntegralRegressionHead', in_channels=4, in_featuremap_size=(8, 8), num_joints=K,
                     deconv_out_channels=None),
    'integral, two losses': dict(type='DSNTHead', in_channels=4, in_featuremap_size=(8, 8), num_joints=K, loss=BOTH,
                                 deconv_out_channels=None),
    'visibility': dict(type='VisPredictHead', pose_cfg=dict(type='HeatmapHead', **HEATMAP)),
    'hands in space': dict(
        type='InternetHead', root_head_cfg=dict(in_channels=4, heatmap_size=8, hidden_dims=(4,)),
        hand_type_head_cfg=dict(in_channels=4, num_labels=2, hidden_dims=(4,)),
        keypoint_head_cfg=dict(in_channels=4, out_channels=2 * K, depth_size=2, deconv_out_channels=(4,),
                               deconv_kernel_sizes=(4,))),
}  # fmt: skip


def drawn(kind, n, seed=0):
    """Features and data samples with every label a head may ask for."""
    torch.manual_seed(seed)
    side, samples = 16 if kind == 'ViPNASHead' else 8, []
    for _ in range(n):
        sample = PoseDataSample()
        labels = InstanceData(keypoint_labels=torch.rand(1, K, 2), keypoint_weights=(torch.rand(1, K) < 0.8).float())
        labels.keypoint_x_labels, labels.keypoint_y_labels = torch.rand(2, 1, K, 32).softmax(-1)
        heatmaps = torch.rand(K, side, side)
        if kind == 'InternetHead':
            heatmaps = torch.rand(2 * K * 2, 16, 16)
            labels = InstanceData(
                keypoint_weights=torch.ones(1, 2 * K), root_depth=torch.rand(1), type=torch.ones(1, 2)
            )
            labels.root_depth_weight, labels.type_weight = torch.ones(1), torch.ones(1)
        if kind == 'MSPNHead':
            labels = InstanceData(keypoint_weights=torch.ones(2, 1, K))  # levels first
            sample.gt_fields = MultilevelPixelData(heatmaps=[heatmaps, 1 - heatmaps])
        else:
            sample.gt_fields = PixelData(heatmaps=heatmaps)
        sample.gt_instance_labels = labels
        samples.append(sample)
    maps = torch.randn(n, 4, 8, 8)
    if kind == 'MSPNHead':
        return [[maps, maps / 2], [maps / 3, maps / 4]], samples
    if kind == 'CPMHead':
        return [maps, maps / 2], samples
    if kind in ('RegressionHead', 'RLEHead'):
        maps = maps[..., :1, :1]
    return ((torch.randn(n, 2, 16, 16), maps) if kind == 'RTMWHead' else (maps,)), samples


def sliced(feats, i):
    return feats[i : i + 1] if torch.is_tensor(feats) else type(feats)(sliced(f, i) for f in feats)


@pytest.mark.parametrize('name', HEADS)
def test_every_head_is_its_parent_on_each_sample_alone(name):
    cfg = HEADS[name]
    torch.manual_seed(0)
    plain = MODELS.build(cfg)
    head = MODELS.build(dict(cfg, type=f'Private{cfg["type"]}'))
    head.load_state_dict(plain.state_dict())
    freeze_batch_norm(plain), freeze_batch_norm(head)
    plain.train(), head.train()
    feats, samples = drawn(cfg['type'], 3)
    losses = head.loss(feats, samples)
    assert all('loss' in key and value.shape == (3,) for key, value in losses.items())
    for i in range(3):
        alone = plain.loss(sliced(feats, i), samples[i : i + 1], dict(compute_acc=False))
        for key, value in losses.items():
            torch.testing.assert_close(value[i], alone[key].reshape(()), rtol=1e-4, atol=1e-7)
    others, other_samples = drawn(cfg['type'], 3, seed=1)
    swapped = merged(sliced(feats, 0), others)
    again = head.loss(swapped, samples[:1] + other_samples[1:])
    for key, value in losses.items():  # the first sample does not notice
        torch.testing.assert_close(again[key][0], value[0], rtol=1e-4, atol=1e-7)


def merged(first, others):
    if torch.is_tensor(first):
        return torch.cat([first, others[1:]])
    return type(first)(merged(a, b) for a, b in zip(first, others))


def test_every_top_down_head_is_known():
    assert {cls.__name__ for cls in KNOWN} == {cfg['type'] for cfg in HEADS.values()} | {'SimCCHead'}
    assert all(issubclass(MODELS.get(f'Private{cls.__name__}'), (FeatureMaskingHead, cls)) for cls in KNOWN)


# ---- a head whose class is swapped ----------------------------------------------------------------------------------
class OwnHead(torch.nn.Module):
    """Of no class of MMPose's; its loss goes through __call__."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, K, 1)

    def forward(self, feats):
        return self.layer(feats[0])

    def loss(self, feats, batch_data_samples, train_cfg=None):
        targets = torch.stack([sample.gt_fields.heatmaps for sample in batch_data_samples])
        return dict(loss_kpt=(self(feats) - targets).square().sum())


class Derived(MODELS.get('VisPredictHead')):
    def loss(self, feats, batch_data_samples, train_cfg=None):
        return {k: 2 * v for k, v in super().loss(feats, batch_data_samples, train_cfg).items()}


@pytest.mark.parametrize('name', [*HEADS, 'own', 'derived'])
def test_a_swapped_head_is_its_class_on_each_sample_alone(name):
    torch.manual_seed(0)
    settings = {k: v for k, v in HEADS['visibility'].items() if k != 'type'}
    built = dict(own=OwnHead, derived=lambda: Derived(**settings)).get(name, lambda: MODELS.build(HEADS[name]))
    head = built()
    plain, keys = copy.deepcopy(head), [*head.state_dict()]
    assert make_private(head) is head and make_private(head) is head
    assert isinstance(head, (FeatureMaskingHead, type(plain))) and [*head.state_dict()] == keys
    freeze_batch_norm(plain), freeze_batch_norm(head)
    plain.train(), head.train()
    kind = {'own': 'HeatmapHead', 'derived': 'VisPredictHead'}.get(name) or HEADS[name]['type']
    feats, samples = drawn(kind, 3)
    losses = head.loss(feats, samples)
    for i in range(3):
        alone = plain.loss(sliced(feats, i), samples[i : i + 1], dict(compute_acc=False))
        for key, value in losses.items():
            torch.testing.assert_close(value[i], alone[key].reshape(()), rtol=1e-4, atol=1e-7)


def test_a_swapped_head_can_be_copied_and_pickled():
    model = torch.nn.ModuleDict(dict(head=make_private(MODELS.build(HEADS['mean']))))
    freeze_batch_norm(model)
    feats, samples = drawn('HeatmapHead', 2)
    head = make_private(OwnHead())
    for twin, original in ((copy.deepcopy(model).head, model.head), (pickle.loads(pickle.dumps(head)), head)):
        assert type(twin) is type(original) and twin is not original
        assert torch.equal(twin.loss(feats, samples)['loss_kpt'], original.loss(feats, samples)['loss_kpt'])


@pytest.mark.parametrize(
    ('head', 'message'),
    [
        (None, 'model.head is NoneType, which has no per-record losses: write a top-down head'),
        (
            torch.nn.Conv2d(1, 1, 1),
            'model.head is Conv2d, .*loss.feats, batch_data_samples, train_cfg. calls self.forward',
        ),
        (type('Half', (torch.nn.Module,), dict(loss=lambda self, feats, samples: {}))(), 'model.head is Half'),
        (MODELS.get('DEKRHead').__new__(MODELS.get('DEKRHead')), r'model.head is DEKRHead, .*top-down heads \(CPMHead'),
    ],
)
def test_what_is_no_top_down_head_is_refused(head, message):
    with pytest.raises(PrivacyError, match=message):
        make_private(head)


def test_a_loss_that_never_calls_forward_contributes_nothing():
    """It would be computed from the features of all samples."""

    class Direct(OwnHead):
        def loss(self, feats, batch_data_samples, train_cfg=None):
            return dict(loss_kpt=self.layer(feats[0]).sum())

    head = make_private(Direct())
    head.loss(*drawn('HeatmapHead', 2))
    assert not any(x.isfinite() for x in head.take().losses)


# ---- samples that a loss raises for ------------------------------------------------------------------------------------
RAISING = [
    name
    for name in HEADS
    if name in ('mean', 'visibility', 'points, learned density', 'integral, two losses', 'levels')
]


@pytest.mark.parametrize('name', RAISING)
@pytest.mark.parametrize('number', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('spoiled', ['features', 'labels'])
def test_a_sample_that_is_not_finite_contributes_nothing(name, number, spoiled):
    """MMPose's losses raise for some (binary cross-entropy, torch.distributions), and others pass it on."""
    head = MODELS.build(dict(HEADS[name], type=f'Private{HEADS[name]["type"]}'))
    freeze_batch_norm(head)
    feats, samples = drawn(HEADS[name]['type'], 3)
    before = [float(x) for x in head.loss(feats, samples) and head.take().losses]
    if spoiled == 'features':
        maps = feats[0]
        while not torch.is_tensor(maps):
            maps = maps[0]
        maps[1, :, 0, 0] = number
    else:
        labels = samples[1].gt_instance_labels
        labels.keypoint_weights = labels.keypoint_weights * number
    losses = head.loss(feats, samples)
    assert all(value.shape == (3,) for value in losses.values())
    after = [float(x) for x in head.take().losses]
    assert [after[0], after[2]] == [before[0], before[2]]
    assert not np.isfinite(after[1]) or after[1] == before[1]  # some losses leave labels' weights out


def test_a_label_out_of_range_contributes_nothing():
    head = MODELS.build(dict(HEADS['visibility'], type='PrivateVisPredictHead'))
    feats, samples = drawn('VisPredictHead', 3)
    samples[2].gt_instance_labels.keypoint_weights[0, 1] = 2.0  # MPII's files say what they like
    with pytest.warns(UserWarning, match='a sample contributes nothing, since its loss raised ValueError$'):
        head.loss(feats, samples)
    assert [bool(x.isfinite()) for x in head.take().losses] == [True, True, False]


@pytest.mark.parametrize('name', ['mean', 'visibility'])
def test_what_no_sample_can_be_right_for_is_raised(name):
    """A head of other joints than the data's: all samples have it, so no record decides."""
    other = dict(HEADS['mean'], out_channels=K + 2)
    cfg = other if name == 'mean' else dict(HEADS[name], pose_cfg=other)
    head = MODELS.build(dict(cfg, type=f'Private{cfg["type"]}'))
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        head.loss(*drawn(cfg['type'], 3))


def test_losses_on_values_end_nothing():
    """Whatever a loss of one's own asserts about values."""

    class Asserting(torch.nn.Module):
        def forward(self, output, target, *weights):
            assert float(target.max()) < 1, target
            return (output - target).square().mean()

    head = MODELS.build(dict(HEADS['mean'], type='PrivateHeatmapHead'))
    head.loss_module = Asserting()
    feats, samples = drawn('HeatmapHead', 3)
    samples[0].gt_fields.heatmaps[0, 0, 0] = 5.0
    with pytest.warns(UserWarning, match='since its loss raised AssertionError$'):
        head.loss(feats, samples)
    assert [bool(x.isfinite()) for x in head.take().losses] == [False, True, True]


def test_a_loss_never_sees_a_sample_that_is_not_finite():
    """On a GPU, a loss that asserts ends the process, and nothing can catch that."""
    head = MODELS.build(dict(HEADS['mean'], type='PrivateHeatmapHead'))
    plain, seen = head.loss_module.forward, []
    head.loss_module.forward = lambda output, *rest: seen.append(output) or plain(output, *rest)
    feats, samples = drawn('HeatmapHead', 3)
    feats[0][1, 0, 0, 0] = torch.nan
    head.loss(feats, samples)
    assert len(seen) == 2 and all(output.isfinite().all() for output in seen)
