"""How a matrix lies in memory, as Hopper's copy engine wants it: encoded by the driver, given to a kernel by value."""

from __future__ import annotations

import ctypes
import functools

import torch

from . import build

# CUtensorMapDataType, CU_TENSOR_MAP_SWIZZLE_128B and CU_TENSOR_MAP_L2_PROMOTION_L2_256B of cuda.h.
_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLE, _PROMOTION = 3, 3


@functools.lru_cache(maxsize=1024)
def tensor_map(at: int, dtype: torch.dtype, rows: int, columns: int, box: tuple[int, int]) -> bytes:
    """What the copy engine must know to fetch boxes (rows, columns) of a row-major matrix [rows, columns] at `at`.

    In shared memory the rows of a box lie one after the other, of 128 bytes at most, swizzled; beyond the matrix they
    are zero. `at` and the bytes of a row are multiples of 16. Raises RuntimeError for what the driver refuses.
    """
    map = (ctypes.c_uint64 * 24)()
    # Must lie at a multiple of 64 bytes.
    place = -(-ctypes.addressof(map) // 64) * 64
    sizes, strides = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * dtype.itemsize)
    boxes, steps = (ctypes.c_uint32 * 2)(box[1], box[0]), (ctypes.c_uint32 * 2)(1, 1)
    kind = (0, _SWIZZLE, _PROMOTION, 0)
    matrix = (_MAP_TYPES[dtype], 2, ctypes.c_void_p(at), sizes, strides, boxes, steps)
    build.libcuda()("cuTensorMapEncodeTiled", ctypes.c_void_p(place), *matrix, *kind)
    return ctypes.string_at(place, 128)
