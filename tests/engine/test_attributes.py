"""A model that remembers samples in plain attributes, which no replay within one step shows, is refused."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from mmpose.structures import PoseDataSample
from torch import nn

from mmpose_dp.engine.checks.attributes import Attributes
from mmpose_dp.engine.dry_run import blank_batch
from mmpose_dp.privacy.errors import UnsupportedModelError
from tests.engine.test_independence import CFG, made, refused_step, step
from tests.support.models import batch


class Slotted:
    __slots__ = 'mean'

    def __init__(self):
        self.mean = torch.zeros(1)


class Keeping(nn.Module):
    """Attributes of every kind, none of which a forward changes."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.bank, self.table, self.rate, self.count = torch.zeros(3), np.zeros(3), 0.5, 0
        self.pending, self.pair, self.named = [], (torch.zeros(1), torch.zeros(1)), {'a': {'b': torch.zeros(1)}}
        self.queue, self.codec = deque([torch.zeros(1)]), SimpleNamespace(grid=torch.zeros(2), size=3)
        self.by_place, self.some, self.slots = {(0, 1): torch.zeros(1)}, {'a'}, Slotted()
        self.raw, self.sparse, self.hidden = bytearray(2), torch.eye(2).to_sparse(), [nn.Linear(1, 1)]
        self.hidden[0].back = [self, self.hidden]  # not followed for ever


WAYS = {
    'another tensor': (lambda m: setattr(m, 'bank', torch.zeros(3)), 'bank'),
    'written to': (lambda m: m.bank.add_(1), 'bank'),
    'other storage': (lambda m: setattr(m.bank, 'data', torch.ones(3)), 'bank'),
    'array': (lambda m: m.table.fill(1), 'table'),
    'list': (lambda m: m.pending.append(torch.zeros(1)), 'pending[0]'),
    'tuple': (lambda m: setattr(m, 'pair', (m.pair[0], torch.ones(1))), 'pair[1]'),
    'dict in a dict': (lambda m: m.named['a'].update(b=torch.ones(1)), "named['a']['b']"),
    'deque': (lambda m: m.queue.clear(), 'queue[0]'),
    'object': (lambda m: setattr(m.codec, 'grid', torch.ones(2)), 'codec.grid'),
    'new attribute': (lambda m: setattr(m.inner, 'seen', torch.ones(1)), 'inner.seen'),
    'by .data': (lambda m: m.bank.data.add_(1), 'bank'),
    'by .numpy()': (lambda m: m.bank.numpy().fill(1), 'bank'),
    'one of two by .data': (lambda m: m.pair[1].data.add_(1), 'pair[1]'),
    'sparse': (lambda m: m.sparse._values().data.add_(1), 'sparse'),
    'key of two': (lambda m: m.by_place.update({(0, 1): torch.ones(1)}), 'by_place[key 0]'),
    'new key of two': (lambda m: m.by_place.update({(1, 1): torch.ones(1)}), 'by_place[key 1]'),
    'set': (lambda m: setattr(m, 'some', {torch.ones(1)}), 'some[0]'),
    'slot': (lambda m: setattr(m.slots, 'mean', torch.ones(1)), 'slots.mean'),
    'bytes': (lambda m: m.raw.extend(b'a'), 'raw'),
    'of a parameter': (lambda m: setattr(m.inner.weight, 'mean', torch.ones(1)), 'inner.weight.mean'),
    'weight of a module in a list': (lambda m: m.hidden[0].weight.data.add_(1), 'hidden[0].weight'),
    'attribute of a module in a list': (lambda m: setattr(m.hidden[0], 'mean', torch.ones(1)), 'hidden[0].mean'),
    'gone': (lambda m: delattr(m, 'bank'), 'bank'),
}


@pytest.mark.parametrize('way', WAYS)
def test_what_changes_is_named(way):
    model = Keeping()
    change, name = WAYS[way]
    before = Attributes(model)
    assert not before.changed(model)
    change(model)
    assert before.changed(model) == name


def test_counts_may_change_and_floating_numbers_count_where_they_are_asked_for():
    model = Keeping()
    before, strict = Attributes(model), Attributes(model, numbers=True)
    model.count, model.codec.size, model.inner.weight.data = 1, 4, torch.ones(2, 2)
    assert not before.changed(model) and not strict.changed(model)
    model.rate = 0.25
    assert not before.changed(model) and strict.changed(model) == 'rate'
    model.rate, model.note = 0.5, '0.123'
    assert not before.changed(model) and strict.changed(model) == 'note'


def test_what_the_attributes_hold_is_not_kept_alive():
    model = Keeping()
    before = Attributes(model)
    (address,) = {model.bank.data_ptr()}
    model.bank = None
    model.bank = torch.zeros(3)  # may have the same address
    assert before.changed(model) == 'bank' and address


def remembering(kind):
    """A model and its wrapper; its backbone keeps something of each batch, without using it."""
    model, wrapper = made()

    def remember(module, inputs, outputs):
        seen = outputs[0].detach().mean((2, 3))
        module.seen = [*getattr(module, 'seen', []), float(seen.mean()) if kind == 'number' else seen]

    model.backbone.register_forward_hook(remember)
    return model, wrapper


@pytest.mark.parametrize('kind', ['tensor', 'number'])
def test_it_is_refused_before_training(kind):
    model, wrapper = remembering(kind)
    with pytest.raises(UnsupportedModelError, match=r'keeps something in model.backbone.seen\[1\]'):
        wrapper.rehearse(batch(CFG, [0, 1], dtype=torch.float32))
    assert not wrapper.ledger.steps


def test_it_is_refused_in_a_step_if_it_begins_late():
    model, wrapper = made()
    step(model, wrapper)
    model.backbone.register_forward_hook(lambda module, inputs, outputs: vars(module).update(seen=outputs[0].detach()))
    refused_step(model, wrapper, r'keeps something in model.backbone.seen')


def test_a_step_that_ends_in_the_check_itself_is_counted():
    model, wrapper = made()
    step(model, wrapper)
    ragged = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])  # it has no shape, which the check asks for
    model.backbone.register_forward_hook(lambda module, inputs, outputs: vars(module).update(seen=ragged))
    with pytest.raises(RuntimeError):
        step(model, wrapper)
    assert wrapper.ledger.steps == 2 and wrapper.mechanism._sum is None


def test_what_a_hook_sets_between_two_steps_is_no_memory_of_a_forward():
    model, wrapper = made()
    for number in range(2):
        model.backbone.scale = torch.full((1,), float(number))
        step(model, wrapper, number)
    assert wrapper.ledger.steps == 2


def test_a_blank_sample_has_a_loss_where_its_weights_are_whole_numbers():
    """SimCC's are: with weights of 0, what is tried before training would have no gradient."""
    sample = PoseDataSample(gt_instance_labels=InstanceData(keypoint_weights=torch.zeros(1, 16, dtype=torch.int64)))
    blank = blank_batch(dict(inputs=torch.zeros(3, 8, 8, dtype=torch.uint8), data_samples=sample))
    assert blank['data_samples'][0].gt_instance_labels.keypoint_weights.all()
    assert not sample.gt_instance_labels.keypoint_weights.any()
