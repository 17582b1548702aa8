"""What the processes of one training send each other, with torch alone. Must not know what a tensor means."""

from collections.abc import Callable, Sequence

from torch import Tensor, distributed

from .tables import as_one


def several_processes() -> bool:
    """Whether this process is one of a group."""
    return distributed.is_available() and distributed.is_initialized()


def is_first_process() -> bool:
    """Whether this process is the first of its group, or alone."""
    return not several_processes() or distributed.get_rank() == 0


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Adds the processes' tensors of one dtype, in place, in one message."""
    _send(tensors, distributed.all_reduce)


def from_first_process(tensors: Sequence[Tensor]) -> None:
    """Copies the first process' tensors of one dtype to the others, in place, in one message."""
    _send(tensors, lambda flat: distributed.broadcast(flat, 0))


def _send(tensors: Sequence[Tensor], how: Callable[[Tensor], object]) -> None:
    if several_processes():
        as_one(tensors, how)
