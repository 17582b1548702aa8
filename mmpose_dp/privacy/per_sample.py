"""Per-sample gradients through any model: capture during the forward, one backward, gradients row by row.

Two engines with one interface. ``RuleEngine`` records each trainable layer's input and the gradient of its output, and
builds per-row gradients from them (layer_rules). ``LoopEngine`` differentiates one row at a time and is always right.
Must not clip, weigh or release anything, and must not return a gradient it could not account for: the first batch is
checked against autograd, and rows that depend on one another are refused.
"""

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


def layers_without_rule(model: nn.Module) -> list[str]:
    """Names of the modules whose trainable parameters no rule covers."""
    return [
        f'{name} ({type(module).__name__})'
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False)) and rule_for(module) is None
    ]


class RuleEngine:
    """Per-row gradients by layer rules. Raises PrivacyError if a trainable parameter has no rule or two owners."""

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]) -> None:
        missing = layers_without_rule(model)
        if missing:
            raise PrivacyError(f'no per-sample rule for {missing[:5]}: use engine="loop" or freeze them')
        self.params = list(params)
        position = {id(p): i for i, p in enumerate(self.params)}
        self._names = {module: name for name, module in model.named_modules()}
        self._blocks: dict[nn.Module, Block] = {}
        for module in self._names:
            own = {n: position[id(p)] for n, p in module.named_parameters(recurse=False) if id(p) in position}
            rule = rule_for(module)
            if own and rule is not None:
                self._blocks[module] = Block(module, rule, list(own), list(own.values()))
        owned = [i for block in self._blocks.values() for i in block.indices]
        if sorted(owned) != list(range(len(self.params))):
            raise PrivacyError(
                'a trainable parameter is shared by two layers, or is not the model\'s: use engine="loop"'
            )
        self._calls: list[tuple[nn.Module, _Call]] = []
        self._checked = False

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
        grads = torch.autograd.grad(losses.sum(), edges, allow_unused=True)
        gradients = RowGradients(self.params, self._fill(calls, grads, len(losses)), len(losses))
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
        names = {i: f'{self._names[b.module]}.{n}' for b in self._blocks.values() for n, i in zip(b.names, b.indices)}
        for i, (mine, theirs) in enumerate(zip(ours, reference)):
            gap = float((mine if theirs is None else mine - theirs.float()).norm())
            limit = 0.05 if half else 1e-3
            if gap > limit * float(mine.norm()) + 1e-5 * scale:
                raise PrivacyError(
                    f'the per-sample gradient of {names[i]} is not what autograd finds (it is used outside its '
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

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Nothing to record."""
        yield

    def backward(self, losses: Tensor) -> RowGradients:
        """Gradients of each row's loss, (rows,)."""
        stacks = [p.new_zeros((len(losses), *p.shape), dtype=torch.float32) for p in self.params]
        for row, loss in enumerate(losses):
            grads = torch.autograd.grad(loss, self.params, retain_graph=row + 1 < len(losses), allow_unused=True)
            for stack, grad in zip(stacks, grads):
                if grad is not None:
                    stack[row] = grad
        blocks = [LoopBlock([i], stack) for i, stack in enumerate(stacks)]
        return RowGradients(self.params, blocks, len(losses))


Engine = RuleEngine | LoopEngine


def build_engine(kind: str, model: nn.Module, params: Sequence[nn.Parameter]) -> Engine:
    """'rules', 'loop', or 'auto': rules where every trainable layer has one, else the loop."""
    if kind not in ('auto', 'rules', 'loop'):
        raise PrivacyError(f"engine={kind!r} is unknown; write 'auto', 'rules' or 'loop'")
    if kind == 'loop' or (kind == 'auto' and layers_without_rule(model)):
        return LoopEngine(model, params)
    return RuleEngine(model, params)
