"""Measures for what part of an epoch the train loop waits for its data loader, and says what to change if that is much.

The share is a step time summed up, and says no more of who was sampled than the log's ``time`` does. Must not look into a batch,
and must not give the share to the message hub, which checkpoints hold.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

from mmengine.runner import Runner
from torch.utils.data import DataLoader

_MUCH = 0.1  # of an epoch's time


class LoaderWait:
    """Measures the waiting. The first batch of a training is left out: worker processes start for it."""

    def __init__(self) -> None:
        self._begun = False
        self._reported: set[bool] = set()  # the kinds of epochs, public or private, that were reported
        self.share = 0.0  # of the last whole epoch

    def batches(self, dataloader: DataLoader) -> Iterator[dict[str, Any]]:
        """The batches of one epoch; ``share`` is set after the last one."""
        self.share, waited = 0.0, 0.0
        start = asked = time.perf_counter()
        for batch in dataloader:
            now = time.perf_counter()
            if self._begun:
                waited += now - asked
            else:
                start, self._begun = now, True
            yield batch
            asked = time.perf_counter()
        self.share = waited / max(time.perf_counter() - start, 1e-9)

    def report(self, runner: Runner, dataloader: DataLoader, public_only: bool) -> None:
        """One sentence in the log if the last epoch waited for more than 10 % of its time, once for each kind of epoch."""
        if self.share <= _MUCH or public_only in self._reported:
            return
        self._reported.add(public_only)
        cores, workers = len(os.sched_getaffinity(0)), dataloader.num_workers
        advice = [f'raise train_dataloader.num_workers (now {workers}, for {cores} cores)'] if workers < cores else []
        if workers and not dataloader.persistent_workers:
            advice.append('write train_dataloader.persistent_workers=True')
        advice.append('store smaller pictures, since each is decoded whole')
        kind = 'public' if public_only else 'private'
        runner.logger.warning(
            f'{self.share:.0%} of this {kind} epoch was spent waiting for data: {", or ".join(advice)}.'
        )
