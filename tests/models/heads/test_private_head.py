"""Private heads: same parameters and predictions as their parents, one loss a record, nothing else reported."""

import pytest
import torch
from helpers import HRNET, RTMPOSE, SIMCC, batch, build, load

from mmpose_dp.models import FeatureMaskingHead


@pytest.fixture(scope='module', params=[HRNET, SIMCC, RTMPOSE], ids=['heatmap', 'simcc', 'rtmcc'])
def pair(request):
    cfg = load(request.param)
    return cfg, build(cfg, private=False), build(cfg, private=True)


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
    data = batch(cfg, [0, None, 1])
    feats = features(plain, 3)
    losses = private.head.loss(feats, data['data_samples'])
    assert set(losses) == {'loss_kpt'} and losses['loss_kpt'].shape == (3,)
    for i in range(3):
        alone = plain.head.loss((feats[0][i : i + 1],), data['data_samples'][i : i + 1])['loss_kpt']
        torch.testing.assert_close(losses['loss_kpt'][i], alone, rtol=1e-4, atol=1e-7)
    assert private.head.rows.records.tolist() == [0, -1, 1]


def test_a_row_does_not_depend_on_the_others(pair):
    cfg, _, private = pair
    data, other = batch(cfg, [0, 1, 2], seed=1), batch(cfg, [0, 1, 2], seed=2)
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


def test_losses_that_normalise_over_the_batch_become_per_record():
    from mmpose.registry import MODELS

    torch.manual_seed(0)
    for loss in ('KeypointOHKMMSELoss', 'CombinedTargetMSELoss', 'FocalHeatmapLoss'):
        settings = dict(topk=4) if 'OHKM' in loss else {}
        head = MODELS.build(
            dict(type='PrivateHeatmapHead', in_channels=4, out_channels=6, deconv_out_channels=None,
                 loss=dict(type=loss, use_target_weight=True, **settings))
        )  # fmt: skip
        parent = type(head.loss_module).__mro__[2]
        out, target, weight = (
            torch.rand(3, 6, 8, 8),
            torch.rand(3, 6, 8, 8),
            torch.ones(3, 2 if 'Comb' in loss else 6),
        )
        each = head.loss_module(out, target, weight)
        for i in range(3):
            one = slice(i, i + 1)
            alone = parent.forward(head.loss_module, out[one], target[one], weight[one])
            torch.testing.assert_close(each[i], alone.reshape(()))


def test_three_twins():
    assert len(FeatureMaskingHead.__subclasses__()) == 3
