"""Frozen BatchNorm: statistics never move, scale and shift train, names stay."""

import copy
import itertools

import pytest
import torch
from torch import nn

from mmpose_dp.models import freeze_batch_norm, public_statistics, replace_batch_norm


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


def test_public_epochs_wait_for_no_other_process(tmp_path):
    """SyncBatchNorm would, at each forward: with an odd public_batch_size, one process has a forward more than another."""
    model = nn.Sequential(nn.SyncBatchNorm(4))
    freeze_batch_norm(model)
    public_statistics(model, True)
    model.train()
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        model(torch.randn(5, 4, 6, 6))  # torch's own refuses to exchange anything on a CPU
    finally:
        torch.distributed.destroy_process_group()
    assert int(model[0].num_batches_tracked) == 1


@pytest.mark.parametrize('shape', [(1, 8, 5, 6), (2, 8, 1, 6), (1, 2, 5, 6)])
def test_gradients_do_not_depend_on_strides(shape):
    """PyTorch's own do, where a dimension has size 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(shape[1]))
    freeze_batch_norm(model)
    nn.init.uniform_(model[0].weight)
    x, grad = torch.randn(shape), torch.randn(shape)
    orders = list(itertools.permutations(range(4)))

    def laid(tensor, order):
        """The values in memory in another order of the dimensions."""
        return tensor.permute(order).contiguous().permute([order.index(i) for i in range(4)])

    found = []
    for orders_of in itertools.product(orders, orders):
        given, wanted = (laid(tensor, order).detach() for tensor, order in zip((x, grad), orders_of))
        given.requires_grad_()
        found.append(torch.autograd.grad(model(given), [given, *model.parameters()], wanted))
    for grads in found[1:]:
        torch.testing.assert_close(grads, found[0])


@pytest.mark.parametrize(('channels', 'groups'), [(64, 32), (32, 16), (18, 9), (7, 1), (1, 1)])
def test_group_norm_in_its_place(channels, groups):
    class Own(nn.BatchNorm2d):
        pass

    for cls in (nn.BatchNorm2d, nn.SyncBatchNorm, Own):
        model = nn.Sequential(nn.Conv2d(3, channels, 1), nn.Sequential(cls(channels, eps=1e-3)))
        nn.init.normal_(model[1][0].weight)
        saved = {name: p.clone() for name, p in model.named_parameters()}
        assert replace_batch_norm(model) == 1
        norm = model[1][0]
        assert isinstance(norm, nn.GroupNorm) and (norm.num_groups, norm.eps) == (groups, 1e-3)
        assert not list(model.buffers())
        for name, param in model.named_parameters():  # a checkpoint with BatchNorm keeps its scale and shift
            assert torch.equal(param, saved[name])
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(model(x)[:1], model(x[:1]))
