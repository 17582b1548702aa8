"""Per-sample gradients by one backward a record: the reference for every other way, and the fallback.

Must not clip, weigh or release anything. Right for any model whose rows do not mix, and it refuses those that do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mmpose_dp.privacy.records import Collector

from .blocks import StackBlock
from .independence import Inputs, MixedRows, gradients_at_inputs, one_by_one, refuse_counting_layers, steady_weights


class LoopEngine:
    """Per-row gradients by one backward a row: the reference.

    Attributes:
        one_at_a_time: see RuleEngine.
    """

    one_at_a_time = True

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]) -> None:
        self.params = list(params)
        refuse_counting_layers(model)
        self._named = {name: p for name, p in model.named_parameters() if any(p is q for q in self.params)}
        self._names = {module: name for name, module in model.named_modules() if not [*module.children()]}
        self._edges: list[tuple[str, GradientEdge]] = []
        self._model = model
        self._inputs = Inputs()
        self._paused = False
        self._unmixed = False

    def __str__(self) -> str:
        return 'a backward a record for every parameter (slow)'

    def ways(self) -> dict[str, str]:
        """See RuleEngine.ways."""
        return dict.fromkeys(self._named, 'loop')

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Notes where modules end, to see on the first batch whether rows mix."""
        self._edges.clear()
        handles = [] if self._unmixed else [module.register_forward_hook(self._record) for module in self._names]
        try:
            asked = gradients_at_inputs(self._model, not self._unmixed)
            with asked as self._inputs, steady_weights(self._named):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See RuleEngine.paused."""
        self._paused = self._inputs.paused = True
        try:
            yield
        finally:
            self._paused = self._inputs.paused = False

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._paused and isinstance(output, Tensor) and output.requires_grad:
            self._edges.append((self._names[module], get_gradient_edge(output)))

    def backward(self, losses: Sequence[Tensor], *collectors: Collector) -> None:
        """See RuleEngine.backward. Raises PrivacyError if rows mix."""
        if not self._unmixed and len(losses) > 1:
            mixing = MixedRows(losses, outermost=False)
            edges = self._edges
            ends: list[Any] = [*(edge for _, edge in edges), *self._inputs]
            for row in mixing.to_look_at:
                found = torch.autograd.grad(losses[row], ends, retain_graph=True, allow_unused=True) if ends else ()
                for i, ((name, _), grad) in reversed([*enumerate(zip(edges, found))]):
                    if grad is not None and grad.shape[:1] == (len(losses),):  # elsewhere rows may lie in any order
                        mixing.look(row, name, grad, place=i)
                for i, grad in enumerate(found[len(edges) :], len(edges)):
                    mixing.look(row, 'the images', grad, place=i)
            self._unmixed = mixing.refuse()
        self._edges.clear()
        self._inputs = Inputs()
        for i, stack in enumerate(one_by_one(losses, self.params)):
            for collector in collectors:
                collector.add(StackBlock([i], stack))
