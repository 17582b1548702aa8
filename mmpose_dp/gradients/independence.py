"""Do the rows of a batch depend on one another? Then no engine can make the model private, and it is refused.

Must not let pass a layer at which the loss of one row has a gradient in another.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmpose_dp.privacy.errors import PrivacyError

Layout = tuple[int, bool]  # the dimension that holds the rows; whether they are its outer part, or else its inner one


class MixedRows:
    """Looks at gradients of the loss of one row alone, where they arrive at the outputs of layers.

    Args:
        losses: one scalar a row.
        outermost: whether the rows must lie where ``look`` says; else they may lie in any dimension that keeps them apart.

    Attributes:
        to_look_at: the rows whose losses to look at: the first and the last that are finite and not 0 (a row of which nothing
            is annotated has no gradient anywhere), since a row may depend on those before it, or behind it, alone.
    """

    def __init__(self, losses: Sequence[Tensor], outermost: bool = True) -> None:
        self._rows, self._outermost = len(losses), outermost
        finite = [row for row, loss in enumerate(losses) if bool(loss.isfinite())]
        telling = [row for row in finite if float(losses[row].detach())]
        self.to_look_at = sorted({*telling[:1], *telling[-1:]})
        self._complete = len(finite) == len(losses) and len(self.to_look_at) == 2
        self._seen: set[int] = set()  # rows that had a gradient of their own somewhere
        # by place: its name, the layout that is read there, and those that keep rows apart
        self._places: dict[Hashable, tuple[str, Layout, set[Layout]]] = {}

    def look(self, row: int, name: str, grad: Tensor | None, axis: int = 0, place: Hashable = None) -> None:
        """Notes where a gradient reaches other rows than its own.

        Args:
            row: whose loss the gradient is of.
            name: what the message calls the place.
            grad: the gradient, with the rows (each any number of entries) along ``axis``.
            place: tells places of one name apart, if given.
        """
        if grad is None or grad.dim() <= axis or grad.shape[axis] % self._rows:
            return
        self._complete &= bool(grad.isfinite().all())
        grad = grad.nan_to_num()  # 0 * NaN, in a row not finite
        if bool(grad.any()):
            self._seen.add(row)
        apart = {layout for layout in _layouts(grad, axis, self._rows) if not _strays(grad, row, self._rows, layout)}
        _, _, left = self._places.setdefault(name if place is None else place, (name, (axis, True), set(apart)))
        left &= apart

    def refuse(self) -> bool:
        """Raises PrivacyError if rows were seen to mix; whether nothing hid it from sight, such as a NaN or no gradient at all."""
        for name, read, left in self._places.values():  # the first one is the nearest to where it happens
            if read in left or (left and not self._outermost):
                continue
            name = name or 'the model'
            if left:
                raise PrivacyError(
                    f'{name} holds its rows in another dimension or order than this engine reads, which wants rows outermost: '
                    "write optim_wrapper.engine='loop', which serves any order"
                )
            order = (
                "; if its rows only stand in another order, write optim_wrapper.engine='loop'"
                if self._outermost
                else ''
            )
            raise PrivacyError(
                f'from {name} on, the loss of one record depends on the rows of another (a norm with batch statistics, a loss '
                'that normalises over the batch). No engine can make that private: put something in its place that treats '
                f'each record by itself, such as GroupNorm for a norm{order}'
            )
        return self._complete and self._seen == {*self.to_look_at}


def _layouts(grad: Tensor, axis: int, rows: int) -> Iterator[Layout]:
    """Where the rows may lie: along ``axis``, as its outer part or its inner one, or as a dimension of their own."""
    yield axis, True
    if grad.shape[axis] > rows:
        yield axis, False
    yield from ((other, True) for other, size in enumerate(grad.shape) if other != axis and size == rows)


def _strays(grad: Tensor, row: int, rows: int, layout: Layout) -> bool:
    """Whether a gradient reaches other rows than its own, if the rows lie so."""
    axis, outer = layout
    by_row = grad.unflatten(axis, (rows, -1) if outer else (-1, rows)).movedim(axis + (not outer), 0)
    return bool(by_row[:row].any() or by_row[row + 1 :].any())


def refuse_counting_layers(model: nn.Module) -> None:
    """Raises PrivacyError for an embedding that divides by counts over the batch, or rescales its weight in a forward."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            for key, plain in (('scale_grad_by_freq', False), ('max_norm', None)):
                if getattr(module, key) not in (None, False):
                    raise PrivacyError(
                        f'{key}={getattr(module, key)} of {name or "the model"} makes one record depend on the others of its '
                        f'batch: write {key}={plain}'
                    )


@contextmanager
def steady_weights(trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Raises PrivacyError if a trained parameter is frozen, or if what is done inside changes one, which would leave a trace."""
    frozen = [name for name, p in trained.items() if not p.requires_grad]
    if frozen:
        raise PrivacyError(
            f'{len(frozen)} parameters were frozen after the optimizer was built ({", ".join(frozen[:3])}): freeze before, and '
            'call model.train() before, where a backbone has frozen_stages'
        )
    before = {name: p._version for name, p in trained.items()}
    yield
    for name, p in trained.items():
        if p._version != before[name]:
            raise PrivacyError(
                f'the training forward changed the parameter {name} in place, which would leak the batch: change parameters by '
                'the optimizer alone'
            )


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
                stack[row] = grad.to_dense()
    return stacks
