"""Per-sample gradients through any model: capture during the forward, one backward, gradients row by row.

``RuleEngine`` serves each parameter by the first way that fits: its layer's rule (layer_rules), the operations that use it
(operations), a backward a row. ``LoopEngine`` (loop_engine) takes the last way for all. Must not clip, weigh or release
anything, and must not hand out a gradient it could not account for: the first batch is checked against autograd, and rows
that depend on one another are refused.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.records import Block, Collector

from .blocks import LayerBlock, RowSum, StackBlock
from .capture import Call, Capture
from .independence import Inputs, MixedRows, gradients_at_inputs, one_by_one, refuse_counting_layers, steady_weights
from .layer_rules import Rule, rule_for
from .loop_engine import LoopEngine
from .recorded_ops import OperationBlock, OperationRecorder, Use

_LOOP = "optim_wrapper.engine='loop'"


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
            raise PrivacyError(
                "the optimizer holds a parameter that is not the model's: build it from the model's own parameters, after any "
                'replacement of layers'
            )
        refuse_counting_layers(model)
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
        by_rule = {id(self.params[i]) for layer in self._layers.values() for i in layer.indices}
        self._others = [
            p for p in model.parameters() if id(p) not in by_rule and id(p) not in map(id, followed.values())
        ]
        self._capture = Capture({module: layer.name for module, layer in self._layers.items()})
        self._model = model
        self._inputs = Inputs()
        self._unmixed = False  # seen on a batch of several rows, all finite
        self._checked: set[bool] = set()  # the sum, for one row, for several

    def ways(self) -> dict[str, str]:
        """How each parameter's gradients are found, by name: 'rule', 'operations' or 'loop'."""
        looped = self._in_losses | self._recorder.lost
        return {
            name: 'loop' if i in looped else 'operations' if i in self._recorder.params else 'rule'
            for i, name in self._param_names.items()
        }

    @property
    def one_at_a_time(self) -> bool:
        """Whether records must come one a forward; known after the first batch.

        A backward a row runs through what all rows have in common, where 0 * NaN is NaN: one record that is not finite
        would take the others with it.
        """
        return bool(self._recorder.lost - self._in_losses)

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
        self._recorder.clear()
        asked = gradients_at_inputs(self._model, not self._unmixed)
        recorder = self._recorder if self._recorder.params else nullcontext()
        named = {name: self.params[i] for i, name in self._param_names.items()}
        with asked as self._inputs, steady_weights(named), self._capture.entered(), recorder:
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Records nothing inside, for a forward of its own within a captured one."""
        switches = (self._capture, self._recorder, self._inputs)
        for switch in switches:
            switch.paused = True
        try:
            yield
        finally:
            for switch in switches:
                switch.paused = False

    def _walk(
        self, loss: Tensor, uses: Sequence[Use], arrive: Callable[[Call, Tensor], None], keep_graph: bool
    ) -> Sequence[Tensor | None]:
        """One backward that computes no layer's weight gradient: ``arrive`` sees the calls' gradients as it goes.

        Returns the gradients at the ``uses``, then those at the inputs.
        """
        # what requires a gradient rests on one of these, so that every recorded call is passed on the way down
        ends: list[Any] = [
            *(use.edge for use in uses),
            *self._inputs,
            *self._capture.ends,
            *(p for p in self._others if p.requires_grad),
        ]
        self._capture.arrive = arrive
        try:
            found = torch.autograd.grad(loss, ends, retain_graph=keep_graph, allow_unused=True) if ends else ()
        finally:
            self._capture.arrive = None
        return found[: len(uses) + len(self._inputs)]

    def backward(self, losses: Sequence[Tensor], *collectors: Collector) -> None:
        """Hands the gradients of each row's loss to the collectors; consumes what ``capture`` recorded.

        A layer is handed over as soon as the backward has passed it, and freed.

        Args:
            losses: one scalar a row. Separate ones rather than a (rows,) tensor where a loss has parameters of its own: one
                row's NaN then stays out of the others' gradients of these.

        Raises PrivacyError if rows mix, if a captured tensor was changed in place, or if the sum is not autograd's (all
        found on the first batch, before anything is released).
        """
        each, rows, uses = list(losses), len(losses), list(self._recorder.uses)
        if not rows:
            return self._forget()
        loss = torch.stack(each).sum()
        if rows > 1 and not self._unmixed:
            self._unmixed = self._refuse_mixed_rows(each, uses)
        unchecked = (rows > 1) not in self._checked
        first = unchecked and bool(loss.isfinite())
        total = RowSum(self.params, torch.arange(rows))
        handed = (*collectors, total) if first else collectors

        def hand(block: Block) -> None:
            for collector in handed:
                collector.add(block)

        waiting = Counter(call.module for call in self._capture.calls)
        calls: dict[nn.Module, list[Call]] = {module: [] for module in waiting}

        def arrive(call: Call, grad: Tensor) -> None:
            call.grad = grad
            calls[call.module].append(call)
            waiting[call.module] -= 1
            if not waiting[call.module]:
                for block in self._layer_blocks(calls.pop(call.module), rows):
                    hand(block)

        keep_graph = unchecked or bool(self.looped)
        grads = self._walk(loss, uses, arrive, keep_graph)
        for reached in calls.values():  # the loss does not depend on all calls of these
            for block in self._layer_blocks(reached, rows) if reached else ():
                hand(block)
        for block in self._operation_blocks(uses, grads, rows):
            hand(block)
        looped = sorted(self._in_losses | self._recorder.lost)
        if looped and not keep_graph:
            raise PrivacyError(f'{self.looped[:5]} are used otherwise than in the first batch: write ' + _LOOP)
        if self._strict and looped:
            raise PrivacyError(
                f'no per-sample rule serves {self.looped[:5]}. Write optim_wrapper.engine="auto" (a backward a record for '
                'these), or freeze them'
            )
        for i, stack in zip(looped, one_by_one(each, [self.params[i] for i in looped])):
            hand(StackBlock([i], stack))
        if first:
            if self._refuse_wrong_sum(loss, total.total, 0.05 if self._capture.half else 1e-3):
                self._checked.add(rows > 1)
        self._forget()

    def _forget(self) -> None:
        self._capture.clear()
        self._recorder.clear()
        self._inputs = Inputs()

    def _refuse_mixed_rows(self, losses: Sequence[Tensor], uses: Sequence[Use]) -> bool:
        """Raises PrivacyError if rows mix; whether everything could be looked at."""
        mixing = MixedRows(losses)
        names = [f'{use.name} on {", ".join(self._param_names[i] for i in use.origins)}' for use in uses]
        for row in mixing.to_look_at:

            def look(call: Call, grad: Tensor, row: int = row) -> None:
                mixing.look(row, self._layers[call.module].name, grad)

            grads = self._walk(losses[row], uses, look, keep_graph=True)
            for use, name, grad in zip(uses, names, grads):
                mixing.look(row, name, grad, use.axis)
            for grad in grads[len(uses) :]:
                mixing.look(row, 'the images', grad)
        return mixing.refuse()

    def _layer_blocks(self, calls: list[Call], rows: int) -> list[Block]:
        layer = self._layers[calls[0].module]
        block = LayerBlock(calls[0].module, layer.rule, layer.param_names, layer.indices)
        folded: list[Tensor] = []
        for call in calls:
            assert call.grad is not None
            if call.input is None:
                folded.append(_by_row(call.grad, rows, layer.name).sum(1))
            elif call.input._version != call.version:
                raise PrivacyError(
                    f'the input of {layer.name} was changed in place after it was read: take that change out, or write {_LOOP}'
                )
            else:
                block.calls.append((_by_row(call.input, rows, layer.name), _by_row(call.grad, rows, layer.name)))
                call.input = call.input.new_empty(0)
            call.grad = None  # the blocks alone hold them now
        if not folded:
            return [block]
        if block.calls:
            raise PrivacyError(f'{layer.name} ran in two precisions: write {_LOOP}')
        stack = torch.stack(folded).sum(0).float()
        places = {'weight': 0, 'bias': 1}
        return [StackBlock([i], stack[:, places[name]]) for name, i in zip(layer.param_names, layer.indices)]

    def _operation_blocks(self, uses: list[Use], grads: Sequence[Tensor | None], rows: int) -> list[OperationBlock]:
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

    def _refuse_wrong_sum(self, loss: Tensor, ours: Sequence[Tensor], limit: float) -> bool:
        """Raises PrivacyError where our sum is not autograd's; whether there was no NaN in the way of comparing."""
        reference = torch.autograd.grad(loss, self.params, retain_graph=True, allow_unused=True)
        scale = max((float(r.norm()) for r in reference if r is not None), default=0.0)
        if not math.isfinite(scale) or not all(bool(mine.isfinite().all()) for mine in ours):
            return False
        for i, (mine, theirs) in enumerate(zip(ours, reference)):
            gap = float((mine if theirs is None else mine - theirs.float()).norm())
            if gap > limit * float(mine.norm()) + 1e-5 * scale:
                raise PrivacyError(
                    f'the per-sample gradient of {self._param_names[i]} is not what autograd finds (it is used outside its '
                    f"layer's forward): write {_LOOP}"
                )
        return True


def _by_row(x: Tensor, rows: int, name: str) -> Tensor:
    """(rows * merged, ...) -> (rows, merged, ...)."""
    if x.shape[0] % rows:
        raise PrivacyError(f'{name} saw {x.shape[0]} leading entries for {rows} rows: write {_LOOP}')
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
