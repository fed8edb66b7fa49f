"""Memory for packed weights on a CPU: in huge pages, which save a look-up for each 4 KiB.

A weight is read once, from end to end, for each token: in small pages that takes up to a third longer.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE = 2 << 20


def empty(size: int) -> Tensor:
    """`size` bytes, uint8 [size], that nobody has written to.

    The system gives huge pages for whole ones that are asked for, where it has them: no byte more is taken than of any
    other memory. What is too small for one comes from torch.
    """
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE * HUGE)
    except OSError:
        # A system without huge pages.
        return torch.empty(size, dtype=torch.uint8)
    # The tensor keeps the mapping alive.
    return whole[start : start + size]


def copy(t: Tensor) -> Tensor:
    """A contiguous copy of a tensor; of one on a CPU in such memory."""
    if t.device.type != "cpu":
        return t.clone(memory_format=torch.contiguous_format)
    return empty(t.nbytes).view(t.dtype).view(t.shape).copy_(t)
