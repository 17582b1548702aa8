"""Per-sample gradients of one batch, block by block, and two ways to collect them. Must not clip, weigh or release anything.

A block is what one method gives: a layer's rule (layer_rules), a parameter's operations (recorded_ops), or one backward per
sample. The engine hands each block to the collectors as soon as the backward has come that far, and forgets it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmpose_dp.privacy.records import Block, as_range

from . import layer_rules
from .layer_rules import Layer


class StackBlock:
    """The gradients of one parameter, written out: (samples, *parameter shape)."""

    def __init__(self, indices: list[int], grads: Tensor) -> None:
        self.indices, self._grads = indices, grads

    def per_sample(self, samples: Sequence[int]) -> list[Tensor]:
        """See Block.per_sample."""
        return [_samples(self._grads, samples)]

    def weighted_sum(self, samples: Sequence[int], weights: Tensor | None = None) -> list[Tensor]:
        """See Block.weighted_sum."""
        grads = self.per_sample(samples)[0]
        return [grads.sum(0) if weights is None else torch.tensordot(weights, grads, dims=1)]

    def ghost_squares(self, samples: Sequence[int]) -> Tensor | None:
        """See Block.ghost_squares: the gradients cost nothing more."""
        return None


class LayerBlock:
    """The gradients of one layer's parameters, by the layer's rule."""

    def __init__(self, module: nn.Module, layer: Layer) -> None:
        self._module, self._layer, self.indices = module, layer, layer.indices
        self._is_product = layer.rule is layer_rules.outer_product
        self.calls: list[
            tuple[Tensor, Tensor]
        ] = []  # (input, output gradient), each (samples, entries per sample, ...)

    @torch.no_grad()
    def per_sample(self, samples: Sequence[int]) -> list[Tensor]:
        """See Block.per_sample."""
        total: list[Tensor] = []
        for a, b in self._calls(samples):
            by_groups = self._is_product and layer_rules.groups_are_faster(self._module, b)
            rule = layer_rules.samples_as_groups if by_groups else self._layer.rule
            grads = self._layer.own(rule(self._module, a, b))
            if len(a) > len(samples):  # adds up what one sample contributed through several entries (windows, say)
                grads = [x.view(len(samples), -1, *x.shape[1:]).sum(1) for x in grads]
            total = _plus(total, grads)
        return [x.float() for x in total]

    @torch.no_grad()
    def weighted_sum(self, samples: Sequence[int], weights: Tensor | None = None) -> list[Tensor]:
        """See Block.weighted_sum."""
        total: list[Tensor] = []
        for a, b in self._calls(samples):
            if weights is not None:
                b = b * weights.repeat_interleave(len(b) // len(samples)).view(-1, *[1] * (b.dim() - 1))
            total = _plus(total, self._layer.own(layer_rules.summed_gradient(self._module, self._layer.rule, a, b)))
        return [x.float() for x in total]

    @torch.no_grad()
    def ghost_squares(self, samples: Sequence[int]) -> Tensor | None:
        """See Block.ghost_squares."""
        calls = self._calls(samples) if self._is_product and len(self.calls) == 1 else []
        if not calls or len(calls[0][0]) != len(samples) or not layer_rules.ghost_is_cheaper(self._module, *calls[0]):
            return None
        return layer_rules.ghost_squares(self._module, *calls[0], self._layer.param_names)

    def _calls(self, samples: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The samples' inputs and output gradients, (samples * entries, ...) each, in float32 at least."""
        parts = ([at_least_float32(_samples(x, samples).flatten(0, 1)) for x in call] for call in self.calls)
        return [(a, b) for a, b in parts]


class PerSampleGradients:
    """Collects everything, if the gradients are few or public.

    Args:
        params: the trainable parameters.
        scale: what the losses were multiplied by (mixed precision); the blocks hold gradients of the scaled losses.
    """

    def __init__(self, params: Sequence[nn.Parameter], scale: float = 1.0) -> None:
        self.params, self._scale = list(params), scale
        self.blocks: list[Block] = []

    def add(self, block: Block) -> None:
        """See Collector.add."""
        self.blocks.append(block)

    def per_sample(self, samples: Tensor) -> list[Tensor]:
        """The gradients of the given samples: one (samples, *parameter shape) float32 tensor per parameter."""
        total = [p.new_zeros((len(samples), *p.shape), dtype=torch.float32) for p in self.params]
        for block in self.blocks:
            for index, grads in zip(block.indices, block.per_sample(as_range(samples))):
                total[index] += grads / self._scale
        return total


class SampleSum:
    """Collects the sum of the given samples' gradients in ``total``, one float32 tensor per parameter.

    Args: as of PerSampleGradients; the indices of the samples; a sum to continue, which is changed.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], samples: Tensor, scale: float = 1.0, total: list[Tensor] | None = None
    ) -> None:
        self.total = total or [torch.zeros_like(p, dtype=torch.float32) for p in params]
        self._samples, self._scale = as_range(samples), scale

    def add(self, block: Block) -> None:
        """See Collector.add."""
        for index, grads in zip(block.indices, block.weighted_sum(self._samples) if len(self._samples) else []):
            self.total[index].add_(grads, alpha=1 / self._scale)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; integers stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _plus(total: list[Tensor], part: list[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(total, part)] if total else part


def _samples(x: Tensor, samples: Sequence[int]) -> Tensor:
    return x[samples.start : samples.stop] if isinstance(samples, range) else x[samples]
