"""The generic rule: a parameter that belongs to no known layer is followed through the operations that use it.

Position embeddings, class tokens, relative position tables, layer scales, a weight of two layers or computed from another
parameter. While a forward runs, each torch function that meets such a parameter is recorded; later it is run again on
each row's slice of its inputs, and differentiated. Must not guess: a call counts only if, during the forward, slicing its
inputs was seen to slice its output; any other leaves its parameters to the single-record loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


@dataclass
class Use:
    """One call of a function on rows and on something made from parameters alone.

    Attributes:
        leaves: its arguments, flattened; tensors of rows are detached.
        made: places in ``leaves`` of what was made from parameters alone, with its graph.
        sliced: places in ``leaves`` of tensors that hold the rows.
        axis: the dimension of the rows, in the sliced leaves and in the output.
        versions: of each tensor among the leaves when it was read, by place.
        edge: where the gradient of the output will be found.
        origins: the parameters (by index) that the made leaves come from.
    """

    func: Callable[..., Any]
    leaves: list[Any]
    spec: pytree.TreeSpec
    made: list[int]
    sliced: list[int]
    axis: int
    versions: dict[int, int]
    edge: GradientEdge
    origins: frozenset[int]

    @property
    def name(self) -> str:
        """What the function is called."""
        return getattr(self.func, '__name__', str(self.func))

    def unchanged(self) -> bool:
        """Whether every tensor still holds what it held when it was read."""
        return all(self.leaves[i]._version == version for i, version in self.versions.items())

    def run(self, start: int, length: int, made: Sequence[Tensor], precise: bool = False) -> Tensor:
        """The output for entries start..start+length of the row axis, computed from ``made``."""
        leaves = list(self.leaves)
        for i, x in zip(self.made, made):
            leaves[i] = x
        for i in self.sliced:
            x = leaves[i].narrow(self.axis, start, length)
            leaves[i] = _precise(x) if precise else x
        if _changes_in_place(self.func):
            leaves[0] = leaves[0].clone()
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return next(x for x in pytree.tree_leaves(self.func(*args, **kwargs)) if isinstance(x, Tensor))

    def vjp(self, grad: Tensor, start: int, length: int, params: Sequence[Tensor]) -> list[Tensor]:
        """Gradient of <grad, output entries start..start+length> for each of ``params``, float32."""
        with torch.enable_grad():
            whole = [_precise(self.leaves[i].detach()).requires_grad_() for i in self.made]
            out = self.run(start, length, whole, precise=True)
            parts = torch.autograd.grad(out, whole, grad.to(out.dtype), allow_unused=True)
        pairs = [(self.leaves[i], g) for i, g in zip(self.made, parts) if g is not None]
        if not pairs:
            return [torch.zeros_like(p, dtype=torch.float32) for p in params]
        grads = torch.autograd.grad(
            [x for x, _ in pairs],
            params,
            [g.to(x.dtype) for x, g in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        return [torch.zeros_like(p, dtype=torch.float32) if g is None else g.float() for p, g in zip(params, grads)]


class OperationBlock:
    """One followed parameter: its uses and the gradients of their outputs, (entries on the row axis a multiple of rows)."""

    def __init__(self, index: int, param: Tensor, uses: list[tuple[Use, Tensor]], num_rows: int) -> None:
        self.indices = [index]
        self._param, self._uses, self._num_rows = param, uses, num_rows

    def per_row(self, rows: Sequence[int]) -> list[Tensor]:
        """See Block.per_row."""
        out = torch.zeros((len(rows), *self._param.shape), dtype=torch.float32, device=self._param.device)
        for use, grad in self._uses:
            length = grad.shape[use.axis] // self._num_rows
            for i, row in enumerate(rows):
                part = grad.narrow(use.axis, row * length, length)
                out[i] += use.vjp(part, row * length, length, [self._param])[0]
        return [out]

    def weighted_sum(self, rows: Sequence[int], weights: Tensor | None = None) -> list[Tensor]:
        """See Block.weighted_sum."""
        grads = self.per_row(rows)[0]
        return [grads.sum(0) if weights is None else torch.tensordot(weights, grads, dims=1)]

    def ghost_squares(self, rows: Sequence[int]) -> Tensor | None:
        """See Block.ghost_squares: such parameters are few."""
        return None


class OperationRecorder(TorchFunctionMode):
    """Records every call that meets one of ``params`` while it is entered.

    Args:
        params: the followed parameters, by index.
        model: its parameters and buffers hold no rows.

    Attributes:
        uses: what was recorded.
        lost: parameters that met a call whose slices are not slices of its output. Once lost, they stay lost.
        paused: records nothing for now.
    """

    paused = False

    def __init__(self, params: dict[int, Tensor], model: nn.Module) -> None:
        super().__init__()
        self.params = params
        self.uses: list[Use] = []
        self.lost: set[int] = set()
        self._model = model
        self.clear()

    def clear(self) -> None:
        """Forgets a forward pass."""
        self.uses = []
        # by identity; the tensors are held so that no identity is given out twice
        self._made: dict[int, tuple[Tensor, frozenset[int]]] = {
            id(p): (p, frozenset([i])) for i, p in self.params.items()
        }
        self._fixed: dict[int, Tensor] = {id(x): x for x in (*self._model.parameters(), *self._model.buffers())}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls ``func`` and looks at what it was called on."""
        if self.paused:
            return func(*args, **(kwargs or {}))
        leaves, spec = pytree.tree_flatten((args, kwargs or {}))
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        made = [i for i in tensors if id(leaves[i]) in self._made]
        rows = [i for i in tensors if id(leaves[i]) not in self._made and id(leaves[i]) not in self._fixed]
        if rows and made:
            return self._meet(func, leaves, spec, made, rows)
        out = func(*args, **(kwargs or {}))
        if rows:
            if _changes_in_place(func):
                self._fixed.pop(id(leaves[0]), None)  # a constant that rows were written into
            return out
        origins = self._origins(leaves, made)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.requires_grad and origins:
                self._made.setdefault(id(x), (x, origins))
            elif isinstance(x, Tensor) and id(x) not in self._made:
                self._fixed[id(x)] = x
        return out

    def _origins(self, leaves: list[Any], made: list[int]) -> frozenset[int]:
        return frozenset[int]().union(*(self._made[id(leaves[i])][1] for i in made))

    def _meet(
        self,
        func: Callable[..., Any],
        leaves: list[Any],
        spec: pytree.TreeSpec,
        made: list[int],
        rows: list[int],
    ) -> Any:
        """A call on rows and on what was made from parameters: recorded, or its parameters are lost."""
        origins, in_place = self._origins(leaves, made), _changes_in_place(func)
        held = [x.detach() if i in rows else x for i, x in enumerate(leaves)]
        if in_place and 0 in rows:
            held[0] = held[0].clone()
        elif in_place:
            self.lost |= origins  # rows were written into something made from parameters
            self._made.pop(id(leaves[0]), None)
            self._fixed.pop(id(leaves[0]), None)
        versions = {i: held[i]._version for i in (*rows, *made)}
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        result = func(*args, **kwargs)
        out = _first_with_graph(result)
        if out is None:  # no gradient flows here; but a write that returns nothing, or no graph at all, hides one
            self.lost |= origins if result is None or not torch.is_grad_enabled() else frozenset()
            return result
        if not out.numel():  # an empty batch shows nothing
            return result
        edge = get_gradient_edge(out)
        found = [Use(func, held, spec, made, [], axis, versions, edge, origins) for axis in (0, 1)]
        found = [use for use in found if _slices(use, rows, out.detach())]
        if found:  # attention is sliced by queries too; the dimension of the rows slices keys and values as well
            self.uses.append(max(found, key=lambda use: len({*use.sliced} & {*rows})))
        else:
            self.lost |= origins
        return result


@torch.no_grad()
def _slices(use: Use, rows: list[int], out: Tensor) -> bool:
    """Finds which leaves to slice so that the first entry of the inputs gives the first entry of the output."""
    if out.dim() <= use.axis:
        return False
    size, want = out.shape[use.axis], out.narrow(use.axis, 0, 1).float()
    # a made leaf is sliced only if it was spread over the rows (a class token, expanded)
    for places in (rows, [*rows, *use.made]):
        leaves = [(i, use.leaves[i]) for i in places]
        use.sliced = [i for i, x in leaves if x.dim() > use.axis and x.shape[use.axis] == size]
        try:
            got = use.run(0, 1, [use.leaves[i] for i in use.made])
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError):
            continue  # the shapes do not fit
        near = 1e-3 * float(want.abs().nan_to_num().max()) if want.numel() else 0.0
        if got.shape == want.shape and torch.allclose(got.float(), want, rtol=1e-3, atol=near, equal_nan=True):
            return True
    return False


def _precise(x: Tensor) -> Tensor:
    """Half precision becomes float32; integers stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _first_with_graph(result: Any) -> Tensor | None:
    return next((x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad), None)


def _changes_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, '__name__', '')
    return (
        name == '__setitem__'
        or (name.startswith('__i') and name.endswith('__') and name != '__index__' and name != '__invert__')
        or (name.endswith('_') and not name.endswith('__'))
    )
