"""Do the rows of a batch depend on one another? Then no engine can make the model private, and it is refused.

Must not let pass a layer at which the loss of one row has a gradient in another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PrivacyError


class MixedRows:
    """Looks at gradients of the loss of one row alone, where they arrive at the outputs of layers.

    Args:
        losses: one scalar a row.

    Attributes:
        to_look_at: the rows whose losses to look at: the first and the last that are finite and not 0 (a row of which nothing
            is annotated has no gradient anywhere), since a row may depend on those before it, or behind it, alone.
    """

    def __init__(self, losses: Sequence[Tensor]) -> None:
        self._rows = len(losses)
        finite = [row for row, loss in enumerate(losses) if bool(loss.isfinite())]
        telling = [row for row in finite if float(losses[row].detach())]
        self.to_look_at = sorted({*telling[:1], *telling[-1:]})
        self._complete = len(finite) == len(losses) and len(self.to_look_at) == 2
        self._seen: set[int] = set()  # rows that had a gradient of their own somewhere
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
        if bool(others[row].any()):
            self._seen.add(row)
        if bool(others[:row].any() or others[row + 1 :].any()):
            self._found = self._found or name  # the first one is the nearest to where it happens

    def refuse(self) -> bool:
        """Raises PrivacyError if rows were seen to mix; whether nothing hid it from sight, such as a NaN or no gradient at all."""
        if self._found:
            raise PrivacyError(
                f'from {self._found} on, the loss of one record depends on the rows of another (BatchNorm in train mode, a '
                'loss that normalises over the batch, or a layer that does not keep rows outermost). No engine can make '
                'that private: change or freeze the layer; if its rows are only not outermost, write '
                "optim_wrapper.engine='loop'"
            )
        return self._complete and self._seen == {*self.to_look_at}


class Inputs(list[Tensor]):
    """The inputs of forwards; nothing is added while ``paused``."""

    paused = False


@contextmanager
def gradients_at_inputs(model: nn.Module, wanted: bool) -> Iterator[Inputs]:
    """If ``wanted``, forwards inside get inputs that require a gradient, listed in what this gives: frozen parts mix rows too."""
    inputs = Inputs()
    if not wanted:
        yield inputs
        return

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def asked(value: Any) -> Any:
            if inputs.paused or not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            inputs.append(value.detach().requires_grad_())
            return inputs[-1].clone()  # a leaf could not be changed in place

        return tuple(asked(value) for value in args), {key: asked(value) for key, value in kwargs.items()}

    handle = model.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()


def one_by_one(losses: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """One backward a row: (rows, *shape) float32 a parameter. The graph is kept."""
    stacks = [p.new_zeros((len(losses), *p.shape), dtype=torch.float32) for p in params]
    for row, loss in enumerate(losses if params else []):
        for stack, grad in zip(stacks, torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)):
            if grad is not None:
                stack[row] = grad
    return stacks
