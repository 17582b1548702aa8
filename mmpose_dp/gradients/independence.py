"""Do the samples of a batch depend on one another? Then no engine can make the model private, and it is refused.

Must not let pass a layer at which the loss of one sample has a gradient in another.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mmpose_dp.privacy.errors import PrivacyError

Layout = tuple[
    int, bool
]  # the dimension that holds the samples; whether they are its outer part, or else its inner one


class MixedSamples:
    """Looks at gradients of the loss of one sample alone, where they arrive at the outputs of layers.

    Args:
        losses: one scalar per sample.
        any_order: whether the samples may be in any dimension that keeps them apart, or only where ``look`` says.

    Attributes:
        to_look_at: the samples whose losses to look at: the first and the last that are finite and not 0 (a sample of which
            nothing is annotated has no gradient anywhere), since a sample may depend on those before it, or behind it, alone.
    """

    def __init__(self, losses: Sequence[Tensor], any_order: bool) -> None:
        self._count, self._any_order = len(losses), any_order
        finite = [i for i, loss in enumerate(losses) if bool(loss.isfinite())]
        telling = [i for i in finite if float(losses[i].detach())]
        self.to_look_at = sorted({*telling[:1], *telling[-1:]})
        self._complete = len(finite) == len(losses) and len(self.to_look_at) == 2
        self._seen: set[int] = set()  # samples that had a gradient of their own somewhere
        # by place: its name, the layout that is read there, and those that keep samples apart
        self._places: dict[Hashable, tuple[str, Layout, set[Layout]]] = {}

    def look(self, sample: int, name: str, grad: Tensor | None, axis: int = 0, place: Hashable = None) -> None:
        """Notes where a gradient reaches other samples than its own.

        Args:
            sample: whose loss the gradient is of.
            name: what the message calls the place.
            grad: the gradient, with the samples (each any number of entries) along ``axis``.
            place: tells places of one name apart, if given.
        """
        if grad is None or grad.dim() <= axis or grad.shape[axis] % self._count:
            return
        self._complete &= bool(grad.isfinite().all())
        grad = grad.nan_to_num()  # 0 * NaN, in a sample not finite
        if bool(grad.any()):
            self._seen.add(sample)
        # along the axis, as its outer part or its inner one, or as a dimension of their own
        layouts = [(axis, True), *([(axis, False)] if grad.shape[axis] > self._count else [])]
        layouts += [(other, True) for other, size in enumerate(grad.shape) if other != axis and size == self._count]
        apart = {layout for layout in layouts if not _strays(grad, sample, self._count, layout)}
        _, _, left = self._places.setdefault(name if place is None else place, (name, (axis, True), set(apart)))
        left &= apart

    def refuse(self) -> bool:
        """Raises PrivacyError if samples mix; whether nothing hid it from sight, such as a NaN or no gradient at all."""
        for name, read, left in self._places.values():  # the first one is the nearest to where it happens
            if read in left or (left and self._any_order):
                continue
            name = name or 'the model'
            if left:
                raise PrivacyError(
                    f'{name} holds its rows in another dimension or order than this engine reads, which wants rows outermost: '
                    "write optim_wrapper.engine='loop', which serves any order"
                )
            order = "; if its rows only stand in another order, write optim_wrapper.engine='loop'"
            raise PrivacyError(
                f'from {name} on, the loss of one record depends on the rows of another (a norm with batch statistics, a loss '
                'that normalises over the batch). No engine can make that private: put something in its place that treats '
                f'each record by itself, such as GroupNorm for a norm{"" if self._any_order else order}'
            )
        return self._complete and self._seen == {*self.to_look_at}


def _strays(grad: Tensor, sample: int, count: int, layout: Layout) -> bool:
    """Whether a gradient reaches other samples than its own, if the samples have this layout."""
    axis, outer = layout
    by_sample = grad.unflatten(axis, (count, -1) if outer else (-1, count)).movedim(axis + (not outer), 0)
    return bool(by_sample[:sample].any() or by_sample[sample + 1 :].any())


class Watch:
    """Notes, while entered, where gradients can be looked at: the model's inputs, since frozen parts mix samples too, and outputs.

    Args:
        model: its inputs are made to require a gradient.
        modules: those whose outputs are noted, with their names.

    Attributes:
        inputs: of the forwards.
        outputs: (name, place in the graph, size of the first dimension) of each call.
        paused: notes nothing for now.
    """

    paused = False

    def __init__(self, model: nn.Module, modules: Mapping[nn.Module, str]) -> None:
        self._model, self._modules = model, modules
        self.clear()

    def clear(self) -> None:
        """Forgets a forward pass."""
        self.inputs: list[Tensor] = []
        self.outputs: list[tuple[str, GradientEdge, int]] = []

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Watches every forward inside the context."""
        handles = [module.register_forward_hook(self._note_output) for module in self._modules]
        handles.append(self._model.register_forward_pre_hook(self._replace_inputs, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _replace_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(map(self._noted, args)), {key: self._noted(value) for key, value in kwargs.items()}

    def _noted(self, value: Any) -> Any:
        if self.paused or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        self.inputs.append(value.detach().requires_grad_())
        return self.inputs[-1].clone()  # a leaf could not be changed in place

    def _note_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.paused and isinstance(output, Tensor) and output.requires_grad and output.dim():
            self.outputs.append((self._modules[module], get_gradient_edge(output), len(output)))


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
