"""The log says, in one sentence, if an epoch waits for its data loader, and the message hub does not learn of it."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import Runner

from mmpose_dp.datasets.steps import OfStep, Step
from mmpose_dp.engine.loops import loader_wait
from mmpose_dp.engine.loops.loader_wait import LoaderWait
from mmpose_dp.engine.loops.validation import train_loader
from tests.support.runs import unvalidated


class Clock:
    """Stands still but for ``pass_by``."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(loader_wait, 'time', SimpleNamespace(perf_counter=lambda: self.now))

    def epoch(self, wait, waits, works):
        """The share of an epoch whose batches take so long to load and to work on."""

        def loader():
            for seconds in waits:
                self.now += seconds
                yield seconds

        for _, seconds in zip(batches := wait.batches(loader()), works):
            self.now += seconds
        list(batches)
        return wait.share


def test_only_the_wait_counts_and_not_the_first_of_all(monkeypatch):
    clock, wait = Clock(monkeypatch), LoaderWait()
    assert clock.epoch(wait, [50.0, 1.0, 1.0], [2.0, 3.0, 3.0]) == pytest.approx(0.2)
    assert clock.epoch(wait, [3.0, 0.0], [1.0, 2.0]) == pytest.approx(0.5)  # the start of a later epoch counts
    assert clock.epoch(wait, [], []) == 0


def said(caplog, share, public_only=False, wait=None, **loader):
    wait, runner = wait or LoaderWait(), SimpleNamespace(logger=logging.getLogger('wait'))
    wait.share = share
    caplog.clear()
    wait.report(runner, SimpleNamespace(**dict(num_workers=0, persistent_workers=False) | loader), public_only)
    return ''.join(caplog.messages)


def test_the_sentence_says_what_to_change(caplog):
    assert said(caplog, 0.1) == ''
    assert '37% of this private epoch' in said(caplog, 0.371) and 'persistent' not in caplog.text
    assert 'num_workers (now 0' in caplog.text and 'smaller pictures' in caplog.text
    assert 'of this public epoch' in said(caplog, 0.2, True, num_workers=1)
    assert 'persistent_workers=True' in caplog.text
    assert 'num_workers' not in said(caplog, 0.2, num_workers=10**6, persistent_workers=True)
    wait = LoaderWait()
    assert [bool(said(caplog, 0.2, public, wait)) for public in (True, False, True, False)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.fixture(scope='module')
def run(synthetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wait')
    cfg = unvalidated(synthetic, folder, 'feature', train_cfg__max_epochs=3, train_cfg__public_epochs=1)
    cfg.train_dataloader.batch_sampler.expected_batch_size = 40
    runner = Runner.from_cfg(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_wait, '_MUCH', 0.0)
        runner.train()
    return runner, ''.join(path.read_text() for path in folder.glob('*/*.log'))


def test_a_training_says_it_once_for_each_kind_of_epoch(run):
    lines = [line for line in run[1].splitlines() if 'waiting for data' in line]
    assert len(lines) == 2 and 'public epoch' in lines[0] and 'private epoch' in lines[1]


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
    runner.optim_wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    assert runner.train_loop.dataloader.pin_memory and not runner.model.data_preprocessor._non_blocking
    runner.train_loop._begin_watch()
    assert runner.model.data_preprocessor._non_blocking
