"""What per-sample gradients need from a forward and a backward: each layer's input, and the gradient of its output.

Must not compute a gradient, and must not move a layer's place in the graph: MMPose changes outputs in place everywhere.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mmpose_dp.privacy.errors import PrivacyError

from .fused_batch_norm import fused_batch_norm
from .layer_rules import Layer, batch_norm


@dataclass(eq=False)
class Call:
    """One call of a layer: its input, that input's version, and the output's gradient once it is there.

    No input: a BatchNorm, whose ``grad`` is that of its parameters, (entries, 2, channels).
    """

    module: nn.Module
    input: Tensor | None = None
    version: int = 0
    grad: Tensor | None = None


class Capture:
    """Records the calls of ``layers`` while it is entered.

    Attributes:
        calls: what was recorded.
        ends: where a backward may stop, below which no gradient is wanted.
        arrive: is given a call and the gradient of its output when a backward reaches it, if not None.
        half: whether mixed precision was seen.
        paused: records nothing for now.
    """

    paused = half = False
    arrive: Callable[[Call, Tensor], None] | None = None

    def __init__(self, layers: Mapping[nn.Module, Layer]) -> None:
        self._layers = layers
        self.clear()

    def clear(self) -> None:
        """Forgets a forward pass."""
        self.calls: list[Call] = []
        self.ends: list[GradientEdge | Tensor] = []

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Records every call made inside the context."""
        norms = {m for m, layer in self._layers.items() if layer.rule is batch_norm and 'forward' not in vars(m)}
        others = [module for module in self._layers if module not in norms]
        handles = [module.register_forward_hook(self._record, with_kwargs=True) for module in others]
        for module in norms:
            module.forward = partial(self._norm, module)
        try:
            yield
        finally:
            for module in norms:
                del module.forward
            for handle in handles:
                handle.remove()

    def _norm(self, module: nn.Module, input: Tensor) -> Tensor:  # torch's name: callers may write input=
        """The forward of a BatchNorm while it is captured."""
        if self.paused:
            return type(module).forward(module, input)
        x = input
        if x.dtype != module.weight.dtype:  # mixed precision: its rule works in float32
            return self._record(module, (x,), {}, type(module).forward(module, x))
        call = Call(module)
        output = fused_batch_norm(module, x, partial(self._arrived, call))
        # only behind it, at a parameter, has the backward passed it
        self._add(call, x, output, next(p for p in module.parameters() if p.requires_grad))
        return output

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if self.paused:
            return output
        x = (*args, *kwargs.values())[0]
        if output._is_view():  # (InstanceNorm's) its place in the graph would change with an in-place change
            output = output.clone()
        self.half |= output.dtype in (torch.bfloat16, torch.float16)
        call = Call(module, x.detach(), x._version)
        self._add(call, x, output)
        # the hook is set now: a later in-place change (ReLU, residual add) of the output does not move it
        output.register_hook(partial(self._arrived, call))
        return output

    def _add(self, call: Call, x: Tensor, output: Tensor, end: Tensor | None = None) -> None:
        if not output.requires_grad:
            raise PrivacyError(
                f'{self._layers[call.module].name} ran without a gradient graph: switch off activation checkpointing '
                '(with_cp) and torch.no_grad in the training forward'
            )
        self.calls.append(call)
        if not x.requires_grad:
            self.ends.append(get_gradient_edge(output) if end is None else end)

    def _arrived(self, call: Call, grad: Tensor) -> None:
        if self.arrive is not None:
            self.arrive(call, grad)
