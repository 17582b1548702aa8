"""Per-sample gradients through any model: capture during the forward, one backward, gradients row by row.

Two engines with one interface. ``RuleEngine`` serves each parameter by the first way that fits: its layer's rule
(layer_rules), the operations that use it (operations), a backward a row. ``LoopEngine`` takes the last way for all and is
the reference. Must not clip, weigh or release anything, and must not return a gradient it could not account for: the
first batch is checked against autograd, and rows that depend on one another are refused.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .errors import PrivacyError
from .layer_rules import Rule, rule_for
from .operations import OperationBlock, OperationRecorder, Use
from .row_gradients import Block, LayerBlock, RowGradients, StackBlock


class _Call(NamedTuple):
    """One call of a layer: its input, that input's version, and where the output's gradient will be found."""

    module: nn.Module
    input: Tensor
    version: int
    edge: GradientEdge


class _Layer(NamedTuple):
    """A layer with a rule, its name, the trainable parameters that the rule serves and their indices."""

    name: str
    rule: Rule
    param_names: list[str]
    indices: list[int]


class RuleEngine:
    """Per-row gradients by layer rules, by operations, and for what is left by one backward a row on the same graph.

    Args:
        called_once_a_row: modules that see one row at a time (losses): they get a backward a row, which is short.
        strict: refuse parameters that would need a backward a row.

    Raises PrivacyError for a parameter that is not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        called_once_a_row: Sequence[nn.Module] = (),
        strict: bool = False,
    ) -> None:
        self.params = list(params)
        self._strict = strict
        position = {id(p): i for i, p in enumerate(self.params)}
        owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        if not position.keys() <= owners.keys():
            raise PrivacyError("the optimizer holds a parameter that is not the model's")
        self._param_names = {position[id(p)]: name for name, p in model.named_parameters() if id(p) in position}
        in_losses = {position[id(p)] for module in called_once_a_row for p in module.parameters() if id(p) in position}
        no_rule = {key for key, count in owners.items() if count > 1} | {id(self.params[i]) for i in in_losses}
        # its children's weights are read without the children being called
        inside = {child for m in model.modules() if isinstance(m, nn.MultiheadAttention) for child in m.children()}
        self._layers: dict[nn.Module, _Layer] = {}
        for name, module in model.named_modules():
            rule = rule_for(module)
            if rule is None or module in inside:
                continue
            own = {n: id(p) for n, p in module.named_parameters(recurse=False)}
            own = {n: position[key] for n, key in own.items() if key in position and key not in no_rule}
            if own:
                self._layers[module] = _Layer(name, rule, list(own), list(own.values()))
        served = {i for layer in self._layers.values() for i in layer.indices} | in_losses
        followed: dict[int, Tensor] = {i: p for i, p in enumerate(self.params) if i not in served}
        self._recorder = OperationRecorder(followed, model)
        self._in_losses = in_losses
        self._calls: list[_Call] = []
        self._checked = False

    def ways(self) -> dict[str, str]:
        """How each parameter's gradients are found, by name: 'rule', 'operations' or 'loop'."""
        looped = self._in_losses | self._recorder.lost
        return {
            name: 'loop' if i in looped else 'operations' if i in self._recorder.params else 'rule'
            for i, name in self._param_names.items()
        }

    @property
    def looped(self) -> list[str]:
        """Names of the parameters that get a backward a row; known after the first batch."""
        return [self._param_names[i] for i in sorted(self._in_losses | self._recorder.lost)]

    def __str__(self) -> str:
        followed = len(self._recorder.params) - len(self._recorder.lost)
        text = (
            f'{len(self._layers)} layers by rule, {followed} parameters by their operations, {len(self.looped)} looped'
        )
        if self.looped:
            more = ', ...' if len(self.looped) > 5 else ''
            text += f' over the records ({", ".join(self.looped[:5])}{more})'
        return text

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Records every call of a trainable layer, and of operations on other parameters, made inside the context."""
        self._calls.clear()
        self._recorder.clear()
        handles = [module.register_forward_hook(self._record) for module in self._layers]
        try:
            with self._recorder if self._recorder.params else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if output._is_view():  # (InstanceNorm's) its place in the graph would change with an in-place change
            output = output.clone()
        if not output.requires_grad:
            raise PrivacyError(
                f'{self._layers[module].name} ran without a gradient graph: switch off activation checkpointing '
                '(with_cp) and torch.no_grad in the training forward'
            )
        # the edge is taken now: a later in-place change (ReLU, residual add) of the output does not move it
        self._calls.append(_Call(module, args[0].detach(), args[0]._version, get_gradient_edge(output)))
        return output

    def backward(self, losses: Tensor) -> RowGradients:
        """Gradients of each row's loss, (rows,); consumes what ``capture`` recorded.

        Raises PrivacyError if rows mix, if a captured tensor was changed in place, or if the sum is not autograd's (all
        found on the first batch, before anything is released).
        """
        calls, self._calls = self._calls, []
        uses = list(self._recorder.uses)
        edges = [call.edge for call in calls] + [use.edge for use in uses]
        check = not self._checked and bool(losses.isfinite().all())
        if not self._checked and len(losses) > 1:
            names = [self._layers[call.module].name for call in calls] + [self._use_name(use) for use in uses]
            axes = [0] * len(calls) + [use.axis for use in uses]
            _refuse_mixed_rows(losses, edges, axes, names)
        again = check or bool(self._in_losses or self._recorder.params)  # whether the graph is walked once more
        grads = _gradients(losses.sum(), edges, again)
        blocks: list[Block] = [
            *self._by_rule(calls, grads[: len(calls)], len(losses)),
            *self._by_operations(uses, grads[len(calls) :], len(losses)),
        ]
        if self._strict and self.looped:
            raise PrivacyError(
                f'no per-sample rule serves {self.looped[:5]}. Write optim_wrapper.engine="auto" (a backward a record for '
                'these), or freeze them'
            )
        looped = sorted(self._in_losses | self._recorder.lost)
        stacks = _row_by_row(losses, [self.params[i] for i in looped])
        gradients = RowGradients(
            self.params,
            blocks + [StackBlock([i], stack) for i, stack in zip(looped, stacks)],
            len(losses),
        )
        if check:
            half = any(call.input.dtype in (torch.bfloat16, torch.float16) for call in calls)
            self._refuse_wrong_sum(gradients, _gradients(losses.sum(), self.params), 0.05 if half else 1e-3)
            self._checked = len(losses) > 1
        self._recorder.clear()
        return gradients

    def _use_name(self, use: Use) -> str:
        return f'{use.name} on {", ".join(self._param_names[i] for i in use.origins)}'

    def _by_rule(self, calls: list[_Call], grads: Sequence[Tensor | None], rows: int) -> list[LayerBlock]:
        filled: dict[nn.Module, LayerBlock] = {}
        for (module, x, version, _), grad in zip(calls, grads):
            if grad is None:
                continue  # the loss does not depend on this call
            layer = self._layers[module]
            if x._version != version:
                raise PrivacyError(
                    f'the input of {layer.name} was changed in place after it was read; use engine="loop"'
                )
            block = LayerBlock(module, layer.rule, layer.param_names, layer.indices)
            filled.setdefault(module, block).calls.append((_by_row(x, rows), _by_row(grad, rows)))
        return list(filled.values())

    def _by_operations(self, uses: list[Use], grads: Sequence[Tensor | None], rows: int) -> list[OperationBlock]:
        reached = [(use, grad) for use, grad in zip(uses, grads) if grad is not None]
        for use, grad in reached:
            if grad.shape[use.axis] % rows or not use.unchanged():
                self._recorder.lost |= use.origins
        blocks = []
        for i, param in self._recorder.params.items():
            mine = [(use, grad) for use, grad in reached if i in use.origins]
            if mine and i not in self._recorder.lost:
                blocks.append(OperationBlock(i, param, mine, rows))
        return blocks

    def _refuse_wrong_sum(self, gradients: RowGradients, reference: Sequence[Tensor | None], limit: float) -> None:
        ours = gradients.weighted_sum(torch.ones(gradients.num_rows, device=gradients.device))
        scale = max((float(r.norm()) for r in reference if r is not None), default=0.0)
        for i, (mine, theirs) in enumerate(zip(ours, reference)):
            gap = float((mine if theirs is None else mine - theirs.float()).norm())
            if gap > limit * float(mine.norm()) + 1e-5 * scale:
                raise PrivacyError(
                    f'the per-sample gradient of {self._param_names[i]} is not what autograd finds (it is used outside its '
                    "layer's forward): use engine='loop'"
                )


class LoopEngine:
    """Per-row gradients by one backward a row: the reference. Cheapest with one row a forward; right with any number."""

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]) -> None:
        self.params = list(params)
        self._param_names = [name for name, p in model.named_parameters() if any(p is q for q in self.params)]
        self._names = {module: name for name, module in model.named_modules() if not [*module.children()]}
        self._edges: list[tuple[str, GradientEdge]] = []
        self._checked = False

    def __str__(self) -> str:
        return 'a backward a record for every parameter (slow)'

    def ways(self) -> dict[str, str]:
        """See RuleEngine.ways."""
        return dict.fromkeys(self._param_names, 'loop')

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Notes where modules end, to see on the first batch whether rows mix."""
        self._edges.clear()
        handles = [] if self._checked else [module.register_forward_hook(self._record) for module in self._names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            self._edges.append((self._names[module], get_gradient_edge(output)))

    def backward(self, losses: Tensor) -> RowGradients:
        """Gradients of each row's loss, (rows,). Raises PrivacyError if rows mix."""
        if not self._checked and len(losses) > 1:
            edges = [edge for _, edge in self._edges]
            _refuse_mixed_rows(losses, edges, [0] * len(edges), [name for name, _ in self._edges], exactly=True)
            self._checked = True
        stacks = _row_by_row(losses, self.params)
        return RowGradients(self.params, [StackBlock([i], stack) for i, stack in enumerate(stacks)], len(losses))


def _gradients(loss: Tensor, inputs: Sequence[Any], keep_graph: bool = True) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, inputs, retain_graph=keep_graph, allow_unused=True) if inputs else []


def _row_by_row(losses: Tensor, params: Sequence[nn.Parameter]) -> list[Tensor]:
    """One backward a row: (rows, *shape) float32 a parameter."""
    stacks = [p.new_zeros((len(losses), *p.shape), dtype=torch.float32) for p in params]
    for row, loss in enumerate(losses):
        for stack, grad in zip(stacks, _gradients(loss, params)):
            if grad is not None:
                stack[row] = grad
    return stacks


def _refuse_mixed_rows(
    losses: Tensor,
    edges: Sequence[GradientEdge],
    axes: Sequence[int],
    names: Sequence[str],
    exactly: bool = False,
) -> None:
    """The loss of the first row that is finite may reach that row of every captured output, and no other.

    ``exactly``: look only where there is one entry a row.
    """
    rows, mixed = len(losses), ''
    row = int(losses.isfinite().int().argmax())
    for grad, axis, name in zip(_gradients(losses[row], edges), axes, names):
        if grad is None or (grad.shape[axis] % rows if not exactly else grad.shape[:1] != (rows,)):
            continue
        others = grad.nan_to_num().unflatten(axis, (rows, -1)).movedim(axis, 0)  # 0 * NaN, in a row that is not finite
        if bool(others[:row].any() or others[row + 1 :].any()):
            mixed = name  # the last one is the nearest to where it happens
    if mixed:
        raise PrivacyError(
            f'from {mixed} on, the loss of one record depends on the rows of another (BatchNorm in train mode, a loss that '
            'normalises over the batch, or a layer that does not keep rows outermost). No engine can make that private: '
            "change or freeze the layer; if its rows are only not outermost, write optim_wrapper.engine='loop'"
        )


def _by_row(x: Tensor, rows: int) -> Tensor:
    """(rows * merged, ...) -> (rows, merged, ...)."""
    if x.shape[0] % rows:
        raise PrivacyError(f'a layer saw {x.shape[0]} leading entries for {rows} rows: use engine="loop"')
    return x.unflatten(0, (rows, -1))


Engine = RuleEngine | LoopEngine


def build_engine(
    kind: str,
    model: nn.Module,
    params: Sequence[nn.Parameter],
    called_once_a_row: Sequence[nn.Module] = (),
) -> Engine:
    """'auto': the fastest way that serves each parameter; 'rules': the same, but no backward a row; 'loop': nothing else.

    Raises PrivacyError for another kind.
    """
    if kind not in ('auto', 'rules', 'loop'):
        raise PrivacyError(f"engine={kind!r} is unknown; write 'auto', 'rules' or 'loop'")
    if kind == 'loop':
        return LoopEngine(model, params)
    return RuleEngine(model, params, called_once_a_row, strict=kind == 'rules')
