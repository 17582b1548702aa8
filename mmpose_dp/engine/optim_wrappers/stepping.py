"""The optimizers that move the parameters after the mechanism has released a gradient, and their state in checkpoints.

Noised gradients need other optimizer settings than plain training, so the steps on public samples may have their own optimizer.
Must not get a gradient of private samples before it is noised.
"""

from collections.abc import Sequence
from typing import Any

from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from mmpose_dp.privacy.errors import PrivacyError

_NOT_PRIVATE = (
    'optim_wrapper.{}() would train without clipping, noise and ledger: let train_step call optim_wrapper.update_params(loss), '
    'which does all of backward, step and zero_grad'
)


class SteppingOptimWrapper(OptimWrapper):
    """An OptimWrapper that may have two optimizers of the same parameters, with the state of both in its ``state_dict``.

    ``param_scheduler`` moves the learning rates of ``optimizer``; those of ``public_optimizer`` follow in proportion.

    Attributes:
        params: what private steps train.
        public_only: whether the steps of this epoch are on public samples only.
        trained: what the steps of this epoch train.
        public_optimizer: takes the steps on public samples only; None: ``optimizer`` does.
        public_params: what it trains, ``params`` among them. Without noise, training fewer parameters gains nothing.
        left_out: what ``optim_wrapper.trainable`` freezes of what the model would train.
        experts: the checkpoints of ``optim_wrapper.experts``, each with the digest of its weights.
        adaptive_norm: C, where it follows the votes of the records; None: it does not.
    """

    params: list[nn.Parameter]
    trained: list[nn.Parameter]
    public_only = False
    public_optimizer: Optimizer | None = None
    public_params: list[nn.Parameter] | None = None
    left_out: Sequence[nn.Parameter] = ()
    experts: Sequence[tuple[str, str]] = ()
    adaptive_norm: Any = None
    _global_step = -1  # mmengine's schedulers set it, and warn where they step before it has grown

    def train_on(self, public_only: bool) -> None:
        """From now on steps are on public samples alone, or not."""
        self.public_only, own = public_only, set(self.params)
        self.trained = self.public_params or self.params if public_only else self.params
        for param in self.public_params or ():
            param.requires_grad_(public_only or param in own)

    def public_step(self) -> None:
        """A step of ``public_optimizer``, or of ``optimizer`` where there is no other, on gradients without noise."""
        if self.public_optimizer is None:
            self.optimizer.step()
            return
        self._move_public_rates(self.public_optimizer)
        self.public_optimizer.step()

    def _move_public_rates(self, optimizer: Optimizer) -> None:
        factors = self._scheduled()
        common = next(iter(factors.values()), 1.0)
        for group in optimizer.param_groups:
            group.setdefault('initial_lr', group['lr'])
            group['lr'] = group['initial_lr'] * next((factors[p] for p in group['params'] if p in factors), common)

    def get_lr(self) -> dict[str, list[float]]:
        """The learning rates of this epoch's steps: those of ``public_optimizer`` if it takes them. The log shows the first."""
        if not self.public_only or self.public_optimizer is None:
            return super().get_lr()
        self._move_public_rates(self.public_optimizer)
        return dict(lr=[group['lr'] for group in self.public_optimizer.param_groups])

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Refused: see step."""
        raise PrivacyError(_NOT_PRIVATE.format('backward'))

    def step(self, **kwargs: Any) -> None:
        """Refused: it would neither clip nor add noise, and the ledger would not know of it."""
        raise PrivacyError(_NOT_PRIVATE.format('step'))

    def zero_grad(self, **kwargs: Any) -> None:
        """Refused: see step."""
        raise PrivacyError(_NOT_PRIVATE.format('zero_grad'))

    def _scheduled(self) -> dict[nn.Parameter, float]:
        """Each parameter's learning rate under ``param_scheduler``, in units of its first learning rate, if that is not 0."""
        groups = [group for group in self.optimizer.param_groups if group.get('initial_lr', group['lr'])]
        return {p: group['lr'] / group.get('initial_lr', group['lr']) for group in groups for p in group['params']}

    def state_dict(self) -> dict:
        """mmengine's state, with that of the public optimizer and C under two more keys."""
        state = super().state_dict()
        if self.public_optimizer is not None:
            state['public_optimizer'] = self.public_optimizer.state_dict()
        if self.adaptive_norm is not None:
            state['max_grad_norm'] = self.adaptive_norm.max_grad_norm
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes the state of what there is. Raises PrivacyError for that of other parameters."""
        state = dict(state_dict)
        public, max_grad_norm = state.pop('public_optimizer', None), state.pop('max_grad_norm', None)
        try:
            super().load_state_dict(state)
            if public is not None and self.public_optimizer is not None:
                self.public_optimizer.load_state_dict(public)
        except ValueError as error:
            raise PrivacyError(
                'the checkpoint to resume from holds the optimizer state of other parameters than the config trains: put the '
                f'model and optim_wrapper (trainable, lora_rank, experts) back as they were ({error})'
            ) from error
        if max_grad_norm is not None and self.adaptive_norm is not None:
            self.adaptive_norm.go_on_from(max_grad_norm)
