"""A training whose private records are canaries, and an attacker who sees everything it releases or treats as public.

The attacker knows every noised gradient, the basis, which public views each step used, and each canary's gradient. Under
Feature DP an excluded canary stays in the public part: its inclusion changes what the view removes and nothing else.
The votes that move C with clipping='adaptive' are not attacked. Must not be used for a training whose weights are needed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpose.registry import HOOKS, OPTIM_WRAPPERS
from torch import Tensor

from mmpose_dp.engine.checks.replay import ReplayCheck
from mmpose_dp.engine.optim_wrappers import DPOptimWrapper
from mmpose_dp.extras.accountability import differs_from_audited
from mmpose_dp.extras.evidence import intact_statement
from mmpose_dp.extras.risk import risk_of
from mmpose_dp.gradients.blocks import PerSampleGradients, StackBlock
from mmpose_dp.privacy.errors import ConfigError, PrivacyError
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.records import Collector, Samples
from mmpose_dp.privacy.statement import build_statement

from .canaries import AuditResult, Canaries, audit

# keys of a statement that must be those of the audited training
_STATED = (
    'method', 'privacy_unit', 'num_records', 'expected_batch_size', 'sample_rate', 'delta', 'target_epsilon', 'accountant',
    'max_grad_norm', 'noise_multiplier', 'public_views', 'public_data_sets',
)  # fmt: skip
_LENGTH = 1e3  # the norm of a canary's gradient in units of C: far more than clipping leaves


@OPTIM_WRAPPERS.register_module()
class AuditedOptimWrapper(DPOptimWrapper):
    """A DPOptimWrapper that replaces a canary's private gradient by its direction, and records what is released.

    Attributes:
        canaries: the directions.
        canary_of: record -> canary.
        releases: (components of the private gradient, the same of the basis or None, C, sigma) of each step.
    """

    def plant(self, canary_of: dict[int, int]) -> None:
        """Turns records into canaries."""
        self.canary_of = canary_of
        self.canaries = Canaries(self.params, len(canary_of), torch.Generator().manual_seed(0))
        self.releases: list[tuple[np.ndarray, np.ndarray | None, float, float]] = []
        self._known: tuple[list[Tensor], np.ndarray] | None = None
        self._watch_releases()

    def canary_gradient(self, record: int) -> list[Tensor]:
        """What one canary adds to the sum before clipping, one tensor per parameter."""
        length = _LENGTH * self.mechanism.noise_and_norm()[1]
        return [length * x for x in self.canaries.direction(self.canary_of[record])]

    def _backward(self, losses: list[Tensor], samples: Samples, *collectors: Collector) -> None:
        """Passes on the real gradients, with those of canaries replaced; the first sample of a record carries it."""
        gradients = PerSampleGradients(self.params, range(len(losses)))
        # these see the real gradients
        checks = [collector for collector in collectors if isinstance(collector, ReplayCheck)]
        super()._backward(losses, samples, gradients, *checks)
        real = gradients.total
        for local, key in enumerate(samples.keys):
            if key not in self.canary_of:
                continue
            mine = [i for i, record in enumerate(samples.records) if record == local]
            for stack, replacement in zip(real, self.canary_gradient(key)):
                stack[mine] = 0.0
                stack[mine[0]] = replacement
        for i, stack in enumerate(real):
            for collector in collectors:
                if collector not in checks:
                    collector.add(StackBlock([i], stack))

    def _watch_releases(self) -> None:
        """Shows the attacker everything that the mechanism releases from now on."""
        mechanism, release = self.mechanism, self.mechanism.release

        def seen(fault: str = '') -> list[Tensor]:
            sigma, max_grad_norm = mechanism.noise_and_norm()
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
            components = [self.canaries.components([b[k] for b in basis]) for k in range(self.projector.rank)]
            self._known = basis, np.linalg.norm(components, axis=0)
        return self._known[1]


@HOOKS.register_module()
class AuditHook(Hook):
    """Includes or excludes each canary at random, records which public views are sampled, and attacks at the end.

    Args:
        num_canaries: number of records turned into canaries; None: all.
        confidence: of the lower bounds.
        report_to: work dir whose statement is to have the result; an audit of another training than that is refused.

    Attributes:
        audited: what is attacked, under the names of a statement.
        result: the AuditResult, after training.
        claim: the ledger's epsilon, after training.
        claimed_mu: the mu of Gaussian DP that covers the ledger's steps; infinite if it is not known.
        dimensions: of the projector's subspace, after training; None without a projector.
    """

    priority = 'LOW'  # after PrivacyBudgetHook, which makes the plan

    def __init__(self, num_canaries: int | None = None, confidence: float = 0.95, report_to: str | None = None) -> None:
        self.num_canaries = num_canaries
        self.report_to = report_to
        self.audited: dict[str, Any] = {}
        self.confidence = confidence
        self.result: AuditResult | None = None
        self.claim = self.claimed_mu = float('nan')
        self.dimensions: int | None = None
        self._views: list[np.ndarray] = []  # of each step: whose public view was sampled, (canaries,) bool
        self._sampled: set[int] = set()  # records whose public view is in the current step

    def before_train(self, runner: Runner) -> None:
        """Plants the canaries. Raises ConfigError if there are too few records, or for another optim_wrapper."""
        wrapper, sampler = runner.optim_wrapper, runner.train_dataloader.batch_sampler
        dataset = runner.train_dataloader.dataset
        if not isinstance(wrapper, AuditedOptimWrapper) or wrapper.plan is None:
            raise ConfigError("an audit needs optim_wrapper.type='AuditedOptimWrapper' and private steps")
        parameters = sum(p.numel() for p in wrapper.params)
        self.audited = {**_as_stated(wrapper.plan), 'parameters_trained': parameters}
        if self.report_to is not None:
            _refuse_another(Path(self.report_to), {**self.audited, 'epsilon': wrapper.plan.epsilon})
        count = self.num_canaries or dataset.num_records
        if count > dataset.num_records:
            raise ConfigError(f'num_canaries={count} is more than the {dataset.num_records} private records')
        chosen = sampler.sampling.random.choice(dataset.num_records, count)
        wrapper.plant({int(record): canary for canary, record in enumerate(chosen)})
        self.members = np.asarray(sampler.sampling.random.uint64(count) % 2, dtype=bool)
        sampler.sampling.leave_out({int(record) for record in chosen[~self.members]})
        self.chosen = chosen
        self._watch(sampler, dataset)

    def _watch(self, sampler: Any, dataset: Any) -> None:
        """Records whose public views each step uses, which is public and known to the attacker."""
        sample, first = sampler.sample, len(dataset.private)

        def watched() -> list[list[int]]:
            records = sample()
            views = {index - first for record in records for index in record if index >= first}
            self._sampled = {r for r in map(int, self.chosen) if views and views.intersection(dataset.samples_of(r))}
            return records

        sampler.sample = watched

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: Any = None
    ) -> None:
        """Keeps whose public views were in this step."""
        if not runner.optim_wrapper.public_only:
            self._views.append(np.array([int(record) in self._sampled for record in self.chosen]))

    def after_train(self, runner: Runner) -> None:
        """Attacks the training."""
        wrapper = runner.optim_wrapper
        plan = wrapper.plan
        self.dimensions = None if wrapper.projector is None else wrapper.projector.rank
        self.claim = wrapper.ledger.epsilon(plan.target_delta, plan.accountant)
        risk = risk_of(wrapper.ledger.history, plan.target_delta)
        mu = None if risk is None else risk['add_or_remove']['gdp_mu']
        self.claimed_mu = mu if isinstance(mu, float) else float('inf')
        scores = _scores(wrapper, np.array(self._views), float(plan.sample_rate))
        self.result = audit(scores, self.members, plan.target_delta, self.confidence)

    @property
    def refuted(self) -> bool:
        """Whether a lower bound is above what is claimed."""
        assert self.result is not None
        return self.result.epsilon_lower_bound > self.claim or self.result.mu > self.claimed_mu


def _as_stated(plan: PrivacyPlan) -> dict[str, Any]:
    """What a statement says of a training with this plan, as far as it is known before a step is taken."""
    statement = build_statement(plan, Ledger(), pretraining='', spent=0.0)
    return {name: statement[name] for name in _STATED}


def _refuse_another(work_dir: Path, audited: dict[str, Any]) -> None:
    """Raises PrivacyError if the statement in a work dir is of another training; without a statement there, nothing is known."""
    statement = intact_statement(work_dir) or {}
    other = differs_from_audited(statement, audited)
    if other:
        raise PrivacyError(
            f'--report-to {work_dir}: the statement there is of another training than this config, which has '
            f'{"; ".join(other)}. Give the config in that work dir, and the options that its training had'
        )


def _scores(wrapper: AuditedOptimWrapper, views: np.ndarray, rate: float) -> dict[str, np.ndarray]:
    """By attack, how much each canary looks like a member, (canaries,).

    - likelihood: the log-likelihood ratio of the releases with and without it, under the claimed sigma and rate;
    - likelihood, less noise: the same under half of that sigma;
    - with its view: the same over the steps that used its public view, as if it had been sampled with it;
    - basis: how much of its gradient is in the basis.
    """
    count = wrapper.canaries.count
    names = ('likelihood', 'likelihood, less noise', 'with its view', 'basis')
    found = {name: np.zeros(count) for name in names}
    then_projected = wrapper.projector is not None and wrapper.projector.order == 'noise-then-project'
    deviation: float | np.ndarray
    for (seen, basis, _, sigma), viewed in zip(wrapper.releases, views):
        share = np.ones(count) if basis is None else np.maximum(basis, 1e-6)
        signal, deviation = seen / (share**2 if then_projected else share), max(sigma, 1e-2)
        if then_projected:
            deviation = deviation / share
        evidence = (signal - 0.5) / np.square(deviation)
        for name, weight in (('likelihood', 1.0), ('likelihood, less noise', 4.0)):
            sampled = np.log(rate) + weight * evidence
            found[name] += sampled if rate == 1 else np.logaddexp(np.log1p(-rate), sampled)
        found['with its view'] += np.where(viewed, evidence, 0.0)
        found['basis'] += 0.0 if basis is None else np.square(basis)
    return {name: score for name, score in found.items() if np.ptp(score) > 0}
