"""Memory for the gradients of kernels, used again from step to step.

The system hands out large memory page by page, at the first touch: for the
200 MB that the gradients of many experts take, that is half as long as all the
products in them. So memory that no gradient uses any more is kept for the next.
"""

import math
import weakref

import torch

_free = {}  # by number of bytes


def empty(shape, dtype):
    """`torch.empty`, in memory that is kept for the next time."""
    num_bytes = math.prod(shape) * dtype.itemsize
    free = _free.setdefault(num_bytes, [])
    try:
        memory = free.pop()
    except IndexError:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
    # The array lives as long as any tensor that shares the memory.
    lent = memory.numpy()
    weakref.finalize(lent, free.append, memory).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


def release():
    """Gives all free memory back to the system."""
    _free.clear()
