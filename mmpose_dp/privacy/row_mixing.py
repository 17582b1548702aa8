"""Do the rows of a batch depend on one another? Then no engine can make the model private, and it is refused.

Must not let pass a layer at which the loss of one row has a gradient in another.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import PrivacyError


class MixedRows:
    """Looks at gradients of the loss of one row alone, where they arrive at the outputs of layers.

    Args:
        losses: one scalar a row.

    Attributes:
        to_look_at: the rows whose losses to look at: the first and the last that are finite, since a row may depend on those
            before it, or behind it, alone.
    """

    def __init__(self, losses: Sequence[Tensor]) -> None:
        self._rows = len(losses)
        finite = [row for row, loss in enumerate(losses) if bool(loss.isfinite())]
        self.to_look_at = sorted({*finite[:1], *finite[-1:]})
        self._complete = len(finite) == len(losses)
        self._found = ''

    def look(self, row: int, name: str, grad: Tensor | None, axis: int = 0) -> None:
        """Notes where a gradient reaches other rows than its own.

        Args:
            row: whose loss the gradient is of.
            name: what the message calls the place.
            grad: the gradient, with the rows (each any number of entries) along ``axis``.
        """
        if grad is None or grad.dim() <= axis or grad.shape[axis] % self._rows:
            return
        self._complete &= bool(grad.isfinite().all())
        others = grad.nan_to_num().unflatten(axis, (self._rows, -1)).movedim(axis, 0)  # 0 * NaN, in a row not finite
        if bool(others[:row].any() or others[row + 1 :].any()):
            self._found = self._found or name  # the first one is the nearest to where it happens

    def refuse(self) -> bool:
        """Raises PrivacyError if rows were seen to mix; whether no NaN was in the way of seeing it."""
        if self._found:
            raise PrivacyError(
                f'from {self._found} on, the loss of one record depends on the rows of another (BatchNorm in train mode, a '
                'loss that normalises over the batch, or a layer that does not keep rows outermost). No engine can make '
                'that private: change or freeze the layer; if its rows are only not outermost, write '
                "optim_wrapper.engine='loop'"
            )
        return self._complete


def one_by_one(losses: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """One backward a row: (rows, *shape) float32 a parameter. The graph is kept."""
    stacks = [p.new_zeros((len(losses), *p.shape), dtype=torch.float32) for p in params]
    for row, loss in enumerate(losses if params else []):
        for stack, grad in zip(stacks, torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)):
            if grad is not None:
                stack[row] = grad
    return stacks
