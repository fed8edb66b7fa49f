"""Memory for packed weights on a CPU: in huge pages, which save a look-up for each 4 KiB.

A weight is read once, from end to end, for each token: in small pages that takes up to a third longer.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE, ALIGNED = 2 << 20, 64


def empty(size: int) -> Tensor:
    """`size` bytes, uint8 [size], that nobody has written to.

    The system gives huge pages for whole ones that are asked for, where it has them: no byte more is taken than of any
    other memory. What is too small for one comes from torch.
    """
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE * HUGE)
    except OSError:
        # A system without huge pages.
        return torch.empty(size, dtype=torch.uint8)
    # The tensor keeps the mapping alive; its storage is these bytes alone, as a file of it would hold them.
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)


def apart(parts: Sequence[Tensor]) -> list[Tensor]:
    """As `together`, but each in memory of its own: torch saves no storage that tensors of several dtypes share."""
    return [together([part])[0] for part in parts]


def together(parts: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous copies of some tensors; of those on a CPU one after the other in such memory."""
    if any(part.device.type != "cpu" for part in parts):
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]
    starts = [0, *itertools.accumulate(-(-part.nbytes // ALIGNED) * ALIGNED for part in parts)]
    memory, out = empty(starts[-1]), []
    for part, start in zip(parts, starts, strict=False):
        place = memory[start : start + part.nbytes]
        out.append(place.view(part.dtype).view(part.shape).copy_(part))
    return out
