"""What each setting of ``trainable`` leaves to train, on MMPose's own models; low-rank updates and their checkpoints."""

import pytest
import torch
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch import nn
from torch.optim import SGD

from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.models import choose_trainable
from mmpose_dp.models.trainable_subset import _stage
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.models import HRNET, PREFIX, batch, build, load

RES50 = PREFIX + 'topdown_heatmap/mpii/td-hm_res50_8xb64-210e_mpii-256x256.py'
COCO = PREFIX + 'topdown_heatmap/coco/td-hm_'


@pytest.fixture(scope='module')
def res50():
    return load(RES50, size=64)


def trained(model):
    return {name for name, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize(
    ('trainable', 'holds', 'lacks'),
    [
        ('all', ['backbone.conv1.weight', 'head.final_layer.bias'], []),
        ('head', ['head.final_layer.weight', 'head.deconv_layers.0.weight'], ['backbone.layer4.0.bn1.weight']),
        (
            'head+last_stage+norms',
            ['head.final_layer.weight', 'backbone.layer4.0.conv1.weight', 'backbone.bn1.weight'],
            ['backbone.layer3.0.conv1.weight', 'backbone.conv1.weight'],
        ),
        (
            'norms+first_stage',
            ['backbone.conv1.weight', 'backbone.layer1.0.conv1.weight', 'backbone.layer4.0.bn1.weight'],
            ['backbone.layer2.0.conv1.weight', 'head.final_layer.weight'],
        ),
        ('bias', ['backbone.bn1.bias', 'head.final_layer.bias'], ['backbone.bn1.weight', 'head.final_layer.weight']),
        ('backbone.layer4.*', ['backbone.layer4.2.conv3.weight'], ['head.final_layer.bias']),
        (
            'lora+head',
            ['backbone.layer1.0.conv1.lora_up.weight', 'head.final_layer.weight'],
            ['backbone.layer1.0.conv1.weight', 'backbone.conv1.weight'],
        ),
    ],
)
def test_subsets(res50, trainable, holds, lacks):
    model = build(res50, private=True)
    count = choose_trainable(model, trainable, lora_rank=4)
    names = trained(model)
    assert names >= {*holds} and not names & {*lacks}
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    params = [p for p in model.parameters() if p.requires_grad]
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    model.train_step(batch(res50, [0, 1]), DPOptimWrapper(SGD(params, 1.0), 1.0, 0.5, expected_batch_size=2))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in frozen.items())


@pytest.mark.parametrize('trainable', ['head+backbone.layer5.*', 'heads', '', 'head+'])
def test_what_matches_nothing(res50, trainable):
    with pytest.raises(PrivacyError, match='matches no trainable parameter.*last_stage.*backbone.conv1.weight'):
        choose_trainable(build(res50, private=True), trainable)


def test_a_list_of_patterns_is_told_to_be_one_string(res50):
    trainable = ['head.*', 'backbone.layer4.*']
    with pytest.raises(PrivacyError, match=r"with \+ between its parts: write 'head\.\*\+backbone\.layer4\.\*'"):
        choose_trainable(build(res50, private=True), trainable)


@pytest.mark.parametrize(
    ('config', 'first', 'last'),
    [
        (HRNET, 'layer1', 'stage4'),
        (COCO + 'ViTPose-small_8xb64-210e_coco-256x192.py', 'layers.0', 'layers.11'),
        (COCO + 'swin-t-p4-w7_8xb32-210e_coco-256x192.py', 'stages.0', 'stages.3'),
        (COCO + 'mobilenetv2_8xb64-210e_coco-256x192.py', 'layer1', 'layer7'),
        (COCO + 'pvt-s_8xb64-210e_coco-256x192.py', 'layers.0', 'layers.3'),
    ],
)
def test_stages(config, first, last):
    model = build(load(config), private=True)
    names = [name for name, _ in model.named_parameters()]
    for wanted, prefixes in ((first, _stage(model, last=False)), (last, _stage(model, last=True))):
        assert prefixes[0] == f'backbone.{wanted}.' and any(name.startswith(prefixes[0]) for name in names)
    begin = [name for name in names if name.startswith(_stage(model, last=False))]
    assert not {*begin} & {name for name in names if name.startswith(_stage(model, last=True))}


def test_a_backbone_without_stages():
    with pytest.raises(PrivacyError, match=r"'backbone.features.\*'"):
        choose_trainable(build(load(COCO + 'alexnet_8xb64-210e_coco-256x192.py'), private=True), 'last_stage')


def test_a_low_rank_checkpoint_runs_in_plain_mmpose(res50):
    plain, private = build(res50, private=False), build(res50, private=True)
    private.load_state_dict(plain.state_dict())
    choose_trainable(private, 'lora', lora_rank=3)
    image = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(private(image, None), plain(image, None))  # nothing has changed yet
    for name, param in private.named_parameters():
        if '.lora_' in name:
            nn.init.normal_(param, std=0.01)
    saved = private.state_dict()
    _load_checkpoint_to_model(plain, dict(state_dict=saved))
    assert not torch.equal(plain.state_dict()['head.final_layer.weight'], build(res50, False).head.final_layer.weight)
    torch.testing.assert_close(private(image, None), plain(image, None), rtol=1e-9, atol=1e-12)
    again = build(res50, private=True)  # and resumes in the model it came from
    choose_trainable(again, 'lora', lora_rank=3)
    again.load_state_dict(saved)
    torch.testing.assert_close(again(image, None), private(image, None), rtol=1e-9, atol=1e-12)
    for (name, a), b in zip(again.named_parameters(), private.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_initialisation_leaves_the_updates_zero(res50):
    model = build(res50, private=True)
    choose_trainable(model, 'lora')
    model.init_weights()
    ups = [m.lora_up.weight for m in model.modules() if hasattr(m, 'lora_up')]
    assert len(ups) > 30 and not any(up.any() for up in ups)
