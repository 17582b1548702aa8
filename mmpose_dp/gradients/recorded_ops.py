"""A parameter that belongs to no known layer (an embedding, a layer scale, a weight of two layers) is followed through its uses.

While a forward runs, each torch function that meets such a parameter is recorded; later it is run again on each sample's slice of
its inputs, and differentiated. Must not guess: a call counts only if, during the forward, slicing its inputs was seen to slice
its output; any other leaves its parameters to one backward per sample.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mmpose_dp.tensors import at_least_float32


@dataclass
class Use:
    """One call of a function on samples and on what was made from parameters alone."""

    func: Callable[..., Any]
    leaves: list[Any]  # its arguments, flattened; tensors of samples are detached
    spec: pytree.TreeSpec
    made: list[int]  # places in ``leaves`` of what was made from parameters alone, with its graph
    sliced: list[int]  # places in ``leaves`` of tensors that hold the samples
    axis: int  # the dimension of the samples, in the sliced leaves and in the output
    versions: dict[int, int]  # of each tensor among the leaves when it was read, by place
    edge: GradientEdge | None  # where the gradient of the output will be found
    origins: frozenset[int]  # the parameters, by index, that the made leaves come from

    def run(self, start: int, length: int, cast: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """The output for entries start..start+length of the samples' axis, with tensors of samples and made ones cast."""
        leaves = list(self.leaves)
        for i in self.made:
            leaves[i] = cast(leaves[i])
        for i in self.sliced:
            leaves[i] = cast(leaves[i].narrow(self.axis, start, length))
        if _changes_in_place(self.func):
            leaves[0] = leaves[0].clone()
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return next(_tensors(self.func(*args, **kwargs)))

    def gradients(self, grad: Tensor, count: int, param: Tensor) -> Tensor:
        """Gradient of <grad, a sample's part of the output> for ``param``: (samples, *parameter shape), float32."""
        total, length = param.new_zeros((count, *param.shape), dtype=torch.float32), grad.shape[self.axis] // count
        for i, part in enumerate(grad.split(length, self.axis)):
            with torch.enable_grad():
                out = self.run(i * length, length, at_least_float32)
            found = torch.autograd.grad(out, param, part.to(out.dtype), retain_graph=True, allow_unused=True)[0]
            if found is not None:
                total[i] = found.to_dense()
        return total


class OperationRecorder(TorchFunctionMode):
    """Records every call that meets one of ``params``, by index; the model's other parameters and its buffers hold no samples."""

    paused = False

    def __init__(self, params: dict[int, Tensor], model: nn.Module) -> None:
        super().__init__()
        self.params, self._model = params, model
        self.lost: set[int] = set()  # need a backward per sample: an output is not sliced with its inputs
        self.clear()

    def clear(self) -> None:
        """Forgets a forward pass."""
        self.uses: list[Use] = []
        # by identity; the tensors are held so that no identity is given out twice
        self._made = {id(p): (p, frozenset([i])) for i, p in self.params.items()}
        self._fixed: dict[int, Tensor] = {id(x): x for x in (*self._model.parameters(), *self._model.buffers())}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls ``func`` and looks at what it was called on."""
        if self.paused:
            return func(*args, **(kwargs or {}))
        leaves, spec = pytree.tree_flatten((args, kwargs or {}))
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        made = [i for i in tensors if id(leaves[i]) in self._made]
        samples = [i for i in tensors if id(leaves[i]) not in self._made and id(leaves[i]) not in self._fixed]
        origins = frozenset[int]().union(*(self._made[id(leaves[i])][1] for i in made))
        if samples and made:
            return self._meet(Use(func, leaves, spec, made, [], 0, {}, None, origins), samples)
        out = func(*args, **(kwargs or {}))
        if samples:
            if _changes_in_place(func):
                self._fixed.pop(id(leaves[0]), None)  # a constant that samples were written into
            return out
        for x in _tensors(out):
            if x.requires_grad and origins:
                self._made.setdefault(id(x), (x, origins))
            elif id(x) not in self._made:
                self._fixed[id(x)] = x
        return out

    def _meet(self, use: Use, samples: list[int]) -> Any:
        """A call on samples and on what was made from parameters: recorded, or its parameters are lost."""
        args, kwargs = pytree.tree_unflatten(use.leaves, use.spec)
        first, in_place = use.leaves[0], _changes_in_place(use.func)
        use.leaves = [x.detach() if i in samples else x for i, x in enumerate(use.leaves)]
        if in_place and 0 in samples:
            use.leaves[0] = use.leaves[0].clone()
        elif in_place:
            self.lost |= use.origins  # samples were written into something made from parameters
            self._made.pop(id(first), None)
            self._fixed.pop(id(first), None)
        use.versions = {i: use.leaves[i]._version for i in (*samples, *use.made)}
        result = use.func(*args, **kwargs)
        out = next((x for x in _tensors(result) if x.requires_grad), None)
        if out is None:  # no gradient flows here; but a write that returns nothing, or no graph at all, hides one
            self.lost |= use.origins if result is None or not torch.is_grad_enabled() else frozenset()
        elif out.numel():  # an empty batch shows nothing
            use.edge = get_gradient_edge(out)
            found = [one for axis in (0, 1) if _slices(one := replace(use, axis=axis), samples, out.detach())]
            if found:  # attention is sliced by queries too; the dimension of the samples slices keys and values as well
                self.uses.append(max(found, key=lambda one: len({*one.sliced} & {*samples})))
            else:
                self.lost |= use.origins
        return result


@torch.no_grad()
def _slices(use: Use, samples: list[int], out: Tensor) -> bool:
    """Finds which leaves to slice so that the first entry of the inputs gives the first entry of the output."""
    if out.dim() <= use.axis:
        return False
    size, want = out.shape[use.axis], out.narrow(use.axis, 0, 1).float()
    # a made leaf is sliced only if it was spread over the samples (a class token, expanded)
    for places in (samples, [*samples, *use.made]):
        use.sliced = [i for i in places if use.leaves[i].dim() > use.axis and use.leaves[i].shape[use.axis] == size]
        try:
            got = use.run(0, 1)
        except (RuntimeError, IndexError, ValueError, TypeError, AssertionError):
            continue  # the shapes do not fit
        near = 1e-3 * float(want.abs().nan_to_num().max()) if want.numel() else 0.0
        if got.shape == want.shape and torch.allclose(got.float(), want, rtol=1e-3, atol=near, equal_nan=True):
            return True
    return False


def _tensors(result: Any) -> Iterator[Tensor]:
    return (x for x in pytree.tree_leaves(result) if isinstance(x, Tensor))


def _changes_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, '__name__', '')
    operator = name.startswith('__i') and name.endswith('__') and name not in ('__index__', '__invert__')
    return operator or name == '__setitem__' or (name.endswith('_') and not name.endswith('__'))
