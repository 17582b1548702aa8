"""Every one of MMPose's MPII configs: the clipped sum is that of plain MMPose looped over single records."""

from pathlib import Path

import mmpose
import pytest
import torch
from helpers import PREFIX, batch, build, clip, load, norms, reference_rows
from torch.optim import SGD

from mmpose_dp.engine import DPOptimWrapper

pytestmark = pytest.mark.usefixtures('same_kernels')

FOLDER = Path(mmpose.__file__).parent / '.mim/configs/body_2d_keypoint'
CONFIGS = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob('mpii/*.py'))
SIZE = {'hourglass': 128}
SLOW = ('101', '152', 'w48', 'dark', 'litehrnet-30', '384x384')


def case(name):
    """Deeper, wider and larger siblings are marked slow."""
    marks = [pytest.mark.slow] if any(key in name for key in SLOW) else []
    return pytest.param(name, marks=marks, id=Path(name).stem.replace('-210e_mpii', ''))


def test_there_are_31():
    assert len(CONFIGS) == 31


@pytest.mark.parametrize('name', map(case, CONFIGS))
def test_the_clipped_sum_is_the_reference(name):
    size = next((size for key, size in SIZE.items() if key in name), 64)
    cfg = load(PREFIX + name, size=size)
    data = batch(cfg, [0, 1])
    rows = reference_rows(build(cfg, private=False), data)
    C = float(norms(rows).mean())
    model = build(cfg, private=True)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    got = {}
    wrapper = DPOptimWrapper(SGD(params.values(), lr=1.0), C, noise_multiplier=0.0, expected_batch_size=2)
    wrapper.optimizer.register_step_pre_hook(lambda *_: got.update((n, p.grad.clone()) for n, p in params.items()))
    model.train_step(data, wrapper)
    want = clip(rows, C).double().sum(0) / 2
    parts = want.split([p.numel() for p in params.values()])
    for (key, grad), part in zip(got.items(), parts):
        gap = float((grad.flatten().double() - part).norm())
        assert gap <= 1e-4 * float(part.norm()) + 1e-7 * float(want.norm()), key
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
