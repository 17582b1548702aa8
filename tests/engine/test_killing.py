"""Kill -9 at any moment: nothing is under-counted, and the training can go on."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from mmpose_dp.engine import newest_checkpoint
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from tests.support.forking import STEPS
from tests.support.processes import environment


class Trainings:
    """Processes that train; each can be killed."""

    def __init__(self, data):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.data, self.server = (
            data,
            subprocess.Popen(
                [sys.executable, '-W', 'ignore', '-m', 'tests.support.forking'], env=environment(), text=True, **pipes
            ),
        )

    def train(self, work_dir, resume=False, kill_after=None, once=lambda: True):
        """(status, seconds) of a training process, killed so many seconds after ``once()`` first holds."""
        work_dir.mkdir(exist_ok=True)
        task = dict(work_dir=str(work_dir), data=str(self.data), resume=resume)
        self.server.stdin.write(json.dumps(task) + '\n')
        self.server.stdin.flush()
        child, start = self._answer(), time.monotonic()
        if kill_after is not None:
            deadline = start + 300
            while not once() and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it was quicker
                os.kill(child, signal.SIGKILL)
        return self._answer(), time.monotonic() - start

    def _answer(self):
        for line in self.server.stdout:
            if line.startswith('> '):
                return int(line[2:])
        raise RuntimeError('the server ended')


@pytest.fixture
def trainings(synthetic):
    made = Trainings(synthetic)
    yield made
    made.server.stdin.close()
    made.server.wait(60)


@pytest.mark.parametrize('kills', [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(trainings, tmp_path, kills):
    status, whole = trainings.train(tmp_path / 'whole')
    assert status == 0
    seed = random.randrange(10**6)
    moments, lost, early = random.Random(seed), 0, 0
    for number in range(kills):
        work_dir, moment = tmp_path / str(number), moments.random() * whole
        # every third one not before the first checkpoint, however busy the machine is
        once = dict(once=lambda: newest_checkpoint(work_dir) is not None) if number % 3 == 2 else {}  # noqa: B023
        status, _ = trainings.train(work_dir, kill_after=moment / (4 if once else 1), **once)
        words = f'seed {seed}, killed number {number} after {moment:.3f} of {whole:.3f} s'
        ledger = Ledger.read(work_dir / LEDGER_NAME)
        seen = work_dir / 'released'
        assert ledger.steps >= (seen.stat().st_size if seen.exists() else 0), words
        checkpoint = newest_checkpoint(work_dir)
        if checkpoint is not None:
            ledger.check_covers(torch.load(checkpoint, weights_only=False)['privacy']['ledger'])
        early += checkpoint is None
        lost += status == signal.SIGKILL
        before = ledger.steps

        begun = checkpoint is not None or (work_dir / LEDGER_NAME).exists()  # of nothing, a resume is refused
        status, _ = trainings.train(work_dir, resume=begun)
        assert status == 0, words
        ledger = Ledger.read(work_dir / LEDGER_NAME)
        assert 7.0 < ledger.epsilon(1e-3) <= 8.0 and ledger.steps >= max(before, STEPS), words
        assert ledger.steps >= seen.stat().st_size, words
        statement = json.loads((work_dir / 'privacy_statement.json').read_text())
        assert statement['private'] and statement['epsilon'] <= 8.0, words
        torch.load(newest_checkpoint(work_dir), weights_only=False)
    assert lost >= kills // 4, 'the training was over before it was killed'
    assert early < kills, 'no training got as far as a checkpoint'
