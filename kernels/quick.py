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
from .stream import groups_of, packed_bytes, stored_groups
from .tensor_map import tensor_map

# Rows of x of the specialisations of quick_sm80.cu, and of a tile of quick_sm90.cu's.
ROWS, COLUMNS = (1, 2, 4, 8, 16), (16, 32, 64, 128)
# Beyond so many rows Hopper's warpgroups are faster.
FEW = 8
BATCH = "TPPPPPiiiiii"


class Shape(stream.Shape):
    """One specialisation of quick_sm80.cu."""

    SOURCE: ClassVar[str] = "quick_sm80.cu"
    ENTRY: ClassVar[str] = "quick_gemm"

    @property
    def columns(self) -> int:
        return self.rows

    @property
    def block(self) -> int:
        return 256

    @property
    def limit(self) -> float:
        return 0.67 if self.rows <= 8 else 0.9


def warps_of(rows: int, groups: int) -> int:
    """Warps of a thread block: 16 where their registers allow it without spilling (ptxas -v over all variants)."""
    return 16 if rows <= 8 or groups <= 1 else 8


@functools.lru_cache(maxsize=4096)
def launcher(call: Call, x_dtype: torch.dtype, rows: int, device_index: int) -> stream.Launcher | None:
    """What runs `rows` rows of a call; None where x does not fit in shared memory."""
    warps = warps_of(rows, groups_of(call.format, call.k) or 0)
    return stream.launcher(Shape, call, x_dtype, rows, warps, device_index)


class Batch(stream.Specialisation):
    """One specialisation of quick_sm90.cu; `rows` of x in a tile, `warps` that multiply, each pair a tile of w."""

    def shared_batch(self, split: int) -> int:
        """Bytes of shared memory: the rings with their barriers or, after them, the cluster's sums."""
        ring = self.stages * (self.rows * 256 + self.warps // 2 * self.stage + 16)
        # Counted from a multiple of 1024 bytes, where a swizzle begins.
        return 1024 + max(ring, split * self.rows * 64 * self.warps if split > 1 else 0)


@functools.lru_cache(maxsize=4096)
def cut_batch(call: Call, x_dtype: torch.dtype, m: int, sms: int, shared: int) -> tuple[Batch, int] | None:
    """The specialisation for m rows, and over how many thread blocks of a cluster k is cut; None where none fits.

    A thread block of eight warps takes a block of 128 inputs in about 0.4 + rows / 175 us on an H200, one of four in
    0.93 times that (measured before the copies had a warp of their own).
    """
    groups = groups_of(call.format, call.k)
    assert groups is not None
    row_tiles, blocks = -(-call.n // 32), -(-call.k // 128)
    rows = next((c for c in COLUMNS if c >= m), COLUMNS[-1])
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
    """What runs m rows of a call at once; None where this GPU or this k is not for quick_sm90.cu."""
    p = torch.cuda.get_device_properties(device_index)
    if (p.major, p.minor) != (9, 0) or call.k % 8:
        return None
    found = cut_batch(call, x_dtype, m, p.multi_processor_count, p.shared_memory_per_block_optin)
    return None if found is None else BatchLauncher(call, *found, device_index)


def _run(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor) -> None:
    index = x.device.index
    addresses, queue = stream.pointers(parts, call), torch._C._cuda_getCurrentRawStream(index)
    at, m, b = 0, x.shape[0], 0 if bias is None else bias.data_ptr()
    if m > FEW and not x.data_ptr() & 15:
        batch = batch_launcher(call, x.dtype, m, index)
        if batch is not None:
            return batch(x, addresses, b, out, queue)
    while at < m:
        left = min(m - at, ROWS[-1])
        rows = next(r for r in ROWS if r >= left)
        run = launcher(call, x.dtype, rows, index)
        while run is None and rows > 1:
            rows //= 2
            run = launcher(call, x.dtype, rows, index)
        if run is None:
            return dense.run(x[at:], parts, bias, call, out[at:])
        end = at + min(left, rows)
        whole = at == 0 and end == m
        run(x if whole else x[at:end], addresses, b, out if whole else out[at:end], queue)
        at = end


def _accepts(call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    f = call.format
    if f.form != "affine":
        return "affine weights"
    if x_dtype not in (torch.float16, torch.bfloat16):
        return "x of float16 | bfloat16"
    if groups_of(f, call.k) is None:
        return "groups of 32, 64, a multiple of 128, or all of k"
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
    m, read = problem.m, packed_bytes("quick", problem.format, problem.n, problem.k) / device.bandwidth
    pieces = [(device.launch + start + read * times, m <= most) for most, start, times in COSTS]
    return sympy.Piecewise(*pieces, (sympy.ceiling(m / COSTS[-1][0]) * pieces[-1][0], True))


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
    return stream.dense_weight(parts, call, dtype, "quick_dense", 4, dense_defines(call.format, dtype))


dense.FAST["quick", "cuda"] = dequantize


def dense_defines(f: Format, dtype: torch.dtype) -> build.Defines:
    """The specialisation of quick_dense.cu for a format and an output dtype."""
    return (("LQ_FORM", 2 if f.form == "table" else 0), *stream.dense_defines(f, dtype))


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
            yield "quick_sm80.cu", "quick_gemm", Shape(f, x_dtype, rows, groups, warps_of(rows, groups), 2).defines
        yield "quick_dense.cu", "quick_dense", dense_defines(f, x_dtype)
    yield "quick_dense.cu", "quick_dense", dense_defines(Format("table", 3, 64, "none", "float32"), torch.float16)


def _hopper() -> Iterator[tuple[str, str, build.Defines]]:
    for (f, x_dtype), rows in itertools.product(_SPREAD, (16, 128)):
        yield "quick_sm90.cu", "quick_batch", Batch(f, x_dtype, rows, groups_of(f, 1024) or 0, 8, 4).defines


CUDA_VARIANTS, HOPPER_VARIANTS = list(_variants()), list(_hopper())
