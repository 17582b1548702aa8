"""The log says, in one sentence, if an epoch waits for its data loader, and the message hub does not learn of it."""

import time

import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.runner import Runner
from mmpose.registry import TRANSFORMS
from torch.utils.data import DataLoader

from mmpose_dp.datasets.steps import OfStep, Step
from mmpose_dp.engine.loops.loader_wait import LoaderWait
from mmpose_dp.engine.loops.validation import train_loader
from tests.support.runs import unvalidated


@TRANSFORMS.register_module()
class Dawdle(BaseTransform):
    """Takes its time."""

    def transform(self, results):
        time.sleep(0.02)
        return results


def slow(items):
    for item in items:
        time.sleep(0.01)
        yield item


def test_only_the_wait_counts_and_not_the_start():
    wait = LoaderWait()
    assert list(wait.batches(range(3))) == [0, 1, 2]
    for _ in wait.batches(slow(range(5))):
        pass
    assert wait.share > 0.5
    for _ in wait.batches(range(5)):
        time.sleep(0.02)
    assert wait.share < 0.1
    first = LoaderWait()
    for i in first.batches(slow(range(2))):
        time.sleep(0.2 * (i == 1))
    assert first.share < 0.1  # the second one; starting the first took as long


@pytest.fixture(scope='module')
def run(synthetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wait')
    cfg = unvalidated(synthetic, folder, 'feature', train_cfg__max_epochs=4, train_cfg__public_epochs=2)
    cfg.train_dataloader.batch_sampler.expected_batch_size = 40
    cfg.train_dataloader.dataset.private.pipeline.insert(1, dict(type='Dawdle'))
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner, ''.join(path.read_text() for path in folder.glob('*/*.log'))


def test_a_slow_loader_is_reported_once_for_each_kind_of_epoch(run):
    _, log = run
    lines = [line for line in log.splitlines() if 'waiting for data' in line]
    assert len(lines) == 2 and 'public epoch' in lines[0] and 'private epoch' in lines[1]
    assert all('num_workers (now 0' in line and 'smaller pictures' in line for line in lines)
    assert not any('persistent' in line for line in lines)


def test_what_a_checkpoint_holds_does_not_have_it(run):
    runner, _ = run
    assert not any('wait' in name for name in runner.message_hub.log_scalars)


def test_a_micro_batch_keeps_its_form_in_pinned_memory(monkeypatch):
    """A data loader rebuilds a batch in memory from which a GPU copies by itself."""
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: self.clone())
    pin = torch.utils.data._utils.pin_memory.pin_memory
    batch = dict(inputs=[torch.zeros(3, 2, 2, dtype=torch.uint8)], data_samples=[object()], step=Step(True, 4))
    pinned = pin(batch)
    assert pinned['step'] == Step(True, 4) and pinned['data_samples'] == batch['data_samples']
    assert torch.equal(pinned['inputs'][0], batch['inputs'][0]) and pinned['inputs'][0] is not batch['inputs'][0]
    assert pin(OfStep([1, 2], Step(False))).step == Step(False)


def test_where_there_is_a_gpu_memory_is_pinned_unless_the_config_says_otherwise(monkeypatch):
    assert train_loader(dict(batch_size=2))['pin_memory'] is torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert train_loader(dict(batch_size=2))['pin_memory'] is True
    assert train_loader(dict(batch_size=2, pin_memory=False))['pin_memory'] is False


def test_a_loader_that_pins_makes_the_preprocessor_copy_without_waiting(synthetic, tmp_path):
    cfg = unvalidated(synthetic, tmp_path, train_cfg__max_epochs=1, train_dataloader__pin_memory=True)
    runner = Runner.from_cfg(cfg)
    assert runner.train_loop.dataloader.pin_memory and isinstance(runner.train_loop.dataloader, DataLoader)
    runner.train_loop._begin_watch()
    assert runner.model.data_preprocessor._non_blocking
