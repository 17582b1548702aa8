"""Counts the operations of a piece of code and the moments at which it would wait for a device, on a CPU."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# operations whose result, or whose size, the host must know
READS = {'_local_scalar_dense', 'nonzero', 'equal', 'masked_select', 'is_nonzero', 'item'}
ALLOCATIONS = {'empty', 'empty_like', 'empty_strided', 'new_empty', 'detach'}


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.by_name, self.reads = Counter(), Counter()

    @property
    def operations(self):
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        views = any(x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns)
        self.by_name[name] += not views and name not in ALLOCATIONS
        masks = args[1] if name in ('index', 'index_put_') else ()
        by_mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in masks)
        if name in READS or by_mask:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """``tolist`` of a tensor of the CPU is no operation."""

    def __init__(self, reads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
            self._reads[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted():
    """Has ``operations``, how many compute something (views do not), and ``reads``, by name, of what is done inside."""
    found = _Operations()
    with _Lists(found.reads), found:
        yield found
