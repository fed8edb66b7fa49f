"""LUT-GEMM on NVIDIA GPUs: which specialisation of lut.cu runs a call, how its work is cut, and the dense weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from ..device import Device
from ..errors import ArgumentError
from ..formats import UNIT_ROUNDOFF
from ..types import SCALE_DTYPES, Format, Problem, Rounding
from . import build, dense
from .layout import LUT
from .registry import Call, Kernel, register

FORMS = {"affine": 0, "binary": 1, "table": 2}
ZEROS = {"none": 0, "int": 1, "float": 2}
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
BITS, BYTES, HALVES = 0, 1, 2
# Rows of x that one launch takes at most; its specialisations are for 1, 2, 4 and 8.
MOST_ROWS = 8
ROWS = {"affine": (1, 2, 4, 8), "binary": (1, 2, 4, 8), "table": (2, 4, 8)}
# Which of them takes so many rows.
_ROWS = {form: [next(r for r in rows if r >= m) for m in range(MOST_ROWS + 1)] for form, rows in ROWS.items()}
GEMM, DENSE = "PPPPPPPiiiiiiii", "PPPPPiiiiiii"
DENSE_WARPS = 8
# Tiles of 32 x 128 of a thread block: up to so many lut.cu divides right in float32.
MOST_UNITS = 1 << 15
# Thread blocks that share k, the share of the multiprocessors that clusters of so many reach, and what sums cost.
CLUSTERS = ((1, 1.0, 0), (2, 1.0, 10_000), (4, 0.9, 80_000), (8, 0.85, 120_000))


@dataclass(frozen=True)
class Shape:
    """One specialisation of lut.cu. `rows` of x; `groups` that share 128 inputs, 0 where a group spans more."""

    format: Format
    x_dtype: torch.dtype
    rows: int
    groups: int
    warps: int
    stages: int

    @property
    def mode(self) -> int:
        """x as bits, bytes or halves: what each further row costs grows less from one to the next."""
        if self.format.form == "table" or self.rows > 4:
            return HALVES
        return BITS if self.rows == 1 else BYTES

    @property
    def defines(self) -> build.Defines:
        f = self.format
        return (
            ("LQ_FORM", FORMS[f.form]),
            ("LQ_BITS", f.bits),
            ("LQ_ZERO", ZEROS[f.zero]),
            ("LQ_SCALE", TYPES[SCALE_DTYPES[f.scale_dtype]]),
            ("LQ_X", TYPES[self.x_dtype]),
            ("LQ_ROWS", self.rows),
            ("LQ_MODE", self.mode),
            ("LQ_SUB", self.groups),
            ("LQ_WARPS", self.warps),
            ("LQ_STAGES", self.stages),
        )

    @property
    def stage(self) -> int:
        """Bytes of a tile with its groups' factors."""
        f, groups = self.format, max(self.groups, 1)
        factor = SCALE_DTYPES[f.scale_dtype].itemsize
        zero = {"none": 0, "int": 2, "float": factor if f.form == "binary" else 4}[f.zero]
        return 512 * (4 if f.form == "table" else f.bits) + groups * 32 * (factor * (f.bits if f.form == "binary" else 1) + zero)

    def shared(self, tiles: int, blocks: int, split: int) -> int:
        """Bytes of shared memory that lut_gemm needs for `tiles` row tiles and `blocks` blocks of 128 inputs."""
        columns, groups = 8 if self.mode == HALVES else self.rows, max(self.groups, 1)
        slots = (tiles + self.warps - 1) * 32 * columns * 4
        x = blocks * (self.rows * (384, 512, 256)[self.mode] + (1 + groups * (4, 2, 1)[self.mode]) * columns * 4)
        pairs = 256 * 32 * 4 if self.format.form == "table" else 0
        wholes = split * tiles * 32 * columns * 4
        return self.warps * self.stages * self.stage + pairs + slots + x + tiles * 64 + wholes


@dataclass(frozen=True)
class Cut:
    """How one call is spread: `tiles` row tiles a thread block, k cut over `split` blocks of a cluster."""

    shape: Shape
    tiles: int
    split: int
    range: int
    shared: int


def groups_of(format: Format, k: int) -> int | None:
    """Groups that share a block of 128 inputs, 0 where a group spans more; None where lut.cu has no way."""
    if format.group in (32, 64, 128):
        return 128 // format.group
    return 0 if format.group % 128 == 0 or format.group == k else None


def stored_groups(call: Call) -> int:
    """Groups of a row tile as they are stored, those that only pad the last tile included."""
    group = call.format.group
    return LUT.order("cuda").grouped_shape(call.n, call.k // group, group, ())[1]


def warps_of(format: Format, rows: int, groups: int) -> int:
    """Warps of a thread block: 16 where their registers allow it without spilling (ptxas -v over all variants)."""
    if rows == 4 and format.form != "table":
        return 16 if groups <= 1 and format.bits <= 4 else 8
    return 16 if groups < 4 and format.bits * max(groups, 1) <= (8 if rows == 8 else 12) else 8


@functools.lru_cache(maxsize=4096)
def cut(call: Call, x_dtype: torch.dtype, rows: int, sms: int, shared: int, clusters: bool) -> Cut | None:
    """The best way to spread a call on `sms` multiprocessors of `shared` bytes; None where x does not fit.

    Times are in bytes at the rate at which memory delivers them to one of all multiprocessors. Measured on an H200: one
    multiprocessor alone takes `limit` times its tiles' bytes, and a block and row of x costs `effort` to prepare. Of
    clusters of four or more, which must lie within a part of the chip, not as many as the multiprocessors would hold
    run at once.
    """
    groups = groups_of(call.format, call.k)
    assert groups is not None
    all_tiles, blocks = -(-call.n // 32), -(-call.k // 128)
    best: tuple[float, Cut] | None = None
    warps = warps_of(call.format, rows, groups)
    for stages, count in ((3, warps), (2, warps), (2, warps // 2), (2, warps // 4)):
        shape = Shape(call.format, x_dtype, rows, groups, count, stages)
        limit, effort = ((0.67, 1200), (0.8 if rows == 2 else 1.25, 800), (1.6, 800))[shape.mode]
        ring = shape.stage * count * (stages - 1)
        for split, usable, sums in CLUSTERS if clusters else CLUSTERS[:1]:
            if split > blocks:
                break
            slots = int(sms * usable)
            span, tiles = -(-blocks // split), -(-all_tiles * split // slots)
            # An empty last range would have nothing to add.
            if span * (split - 1) >= blocks:
                continue
            while tiles > 1 and (tiles * span > MOST_UNITS or shape.shared(tiles, span, split) > shared):
                tiles = -(-tiles // 2)
            need = shape.shared(tiles, span, split)
            if need > shared:
                continue
            waves = -(-(-(-all_tiles // tiles) * split) // slots)
            flow = max(all_tiles * blocks / sms, limit * waves * tiles * span) * shape.stage
            # While x is prepared the rings fill; what it takes beyond that is lost.
            lost = waves * max(effort * rows * span - ring, 0)
            seconds = flow + lost + sums
            if best is None or seconds < best[0]:
                best = (seconds, Cut(shape, tiles, split, span, need))
        if best is not None:
            return best[1]
    return None


class Launcher:
    """One call's launches of lut_gemm on one device, for one number of rows."""

    def __init__(self, call: Call, plan: Cut, device_index: int, pdl: bool) -> None:
        shape, f = plan.shape, call.format
        self.function = build.load_cuda("lut.cu", "lut_gemm", GEMM, shape.defines, device_index, plan.shared)
        row_tiles = -(-call.n // 32)
        self.grid = (plan.split, -(-row_tiles // plan.tiles), 1)
        self.cluster = (plan.split, 1, 1)
        self.threads, self.shared, self.pdl = 32 * shape.warps, plan.shared, pdl
        stored = stored_groups(call)
        span = 0 if shape.groups else -(-(1 << 32) // max(-(-f.group // 128), 2))
        self.values = (call.n, call.k, plan.tiles, plan.range, stored, span - (span >> 31 << 32))
        self.wide = call.k % 8 == 0

    def __call__(self, x: Tensor, parts: Sequence[int], bias: int, out: Tensor, stream: int) -> None:
        at = x.data_ptr()
        wide = int(self.wide and not (at | bias) & 15)
        values = (at, *parts, bias, out.data_ptr(), x.shape[0], *self.values, wide)
        self.function.launch(self.grid, self.threads, self.shared, self.cluster, stream, values, self.pdl)


@functools.lru_cache(maxsize=4096)
def launcher(call: Call, x_dtype: torch.dtype, rows: int, device_index: int) -> Launcher | None:
    """What runs `rows` rows of a call; None where x does not fit in shared memory."""
    p = torch.cuda.get_device_properties(device_index)
    modern = p.major >= 9
    plan = cut(call, x_dtype, rows, p.multi_processor_count, p.shared_memory_per_block_optin, modern)
    return None if plan is None else Launcher(call, plan, device_index, modern)


def _pointers(parts: Sequence[Tensor], call: Call) -> tuple[int, int, int, int]:
    """Addresses of the planes, the scale or alpha, the zero or offset, and the table; 0 for what there is not."""
    f = call.format
    at = [part.data_ptr() for part in parts]
    for i, address in enumerate(at):
        if address & 15 or not parts[i].is_cuda:
            name = LUT.names(f, "cuda")[i]
            raise ArgumentError(f"parts.{name}", hex(address), "a CUDA tensor at a multiple of 16 bytes")
    return at[0], at[1], at[2] if f.zero != "none" else 0, at[-1] if f.form == "table" else 0


@functools.cache
def _multiplies_bits(device_index: int) -> bool:
    """Whether tensor cores take single bits; from Blackwell on the compiler writes out a long emulation."""
    return torch.cuda.get_device_properties(device_index).major < 10


def _run(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor) -> None:
    index = x.device.index
    if call.format.form == "table" and parts[-1].ndim > 1:
        # A look-up needs the whole table in shared memory, for every lane.
        return dense.run(x, parts, bias, call, out)
    addresses, stream = _pointers(parts, call), torch._C._cuda_getCurrentRawStream(index)
    at, m, b = 0, x.shape[0], 0 if bias is None else bias.data_ptr()
    while at < m:
        left = min(m - at, MOST_ROWS)
        rows = _ROWS[call.format.form][left]
        if rows == 1 and not _multiplies_bits(index):
            rows = 2
        run = launcher(call, x.dtype, rows, index)
        while run is None and rows > ROWS[call.format.form][0]:
            rows //= 2
            run = launcher(call, x.dtype, rows, index)
        if run is None:
            return dense.run(x[at:], parts, bias, call, out[at:])
        end = at + min(left, rows)
        whole = at == 0 and end == m
        run(x if whole else x[at:end], addresses, b, out if whole else out[at:end], stream)
        at = end


def _accepts(call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    f = call.format
    if x_dtype not in (torch.float16, torch.bfloat16):
        return "x of float16 | bfloat16"
    if groups_of(f, call.k) is None:
        return "groups of 32, 64, a multiple of 128, or all of k"
    if f.form == "table" and f.bits > 4:
        return "tables of at most 4 bits"
    if not build.has_nvrtc():
        return "a machine with NVRTC"
    return None


def _rounding(call: Call, x_dtype: torch.dtype) -> Rounding:
    # A table of a whole weight is looked up as halves, one by row or group goes by the dense weight. Other weights are
    # sums of planes in float32, whose rounding is relative to the planes, and they may cancel.
    u = UNIT_ROUNDOFF[x_dtype]
    return Rounding(weight=u if call.format.form == "table" else 2.0**-11, accumulate=2.0**-22, out=u)


def packed_bytes(format: Format, n: int, k: int) -> int:
    """Bytes of all parts but the table."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in LUT.shapes(format, n, k, "cuda"))


# (m up to, seconds beyond a launch, times a pure read): least squares over lqcompile/measured/nvidia_h200.json, where
# the first is within 11 % at m = 1 and 2, 16 % at 4 and 19 % at 8; the second, of tables, within 23 %.
SUMS = ((1, 1.8e-6, 1.12), (2, 2.2e-6, 1.18), (4, 2.5e-6, 1.87), (8, 2.9e-6, 2.46))
LOOKUPS = ((2, 4.6e-6, 1.39), (4, 4.6e-6, 1.51), (8, 3.1e-6, 2.51))


def _seconds(problem: Problem, layout: str, device: Device) -> sympy.Expr:
    f, m = problem.format, problem.m
    read = packed_bytes(f, problem.n, problem.k) / device.bandwidth
    costs = LOOKUPS if f.form == "table" else SUMS
    launches = sympy.ceiling(m / MOST_ROWS)
    pieces = [(device.launch + start + read * times, m <= most) for most, start, times in costs]
    return sympy.Piecewise(*pieces, (launches * pieces[-1][0], True))


register(
    Kernel(
        name="lut",
        layouts=("lut",),
        devices=("cuda",),
        summary="x in 16 bits; groups of 32, 64, 128 i or k; bit planes on tensor cores; m up to 8",
        run=_run,
        accepts=_accepts,
        rounding=_rounding,
        seconds=_seconds,
    )
)


def dequantize(parts: Sequence[Tensor], call: Call, dtype: torch.dtype) -> Tensor | None:
    """The dense weight [n, k] by lut_dense.cu; None for what it does not take."""
    f, groups = call.format, groups_of(call.format, call.k)
    if dtype not in (torch.float16, torch.bfloat16) or groups is None or not build.has_nvrtc():
        return None
    out = parts[0].new_empty((call.n, call.k), dtype=dtype)
    if out.numel() == 0:
        return out
    function = build.load_cuda("lut_dense.cu", "lut_dense", DENSE, dense_defines(f, dtype), out.device.index)
    units = -(-call.n // 32) * -(-call.k // 128)
    stored = stored_groups(call)
    table = parts[-1] if f.form == "table" else None
    row, group = (0, 0) if table is None or table.ndim == 1 else (table.stride(0), table.stride(1) * (table.ndim == 3))
    values = (
        *_pointers(parts, call),
        out.data_ptr(),
        *(call.n, call.k, f.group, call.k // f.group, stored, row, group),
    )
    stream = torch._C._cuda_getCurrentRawStream(out.device.index)
    function.launch((-(-units // DENSE_WARPS), 1, 1), 32 * DENSE_WARPS, 0, (1, 1, 1), stream, values)
    return out


dense.FAST["lut", "cuda"] = dequantize


def dense_defines(f: Format, dtype: torch.dtype) -> build.Defines:
    """The specialisation of lut_dense.cu for a format and an output dtype."""
    return (
        ("LQ_FORM", FORMS[f.form]),
        ("LQ_BITS", f.bits),
        ("LQ_NIBBLES", int(LUT.widths(f, "cuda") == (4,) and f.form == "table")),
        ("LQ_ZERO", ZEROS[f.zero]),
        ("LQ_SCALE", TYPES[SCALE_DTYPES[f.scale_dtype]]),
        ("LQ_OUT", TYPES[dtype]),
    )


def _variants() -> Iterator[tuple[str, str, build.Defines]]:
    """A spread of specialisations that CI compiles for every architecture."""
    half, bfloat = torch.float16, torch.bfloat16
    formats = [
        (Format("binary", 3, 128, "float", "float16"), half),
        (Format("binary", 8, 32, "none", "float32"), bfloat),
        (Format("affine", 4, 128, "int", "float16"), half),
        (Format("affine", 2, 64, "float", "bfloat16"), bfloat),
        (Format("affine", 8, 256, "none", "float16"), half),
        (Format("table", 4, 64, "none", "bfloat16"), bfloat),
    ]
    for f, x_dtype in formats:
        for rows in ROWS[f.form]:
            groups = groups_of(f, 1024) or 0
            shape = Shape(f, x_dtype, rows, groups, warps_of(f, rows, groups), 2)
            yield "lut.cu", "lut_gemm", shape.defines
        yield "lut_dense.cu", "lut_dense", dense_defines(f, x_dtype)


CUDA_VARIANTS = list(_variants())
