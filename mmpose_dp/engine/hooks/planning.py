"""From the config's parts to the one plan: what method they make, and with what noise.

Must not decide what is private: it names what it finds, or refuses it.
"""

from collections import Counter
from typing import Any

import torch

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.extras.personal_budgets import Budget
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.plan import PrivacyPlan

from ..loops import PrivateTrainLoop
from ..optim_wrappers import DPOptimWrapper


def make_plan(
    loop: PrivateTrainLoop, wrapper: DPOptimWrapper, target_epsilon: float | None, **promised: Any
) -> PrivacyPlan:
    """The plan of a training; ``promised`` are the fields of the plan that PrivacyBudgetHook sets. Raises PrivacyError."""
    dataset = loop.dataloader.dataset
    assert isinstance(dataset, PublicPrivateDataset)
    settings: dict[str, Any] = dict(
        method=_method(dataset, wrapper, loop),
        privacy_unit=dataset.privacy_unit,
        subjects=dataset.subjects,
        subjects_digest=dataset.subjects_digest,
        num_records=dataset.num_records,
        expected_batch_size=loop.sampler.expected_batch_size,
        steps=loop.private_steps,
        max_grad_norm=wrapper.mechanism.max_grad_norm,
        public_view=dataset.view_description,
        public_data=dataset.public_description,
        secret_randomness=all(x.random.is_secret for x in (wrapper.mechanism, loop.sampler.sampling, dataset)),
        arithmetic=_arithmetic(wrapper),
        secure_mode=wrapper.secure_mode,
        schedule=wrapper.schedule,
        adaptive_norm=wrapper.adaptive_norm is not None,
        **promised,
    )
    budgets, settings['assignment'] = _budgets(dataset, target_epsilon)
    if budgets and wrapper.mechanism.noise_multiplier is not None:
        raise PrivacyError('with personal_epsilon the noise follows from the budgets: leave noise_multiplier out')
    if wrapper.mechanism.noise_multiplier is not None:
        return PrivacyPlan(
            noise_multiplier=wrapper.mechanism.noise_multiplier, target_epsilon=target_epsilon, **settings
        )
    if target_epsilon is None:
        raise PrivacyError('give PrivacyBudgetHook a target_epsilon, or DPOptimWrapper a noise_multiplier')
    target = max((budget.epsilon for budget in budgets), default=target_epsilon)
    return PrivacyPlan.calibrate(target_epsilon=target, budgets=budgets, **settings)


def facts_of_views(loop: PrivateTrainLoop, wrapper: DPOptimWrapper) -> dict[str, Any]:
    """What the ledger keeps of a training on public views alone: a private one in its folder must have the same view."""
    dataset = loop.dataloader.dataset
    assert isinstance(dataset, PublicPrivateDataset)
    return dict(
        method=_method(dataset, wrapper, loop),
        privacy_unit=dataset.privacy_unit,
        subjects=dataset.subjects,
        subjects_digest=dataset.subjects_digest,
        num_records=dataset.num_records,
        personal_budgets=[],
        secure_mode=wrapper.secure_mode,
        public_view=dataset.view_description,
        public_data=dataset.public_description,
    )


def _arithmetic(wrapper: DPOptimWrapper) -> str:
    """The numbers of the forwards and where they are computed: rounding follows both."""
    device = wrapper.params[0].device.type if wrapper.params else 'cpu'
    precision = wrapper.amp_dtype or torch.get_default_dtype()
    return f'{str(precision).removeprefix("torch.")} on a {"CPU" if device == "cpu" else "GPU"}'


def _budgets(dataset: PublicPrivateDataset, target_epsilon: float | None) -> tuple[tuple[Budget, ...], tuple[int, ...]]:
    """The personal budgets, smallest first, and which of them each record has; none where nobody has one."""
    named = dataset.personal_epsilons
    if not any(epsilon is not None for epsilons in named for epsilon in epsilons):
        return (), ()
    if target_epsilon is None and any(None in epsilons for epsilons in named):
        raise PrivacyError('some records have no personal_epsilon: give PrivacyBudgetHook a target_epsilon for them')
    own = [min(target_epsilon if epsilon is None else epsilon for epsilon in epsilons) for epsilons in named]
    counts = sorted(Counter(own).items())
    order = [epsilon for epsilon, _ in counts]
    return tuple(Budget(float(epsilon), n) for epsilon, n in counts), tuple(order.index(epsilon) for epsilon in own)


def _method(dataset: PublicPrivateDataset, wrapper: DPOptimWrapper, loop: PrivateTrainLoop) -> str:
    return method_of(dataset.public_view is not None, dataset.public is not None, wrapper, loop.public_epochs)


def method_of(has_view: bool, has_public: bool, wrapper: DPOptimWrapper, public_epochs: int) -> str:
    """What the combination of public half (a public_view, a public data set) and projector is called. Raises PrivacyError."""
    if not has_view and not has_public:
        if wrapper.projector is not None:
            raise PrivacyError(
                'optim_wrapper.projector needs public data: set train_dataloader.dataset.public_view (Feature DP) or '
                'public (a data set that is really public)'
            )
        return 'dpsgd'
    if wrapper.projector is None and not wrapper.public_weight and not public_epochs:
        raise PrivacyError(
            'train_dataloader.dataset has a public half that nothing uses: set optim_wrapper.public_weight or projector, '
            'or train_cfg.public_epochs, or take the public half out'
        )
    if has_view:
        return 'feature' if wrapper.projector is None else 'hybrid'
    if wrapper.projector is None:
        raise PrivacyError(
            'train_dataloader.dataset.public without optim_wrapper.projector is not a method offered here'
        )
    return 'projected'
