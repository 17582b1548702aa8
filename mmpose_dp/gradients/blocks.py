"""Per-sample gradients of one batch, block by block, and two collectors. Must not clip, weigh or release anything.

A block is what one method gives. The engine hands it over as soon as the backward has come that far, and forgets it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mmpose_dp.privacy.records import Block
from mmpose_dp.tensors import as_range, at_least_float32, of_samples, of_weight_0, parts_of, without

from . import layer_rules


class StackBlock(Block):
    """The gradients of one parameter, written out: (samples, *parameter shape)."""

    def __init__(self, indices: list[int], grads: Tensor) -> None:
        self.indices, self._grads = indices, grads

    def per_sample(self, samples: Sequence[int]) -> list[Tensor]:
        """See Block.per_sample."""
        return [of_samples(self._grads, samples)]


class LayerBlock(Block):
    """The gradients of one layer's parameters, by the layer's rule."""

    def __init__(self, module: nn.Module, layer: layer_rules.Layer) -> None:
        self._module, self._layer, self.indices = module, layer, layer.indices
        # (input, output gradient) of each call, both (samples, entries per sample, ...)
        self.calls: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def per_sample(self, samples: Sequence[int]) -> list[Tensor]:
        """See Block.per_sample."""
        total: list[Tensor] = []
        for a, b in self._calls_of(samples):
            grads = self._layer.own(self._layer.rule(self._module, a, b))
            if len(a) != len(samples):  # adds up what one sample contributed through several entries (windows, say)
                grads = [x.unflatten(0, (len(samples), -1)).sum(1) for x in grads]
            total = [x + y for x, y in zip(total, grads)] if total else grads
        return [x.float() for x in total]

    @torch.no_grad()
    def weighted_sum(self, samples: Sequence[int], weights: Tensor | None = None) -> list[Tensor]:
        """See Block.weighted_sum."""
        total: list[Tensor] = []
        for a, b in self._calls_of(samples):
            if weights is not None:
                each = weights.repeat_interleave(len(b) // len(samples))  # of an entry
                left_out = of_weight_0(each)
                a, b = without(a, left_out), without(b, left_out)
                b = b * each.view(-1, *[1] * (b.dim() - 1))
            grads = self._layer.own(layer_rules.summed_gradient(self._module, self._layer.rule, a, b))
            total = [x + y for x, y in zip(total, grads)] if total else grads
        return [x.float() for x in total]

    @torch.no_grad()
    def ghost_squares(self, samples: Sequence[int]) -> Tensor | None:
        """See Block.ghost_squares."""
        if len(self.calls) > 1 or self._layer.rule is not layer_rules.outer_product:
            return None
        module, [(a, b)] = self._module, self._calls_of(samples)
        cheaper = len(a) == len(samples) and layer_rules.ghost_is_cheaper(module, a, b)  # type: ignore[arg-type]
        return layer_rules.ghost_squares(module, a, b, self._layer.param_names) if cheaper else None  # type: ignore[arg-type]

    def _calls_of(self, samples: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples' inputs and output gradients of each call, (samples * entries, ...), in float32 at least."""
        for pair in self.calls:
            a, b = (at_least_float32(of_samples(x, samples).flatten(0, 1)) for x in pair)
            yield a, b


class PerSampleGradients:
    """Collects the given samples' gradients in ``total``: one (samples, *parameter shape) float32 tensor per parameter.

    Args: ``scale`` is what the losses, and so the gradients in blocks, were multiplied by (mixed precision). ``total`` are zeros to
    fill, of any floating dtype.
    """

    _summed = False

    def __init__(
        self, params: Sequence[Tensor], samples: Sequence[int], scale: float = 1.0, total: list[Tensor] | None = None
    ) -> None:
        shapes = [p.shape for p in params]
        size = *(() if self._summed else (len(samples),)), sum(shape.numel() for shape in shapes)
        self.total = total or parts_of(params[0].new_zeros(size, dtype=torch.float32), shapes)
        self._samples, self._scale = as_range(samples), scale

    def add(self, block: Block) -> None:
        """See Collector.add."""
        found = block.weighted_sum if self._summed else block.per_sample
        for index, grads in zip(block.indices, found(self._samples) if len(self._samples) else []):
            self.total[index].add_(grads, alpha=1 / self._scale)


class SampleSum(PerSampleGradients):
    """Collects their sum instead: one float32 tensor per parameter. ``total`` is a sum to continue, which is changed."""

    _summed = True
