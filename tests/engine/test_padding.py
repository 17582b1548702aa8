"""Private forwards have one shape, and what fills them up is nobody's and contributes nothing."""

import copy

import pytest
import torch
from mmengine.runner import Runner
from torch.optim import SGD

from mmpose_dp.datasets.samplers.poisson_batch_sampler import _pack, _size_that_wastes_least
from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.engine.padding import padded
from mmpose_dp.privacy.records import PADDING, Samples
from tests.support.datasets import records
from tests.support.models import build, flat, load, take
from tests.support.runs import tiny, unvalidated


def trained(synthetic, folder, **options):
    """The sizes of a short training's forwards, and its sampler."""
    runner, sizes = Runner.from_cfg(tiny(unvalidated(synthetic, folder, 'dpsgd', **options))), []
    runner.model.backbone.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    runner.train()
    return sizes, runner.train_loop.sampler


def test_private_forwards_have_one_shape(synthetic, tmp_path):
    sizes, sampler = trained(synthetic, tmp_path, train_cfg__max_epochs=2)
    steps = sizes[sizes.index(sampler.private_forward) :]  # behind what looks at blank samples
    assert len(steps) > 10 and set(steps) == {1, sampler.private_forward}  # 1: a record that is replayed alone


def test_padding_contributes_nothing(synthetic):
    cfg = load('body_2d_keypoint/topdown_heatmap/mpii/td-hm_mobilenetv2_8xb64-210e_mpii-256x256.py', 64)
    data, found = records(cfg, synthetic, 3), []
    for batch in (data, padded(data, 5)):
        torch.manual_seed(0)
        model = build(cfg, private=True)
        params = [p for p in model.parameters() if p.requires_grad]
        wrapper = DPOptimWrapper(SGD(params, lr=1.0), 1e-3, noise_multiplier=0.0, expected_batch_size=1)
        before = flat(params).clone()
        take(model, batch, wrapper)
        found.append(flat(params) - before)
    assert float(found[0].norm()) > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)


def test_a_parameter_that_needs_one_record_at_a_time_is_not_padded(synthetic, tmp_path):
    sizes, _ = trained(synthetic, tmp_path, train_cfg__max_epochs=1, optim_wrapper__engine='loop')
    assert set(sizes[-8:]) == {1}


def test_padding_is_nobodys_and_holds_no_label(synthetic, tmp_path):
    cfg = tiny(unvalidated(synthetic, tmp_path, 'dpsgd'))
    cfg.train_dataloader.batch_sampler.expected_batch_size = 40  # all of them: by chance a batch could have one record
    runner = Runner.from_cfg(cfg)
    batch = next(iter(runner.train_dataloader))
    batch = {key: batch[key][:2] for key in ('inputs', 'data_samples')}
    before = copy.deepcopy(batch)
    full = padded(batch, 5)
    assert (
        len(full['inputs']) == len(full['data_samples']) == 5
        and padded(batch, 2) is batch
        and padded(batch, 1) is batch
    )
    assert all(torch.equal(x, y) for x, y in zip(batch['inputs'], before['inputs']))
    keys = [sample.metainfo['dp_record'] for sample in full['data_samples']]
    assert keys[2:] == [PADDING] * 3 and keys[0] == before['data_samples'][0].metainfo['dp_record']
    for picture, sample in zip(full['inputs'][2:], full['data_samples'][2:]):
        labels = [
            x
            for part in (sample.gt_instance_labels, sample.get('gt_fields'))
            if part is not None
            for x in part.values()
        ]
        assert {float(x) for x in [picture.float().unique(), *(x.unique() for x in labels)]} <= {127.0, 0.5, 0.0}
    samples = Samples.from_keys(keys)
    assert (samples.num_records, list(samples.private), list(samples.public)) == (2, [0, 1], [])


@pytest.mark.parametrize(
    ('expected', 'most', 'between'),
    [(64, 8, (8, 8)), (4096, 64, (64, 64)), (12, 64, (4, 18)), (32, 64, (8, 24)), (1, 1, (1, 1)), (0.2, 8, (1, 1))],
)
def test_the_size_of_forwards_follows_what_is_expected(expected, most, between):
    assert between[0] <= _size_that_wastes_least(expected, most) <= between[1]


def test_a_record_that_is_larger_has_a_forward_to_itself():
    assert _pack([[1], [2, 3, 4, 5], [6], [7, 8]], 3) == [[1], [2, 3, 4, 5], [6, 7, 8]]
    assert _pack([], 3) == []
