"""Sums and copies over the processes of one training. Needs torch only. Must not know what a tensor means."""

from torch import Tensor, distributed


def several_processes() -> bool:
    """Whether this process is one of a group."""
    return distributed.is_available() and distributed.is_initialized()


def is_first_process() -> bool:
    """Whether this process is the first of its group, or alone."""
    return not several_processes() or distributed.get_rank() == 0


def sum_over_processes(x: Tensor) -> None:
    """Adds the processes' tensors, in place."""
    if several_processes():
        distributed.all_reduce(x)


def from_first_process(x: Tensor) -> None:
    """Copies the first process' tensor to the others, in place."""
    if several_processes():
        distributed.broadcast(x, 0)
