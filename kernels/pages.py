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
        out.append(tensor_of(memory[start : start + part.nbytes], part).copy_(part))
    return out


def tensor_of(bytes_: Tensor, like: Tensor) -> Tensor:
    """The contiguous tensor of another one's dtype and shape that some bytes are; it holds no other, as a view does."""
    start, strides = bytes_.storage_offset() // like.element_size(), torch.empty(like.shape, device="meta").stride()
    return torch.empty(0, dtype=like.dtype, device=bytes_.device).set_(
        bytes_.untyped_storage(), start, like.shape, strides
    )


def adjoin(parts: Sequence[Tensor]) -> Tensor | None:
    """One tensor of contiguous parts that differ in their first size alone, one after the other; they become its views.

    Nothing is copied where they stand so already. None, with nothing changed, where they stand elsewhere and something
    else may read their memory.
    """
    first, size = parts[0], sum(part.shape[0] for part in parts)
    starts = itertools.accumulate((part.nbytes for part in parts), initial=first.data_ptr())
    storage, shape = first.untyped_storage(), (size, *first.shape[1:])
    in_place = all(part.data_ptr() == start for part, start in zip(parts, starts, strict=False))
    if in_place and len({part.untyped_storage().data_ptr() for part in parts}) == 1:
        return first.new_empty(0).set_(storage, first.storage_offset(), shape, first.stride())
    if len({id(part) for part in parts}) < len(parts) or not all(map(_alone, parts)):
        return None
    nbytes = sum(part.nbytes for part in parts)
    memory = empty(nbytes) if first.device.type == "cpu" else first.new_empty(nbytes, dtype=torch.uint8)
    whole = memory.view(first.dtype).view(shape)
    for part, place in zip(parts, whole.split([part.shape[0] for part in parts]), strict=True):
        place.copy_(part)
        part.set_(whole.untyped_storage(), place.storage_offset(), place.shape, place.stride())
    return whole


def _alone(t: Tensor) -> bool:
    """Whether no other tensor is of the same memory, and all of it is this one's."""
    use, fresh = torch._C._storage_Use_Count, torch.empty(0)
    own = use(t.untyped_storage()._cdata) == use(fresh.untyped_storage()._cdata)
    return own and t.untyped_storage().nbytes() < t.nbytes + ALIGNED and not t.is_inference()
