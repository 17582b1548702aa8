"""Finds out where the weights of a private training come from, while they are loaded, and says it in the log.

Must not change what is loaded, except that a checkpoint for other joints is fitted to the model's.
"""

from pathlib import Path
from typing import Any

from mmengine.runner import Runner

from mmpose_dp.models import LoadWatch, fit_checkpoint, unwrapped

from ..training_settings import FROM_RANDOM, left_random, mostly_random
from .provenance import (
    GIVEN,
    Lineage,
    Start,
    idle_experts,
    pretraining_in,
    pretraining_of,
    starts_of_experts,
    starts_of_init_cfg,
)


class Origin:
    """The origin of one training's weights: of a first start, of a start from ``load_from``, or of a resume.

    Attributes:
        lineage: what is known about the trainings before it.
        pretraining: the words of its statement; those of a first start are known after ``report``.
    """

    def __init__(self) -> None:
        self.lineage = Lineage()
        self.pretraining = 'none: random weights'
        self._starts: list[Start] = []
        self._watch: LoadWatch | None = None
        self._own_loads: int | None = None  # number of loads before that of load_from
        self._held = False  # whether the model had weights before its runner began

    def watch(self, runner: Runner) -> None:
        """Watches from now on what is loaded. Raises ConfigError for a file that the model names and that cannot be used."""
        model, dataset = unwrapped(runner.model), runner.train_dataloader.dataset
        self._starts, self._watch = starts_of_init_cfg(model), LoadWatch(model)
        self._held = bool(getattr(model, 'is_init', False))  # mmengine will not give it other values
        self._starts += starts_of_experts(runner.optim_wrapper.experts, model, dataset.metainfo)

    def forget_watch(self) -> None:
        """Leaves out ``report``."""
        self._watch = None

    def start_from(self, runner: Runner, checkpoint: dict) -> None:
        """Takes note of the checkpoint of ``load_from``, which is loaded next, and fits it to the model's joints."""
        assert self._watch is not None
        self._starts.append(Start.of('load_from', str(runner._load_from), '', checkpoint))
        self._own_loads = len(self._watch.loads)
        for words in idle_experts(runner.optim_wrapper.experts, checkpoint):
            runner.logger.warning(f'{words}.')
        metainfo = runner.train_dataloader.dataset.metainfo
        for line in fit_checkpoint(checkpoint, unwrapped(runner.model), metainfo):
            runner.logger.warning(f'load_from: {line}')

    def go_on_from(self, runner: Runner, checkpoint: Any) -> None:
        """Takes what a checkpoint to resume from says."""
        self.lineage = Lineage.of(checkpoint, Path(str(runner._load_from)).name)
        self.pretraining = pretraining_in(checkpoint)

    def report(self, runner: Runner) -> None:
        """Logs what was loaded since ``watch``: tensors that ``load_from`` lacks may still come from an ``init_cfg``.

        Does nothing where nothing is watched, as in a resume. Raises ConfigError for a file that fits nothing of the model.
        """
        if self._watch is None:
            return
        self._watch.close()
        self.pretraining = pretraining_of(self._starts, self._watch, self._own_loads, self._held)
        self.lineage = self.lineage.joined(Lineage(unknown=(GIVEN,) if GIVEN in self.pretraining else ()))
        for start in self._starts:
            self._add_start(runner, start)
        if self.pretraining.startswith('none'):
            runner.logger.warning(f'{FROM_RANDOM}.')
        if 'is not known' in self.pretraining:
            return
        wrapper, settings = runner.optim_wrapper, runner.cfg.get('optim_wrapper') or {}
        model, loaded = unwrapped(runner.model), self._watch.found('') or set()
        words = [mostly_random(model, loaded)]
        if not (runner.train_loop.public_epochs and wrapper.public_params is not None):
            words.append(left_random(model, wrapper.left_out, loaded, settings.get('trainable', 'all')))
        for sentence in filter(None, words):
            runner.logger.warning(f'{sentence}.')

    def _add_start(self, runner: Runner, start: Start) -> None:
        """Adds the lineage of a file from which training starts, and logs it."""
        self.lineage = self.lineage.joined(start.lineage)
        words = f'{start.key}={start.path}{start.lineage.in_words(Path(start.path).name)}.'
        if start.lineage.private:
            runner.logger.warning(f'{words} Add its ledger with tools/privacy_ledger.py add, or resume its training.')
        else:
            runner.logger.warning(words)
