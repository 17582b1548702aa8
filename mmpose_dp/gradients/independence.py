"""Do the samples of a batch depend on one another? Then no engine can make the model private, and it is refused.

Must not let pass a layer at which the loss of one sample has a gradient in another.
"""

from collections.abc import Hashable, Sequence

from torch import Tensor, nn

from mmpose_dp.privacy.errors import UnsupportedModelError

Layout = tuple[int, bool]  # the dimension of the samples; whether they are its outer part, or else its inner one


class MixedSamples:
    """Looks at gradients of the loss of one sample alone, where they arrive at the outputs of layers.

    Args: one loss per sample; whether samples may be in any dimension that keeps them apart, or only where ``look`` says.
    """

    def __init__(self, losses: Sequence[Tensor], any_order: bool) -> None:
        self._count, self._any_order = len(losses), any_order
        finite = [i for i, loss in enumerate(losses) if bool(loss.isfinite())]
        # a sample of which nothing is annotated has no gradient anywhere
        telling = [i for i in finite if float(losses[i].detach())]
        # whose losses to look at: a sample may depend on those before it, or behind it, alone
        self.to_look_at = sorted({*telling[:1], *telling[-1:]})
        self._complete = len(finite) == len(losses) and len(self.to_look_at) == 2
        self._seen: set[int] = set()  # samples that had a gradient at their own place somewhere
        # by place: its name, the layout that is read there, and those that keep samples apart
        self._places: dict[Hashable, tuple[str, Layout, set[Layout]]] = {}

    def look(self, sample: int, name: str, grad: Tensor | None, axis: int = 0, place: Hashable = None) -> None:
        """Notes where the gradient of a sample's loss, with samples (each any number of entries) along ``axis``, reaches others.

        ``name`` is what the message calls the place; ``place`` tells places of one name apart.
        """
        if grad is None or grad.dim() <= axis or grad.shape[axis] % self._count:
            return
        self._complete &= bool(grad.isfinite().all())
        grad = grad.nan_to_num()  # 0 * NaN, in a sample not finite
        if bool(grad.any()):
            self._seen.add(sample)
        others = [(i, True) for i, size in enumerate(grad.shape) if i != axis and size == self._count]
        layouts = [(axis, True), *([(axis, False)] if grad.shape[axis] > self._count else []), *others]
        apart = {layout for layout in layouts if not self._strays(grad, sample, layout)}
        _, _, left = self._places.setdefault(name if place is None else place, (name, (axis, True), set(apart)))
        left &= apart

    def _strays(self, grad: Tensor, sample: int, layout: Layout) -> bool:
        """Whether a gradient reaches other samples than its own, if the samples have this layout."""
        axis, outer = layout
        sizes = (self._count, -1) if outer else (-1, self._count)
        by_sample = grad.unflatten(axis, sizes).movedim(axis + (not outer), 0)
        return bool(by_sample[:sample].any() or by_sample[sample + 1 :].any())

    def refuse(self) -> bool:
        """Raises UnsupportedModelError if samples mix; whether nothing hid it from sight, such as a NaN or no gradient at all."""
        for name, read, left in self._places.values():  # the first one is the nearest to where it happens
            if read in left or (left and self._any_order):
                continue
            name = name or 'the model'
            if left:
                raise UnsupportedModelError(
                    f'{name} holds its samples in another dimension or order than this engine reads, which is samples outermost: '
                    "write optim_wrapper.engine='loop', which serves any order"
                )
            order = "; if its samples are only in another order, write optim_wrapper.engine='loop'"
            raise UnsupportedModelError(
                f'from {name} on, the loss of one record depends on the samples of another (a norm with batch statistics, a loss '
                'that normalises over the batch). No engine can make that private: put something in its place that treats '
                f'each record by itself, such as GroupNorm for a norm{"" if self._any_order else order}. If a loss of a head uses '
                'feats or calls a layer: move that into forward(feats), so that the loss uses only what forward(feats) returns'
            )
        return self._complete and self._seen == {*self.to_look_at}


def refuse_counting_layers(model: nn.Module) -> None:
    """Raises UnsupportedModelError for an embedding that divides by counts over the batch, or rescales its weight in a forward."""
    for name, module in model.named_modules():
        for key, plain in (('scale_grad_by_freq', False), ('max_norm', None)):
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and getattr(module, key) not in (None, False):
                raise UnsupportedModelError(
                    f'{key}={getattr(module, key)} of {name or "the model"} makes one record depend on the others of its '
                    f'batch: write {key}={plain}'
                )
