"""Names the first layer at which a record is not the same alone and among others, once a step is not released.

Must not decide whether a step is released.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Seen = list[tuple[str, Tensor | None]]


def first_difference(
    model: nn.Module, alone: Callable[[], object], among: Callable[[], object], samples: Sequence[int], limit: float
) -> str | None:
    """The first module whose output for the record is not the same alone and among others, by name; None if none is found.

    Args:
        model: its modules without children are watched.
        alone: runs the forward on the record alone.
        among: runs it on the batch.
        samples: the record's samples in the batch.
        limit: the relative difference that counts.
    """
    with _watched(model, lambda output, call: output.clone()) as seen_alone:
        alone()

    def of_record(output: Tensor, call: int) -> Tensor | None:
        want = seen_alone[call][1] if call < len(seen_alone) else None
        return None if want is None else _samples_like(output, samples, want)

    with _watched(model, of_record) as seen_among:
        among()
    for (name, want), (_, got) in zip(seen_alone, seen_among):
        if want is None or got is None:
            continue
        scale = float(want.double().norm())
        if not float((got.double() - want.double()).norm()) <= limit * scale + 1e-30:
            return name
    return None


@contextmanager
def _watched(model: nn.Module, kept: Callable[[Tensor, int], Tensor | None]) -> Iterator[Seen]:
    """What is ``kept`` of the outputs of the modules without children, in the order of their calls."""
    seen: Seen = []

    def hook(name: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            usable = isinstance(output, Tensor) and output.dim() > 0
            seen.append((name, kept(output.detach(), len(seen)) if usable else None))

        return watch

    leaves = [(name, module) for name, module in model.named_modules() if not [*module.children()]]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _samples_like(output: Tensor, samples: Sequence[int], want: Tensor) -> Tensor | None:
    """The samples of a batch's output that belong to the record, by the shape that the same call had alone."""
    if want.shape[1:] != output.shape[1:] or len(want) % len(samples):
        return None
    merged = len(want) // len(samples)
    if any((sample + 1) * merged > len(output) for sample in samples):
        return None
    return torch.cat([output[sample * merged : (sample + 1) * merged] for sample in samples]).clone()
