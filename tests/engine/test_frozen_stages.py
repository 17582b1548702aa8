"""``frozen_stages`` of each backbone that has it: frozen as in plain training, at the first step or in train() alone."""

import inspect

import mmpose.models.backbones
import pytest
import torch
from mmpose.registry import MODELS

from mmpose_dp.engine import DPOptimWrapper, DPOptimWrapperConstructor
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.models import RLE, batch, load, take

_HRNET = {
    f'stage{i}': dict(
        num_modules=1, num_branches=min(i, 2), block='BOTTLENECK' if i == 1 else 'BASIC',
        num_blocks=(1,) * min(i, 2), num_channels=((4,), (4, 8))[i > 1],
    )
    for i in (1, 2, 3, 4)
}  # fmt: skip
# each: its settings, frozen stages, channels of the last output
BACKBONES = {
    'ResNet': (dict(depth=18, base_channels=4, stem_channels=4), 1, 32),
    'HRNet': (dict(extra=_HRNET), 2, 4),
    'MobileNetV2': (dict(widen_factor=0.1, out_indices=(7,)), 1, 1280),
    'MobileNetV3': (dict(arch='small', out_indices=(10,)), 1, 96),
    'ShuffleNetV1': (dict(), 1, 960),
    'ShuffleNetV2': (dict(widen_factor=0.5), 1, 1024),
    'SwinTransformer': (dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)), 1, 64),
    'VGG': (dict(depth=11, norm_cfg=dict(type='BN')), 1, 512),
    'CSPNeXt': (dict(arch='P5', deepen_factor=0.167, widen_factor=0.125, out_indices=(4,)), 1, 128),
    'CSPDarknet': (dict(arch='P5', deepen_factor=0.167, widen_factor=0.125, out_indices=(4,)), 1, 128),
    'ViPNAS_MobileNetV3': (dict(), 1, 160),
    'ViPNAS_ResNet': (dict(depth=50), 1, 608),
}  # fmt: skip


def with_frozen_stages():
    classes = [cls for _, cls in inspect.getmembers(mmpose.models.backbones, inspect.isclass)]
    return [c for c in classes if any('frozen_stages' in inspect.signature(b.__init__).parameters for b in c.__mro__)]


def test_each_way_to_freeze_is_here():
    classes = [getattr(mmpose.models.backbones, name) for name in BACKBONES]
    ways = {cls.train for cls in classes}
    assert not [c.__name__ for c in with_frozen_stages() if c.train not in ways and c.__module__.startswith('mmpose')]


def build(name, private=True, frozen_stages=None):
    settings, frozen, channels = BACKBONES[name]
    cfg = load(RLE, size=64)
    model = cfg.model.copy()
    model.backbone = dict(type=name, frozen_stages=frozen if frozen_stages is None else frozen_stages, **settings)
    if name == 'HRNet':
        model.backbone.in_channels = 3
    model.head = dict(model.head, type=f'{"Private" if private else ""}{model.head.type}', in_channels=channels)
    torch.manual_seed(0)
    return cfg, MODELS.build(model)


def construct(model, **settings):
    wrapper = dict(
        type='DPOptimWrapper', optimizer=dict(type='SGD', lr=0.1), max_grad_norm=1.0, noise_multiplier=0.0,
        expected_batch_size=2, **settings,
    )  # fmt: skip
    return DPOptimWrapperConstructor(wrapper)(model)


@pytest.mark.parametrize('name', BACKBONES)
def test_trains_what_plain_training_does(name):
    plain = build(name, private=False)[1].train()
    cfg, model = build(name)
    wrapper = construct(model, public_optimizer=dict(type='SGD', lr=0.1))
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in wrapper.params} == trained < set(names.values())
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    take(model, batch(cfg, [0, 1], dtype=torch.float32), wrapper)
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved <= trained and len(moved) > len(trained) / 2
    wrapper.train_on(public_only=True)
    take(model, batch(cfg, [None, None], dtype=torch.float32), wrapper)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_updates_of_low_rank_stay_out_of_frozen_stages():
    cfg, model = build('MobileNetV2')
    wrapper = construct(model, trainable='lora+head')
    assert isinstance(wrapper, DPOptimWrapper) and all(p.requires_grad for p in wrapper.params)
    model.train()
    take(model, batch(cfg, [0, 1], dtype=torch.float32), wrapper)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any('.lora_' in name for name in names) and not any('layer1.' in name for name in names)


def test_nothing_left_to_train_is_refused():
    _, model = build('ResNet', frozen_stages=4)
    model.head.requires_grad_(False)
    with pytest.raises(PrivacyError, match='no parameter to train.*frozen_stages'):
        construct(model)
