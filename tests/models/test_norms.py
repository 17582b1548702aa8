"""Frozen BatchNorm: statistics never move, scale and shift train, names stay."""

import copy

import torch
from torch import nn

from mmpose_dp.models import freeze_batch_norm


def test_statistics_never_move_again():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.GroupNorm(2, 4))
    keys = list(model.state_dict())
    assert freeze_batch_norm(model) == 2 and list(model.state_dict()) == keys
    for twin in (model, copy.deepcopy(model)):
        twin.train()
        before = {k: v.clone() for k, v in twin.named_buffers()}
        twin[1](torch.randn(5, 4, 6, 6))
        assert twin.training and not twin[1].training and not twin[2].training
        assert all(torch.equal(v, before[k]) for k, v in twin.named_buffers())
        assert isinstance(twin[1], nn.BatchNorm2d) and twin[1].weight.requires_grad


def test_freezing_twice_is_freezing_once():
    model = nn.Sequential(nn.BatchNorm2d(4))
    freeze_batch_norm(model)
    cls = type(model[0])
    assert freeze_batch_norm(model) == 1 and type(model[0]) is cls
