"""The host's side of job.h: which library runs a call on a CPU, what it is told, bounds and costs, and its kernels."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from ..device import Device
from ..errors import Reason, Refused
from ..formats import UNIT_ROUNDOFF, code_range, parts_of
from ..types import SCALE_DTYPES, Format, Problem, Rounding
from . import dense, native
from .layout import LAYOUTS
from .registry import X_DTYPES, Call, Kernel, register

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.int16: 3}
# lq_gemm's: seven pointers, m, n, k, span, groups, three types, low, levels, two strides, threads.
SIGNATURE = (
    *[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 5, *[ctypes.c_int] * 3, ctypes.c_float, *[ctypes.c_int64] * 3,
    ctypes.c_int,
)  # fmt: skip
# lq_dense's: five pointers, n, k, group, groups, two strides, three types, low, threads.
DENSE = (*[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 6, *[ctypes.c_int] * 3, ctypes.c_float, ctypes.c_int)


def digits_of(call: Call, x_dtype: torch.dtype) -> int:
    """How many digits of 8 bits stand for x: its own precision, but for outliers within a block. Tables need none."""
    if call.format.form == "table":
        return 0
    return 3 if x_dtype == torch.float32 or call.layout == "lut" else 2


def block_of(format: Format, k: int) -> int | None:
    """Inputs that share a scale of x and one of w; None where the kernels take no such groups."""
    if format.group in (32, 64):
        return format.group
    return 128 if format.group % 128 == 0 or format.group == k else None


def refusal(call: Call, isa: native.Isa | None = None) -> str | None:
    """What of a call, or of this machine, the kernels do not take, by `isa` or any."""
    if block_of(call.format, call.k) is None:
        return "groups of 32, 64, a multiple of 128, or all of k"
    if not native.isas():
        return "x86-64 with AVX2, on Linux"
    if not native.has_compiler():
        return "a machine with a C++ compiler"
    return None if isa is None or native.has(isa) else "x86-64 with AMX for bfloat16"


def declare(
    name: str, layout: str, source: str, *, forms: Sequence[str], summary: str, isa: native.Isa | None = None,
    x_dtypes: Sequence[torch.dtype] = X_DTYPES, rounding: Callable[[Call, torch.dtype], Rounding],
    seconds: Callable[[Problem, str, Device], sympy.Expr],
) -> Kernel:  # fmt: skip
    """Registers what `source` runs: weights of `forms` in `layout`, by `isa`, by default the best that the CPU has."""

    def accepts(call: Call, x_dtype: torch.dtype, device: str) -> str | None:
        if call.format.form not in forms:
            return f"{' | '.join(forms)} weights"
        if call.format.form == "table" and call.format.bits > 4:
            return "tables of 1 to 4 bits"
        if x_dtype not in x_dtypes:
            return f"x of {' | '.join(str(dtype)[6:] for dtype in x_dtypes)}"
        return refusal(call, isa)

    def runs(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor) -> None:
        run(source, x, parts, bias, call, out, isa)

    summary = f"{summary}; groups of 32, 64, 128 i or k"
    return register(Kernel(name, (layout,), ("cpu",), summary, runs, accepts, rounding, seconds, batch_invariant=True))


def rounding(call: Call, x_dtype: torch.dtype) -> Rounding:
    """What gemm.h does to x, w and y. Dots are exact; each block's is scaled and added in float32."""
    # Three digits hold 24 bits, of which look-ups leave 22. A digit's range is not quite a power of two.
    bits = 16 if digits_of(call, x_dtype) == 2 else 22 if call.layout == "lut" else 24
    step = (1 + 2.0**-6) * 2.0 ** (1 - bits)
    return Rounding(2.0**-22, 2.0**-23, UNIT_ROUNDOFF[x_dtype], step, block_of(call.format, call.k) or 1)


class Launcher:
    """One call's launches with x of one dtype by one library. Raises what `native.load` raises."""

    def __init__(self, source: str, call: Call, x_dtype: torch.dtype, isa: native.Isa) -> None:
        f, layout = call.format, LAYOUTS[call.layout]
        binary, block = f.form == "binary", block_of(f, call.k)
        self.defines = (
            ("LQ_BINARY", int(binary)),
            ("LQ_LEVELS", int(f.form == "table")),
            ("LQ_BITS", sum(layout.widths(f, "cpu"))),
            ("LQ_DIGITS", digits_of(call, x_dtype)),
            ("LQ_BLOCK", block or 0),
            ("LQ_QUADS", int(call.layout == "lut")),
            ("LQ_TABLES", int(call.layout == "lut" and ("LQ_LANES", 16) in isa.defines)),
        )
        assert block is not None
        self.entry: Any = native.load(source, isa, self.defines).lq_gemm
        self.entry.argtypes, self.entry.restype = SIGNATURE, ctypes.c_int
        dtypes = [dtype for _, dtype in layout.shapes(f, call.n, call.k, "cpu")]
        groups = layout.order("cpu").grouped_shape(call.n, call.k // f.group, f.group, ())[1]
        span = -(-f.group // 128) if block == 128 else 1
        self.sizes = (call.n, call.k, span, groups, TYPES[x_dtype], TYPES[SCALE_DTYPES[f.scale_dtype]])
        self.factor = len(parts_of(f)) == 2
        self.low = (TYPES[dtypes[2]] if self.factor else 0, float(-code_range(f)[0]))
        self.levels = 1 << f.bits if f.form == "table" else 0

    def __call__(self, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, out: Tensor, threads: int) -> None:
        """Writes y to `out`. Raises MemoryError where there is none for x's digits."""
        zero = parts[2].data_ptr() if self.factor else None
        table = parts[-1] if self.levels else None
        failed = self.entry(
            x.data_ptr(), parts[0].data_ptr(), parts[1].data_ptr(), zero, None if table is None else table.data_ptr(),
            None if bias is None else bias.data_ptr(), out.data_ptr(), x.shape[0], *self.sizes, *self.low, self.levels,
            *_strides(table), threads,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the digits of x {tuple(x.shape)}")


def _strides(table: Tensor | None) -> tuple[int, int]:
    """From one row's table to the next one's, and one group's; 0 where they share it."""
    if table is None or table.ndim == 1:
        return 0, 0
    return table.stride(0), table.stride(1) * (table.ndim == 3)


@functools.lru_cache(maxsize=4096)
def launcher(source: str, call: Call, x_dtype: torch.dtype, isa: native.Isa | None) -> Launcher | None:
    """The launches of a call by `isa`, by default this CPU's best; None, with a warning, where nothing compiles."""
    try:
        return Launcher(source, call, x_dtype, isa or native.isas()[0])
    except Refused as refused:
        _warn(refused.reason, str(refused))
        return None


@functools.cache
def _warn(reason: Reason, detail: str) -> None:
    """Once for each way in which it fails."""
    warnings.warn(f"lqcompile: {reason.sentence}: {detail}\n{reason.advice}", stacklevel=5)


def run(
    source: str, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor,
    isa: native.Isa | None = None,
) -> None:  # fmt: skip
    """y[m, n] = x[m, k] @ w[n, k].T + bias[n] into `out`, on torch's threads; dense where nothing compiles."""
    found = launcher(source, call, x.dtype, isa)
    if found is None:
        return dense.run(x, parts, bias, call, out)
    found(x, parts, bias, out, torch.get_num_threads())


@functools.lru_cache(maxsize=4096)
def _unpacker(bits: int) -> Any | None:
    try:
        entry = native.load("dense.cpp", native.isas()[0], (("LQ_BITS", bits),)).lq_dense
    except Refused as refused:
        _warn(refused.reason, str(refused))
        return None
    entry.argtypes, entry.restype = DENSE, ctypes.c_int
    return entry


def dequantize(parts: Sequence[Tensor], call: Call, dtype: torch.dtype) -> Tensor | None:
    """The dense weight [n, k] of layout quick by dense.cpp; None for what it does not take."""
    if dtype not in TYPES or not native.isas() or not native.has_compiler():
        return None
    f, layout = call.format, LAYOUTS[call.layout]
    out = torch.empty((call.n, call.k), dtype=dtype)
    entry = _unpacker(sum(layout.widths(f, "cpu")))
    if entry is None or out.numel() == 0:
        return None
    table = parts[-1] if f.form == "table" else None
    zero = parts[2] if f.zero != "none" else None
    groups = layout.order("cpu").grouped_shape(call.n, call.k // f.group, f.group, ())[1]
    entry(
        parts[0].data_ptr(), parts[1].data_ptr(), None if zero is None else zero.data_ptr(),
        None if table is None else table.data_ptr(), out.data_ptr(), call.n, call.k, f.group, groups, *_strides(table),
        TYPES[dtype], TYPES[parts[1].dtype], 0 if zero is None else TYPES[zero.dtype], float(-code_range(f)[0]),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


# By instructions and digits of x: arithmetic of a batch, in units of the device's dense float32 rate; from int4 g128 at
# m = 32 and 128 on one core of a Sapphire Rapids.
RATES = {
    ("amx", 2): 5.2, ("amx", 3): 3.3, ("avx512", 2): 0.78, ("avx512", 3): 0.53, ("avx_vnni", 2): 0.7,
    ("avx_vnni", 3): 0.47, ("avx2", 2): 0.54, ("avx2", 3): 0.37
}  # fmt: skip
# Rows of x that are looked up by AVX-512, and operations of a dense float32 matmul in the time that takes a plane.
LOOKED_UP, LOOK_UP = 4, 1.4


def seconds(problem: Problem, layout: str, device: Device) -> sympy.Expr:
    """A read of the packed weight, 1.15 times what memory can, and of more than one row the arithmetic."""
    f, m, isa = problem.format, problem.m, native.isas()[0].name
    call = Call(layout, f, problem.n, problem.k)
    read = 1.15 * LAYOUTS[layout].packed_bytes(f, problem.n, problem.k, "cpu") / device.bandwidth
    # Each plane of a binary weight is a product of its own, but for few rows that are looked up.
    planes = f.bits if f.form == "binary" else 1
    rate = RATES[isa, digits_of(call, problem.x_dtype)] * device.rate / planes
    if isa == "amx":
        # Each block's dots are scaled, which takes longer than the tiles: 1.6 times as long in all at 64, 2.6 at 32.
        rate *= ((block_of(f, problem.k) or 128) / 128) ** 0.7
    size = problem.n * problem.k
    work = 2.0 * m * size / rate
    if f.form == "affine":
        return device.launch + sympy.Piecewise((read, m <= 1), (read + work, True))
    if isa in NARROW:
        return device.launch + sympy.Max(read, work)
    found = sympy.Max(read, LOOK_UP * planes * m * size / device.rate)
    return device.launch + sympy.Piecewise((found, m <= LOOKED_UP), (read + work, True))


# Instructions of vectors of 256 bits.
NARROW = ("avx_vnni", "avx2")
