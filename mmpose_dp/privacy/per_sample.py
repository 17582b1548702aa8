"""Per-sample gradients through any model: capture during the forward, one backward, gradients row by row.

Two engines with one interface. ``RuleEngine`` records each trainable layer's input and the gradient of its output, and
builds per-row gradients from them (layer_rules). ``LoopEngine`` differentiates one row at a time and is always right.
Must not clip, weigh or release anything, and must not return a gradient it could not account for: the first batch is
checked against autograd, and rows that depend on one another are refused.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .errors import PrivacyError
from .layer_rules import Rule, rule_for, weighted_gradient


class _Call(NamedTuple):
    """One call of a layer: its input, that input's version, and where the output's gradient will be found."""

    input: Tensor
    version: int
    edge: GradientEdge


@dataclass
class Block:
    """The gradients of one layer's parameters; ``indices`` are their places in ``RowGradients.params``."""

    module: nn.Module
    rule: Rule
    names: list[str]
    indices: list[int]
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (input, output gradient), rows outermost

    @torch.no_grad()
    def per_row(self, rows: Tensor) -> list[Tensor]:
        """Gradients of the given rows: one (rows, *parameter shape) float32 tensor a parameter."""
        total: list[Tensor] = []
        for a, b in self.calls:
            grads = self.rule(self.module, _float(a, rows), _float(b, rows))
            found = [_sum_merged(grads[name], len(rows)) for name in self.names]
            total = [x + y for x, y in zip(total, found)] if total else found
        return total

    @torch.no_grad()
    def weighted_sum(self, rows: Tensor, weights: Tensor) -> list[Tensor]:
        """sum of the given rows' gradients times ``weights`` (rows,): one tensor a parameter."""
        total: list[Tensor] = []
        for a, b in self.calls:
            scaled = _float(b, rows)
            repeats = len(scaled) // len(rows)
            scaled = scaled * weights.repeat_interleave(repeats).view(-1, *[1] * (scaled.dim() - 1))
            grads = weighted_gradient(self.module, self.rule, _float(a, rows), scaled)
            found = [grads[name] for name in self.names]
            total = [x + y for x, y in zip(total, found)] if total else found
        return total


@dataclass
class LoopBlock:
    """One parameter's gradients as the single-row loop left them, (rows, *parameter shape)."""

    indices: list[int]
    grads: Tensor

    def per_row(self, rows: Tensor) -> list[Tensor]:
        """See Block.per_row."""
        return [self.grads[rows]]

    def weighted_sum(self, rows: Tensor, weights: Tensor) -> list[Tensor]:
        """See Block.weighted_sum."""
        return [torch.tensordot(weights, self.grads[rows], dims=1)]


class RowGradients:
    """The gradients of every row of one batch, block by block.

    Attributes:
        params: the trainable parameters, in the order of every list of gradients here.
        num_rows: rows of the batch.
    """

    def __init__(self, params: Sequence[nn.Parameter], blocks: Sequence[Block | LoopBlock], num_rows: int) -> None:
        self.params = list(params)
        self.num_rows = num_rows
        self.device = params[0].device
        self._blocks = blocks

    def blocks(self) -> Sequence[Block | LoopBlock]:
        """One block a layer. A parameter in no block has gradient zero for every row."""
        return self._blocks

    def weighted_sum(self, weights: Tensor) -> list[Tensor]:
        """sum_r weights[r] * g_r, (rows,) -> one float32 tensor a parameter.

        Rows of weight 0 are left out rather than multiplied, so that a NaN in them does no harm.
        """
        rows = weights.nonzero().flatten()
        total = [torch.zeros_like(p, dtype=torch.float32) for p in self.params]
        if len(rows):
            for block in self._blocks:
                for index, grads in zip(block.indices, block.weighted_sum(rows, weights[rows])):
                    total[index] += grads
        return total

    def per_row(self, rows: Tensor) -> list[Tensor]:
        """All gradients of the given rows, (rows, *shape) float32 each: rows x p numbers, for public rows only."""
        total = [p.new_zeros((len(rows), *p.shape), dtype=torch.float32) for p in self.params]
        for block in self._blocks:
            for index, grads in zip(block.indices, block.per_row(rows)):
                total[index] += grads
        return total


def _float(x: Tensor, rows: Tensor) -> Tensor:
    """The rows' part of a captured tensor, (rows * merged, ...) float32."""
    if len(rows) == x.shape[0]:
        return x.flatten(0, 1).float()
    return x[rows].flatten(0, 1).float()


def _sum_merged(grads: Tensor, rows: int) -> Tensor:
    """Adds up what one row contributed through several leading entries (windows, say)."""
    return grads if len(grads) == rows else grads.view(rows, -1, *grads.shape[1:]).sum(1)


def _row_by_row(losses: Tensor, params: Sequence[nn.Parameter], keep_graph: bool) -> list[Tensor]:
    """One backward a row: (rows, *shape) float32 a parameter."""
    stacks = [p.new_zeros((len(losses), *p.shape), dtype=torch.float32) for p in params]
    for row, loss in enumerate(losses):
        keep = keep_graph or row + 1 < len(losses)
        grads = torch.autograd.grad(loss, params, retain_graph=keep, allow_unused=True)
        for stack, grad in zip(stacks, grads):
            if grad is not None:
                stack[row] = grad
    return stacks


class RuleEngine:
    """Per-row gradients by layer rules; parameters that no rule serves get one backward a row on the same graph.

    Args:
        called_once_a_row: modules that see one row at a time (losses): the rules do not hold for them.

    Attributes:
        looped: names of the parameters that no rule serves, those of two layers among them.

    Raises PrivacyError for a parameter that is not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        called_once_a_row: Sequence[nn.Module] = (),
    ) -> None:
        self.params = list(params)
        position = {id(p): i for i, p in enumerate(self.params)}
        owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        if not position.keys() <= owners.keys():
            raise PrivacyError("the optimizer holds a parameter that is not the model's")
        self._param_names = {position[id(p)]: name for name, p in model.named_parameters() if id(p) in position}
        no_rule = {id(p) for module in called_once_a_row for p in module.parameters()}
        no_rule |= {key for key, count in owners.items() if count > 1}
        self._names = {module: name for name, module in model.named_modules()}
        self._blocks: dict[nn.Module, Block] = {}
        for module in self._names:
            rule = rule_for(module)
            own = {n: id(p) for n, p in module.named_parameters(recurse=False)} if rule is not None else {}
            own = {n: position[key] for n, key in own.items() if key in position and key not in no_rule}
            if own and rule is not None:
                self._blocks[module] = Block(module, rule, list(own), list(own.values()))
        owned = {i for block in self._blocks.values() for i in block.indices}
        self._looped = [i for i in range(len(self.params)) if i not in owned]
        self.looped = [self._param_names[i] for i in self._looped]
        self._calls: list[tuple[nn.Module, _Call]] = []
        self._checked = False

    def __str__(self) -> str:
        text = f'{len(self._blocks)} layers by rule'
        if self.looped:
            more = ', ...' if len(self.looped) > 5 else ''
            text += f', {len(self.looped)} parameters by a backward a record ({", ".join(self.looped[:5])}{more})'
        return text

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Records every call of a trainable layer made inside the context."""
        self._calls.clear()
        handles = [module.register_forward_hook(self._record) for module in self._blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:
            raise PrivacyError(
                f'{self._names[module]} ran without a gradient graph: switch off with_cp (activation checkpointing) '
                'and torch.no_grad in the training forward'
            )
        # the edge is taken now: a later in-place change (ReLU, residual add) of the output does not move it
        self._calls.append((module, _Call(args[0].detach(), args[0]._version, get_gradient_edge(output))))

    def backward(self, losses: Tensor) -> RowGradients:
        """Gradients of each row's loss, (rows,); consumes what ``capture`` recorded.

        Raises PrivacyError if rows mix, if a captured tensor was changed in place, or if the rules' sum is not
        autograd's (all found on the first batch, before anything is released).
        """
        calls, self._calls = self._calls, []
        if not calls:
            raise PrivacyError('no layer with a rule took part in the forward: use engine="loop"')
        edges = [call.edge for _, call in calls]
        check = not self._checked and bool(losses.isfinite().all())
        if check and len(losses) > 1:
            self._refuse_mixed_rows(
                losses,
                calls,
                torch.autograd.grad(losses[0], edges, retain_graph=True, allow_unused=True),
            )
        reference = (
            torch.autograd.grad(losses.sum(), self.params, retain_graph=True, allow_unused=True) if check else None
        )
        looped = [self.params[i] for i in self._looped]
        stacks = _row_by_row(losses, looped, keep_graph=True) if looped else []
        loops = [LoopBlock([i], stack) for i, stack in zip(self._looped, stacks)]
        grads = torch.autograd.grad(losses.sum(), edges, allow_unused=True)
        filled = self._fill(calls, grads, len(losses))
        gradients = RowGradients(self.params, [*filled, *loops], len(losses))
        if reference is not None:
            self._refuse_wrong_sum(gradients, reference)
            self._checked = len(losses) > 1
        return gradients

    def _fill(self, calls: Sequence[tuple[nn.Module, _Call]], grads: Sequence[Tensor | None], rows: int) -> list[Block]:
        filled: dict[nn.Module, Block] = {}
        for (module, call), grad in zip(calls, grads):
            if grad is None:
                continue  # the loss does not depend on this call
            if call.input._version != call.version:
                raise PrivacyError(
                    f'the input of {self._names[module]} was changed in place after it was read; use engine="loop"'
                )
            if module not in filled:
                known = self._blocks[module]
                filled[module] = Block(module, known.rule, known.names, known.indices)
            filled[module].calls.append((_by_row(call.input, rows), _by_row(grad, rows)))
        return list(filled.values())

    def _refuse_mixed_rows(
        self,
        losses: Tensor,
        calls: Sequence[tuple[nn.Module, _Call]],
        grads: Sequence[Tensor | None],
    ) -> None:
        for (module, _), grad in zip(calls, grads):
            if grad is not None and bool((_by_row(grad, len(losses))[1:] != 0).any()):
                raise PrivacyError(
                    f'{self._names[module]}: the loss of one record depends on the rows of another (BatchNorm in train '
                    'mode, a loss that normalises over the batch, or a layer that does not keep rows outermost)'
                )

    def _refuse_wrong_sum(self, gradients: RowGradients, reference: Sequence[Tensor | None]) -> None:
        ours = gradients.weighted_sum(torch.ones(gradients.num_rows, device=gradients.device))
        scale = max((float(r.norm()) for r in reference if r is not None), default=0.0)
        half = any(a.dtype != torch.float32 for b in gradients.blocks() if isinstance(b, Block) for a, _ in b.calls)
        for i, (mine, theirs) in enumerate(zip(ours, reference)):
            gap = float((mine if theirs is None else mine - theirs.float()).norm())
            limit = 0.05 if half else 1e-3
            if gap > limit * float(mine.norm()) + 1e-5 * scale:
                raise PrivacyError(
                    f'the per-sample gradient of {self._param_names[i]} is not what autograd finds (it is used outside its '
                    "layer's forward): use engine='loop'"
                )


def _by_row(x: Tensor, rows: int) -> Tensor:
    """(rows * merged, ...) -> (rows, merged, ...)."""
    if x.shape[0] % rows:
        raise PrivacyError(f'a layer saw {x.shape[0]} leading entries for {rows} rows: use engine="loop"')
    return x.unflatten(0, (rows, -1))


class LoopEngine:
    """Per-row gradients by one backward a row: the reference, and the fallback for models with layers of no rule.

    Cheapest with one row a forward; it is right with any number.
    """

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]) -> None:
        self.params = list(params)

    def __str__(self) -> str:
        return 'every parameter by a backward a record (slow)'

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Nothing to record."""
        yield

    def backward(self, losses: Tensor) -> RowGradients:
        """Gradients of each row's loss, (rows,)."""
        stacks = _row_by_row(losses, self.params, keep_graph=False)
        blocks = [LoopBlock([i], stack) for i, stack in enumerate(stacks)]
        return RowGradients(self.params, blocks, len(losses))


Engine = RuleEngine | LoopEngine


def build_engine(
    kind: str,
    model: nn.Module,
    params: Sequence[nn.Parameter],
    called_once_a_row: Sequence[nn.Module] = (),
) -> Engine:
    """'rules': a layer rule for every parameter; 'auto': rules, and a backward a row for the rest; 'loop': no rule.

    Raises PrivacyError for another kind, and with 'rules' for a parameter that no rule serves.
    """
    if kind not in ('auto', 'rules', 'loop'):
        raise PrivacyError(f"engine={kind!r} is unknown; write 'auto', 'rules' or 'loop'")
    if kind == 'loop':
        return LoopEngine(model, params)
    engine = RuleEngine(model, params, called_once_a_row)
    if kind == 'rules' and engine.looped:
        raise PrivacyError(f'no per-sample rule for {engine.looped[:5]}: use engine="auto" or freeze them')
    return engine if len(engine.looped) < len(engine.params) else LoopEngine(model, params)
