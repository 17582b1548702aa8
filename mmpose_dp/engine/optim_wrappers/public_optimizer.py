"""A second optimizer for the steps on public rows alone: plain training wants another one than noised gradients do.

Must not see a gradient of a step that private rows took part in.
"""

from mmengine.optim import OptimWrapper
from torch.optim import Optimizer


class WithPublicOptimizer(OptimWrapper):
    """An OptimWrapper that may have two optimizers of the same parameters, with the state of both in its ``state_dict``.

    ``param_scheduler`` moves the learning rates of ``optimizer``; those of ``public_optimizer`` follow in proportion.
    """

    public_optimizer: Optimizer | None = None

    def public_step(self) -> None:
        """A step of ``public_optimizer``, or of ``optimizer`` where there is no other."""
        if self.public_optimizer is None:
            self.step()
            return
        first = self.optimizer.param_groups[0]
        factor = first['lr'] / first.get('initial_lr', first['lr'])
        for group in self.public_optimizer.param_groups:
            group.setdefault('initial_lr', group['lr'])
            group['lr'] = group['initial_lr'] * factor
        self.public_optimizer.step()

    def state_dict(self) -> dict:
        """As mmengine's, and the public optimizer's under its own key."""
        state = super().state_dict()
        if self.public_optimizer is not None:
            state['public_optimizer'] = self.public_optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes the state of the optimizers that there are."""
        state = dict(state_dict)
        public = state.pop('public_optimizer', None)
        super().load_state_dict(state)
        if public is not None and self.public_optimizer is not None:
            self.public_optimizer.load_state_dict(public)
