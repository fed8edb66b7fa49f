"""How an array lies in memory, as Hopper's copy engine wants it: encoded by the driver, given to a kernel by value."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator

import torch

from . import build

# CUtensorMapDataType (16 bits of any kind as unsigned ones), swizzles none and 128B, and
# CU_TENSOR_MAP_L2_PROMOTION_L2_256B of cuda.h.
_MAP_TYPES = {torch.int16: 1, torch.float16: 6, torch.bfloat16: 9}
_SWIZZLES, _PROMOTION = (0, 3), 3


@functools.lru_cache(maxsize=4096)
def tensor_map(at: int, dtype: torch.dtype, sizes: tuple[int, ...], box: tuple[int, ...], swizzled: bool) -> bytes:
    """What the copy engine must know to fetch boxes of `box` from a contiguous array of `sizes` at `at`.

    Both are in elements, innermost last. In shared memory the rows of a box lie one after the other, swizzled or not; a
    swizzled row is 128 bytes at most. What lies beyond the array is zero. `at` and the bytes of a row are multiples of
    16. Raises RuntimeError for what the driver refuses.
    """
    map, rank = (ctypes.c_uint64 * 24)(), len(sizes)
    # Must lie at a multiple of 64 bytes.
    place = -(-ctypes.addressof(map) // 64) * 64
    lengths, boxes = (ctypes.c_uint64 * rank)(*reversed(sizes)), (ctypes.c_uint32 * rank)(*reversed(box))
    steps = [*itertools.accumulate(reversed(sizes[1:]), operator.mul, initial=dtype.itemsize)][1:]
    strides, ones = (ctypes.c_uint64 * (rank - 1))(*steps), (ctypes.c_uint32 * rank)(*[1] * rank)
    kind = (0, _SWIZZLES[swizzled], _PROMOTION, 0)
    array = (_MAP_TYPES[dtype], rank, ctypes.c_void_p(at), lengths, strides, boxes, ones)
    build.libcuda()("cuTensorMapEncodeTiled", ctypes.c_void_p(place), *array, *kind)
    return ctypes.string_at(place, 128)
