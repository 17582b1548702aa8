"""MMPose's configs, made private: the clipped sum is that of plain MMPose looped over single records."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.engine.checks.replay import ReplayCheck
from mmpose_dp.engine.dry_run import blank_batch, refuse_early_mixing, try_batch
from mmpose_dp.engine.padding import padded
from mmpose_dp.gradients.blocks import PerSampleGradients
from tests.support.datasets import records, with_targets_in
from tests.support.models import FOLDER, build, clip, load, norms, reference_gradients, take

MPII = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob('body_2d_keypoint/*/mpii/*.py'))
HEATMAP, RTMPOSE = 'body_2d_keypoint/topdown_heatmap/coco/td-hm_', 'body_2d_keypoint/rtmpose/coco/rtmpose-'
SIMCC, REGRESSION = 'body_2d_keypoint/simcc/coco/simcc_', 'body_2d_keypoint/topdown_regression/coco/td-reg_'
INTEGRAL = 'body_2d_keypoint/integral_regression/coco/ipr_res50_'
OTHERS = [
    HEATMAP + 'ViTPose-small_8xb64-210e_coco-256x192.py',
    HEATMAP + 'ViTPose-small-simple_8xb64-210e_coco-256x192.py',
    HEATMAP + 'hrformer-small_8xb32-210e_coco-256x192.py',
    HEATMAP + 'swin-t-p4-w7_8xb32-210e_coco-256x192.py',
    HEATMAP + 'pvt-s_8xb64-210e_coco-256x192.py',
    HEATMAP + 'pvtv2-b2_8xb64-210e_coco-256x192.py',
    HEATMAP + 'resnest50_8xb64-210e_coco-256x192.py',
    HEATMAP + 'vipnas-res50_8xb64-210e_coco-256x192.py',
    HEATMAP + 'vipnas-mbv3_8xb64-210e_coco-256x192.py',
    HEATMAP + 'mspn50_8xb32-210e_coco-256x192.py',
    HEATMAP + '2xmspn50_8xb32-210e_coco-256x192.py',
    HEATMAP + 'rsn18_8xb32-210e_coco-256x192.py',
    HEATMAP + 'alexnet_8xb64-210e_coco-256x192.py',
    HEATMAP + 'vgg16-bn_8xb64-210e_coco-256x192.py',
    HEATMAP + 'litehrnet-18_8xb64-210e_coco-256x192.py',
    HEATMAP + 'hrnet-w32_udp-8xb64-210e_coco-256x192.py',
    HEATMAP + 'hrnet-w32_udp-regress-8xb64-210e_coco-256x192.py',
    HEATMAP + 'res50_dark-8xb64-210e_coco-256x192.py',
    RTMPOSE + 't_8xb256-420e_coco-256x192.py',
    RTMPOSE + 's_8xb256-420e_coco-256x192.py',
    RTMPOSE + 'm_8xb256-420e_coco-256x192.py',
    RTMPOSE + 'l_8xb256-420e_coco-256x192.py',
    SIMCC + 'mobilenetv2_wo-deconv-8xb64-210e_coco-256x192.py',
    SIMCC + 'res50_8xb64-210e_coco-256x192.py',
    SIMCC + 'vipnas-mbv3_8xb64-210e_coco-256x192.py',
    REGRESSION + 'mobilenetv2_rle-pretrained-8xb64-210e_coco-256x192.py',
    REGRESSION + 'res50_8xb64-210e_coco-256x192.py',
    INTEGRAL + '8xb64-210e_coco-256x256.py',
    INTEGRAL + 'debias-8xb64-210e_coco-256x256.py',
    INTEGRAL + 'dsnt-8xb64-210e_coco-256x256.py',
    'hand_2d_keypoint/topdown_heatmap/onehand10k/td-hm_mobilenetv2_8xb64-210e_onehand10k-256x256.py',
    'face_2d_keypoint/topdown_heatmap/wflw/td-hm_hrnetv2-w18_awing-8xb64-60e_wflw-256x256.py',
    'animal_2d_keypoint/topdown_heatmap/ap10k/cspnext-m_udp_8xb64-210e_ap10k-256x256.py',
    'wholebody_2d_keypoint/topdown_heatmap/coco-wholebody/td-hm_vipnas-mbv3_8xb64-210e_coco-wholebody-256x192.py',
]
HEIGHT = {'cpm': 64, 'hourglass': 128, 'scnet': 128, 'alexnet': 256, 'ipr': 128}  # the least that these models need
# one of each backbone family and head is left to the everyday run
SLOW = (
    *(
        'hourglass',
        'scnet',
        'seresnet50',
        'resnetv1d50',
        'resnest50',
        'pvt-s',
        '101',
        '152',
        'w48',
        'litehrnet-30',
        '384x384',
        'hrnet-w32_dark',
        '2xmspn50',
        'ViTPose-small-simple',
        'pvtv2',
        'dsnt',
    ),
    *(
        'udp-',
        'res50_dark',
        'rtmpose-t',
        'rtmpose-s',
        'rtmpose-l',
        'rtmpose-m_8xb256',
        'simcc_mobilenet',
        'simcc_vipnas',
    ),
    *(
        'simcc_res50_8xb64',
        'td-reg_res50_8xb64-210e_coco',
        'debias',
        'vgg',
        'litehrnet-18_8xb64-210e_coco',
        'wholebody',
        'ap10k',
    ),
)


def case(name):
    """Deeper, wider and larger siblings are marked slow."""
    marks = [pytest.mark.slow] if any(key in name for key in SLOW) else []
    return pytest.param(name, marks=marks, id=Path(name).stem)


def calm(model):
    """Shrinks the weights of DSNT's head: its loss is NaN, in MMPose too, if the softmax of random weights underflows to 0."""
    if 'DSNT' in type(model.head).__name__:
        for param in model.head.parameters():
            param.data *= 0.1
    return model


def test_there_are_31_for_mpii():
    assert len(MPII) == 31


@pytest.mark.parametrize('name', map(case, MPII + OTHERS))
def test_the_clipped_sum_is_the_reference(name, synthetic):
    cfg = load(name, next((height for key, height in HEIGHT.items() if key in name), 64 if '256x256' in name else 128))
    data = records(cfg, synthetic, 2)
    gradients = reference_gradients(calm(build(cfg, private=False)), data)
    C = float(norms(gradients).mean())
    model = calm(build(cfg, private=True))
    packed = {key: values[0] for key, values in data.items()}
    try_batch(model, blank_batch(packed), 'data')  # as before training
    refuse_early_mixing(model, blank_batch(packed, 3), 'data')
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    got = {}
    wrapper = DPOptimWrapper(SGD(params.values(), lr=1.0), C, noise_multiplier=0.0, expected_batch_size=2)
    wrapper.optimizer.register_step_pre_hook(lambda *_: got.update((n, p.grad.clone()) for n, p in params.items()))
    take(model, data, wrapper)
    print(wrapper.engine)
    want = clip(gradients, C).double().sum(0) / 2
    parts = want.split([p.numel() for p in params.values()])
    for (key, grad), part in zip(got.items(), parts):
        gap = float((grad.flatten().double() - part).norm())
        assert gap <= 1e-4 * float(part.norm()) + 1e-6 * float(want.norm()), key
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def one_shape(name):
    """One of each kind of layers is in the everyday run."""
    quick = any(
        key in name for key in ('mobilenetv2_8xb64-210e_mpii', 'shufflenetv2', 'rtmpose-m_8xb64-210e_mpii', 'swin')
    )
    return pytest.param(name, marks=[] if quick else [pytest.mark.slow], id=Path(name).stem)


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
@pytest.mark.parametrize('name', map(one_shape, MPII + OTHERS))
def test_a_record_has_one_gradient_in_forwards_of_one_shape(name, dtype, synthetic):
    """Whoever else is there, padding included, and in whichever place. Most have it to the bit; a kink would move it by 1e-3."""
    model, wrapper, batches = training(name, dtype, synthetic, 1)

    def gradients(places):
        batch = padded({key: [values[i] for i in places] for key, values in batches[0].items()}, 4)
        found = PerSampleGradients(wrapper.params, range(4))
        wrapper._gradients_among(batch, found)
        return found.total

    for module in model.modules():
        module.train('Drop' not in type(module).__name__)  # random numbers go by places
    among, others = (torch.cat([x.flatten(1) for x in gradients(places)], 1) for places in ([0, 1, 2, 3], [1, 3]))
    gap = float((among[[1, 3]] - others[:2]).norm() / others[:2].norm())
    print(f'{name} {dtype}: {gap:.1e}')
    assert gap <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
@pytest.mark.parametrize('name', MPII + OTHERS, ids=lambda name: Path(name).stem)
def test_the_replay_stops_no_sound_model(name, dtype, synthetic):
    """200 steps with dropout and drop paths; the environment variable REPLAY_STEPS sets another number."""
    assert max(gaps(name, dtype, synthetic, int(os.environ.get('REPLAY_STEPS', 200)))) > 0


def training(name, dtype, data, count):
    """A model in training, its wrapper, and ``count`` batches of 4 records."""
    # torch's bfloat16 gives a convolution of 7 x 7 over 2 x 2 places a wrong gradient on CPUs
    wide = any(key in name for key in ('rtmpose', 'cspnext'))
    lowest = 128 if wide or '256x256' not in name else 64
    cfg = load(name, next((height for key, height in HEIGHT.items() if key in name), lowest))
    model = calm(build(cfg, private=True)).float()
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    # no noise, which would take a third of the time: the weights move by the clipped gradients
    wrapper = DPOptimWrapper(SGD(params, lr=1e-2), 1.0, noise_multiplier=0.0, expected_batch_size=4, amp_dtype=dtype)
    wrapper.replay.fixed_shape = True
    batches = [with_targets_in(torch.float32, records(cfg, data, 4, seed)) for seed in range(count)]
    wrapper.prepare(model)
    wrapper.rehearse(batches[0])  # as before training
    return model, wrapper, batches


def gaps(name, dtype, data, steps):
    """The relative distance of the two gradients of the replayed record at each step."""
    model, wrapper, batches = training(name, dtype, data, min(steps, 8))
    found, whole = [], ReplayCheck.gap

    def noted(check, rounding=0.0):
        found.append(whole(check))
        return found[-1]

    ReplayCheck.gap = noted
    try:
        for step in range(steps):
            take(model, copy.deepcopy(batches[step % len(batches)]), wrapper)
    finally:
        ReplayCheck.gap = whole
    return found
