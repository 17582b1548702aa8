"""The mechanism: from per-sample gradients to the one noised gradient that a step releases.

Sampling (sampling.py) has happened before it, and everything after it is post-processing. Must not release anything but what
``release`` returns, and must not divide by the number of records that were sampled.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmpose_dp.processes import from_first_process, is_first_process, several_processes, sum_over_processes
from mmpose_dp.tensors import parts_of

from .clipping import ClippedCoordinates, ClippedSum, clipping_norm
from .errors import PrivacyError
from .ledger import Ledger
from .noise import RandomSource
from .plan import PrivacyPlan
from .projection import Projector
from .records import Samples


class GaussianMechanism:
    """The Gaussian mechanism on the sum of clipped gradients of one logical batch (DP-SGD: Abadi et al. 2016, algorithm 1).

    Per micro-batch::

        collector = mechanism.collector(samples)      # samples says which record each sample belongs to
        engine.backward(losses, collector)            # per-sample gradients, parameter by parameter
        mechanism.add(collector)

    and once per logical batch, also if it is empty, ``gradient = mechanism.release()``. The steps are

    1. **clip**: a record's vector is the sum of its samples' gradients, or, with ``project-then-clip``, of their k
       coordinates V^T g. ``ClippedSum.total`` (clipping.py) scales it to a norm of at most C, less the room for rounding.
    2. **sum** over the records of all micro-batches, and over processes: in float64, as one record moves the order of all others.
    3. **count**: the ledger has the step on the disk before its noise is made.
    4. **noise**: N(0, (sigma * C)^2) is added to every entry of the sum, on one process, once, and rounded to a grid (noise.py).
    5. **divide by B**, the expected batch size: a constant.
    6. **map back**: V times the noised coordinates, or V V^T times the noised gradient. V was made from public data.

    Theorem. Two data sets that differ in one record give sums that differ by at most C in L2 norm, whatever the records, the
    parameters and V are. So with Poisson sampling at rate q (sampling.py) one step is the Poisson-subsampled Gaussian mechanism
    with noise multiplier sigma under add-or-remove adjacency, and steps compose adaptively: ``accounting.epsilon`` of the ledger's
    history is an upper bound (Abadi et al. 2016; Mironov et al. 2019; Doroshenko et al. 2022).

    Sharp edges: that a record's gradient depends on that record alone is a property of the model, which gradients/independence.py
    looks at and engine/checks/replay.py tests at every step. Anything else computed from private samples is another release.
    Other kinds of clipping are subclasses (extras/clipping_variants.py).
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        max_grad_norm: float,  # C
        noise_multiplier: float | None = None,  # sigma; None until a plan is attached
        expected_batch_size: int | None = None,  # B; None until a plan is attached
        *,
        projector: Projector | None = None,  # V
        loss_scale: float = 1.0,  # what the losses were multiplied by (mixed precision)
        random: RandomSource | None = None,
    ) -> None:
        self.params, self.projector, self.loss_scale = list(params), projector, loss_scale
        self.max_grad_norm, self.noise_multiplier = float(max_grad_norm), noise_multiplier
        self.expected_batch_size = expected_batch_size
        # with project-then-clip, whose coordinates are clipped
        self.coordinates_of = projector if projector and projector.order == 'project-then-clip' else None
        self.random = random or RandomSource()
        self.plan: PrivacyPlan | None = None  # what was promised; None: no step is counted, and nothing is promised
        self.ledger = Ledger()  # the steps taken
        self.forget()

    def attach(self, plan: PrivacyPlan) -> None:
        """Takes sigma, B and C from the plan. Raises PrivacyError where the mechanism was given others."""
        for name in ('noise_multiplier', 'expected_batch_size', 'max_grad_norm'):
            own, planned = getattr(self, name), getattr(plan, name)
            if own is not None and own != planned:
                raise PrivacyError(f'optim_wrapper.{name}={own} contradicts the plan ({planned}): leave it out')
            setattr(self, name, planned)
        self.plan = plan

    def noise_and_norm(self) -> tuple[float | None, float]:
        """sigma and C of the current step."""
        if self.plan is None:
            return self.noise_multiplier, self.max_grad_norm
        step = self.ledger.run_steps
        return self.plan.event_at(step).noise_multiplier, self.plan.max_grad_norm_at(step)

    def forget(self) -> None:
        """Begins a logical batch, and drops an unfinished one that an interruption left: a record counts once in a sum."""
        self._sum: Tensor | None = None  # over the micro-batches so far, in float64

    # ---- 1 and 2: clip and sum -------------------------------------------------------------------------------------
    def collector(self, samples: Samples) -> ClippedSum:
        """What clips and adds up the records of one micro-batch."""
        return self.collector_of_norm(samples, clipping_norm(self.noise_and_norm()[1]))

    def collector_of_norm(self, samples: Samples, max_grad_norm: float) -> ClippedSum:
        """What clips each record's vector to norm ``max_grad_norm`` and adds them up; other kinds of clipping replace it."""
        if self.coordinates_of is not None:
            return ClippedCoordinates(samples, max_grad_norm, self.coordinates_of, self.loss_scale)
        return ClippedSum(self.params, samples, max_grad_norm, self.loss_scale)

    def add(self, collector: ClippedSum) -> None:
        """Adds one micro-batch to the logical batch, in float64."""
        part = collector.total()
        flat, self._shapes = torch.cat([x.flatten() for x in part]).double(), [x.shape for x in part]
        self._sum = flat if self._sum is None else self._sum.add_(flat)

    # ---- 3 to 6: count, noise, divide, map back --------------------------------------------------------------------
    def release(self, fault: str = '') -> list[Tensor]:
        """Ends the logical batch: its noised mean gradient, one float32 tensor per parameter.

        ``fault`` is why nothing must be released, empty if nothing is wrong. The step is counted all the same: that a record could
        stop the training is a release too. Raises PrivacyError for a fault on any process, and if sigma or B is not set.
        """
        sigma, max_grad_norm = self.noise_and_norm()
        if sigma is None or self.expected_batch_size is None:
            raise PrivacyError(
                'noise_multiplier or expected_batch_size is not set: add PrivacyBudgetHook to default_hooks, which '
                'calibrates them, or give both to DPOptimWrapper'
            )
        self.count()
        self._refuse(fault)
        if self._sum is None:
            self.add(self.collector(Samples.from_keys([])))  # of no record: zeros
        assert self._sum is not None
        flat = self._sum
        self.forget()
        sum_over_processes(flat)
        # once, and after the last addition: a number that is added to rounded noise would show beside the noise's grid
        if is_first_process():
            self.random.add_gaussian(flat, sigma * max_grad_norm)
        flat = flat.float()
        from_first_process(flat)
        return self.map_back(parts_of(flat.div_(self.expected_batch_size), self._shapes))

    def count(self) -> None:
        """Counts the step before its result exists: a crash from here on counts too much, never too little."""
        if self.plan is not None:
            self.ledger.count(self.plan.event_at(self.ledger.run_steps))

    def map_back(self, total: list[Tensor]) -> list[Tensor]:
        """From a noised total to one float32 tensor per parameter: post-processing."""
        if self.coordinates_of is not None:
            return self.coordinates_of.expand(total[0])
        return total if self.projector is None else self.projector.project(total)

    def _refuse(self, fault: str) -> None:
        """Raises PrivacyError, on every process, if one of them has a fault."""
        anywhere = torch.tensor(float(bool(fault)), device=self.params[0].device if several_processes() else 'cpu')
        sum_over_processes(anywhere)
        if float(anywhere):
            self.forget()
            why = fault or 'another process found that its records depend on one another, or that the model was changed'
            raise PrivacyError(
                f'private step {self.ledger.run_steps} is not released, and counted: {why}. Every record must contribute what it '
                'would contribute alone: change or freeze the layer, and leave the model to the optimizer'
            )
