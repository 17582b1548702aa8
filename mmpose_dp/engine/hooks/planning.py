"""Makes the plan of a training from the parts of its config: the method and the noise.

Must not decide what is private: it names what it finds or refuses it.
"""

from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_world_size

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.extras.schedule import ScheduledPlan
from mmpose_dp.messages import warn_in_terminal
from mmpose_dp.privacy.errors import ConfigError
from mmpose_dp.privacy.plan import PrivacyPlan

from ..loops import PrivateTrainLoop
from ..optim_wrappers import DPOptimWrapper

_MANY_BUDGETS = 8  # each takes seconds to calibrate
_RECORDS = 'records (annotation file, or its order)'
_OF_THE_FIRST = ('noise_multiplier', 'earlier_history', 'arithmetic')  # which process 0 alone uses
_NO_BUDGET = 'write default_hooks.privacy_budget.target_epsilon, or optim_wrapper.noise_multiplier'


def make_plan(
    loop: PrivateTrainLoop, wrapper: DPOptimWrapper, target_epsilon: float | None, **promised: Any
) -> PrivacyPlan:
    """The plan of a training. ``promised``: the fields that PrivacyBudgetHook sets. Raises ConfigError."""
    dataset = loop.dataloader.dataset
    settings: dict[str, Any] = dict(
        **_described(loop, wrapper),
        expected_batch_size=loop.sampler.expected_batch_size,
        steps=loop.private_steps,
        max_grad_norm=wrapper.mechanism.max_grad_norm,
        secret_randomness=all(x.random.is_secret for x in (wrapper.mechanism, loop.sampler.sampling, dataset)),
        arithmetic=_arithmetic(wrapper),
        adaptive_norm=wrapper.adaptive_norm is not None,
        **promised,
    )
    kind: type[PrivacyPlan] = PrivacyPlan
    if wrapper.schedule is not None:
        kind, settings['schedule'] = ScheduledPlan, wrapper.schedule
    if any(epsilon is not None for epsilons in dataset.personal_epsilons for epsilon in epsilons):
        return _personal_plan(dataset.personal_epsilons, target_epsilon, wrapper, settings)
    return plan_for(kind, wrapper.mechanism.noise_multiplier, target_epsilon, **settings)


def plan_for(
    kind: type[PrivacyPlan], noise_multiplier: float | None, target_epsilon: float | None, **settings: Any
) -> PrivacyPlan:
    """The plan of this ``kind`` with the given noise, or else calibrated to the budget. Raises ConfigError without either."""
    if noise_multiplier is not None:
        return kind(noise_multiplier=noise_multiplier, target_epsilon=target_epsilon, **settings)
    if target_epsilon is None:
        raise ConfigError(_NO_BUDGET)
    return kind.calibrate(target_epsilon=target_epsilon, **settings)


def refuse_other_plans(plan: PrivacyPlan | None, dataset: PublicPrivateDataset) -> None:
    """Raises ConfigError, on every process, if they have different plans or records: each machine reads its own files.

    Each process samples its own share of the records, by their numbers, and clips them to its own C; the first one adds the noise
    and keeps the ledger. So with other records, or in another order, a person could be in two shares, and weigh 2 C.
    """
    if get_world_size() == 1:
        return
    own = {} if plan is None else {key: repr(value) for key, value in asdict(plan).items() if key not in _OF_THE_FIRST}
    held = all_gather_object({**own, _RECORDS: dataset.records_digest()})
    for rank, one in enumerate(held):
        if other := sorted(key for key in {*one, *held[0]} if one.get(key) != held[0].get(key)):
            raise ConfigError(
                f'process {rank} has other {", ".join(other)} than process 0, so that a record could weigh more than its noise '
                'covers: put the same config and the same annotation files on every machine'
            )


def run_metadata_of_views(loop: PrivateTrainLoop, wrapper: DPOptimWrapper) -> dict[str, Any]:
    """The ledger's metadata of a training on public views only: a later private one in its folder must have the same view."""
    source = loop.dataloader.dataset.view_source
    return dict(_described(loop, wrapper), personal_budgets=[], view_source=source)


def _described(loop: PrivateTrainLoop, wrapper: DPOptimWrapper) -> dict[str, Any]:
    """The fields of a plan that the ledger keeps for every training, even one without private steps."""
    dataset = loop.dataloader.dataset
    assert isinstance(dataset, PublicPrivateDataset)
    return dict(
        method=method_of(dataset.public_view is not None, dataset.public is not None, wrapper, loop.public_epochs),
        privacy_unit=dataset.privacy_unit,
        subjects=dataset.subjects,
        subjects_digest=dataset.subjects_digest,
        num_records=dataset.num_records,
        public_view=dataset.view_description,
        public_data=dataset.public_description,
    )


def _arithmetic(wrapper: DPOptimWrapper) -> str:
    """The number format of the forwards and the device that computes them, since both decide rounding."""
    device = wrapper.params[0].device.type if wrapper.params else 'cpu'
    precision = wrapper.amp_dtype or torch.get_default_dtype()
    return f'{str(precision).removeprefix("torch.")} on a {"CPU" if device == "cpu" else "GPU"}'


def _personal_plan(
    wishes: list[tuple[float | None, ...]],
    target_epsilon: float | None,
    wrapper: DPOptimWrapper,
    settings: dict[str, Any],
) -> PrivacyPlan:
    """The plan if some records have personal budgets; a record has the smallest budget of its samples."""
    from mmpose_dp.extras.personal_budgets import Budget, PersonalPlan

    if target_epsilon is None and any(None in epsilons for epsilons in wishes):
        raise ConfigError(
            'some records have no personal_epsilon: write a target_epsilon for them in default_hooks.privacy_budget'
        )
    if wrapper.mechanism.noise_multiplier is not None:
        raise ConfigError(
            'train_dataloader.dataset.personal_epsilon decides the noise: remove optim_wrapper.noise_multiplier'
        )
    if target_epsilon is None:
        raise ConfigError(_NO_BUDGET)
    own = [min(target_epsilon if epsilon is None else epsilon for epsilon in epsilons) for epsilons in wishes]
    counts = sorted(Counter(own).items())
    order = [epsilon for epsilon, _ in counts]
    parts = 1 if wrapper.schedule is None else len(wrapper.schedule.parts(settings['steps']))
    warn_of_many_budgets(len(order), parts)
    budgets = tuple(Budget(float(epsilon), count) for epsilon, count in counts)
    assignment = tuple(order.index(epsilon) for epsilon in own)
    return PersonalPlan.calibrate(target_epsilon=order[-1], budgets=budgets, assignment=assignment, **settings)


def warn_of_many_budgets(count: int, parts: int = 1) -> None:
    """Says beforehand that calibration will take long. ``parts``: of the schedule."""
    if count * parts > _MANY_BUDGETS:
        scheduled = f' for {parts} parts of optim_wrapper.schedule' if parts > 1 else ''
        fewer = ', or write fewer optim_wrapper.schedule.pieces' if parts > 1 else ''
        warn_in_terminal(
            f'train_dataloader.dataset.personal_epsilon has {count} different values, and the sample rate of each is searched for '
            f'by itself{scheduled}, which takes minutes. To start sooner, round them down to a few, such as 0.5, 1, 2 and 4{fewer}'
        )


def method_of(has_view: bool, has_public: bool, wrapper: DPOptimWrapper, public_epochs: int) -> str:
    """The name of the method that public data (a public_view, a public data set) and projector make. Raises ConfigError."""
    if not has_view and not has_public:
        if wrapper.projector is not None:
            raise ConfigError(
                'optim_wrapper.projector needs public data: set train_dataloader.dataset.public_view (Feature DP) or '
                'public (a data set that is really public)'
            )
        return 'dpsgd'
    if wrapper.projector is None and not wrapper.public_weight and not public_epochs:
        raise ConfigError(
            'train_dataloader.dataset has a public part that nothing uses: set optim_wrapper.public_weight or projector, '
            'or train_cfg.public_epochs, or remove public_view and public'
        )
    if has_view:
        return 'feature' if wrapper.projector is None else 'hybrid'
    if wrapper.projector is None:
        raise ConfigError(
            'train_dataloader.dataset.public without optim_wrapper.projector is not supported: set projector, or use '
            'public_view instead'
        )
    return 'projected'
