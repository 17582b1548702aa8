"""How often a step waits for the device that it runs on, and how many operations it has: counted on the CPU.

``python -m pytest -s tests/engine/test_host_reads.py`` prints the numbers of operations.
"""

import pytest
import torch
from torch.nn.functional import unfold
from torch.optim import SGD

from mmpose_dp import tensors
from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.gradients import layer_rules
from mmpose_dp.privacy.projection import Projector
from tests.support.counting import counted
from tests.support.models import HRNET, batch, build, load

# mmengine looks at the sizes of the images, in a tensor that it has just made on the host
OF_MMENGINE = {'_local_scalar_dense': 1}


def test_a_micro_batch_waits_once_and_a_step_twice(monkeypatch):
    monkeypatch.setattr(tensors, 'reading_waits', lambda x: True)  # as on a GPU
    monkeypatch.setattr(
        layer_rules, 'windows', lambda x, *sizes: unfold(x, *sizes)
    )  # one operation, not a view per step
    cfg = load(HRNET, size=64)
    model = build(cfg, private=True).float()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(params, 1e-3, foreach=True)  # as on a GPU
    wrapper = DPOptimWrapper(optimizer, 1.0, noise_multiplier=1.0, expected_batch_size=4, public_weight=0.5)
    wrapper.prepare(model)
    parts = [batch(cfg, keys, seed, torch.float32) for seed, keys in enumerate([[0, 1], [2, 2], [3, 4], [None, None]])]
    for replayed, part in zip((0, None), parts):  # the first batch is looked at, and a record is replayed in it
        wrapper.begin_micro_batch(False, replayed)
        model.train_step(part, wrapper)
    kinds = ('two samples of one record', parts[1], 7), ('two records', parts[2], 10), ('two public', parts[3], 6)
    for kind, part, most in kinds:
        wrapper.begin_micro_batch(False, None)
        with counted() as found:
            model.train_step(part, wrapper)
        # the head looks whether each sample's outputs are finite, before a loss that asserts can end the process
        assert found.reads == {'tolist': 1, **OF_MMENGINE}, kind
        assert found.operations < most * len(params), kind  # all of them, the forward's too
        print(f'micro-batch of {kind}: {found.operations} operations for {len(params)} parameters')
    with counted() as found:
        wrapper.finish_step()
    # what forbids the release; the same on the host, where processes would add it up; whether the update is finite, and metrics.
    # A GPU makes its noise itself: what is read of the sum is on the CPU already
    assert found.reads == {'_local_scalar_dense': 2, 'tolist': 1, 'cpu': 1, 'numpy': 1}
    assert found.operations < len(params)
    print(f'tail of a step: {found.operations} operations')


@pytest.mark.parametrize('order', ['project-then-clip', 'noise-then-project'])
def test_a_projector_adds_no_operation_per_parameter_to_the_tail(order):
    params = [torch.nn.Parameter(torch.ones(size)) for size in range(1, 101)]
    projector = Projector(rank=2, order=order, dtype='bfloat16')
    projector.place(torch.ones(2, 5050, dtype=torch.bfloat16), [p.shape for p in params])
    optimizer = SGD(params, 1e-3, foreach=True)
    wrapper = DPOptimWrapper(optimizer, 1.0, noise_multiplier=1.0, expected_batch_size=4, projector=projector)
    with counted() as found:
        wrapper.finish_step()
    assert found.operations < 60 + 100 * (order == 'noise-then-project')  # the zeros of an empty step
