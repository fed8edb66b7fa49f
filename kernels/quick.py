"""QUICK on NVIDIA GPUs: a few rows by quick_sm80.cu, batches on Hopper by quick_sm90.cu, and the dense weight."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from ..device import Device
from ..formats import UNIT_ROUNDOFF
from ..types import Format, Problem, Rounding
from . import build, dense, stream
from .registry import Call, Kernel, register
from .stream import groups_of, stored_groups
from .tensor_map import tensor_map

# Rows of x of the specialisations of quick_sm80.cu, and of a tile of quick_sm90.cu's.
ROWS, COLUMNS = (1, 2, 4, 8, 16), (16, 32, 64, 128)
SIZES = stream.sizes_of(ROWS)
# Beyond so many rows Hopper's warpgroups are faster.
FEW = 8
BATCH = "TPPPPPiiiiii"


class Shape(stream.Shape):
    """One specialisation of quick_sm80.cu."""

    SOURCE: ClassVar[str] = "quick_sm80.cu"
    ENTRY: ClassVar[str] = "quick_gemm"

    @staticmethod
    def warps_of(format: Format, rows: int, groups: int) -> int:
        return 16 if rows <= 8 or groups <= 1 else 8

    @property
    def columns(self) -> int:
        return self.rows

    @property
    def block(self) -> int:
        return 256

    @property
    def limit(self) -> float:
        return 0.67 if self.rows <= 8 else 0.9


class Batch(stream.Specialisation):
    """One specialisation of quick_sm90.cu; `rows` of x in a tile, `warps` that multiply, each pair a tile of w."""

    def shared_batch(self, split: int) -> int:
        """Bytes of shared memory: the rings with their barriers or, after them, the cluster's sums."""
        ring = self.stages * (self.rows * 256 + self.warps // 2 * self.stage + 16)
        # Counted from a multiple of 1024 bytes, where a swizzle begins.
        return 1024 + max(ring, split * self.rows * 64 * self.warps if split > 1 else 0)


def rows_of_tile(m: int) -> int:
    """Rows of x in a tile of quick_sm90.cu where there are m."""
    return next((c for c in COLUMNS if c >= m), COLUMNS[-1])


def whole_tiles(m: int) -> int:
    """m, up to whole tiles: what is chosen for it depends on no more."""
    return -(-m // rows_of_tile(m)) * rows_of_tile(m)


def cut_batch(call: Call, x_dtype: torch.dtype, m: int, sms: int, shared: int) -> tuple[Batch, int] | None:
    """The specialisation for m rows, and over how many thread blocks of a cluster k is cut; None where none fits.

    A thread block of eight warps takes a block of 128 inputs in about 0.4 + rows / 175 us on an H200, one of four in
    0.93 times that (measured before the copies had a warp of their own).
    """
    groups = groups_of(call.format, call.k)
    assert groups is not None
    row_tiles, blocks = -(-call.n // 32), -(-call.k // 128)
    rows = rows_of_tile(m)
    best: tuple[float, Batch, int] | None = None
    for warps, split, stages in itertools.product((8, 4), (1, 2, 4), (6, 5, 4, 3)):
        shape, span = Batch(call.format, x_dtype, rows, groups, warps, stages), -(-blocks // split)
        if span * (split - 1) >= blocks or shape.shared_batch(split) > shared:
            continue
        # Of clusters of four not as many run at once as there are multiprocessors for.
        slots = int(sms * (0.88 if split == 4 else 1.0))
        waves = math.ceil(math.ceil(row_tiles / (warps // 2)) * split * math.ceil(m / rows) / slots)
        each = (0.4 + rows / 175) * (1.0 if warps == 8 else 0.93)
        seconds = waves * (span * each + 1.0) + 0.4 * (split - 1)
        if best is None or seconds < best[0]:
            best = (seconds, shape, split)
    return None if best is None else best[1:]


class BatchLauncher:
    """One call's launches of quick_batch on one device, for numbers of rows of x that share a tile size."""

    def __init__(self, call: Call, shape: Batch, split: int, device_index: int) -> None:
        self.shared = shape.shared_batch(split)
        self.function = build.load_cuda("quick_sm90.cu", "quick_batch", BATCH, shape.defines, device_index, self.shared)
        self.split, self.rows, self.threads = split, shape.rows, 32 * shape.warps + 128
        self.row_blocks = math.ceil(call.n / (16 * shape.warps))
        range = math.ceil(math.ceil(call.k / 128) / split)
        self.values = (call.n, call.k, range, stored_groups(call), stream.span_of(call))

    def __call__(self, x: Tensor, parts: Sequence[int], bias: int, out: Tensor, queue: int) -> None:
        m, k = x.shape
        map = tensor_map(x.data_ptr(), x.dtype, m, k, (self.rows, 64))
        values: tuple[int | bytes, ...] = (map, *parts[:3], bias, out.data_ptr(), m, *self.values)
        grid = (self.split, self.row_blocks, -(-m // self.rows))
        self.function.launch(grid, self.threads, self.shared, (self.split, 1, 1), queue, values, True)


@functools.lru_cache(maxsize=4096)
def batch_launcher(call: Call, x_dtype: torch.dtype, m: int, device_index: int) -> BatchLauncher | None:
    """What runs up to m rows, whole tiles of them; None where this GPU or this k is not for quick_sm90.cu."""
    p = torch.cuda.get_device_properties(device_index)
    if (p.major, p.minor) != (9, 0) or call.k % 8:
        return None
    found = cut_batch(call, x_dtype, m, p.multi_processor_count, p.shared_memory_per_block_optin)
    return None if found is None else BatchLauncher(call, *found, device_index)


def _run(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor) -> None:
    m, index = x.shape[0], x.device.index
    if m > FEW and not x.data_ptr() & 15:
        batch = batch_launcher(call, x.dtype, whole_tiles(m), index)
        if batch is not None:
            queue = torch._C._cuda_getCurrentRawStream(index)
            return batch(x, stream.pointers(parts, call), 0 if bias is None else bias.data_ptr(), out, queue)
    stream.run(Shape, SIZES, ROWS[0], x, parts, bias, call, out)


def _accepts(call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    if call.format.form != "affine":
        return "affine weights"
    refused = stream.refusal(call, x_dtype)
    if refused is not None:
        return refused
    if not build.has_nvrtc():
        return "a machine with NVRTC"
    return None


def _rounding(call: Call, x_dtype: torch.dtype) -> Rounding:
    # Codes less a whole zero of at most 8 bits are exact in x's dtype; another zero is rounded, and the difference.
    u = UNIT_ROUNDOFF[x_dtype]
    return Rounding(weight=2 * u if call.format.zero != "none" else 2.0**-22, accumulate=2.0**-22, out=u)


# (m up to, seconds beyond a launch, times a pure read): least squares over six shapes of int4 g128 on an H200, within
# 12 % up to m = 8 and, measured before quick_sm90.cu had a warp for its copies, 22 % beyond.
COSTS = (
    (1, 1.7e-6, 1.11),
    (8, 1.6e-6, 1.40),
    (16, 3.0e-6, 1.67),
    (32, 4.7e-6, 1.86),
    (64, 6.8e-6, 2.74),
    (128, 7.6e-6, 4.29),
)


def _seconds(problem: Problem, layout: str, device: Device) -> sympy.Expr:
    return stream.seconds(COSTS, problem, layout, device)


register(
    Kernel(
        name="quick",
        layouts=("quick",),
        devices=("cuda",),
        summary="affine weights, x in 16 bits; groups of 32, 64, 128 i or k; codes become numbers in registers",
        run=_run,
        accepts=_accepts,
        rounding=_rounding,
        seconds=_seconds,
    )
)


def dequantize(parts: Sequence[Tensor], call: Call, dtype: torch.dtype) -> Tensor | None:
    """The dense weight [n, k] by quick_dense.cu; None for what it does not take."""
    return stream.dense_weight(parts, call, dtype, "quick_dense", 4, stream.dense_defines(call.format, dtype))


dense.FAST["quick", "cuda"] = dequantize


_SPREAD = (
    (Format("affine", 4, 128, "int", "float16"), torch.float16),
    (Format("affine", 4, 64, "float", "bfloat16"), torch.bfloat16),
    (Format("affine", 8, 256, "none", "float16"), torch.bfloat16),
    (Format("affine", 3, 32, "int", "float32"), torch.float16),
    (Format("affine", 7, 128, "float", "float16"), torch.float16),
)


def _variants() -> Iterator[tuple[str, str, build.Defines]]:
    """A spread of specialisations that CI compiles for every architecture."""
    for f, x_dtype in _SPREAD:
        groups = groups_of(f, 1024) or 0
        for rows in (1, 16):
            shape = Shape(f, x_dtype, rows, groups, Shape.warps_of(f, rows, groups), 2)
            yield "quick_sm80.cu", "quick_gemm", shape.defines
        yield "quick_dense.cu", "quick_dense", stream.dense_defines(f, x_dtype)
    table = Format("table", 3, 64, "none", "float32")
    yield "quick_dense.cu", "quick_dense", stream.dense_defines(table, torch.float16)


def _hopper() -> Iterator[tuple[str, str, build.Defines]]:
    for (f, x_dtype), rows in itertools.product(_SPREAD, (16, 128)):
        yield "quick_sm90.cu", "quick_batch", Batch(f, x_dtype, rows, groups_of(f, 1024) or 0, 8, 4).defines


CUDA_VARIANTS, HOPPER_VARIANTS = list(_variants()), list(_hopper())
