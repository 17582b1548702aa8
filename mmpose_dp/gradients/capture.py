"""What per-sample gradients need from a forward and a backward: each layer's input, and the gradient of its output.

Must not move a layer's place in the graph: MMPose changes outputs in place everywhere.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mmpose_dp.privacy.errors import UnsupportedModelError

from .layer_rules import Layer, batch_norm, batch_norm_backward

Arrive = Callable[['Call', Tensor], None]


class _FusedNorm(torch.autograd.Function):
    """BatchNorm with fixed statistics that finds each entry's gradients, (entries, 2, channels), and gives them to ``take``.

    A rule would read both activations a second time, for every norm of the model.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: nn.Module, take: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.take = module, take
        statistics = module.running_mean, module.running_var
        return torch.ops.aten.native_batch_norm(x, weight, bias, *statistics, False, 0.0, module.eps)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        grad, *own = batch_norm_backward(ctx.module, weight, x, grads[0], ctx.needs_input_grad[0])
        entries = torch.stack(own, 1)
        ctx.take(entries)
        total = entries.sum(0)
        return grad, total[0], total[1] if ctx.needs_input_grad[2] else None, None, None


@dataclass(eq=False)
class Call:
    """One call of a layer."""

    module: nn.Module
    input: Tensor | None = None  # None: a BatchNorm, whose grad is that of its parameters, (entries, 2, channels)
    version: int = 0  # of the input, when it was read
    grad: Tensor | None = None  # of the output, once it is there


class Capture:
    """Records the calls of ``layers`` while it is entered and not ``paused``; see ``entered`` for ``watched``."""

    paused = low_precision = False  # low_precision: mixed precision was seen
    # is given a call and the gradient of its output when a backward reaches it
    arrive: Arrive = staticmethod(lambda call, grad: None)

    def __init__(self, model: nn.Module, layers: Mapping[nn.Module, Layer], watched: Mapping[nn.Module, str]) -> None:
        self._model, self._layers, self._watched = model, layers, watched
        self.clear()

    def clear(self) -> None:
        """Forgets a forward pass."""
        self.calls: list[Call] = []
        self.ends: list[GradientEdge | Tensor] = []  # where a backward may stop, below which no gradient is wanted
        self.inputs: list[Tensor] = []  # of the model
        self.outputs: list[tuple[str, GradientEdge, int]] = []  # name, place in the graph, size of the first dimension

    @contextmanager
    def entered(self, watch: bool) -> Iterator[None]:
        """Records inside; with ``watch`` also the model's inputs, since frozen parts mix samples too, and ``watched`` outputs."""
        norms = {m for m, layer in self._layers.items() if layer.rule is batch_norm and 'forward' not in vars(m)}
        others = [module for module in self._layers if module not in norms]
        handles = [module.register_forward_hook(self._record, with_kwargs=True) for module in others]
        if watch:
            handles += [module.register_forward_hook(self._note_output) for module in self._watched]
            handles.append(self._model.register_forward_pre_hook(self._note_inputs, with_kwargs=True))
        for module in norms:
            module.forward = partial(self._norm, module)
        try:
            yield
        finally:
            for module in norms:
                del module.forward
            for handle in handles:
                handle.remove()

    def _note_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        def noted(value: Any) -> Any:
            if self.paused or not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            self.inputs.append(value.detach().requires_grad_())
            return self.inputs[-1].clone()  # a leaf could not be changed in place

        return tuple(map(noted, args)), {key: noted(value) for key, value in kwargs.items()}

    def _note_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.paused and isinstance(output, Tensor) and output.requires_grad and output.dim():
            self.outputs.append((self._watched[module], get_gradient_edge(output), len(output)))

    def _norm(self, module: nn.Module, input: Tensor) -> Tensor:  # torch's name: callers may write input=
        if self.paused:
            return type(module).forward(module, input)
        if input.dtype != module.weight.dtype:  # mixed precision: its rule works in float32
            return self._record(module, (input,), {}, type(module).forward(module, input))
        call = Call(module)
        output = _FusedNorm.apply(input, module.weight, module.bias, module, lambda grad: self.arrive(call, grad))
        # only behind it, at a parameter, has the backward passed it
        self._add(call, input, output, next(p for p in module.parameters() if p.requires_grad))
        return output

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if self.paused:
            return output
        x = (*args, *kwargs.values())[0]
        if output._is_view():  # (InstanceNorm's) its place in the graph would change with an in-place change
            output = output.clone()
        self.low_precision |= output.dtype in (torch.bfloat16, torch.float16)
        call = Call(module, x.detach(), x._version)
        self._add(call, x, output)
        # the hook is set now: a later in-place change (ReLU, residual add) of the output does not move it
        output.register_hook(lambda grad: self.arrive(call, grad))
        return output

    def _add(self, call: Call, x: Tensor, output: Tensor, end: Tensor | None = None) -> None:
        if not output.requires_grad:
            raise UnsupportedModelError(
                f'{self._layers[call.module].name} ran without a gradient graph: switch off activation checkpointing '
                '(with_cp) and torch.no_grad in the training forward'
            )
        self.calls.append(call)
        if not x.requires_grad:
            self.ends.append(get_gradient_edge(output) if end is None else end)
