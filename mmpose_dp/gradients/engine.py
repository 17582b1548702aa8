"""Per-sample gradients through any model: capture during the forward, one backward, gradients sample by sample.

Must not clip, weigh or release anything. The first batch is checked against autograd, and samples that mix are refused.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from mmpose_dp.privacy.errors import ConfigError, PrivacyError, UnsupportedModelError
from mmpose_dp.privacy.records import Block, Collector

from .blocks import LayerBlock, SampleSum, StackBlock
from .capture import Arrive, Call, Capture
from .independence import MixedSamples, refuse_counting_layers
from .layer_rules import find_layers
from .recorded_ops import OperationRecorder, Use

_LOOP = "optim_wrapper.engine='loop'"


class Engine:
    """Per-sample gradients, of each parameter by its layer's rule, or the operations that use it, or one backward per sample.

    Args:
        params: the trainable parameters, in the order of every list of gradients.
        called_per_sample: modules that see one sample at a time (losses): they get a backward per sample, which is short.
        kind: 'auto'; 'rules' refuses parameters that would need a backward per sample; 'loop' takes that for all parameters.

    Raises ConfigError for another kind, and PrivacyError for a parameter that is not the model's.
    """

    def __init__(
        self, model: Module, params: Sequence[Parameter], called_per_sample: Sequence[Module] = (), kind: str = 'auto'
    ) -> None:
        if kind not in ('auto', 'rules', 'loop'):
            raise ConfigError(f"engine={kind!r} is unknown; write 'auto', 'rules' or 'loop'")
        self.params, self._kind, by_loop = list(params), kind, kind == 'loop'
        place = {id(p): i for i, p in enumerate(self.params)}
        self._names = {place[id(p)]: name for name, p in model.named_parameters() if id(p) in place}
        if len(self._names) < len(place):
            raise PrivacyError(
                "the optimizer holds a parameter that is not the model's: build it from the model's own parameters, after any "
                'replacement of layers'
            )
        refuse_counting_layers(model)
        called = [model] if by_loop else called_per_sample
        self._in_losses = {place[id(p)] for module in called for p in module.parameters() if id(p) in place}
        self._layers = find_layers(model, {key: i for key, i in place.items() if i not in self._in_losses})
        by_rule = {i for layer in self._layers.values() for i in layer.indices}
        followed = {i: p for i, p in enumerate(self.params) if i not in by_rule | self._in_losses}
        self._recorder = OperationRecorder(dict(followed), model)
        self._recorder.lost |= self._in_losses
        self._others = [p for p in model.parameters() if id(p) not in place or place[id(p)] in self._in_losses]
        leaves = {module: name for name, module in model.named_modules() if not [*module.children()]}
        self._capture = Capture(model, self._layers, leaves if by_loop else {})
        self._agreed = False  # with autograd's sum, in full precision
        self.look_again()

    def gradient_methods(self) -> dict[str, str]:
        """How each parameter's gradients are found, by name: 'rule', 'operations' or 'loop'."""
        methods = dict.fromkeys(self._names, 'rule') | dict.fromkeys(self._recorder.params, 'operations')
        methods |= dict.fromkeys(self._recorder.lost, 'loop')
        return {name: methods[i] for i, name in self._names.items()}

    @property
    def one_at_a_time(self) -> bool:
        """Whether each forward must be of one record alone, as 0 * NaN is NaN in a shared graph; known after the first batch."""
        return self._kind == 'loop' or bool(self._recorder.lost - self._in_losses)

    def __str__(self) -> str:
        if self._kind == 'loop':
            return 'one backward per record for every parameter (slow)'
        followed = Counter(self.gradient_methods().values())['operations']
        names = [self._names[i] for i in sorted(self._recorder.lost)]
        text = f'{len(self._layers)} layers by rule, {followed} parameters by their operations, {len(names)} looped'
        return text + (f' over the records ({", ".join(names[:5] + ["..."] * (len(names) > 5))})' if names else '')

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Records what ``backward`` needs of the forwards made inside the context.

        Raises PrivacyError if a trained parameter is frozen, or changed inside, which would leave a trace of the batch.
        """
        self._forget()
        trained = {name: self.params[i] for i, name in self._names.items()}
        if frozen := [name for name, p in trained.items() if not p.requires_grad]:
            raise PrivacyError(
                f'{len(frozen)} parameters were frozen after the optimizer was built ({", ".join(frozen[:3])}): freeze them before '
                'that. If a backbone has frozen_stages, call model.train() before that'
            )
        before = [p._version for p in trained.values()]
        with self._capture.entered(not self._unmixed), self._recorder if self._recorder.params else nullcontext():
            yield
        for name in (name for (name, p), version in zip(trained.items(), before) if p._version != version):
            raise UnsupportedModelError(
                f'the training forward changed the parameter {name} in place, which would leak the batch: change parameters by '
                'the optimizer alone'
            )

    def look_again(self) -> None:
        """The next batch is checked like the first one: the batch before it belonged to no record."""
        self._unmixed = False  # seen on a batch of several samples, all finite
        self._checked = {False, True} if self._kind == 'loop' else set[bool]()  # the sum, for one sample, for several

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Records nothing inside: for another forward within a captured one."""
        self._capture.paused = self._recorder.paused = True
        try:
            yield
        finally:
            self._capture.paused = self._recorder.paused = False

    def _forget(self) -> None:
        self._capture.clear()
        if self._recorder.params:
            self._recorder.clear()

    def backward(self, losses: Sequence[Tensor], *collectors: Collector) -> None:
        """Hands the gradients of each sample's loss to the collectors, layer by layer; consumes what ``capture`` recorded.

        ``losses``: one scalar per sample. If a loss has parameters, the scalars must be separate: in a (samples,) tensor
        one sample's NaN would reach the others' gradients of these. Raises UnsupportedModelError, on the first batch and before
        anything is released, if samples mix, if a captured tensor was changed in place, or if the sum is not autograd's.
        """
        each, count, uses = list(losses), len(losses), list(self._recorder.uses)
        if not count:
            return self._forget()
        loss = torch.stack(each).sum()
        self._unmixed = self._unmixed or (count > 1 and self._refuse_mixed_samples(each, uses))
        unchecked = (count > 1) not in self._checked
        total = SampleSum(self.params, range(count)) if unchecked and bool(loss.isfinite()) else None
        handed = collectors if total is None else (*collectors, total)

        def hand(blocks: Iterable[Block]) -> None:
            for block in blocks:
                for collector in handed:
                    collector.add(block)

        waiting = Counter(call.module for call in self._capture.calls)
        reached: dict[Module, list[Call]] = {}

        def arrive(call: Call, grad: Tensor) -> None:
            call.grad = grad
            reached.setdefault(call.module, []).append(call)
            waiting[call.module] -= 1
            if not waiting[call.module]:
                hand(self._layer_blocks(reached.pop(call.module), count))

        keep_graph = unchecked or bool(self._recorder.lost)
        if waiting or uses:
            grads = self._walk(loss, [*(use.edge for use in uses), *self._capture.inputs], arrive, keep_graph)
            for calls in reached.values():  # the loss does not depend on all calls of these
                hand(self._layer_blocks(calls, count))
            if uses:
                hand(self._operation_blocks(uses, grads, count))
        if self._recorder.lost:
            hand(self._looped_blocks(each, keep_graph))
        if total is not None and self._refuse_wrong_sum(loss, total.total):
            self._checked.add(count > 1)
        self._forget()

    def _walk(self, loss: Tensor, ends: Sequence[Any], arrive: Arrive, keep_graph: bool) -> Sequence[Tensor | None]:
        """One backward without layers' weight gradients: ``arrive`` is given the calls'; those of ``ends`` are returned first."""
        # what requires a gradient rests on one of these, so that every recorded call is passed on the path down
        ends = [*ends, *self._capture.ends, *(p for p in self._others if p.requires_grad)]
        self._capture.arrive = arrive
        try:
            return torch.autograd.grad(loss, ends, retain_graph=keep_graph, allow_unused=True) if ends else ()
        finally:
            del self._capture.arrive

    def _refuse_mixed_samples(self, losses: Sequence[Tensor], uses: Sequence[Use]) -> bool:
        """Raises UnsupportedModelError if samples mix; whether everything could be looked at."""
        mixing = MixedSamples(losses, any_order=self._kind == 'loop')
        places: list[tuple[str, Any, int]] = [('the images', x, 0) for x in self._capture.inputs]
        for use in uses:
            names = ', '.join(self._names[i] for i in use.origins)
            places.append((f'{getattr(use.func, "__name__", use.func)} on {names}', use.edge, use.axis))
        # where an output's first dimension is of another size, samples may have any order
        places += [(name, edge, 0) for name, edge, size in self._capture.outputs if size == len(losses)]
        for sample in mixing.to_look_at:

            def look(call: Call, grad: Tensor, sample: int = sample) -> None:
                mixing.look(sample, self._layers[call.module].name, grad)

            grads = self._walk(losses[sample], [end for _, end, _ in places], look, keep_graph=True)
            for i, ((name, _, axis), grad) in reversed([*enumerate(zip(places, grads))]):
                mixing.look(sample, name, grad, axis, place=i)
        return mixing.refuse()

    def _layer_blocks(self, calls: list[Call], count: int) -> list[Block]:
        module, layer = calls[0].module, self._layers[calls[0].module]
        block, folded = LayerBlock(module, layer), []
        for call in calls:
            if n := next((len(x) for x in (call.grad, call.input) if x is not None and len(x) % count), 0):
                raise UnsupportedModelError(f'{layer.name} saw {n} leading entries for {count} samples: write {_LOOP}')
            grad, call.grad = call.grad.unflatten(0, (count, -1)), None  # type: ignore[union-attr]  # only the blocks hold them
            if call.input is None:
                folded.append(grad.sum(1) if grad.shape[1] > 1 else grad[:, 0])
            elif call.input._version != call.version:
                raise UnsupportedModelError(
                    f'the input of {layer.name} was changed in place after it was read: take that change out, or write {_LOOP}'
                )
            else:
                block.calls.append((call.input.unflatten(0, (count, -1)), grad))
                call.input = call.input.new_empty(0)
        if folded and block.calls:
            raise UnsupportedModelError(f'{layer.name} ran in two precisions: write {_LOOP}')
        if not folded:
            return [block]
        weight, bias = sum(folded[1:], folded[0]).float().unbind(1)
        return [StackBlock([i], x) for i, x in zip(layer.indices, layer.own({'weight': weight, 'bias': bias}))]

    def _operation_blocks(self, uses: list[Use], grads: Sequence[Tensor | None], count: int) -> Iterator[Block]:
        reached = [(use, grad) for use, grad in zip(uses, grads) if grad is not None]
        for use, grad in reached:
            unchanged = all(use.leaves[i]._version == version for i, version in use.versions.items())
            if grad.shape[use.axis] % count or not unchanged:
                self._recorder.lost |= use.origins
        for i, param in self._recorder.params.items():
            mine = [(use, grad) for use, grad in reached if i in use.origins]
            if mine and i not in self._recorder.lost:
                yield StackBlock([i], torch.stack([use.gradients(grad, count, param) for use, grad in mine]).sum(0))

    def _looped_blocks(self, losses: Sequence[Tensor], kept_graph: bool) -> Iterator[Block]:
        indices, names = sorted(self._recorder.lost), [self._names[i] for i in sorted(self._recorder.lost)[:5]]
        if not kept_graph:
            raise UnsupportedModelError(f'{names} are used otherwise than in the first batch: write {_LOOP}')
        if self._kind == 'rules':
            more = 'Write optim_wrapper.engine="auto" (a backward per record for these), or freeze them'
            raise UnsupportedModelError(f'no per-sample rule serves {names}. {more}')
        params = [self.params[i] for i in indices]
        stacks = [p.new_zeros((len(losses), *p.shape), dtype=torch.float32) for p in params]
        for sample, loss in enumerate(losses):
            for stack, grad in zip(stacks, torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)):
                if grad is not None:
                    stack[sample] = grad.to_dense()
        return (StackBlock([i], stack) for i, stack in zip(indices, stacks))

    def _refuse_wrong_sum(self, loss: Tensor, ours: Sequence[Tensor]) -> bool:
        """Raises UnsupportedModelError where our sum is not autograd's; whether there was no NaN that hid it."""
        if self._capture.low_precision and self._agreed:
            return True  # autograd's own sums in bfloat16 are off by a third (LayerNorm's on CPUs)
        limit = 0.05 if self._capture.low_precision else 1e-3
        reference = torch.autograd.grad(loss, self.params, retain_graph=True, allow_unused=True)
        scale = max((float(r.norm()) for r in reference if r is not None), default=0.0)
        if not math.isfinite(scale) or not all(bool(mine.isfinite().all()) for mine in ours):
            return False
        for i, (mine, theirs) in enumerate(zip(ours, reference)):
            gap = float((mine if theirs is None else mine - theirs.float()).norm())
            if gap > limit * float(mine.norm()) + 1e-5 * scale:
                raise UnsupportedModelError(
                    f'the per-sample gradient of {self._names[i]} is not what autograd finds (it is used outside its '
                    f"layer's forward): write {_LOOP}"
                )
        self._agreed = not self._capture.low_precision
        return True
