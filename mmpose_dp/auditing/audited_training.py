"""A training whose private records are canaries, and an attacker who sees all that it releases or calls public.

The attacker knows every noised gradient, the basis, which public views were drawn when, and each canary's gradient. Under
Feature DP a canary that is left out stays in the public half: in and out differ in what the view removes and in nothing else.
The votes that move C with clipping='adaptive' are not attacked. Must not be used for a training whose weights are wanted.
"""

from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.registry import HOOKS, OPTIM_WRAPPERS
from torch import Tensor

from mmpose_dp.engine.checks.replay import ReplayCheck
from mmpose_dp.engine.optim_wrappers import DPOptimWrapper
from mmpose_dp.gradients.blocks import PerSampleGradients, StackBlock
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.records import Collector, Samples

from .canaries import AuditResult, Canaries, audit

_LOUD = 1e3  # the norm of a canary's gradient in units of C: far beyond what clipping lets through


@OPTIM_WRAPPERS.register_module()
class AuditedOptimWrapper(DPOptimWrapper):
    """DPOptimWrapper in which a canary's private gradient is its own direction, and releases are written down.

    Attributes:
        canaries: the directions.
        canary_of: record -> canary.
        releases: (components of the private gradient, the same of the basis or None, C, sigma) of each step.
    """

    def plant(self, canary_of: dict[int, int]) -> None:
        """Makes records into canaries."""
        self.canary_of = canary_of
        self.canaries = Canaries(self.params, len(canary_of), torch.Generator().manual_seed(0))
        self.releases: list[tuple[np.ndarray, np.ndarray | None, float, float]] = []
        self._known: tuple[list[Tensor], np.ndarray] | None = None
        self._watch_releases()

    def canary_gradient(self, record: int) -> list[Tensor]:
        """What one canary adds to the sum before clipping, one tensor per parameter."""
        length = _LOUD * self.mechanism.now()[1]
        return [length * x for x in self.canaries.direction(self.canary_of[record])]

    def _backward(self, losses: list[Tensor], rows: Samples, *collectors: Collector) -> None:
        """The real gradients with those of canaries exchanged; the first row of a record carries it."""
        gradients = PerSampleGradients(self.params, torch.arange(len(losses)))
        checks = [collector for collector in collectors if isinstance(collector, ReplayCheck)]  # of the real ones
        super()._backward(losses, rows, gradients, *checks)
        real = gradients.total
        for local, key in enumerate(rows.keys):
            if key not in self.canary_of:
                continue
            mine = (rows.records == local).nonzero().flatten()
            for stack, loud in zip(real, self.canary_gradient(key)):
                stack[mine] = 0.0
                stack[mine[0]] = loud
        for i, stack in enumerate(real):
            for collector in collectors:
                if collector not in checks:
                    collector.add(StackBlock([i], stack))

    def _watch_releases(self) -> None:
        """From now on what the mechanism releases is seen by the attacker."""
        mechanism, release = self.mechanism, self.mechanism.release

        def seen(fault: str = '') -> list[Tensor]:
            sigma, max_grad_norm = mechanism.now()
            released = release(fault)
            size = mechanism.expected_batch_size or 1
            found = self.canaries.components(released) * size / max_grad_norm
            self.releases.append((found, self._shares(), max_grad_norm, float(sigma or 0.0)))
            return released

        mechanism.release = seen  # type: ignore[method-assign]

    def _shares(self) -> np.ndarray | None:
        """|V^T a| of each canary's direction a, once for each basis."""
        if self.projector is None:
            return None
        if self._known is None or self._known[0] is not self.projector.basis:
            basis = self.projector.basis
            squares = sum(
                np.square(self.canaries.components([b[k] for b in basis])) for k in range(self.projector.rank)
            )
            self._known = basis, np.sqrt(squares)
        return self._known[1]


@HOOKS.register_module()
class AuditHook(Hook):
    """Flips the seeds, leaves out who loses, watches the draws of public views, and attacks at the end.

    Args:
        num_canaries: records made into canaries; None: all.
        confidence: of the lower bounds.

    Attributes:
        result: the AuditResult, after training.
        claim: epsilon as the ledger has it.
    """

    priority = 'LOW'  # after PrivacyBudgetHook has planned

    def __init__(self, num_canaries: int | None = None, confidence: float = 0.95) -> None:
        self.num_canaries = num_canaries
        self.confidence = confidence
        self.result: AuditResult | None = None
        self.claim = float('nan')

    def before_train(self, runner: Runner) -> None:
        """Plants the canaries."""
        wrapper, sampler = runner.optim_wrapper, runner.train_dataloader.batch_sampler
        dataset = runner.train_dataloader.dataset
        if not isinstance(wrapper, AuditedOptimWrapper) or wrapper.plan is None:
            raise PrivacyError("an audit needs optim_wrapper.type='AuditedOptimWrapper' and private steps")
        count = self.num_canaries or dataset.num_records
        if count > dataset.num_records:
            raise PrivacyError(f'{count} canaries were asked for and there are {dataset.num_records} private records')
        chosen = sampler.sampling.random.choice(dataset.num_records, count)
        wrapper.plant({int(record): canary for canary, record in enumerate(chosen)})
        self.members = np.asarray(sampler.sampling.random.uint64(count) % 2, dtype=bool)
        sampler.sampling.leave_out({int(record) for record in chosen[~self.members]})
        self.chosen, self._views, self._drawn = chosen, [], set()
        self._watch(sampler, dataset)

    def _watch(self, sampler: Any, dataset: Any) -> None:
        """Which records' public views a step uses is public, so the attacker may know it."""
        draw, first = sampler.draw, len(dataset.private)

        def watched() -> list[list[int]]:
            records = draw()
            rows = {row - first for record in records for row in record if row >= first}
            self._drawn = (
                {r for r in map(int, self.chosen) if rows.intersection(dataset.samples_of(r))} if rows else set()
            )
            return records

        sampler.draw = watched

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: Any = None
    ) -> None:
        """Keeps who was seen in the public draw of this step."""
        if not runner.optim_wrapper.public_only:
            self._views.append(np.array([int(record) in self._drawn for record in self.chosen]))

    def after_train(self, runner: Runner) -> None:
        """Attacks."""
        wrapper = runner.optim_wrapper
        plan = wrapper.plan
        self.claim = wrapper.ledger.epsilon(plan.target_delta, plan.accountant)
        scores = _scores(wrapper, np.array(self._views), float(plan.sample_rate))
        self.result = audit(scores, self.members, plan.target_delta, self.confidence)


def _scores(wrapper: AuditedOptimWrapper, views: np.ndarray, rate: float) -> dict[str, np.ndarray]:
    """By attack, how much each canary looks like a member.

    - likelihood: log of how much likelier the releases are with it than without, under the claimed sigma and rate;
    - likelihood, less noise: the same under half of that sigma;
    - with its view: the same over the steps that drew its public view, as if it had been drawn with it;
    - basis: how much of its gradient the basis holds.
    """
    count = wrapper.canaries.count
    names = ('likelihood', 'likelihood, less noise', 'with its view', 'basis')
    found = {name: np.zeros(count) for name in names}
    then_projected = wrapper.projector is not None and wrapper.projector.order == 'noise-then-project'
    for (seen, basis, _, sigma), viewed in zip(wrapper.releases, views):
        share = np.ones(count) if basis is None else np.maximum(basis, 1e-6)
        signal, deviation = seen / (share**2 if then_projected else share), max(sigma, 1e-2)
        if then_projected:
            deviation = deviation / share
        evidence = (signal - 0.5) / np.square(deviation)
        for name, weight in (('likelihood', 1.0), ('likelihood, less noise', 4.0)):
            drawn = np.log(rate) + weight * evidence
            found[name] += drawn if rate == 1 else np.logaddexp(np.log1p(-rate), drawn)
        found['with its view'] += np.where(viewed, evidence, 0.0)
        found['basis'] += 0.0 if basis is None else np.square(basis)
    return {name: score for name, score in found.items() if np.ptp(score) > 0}
