"""QUICK on NVIDIA GPUs: a few rows by quick_sm80.cu, batches on Hopper by quick_sm90.cu, and the dense weight."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from ..device import Device
from ..errors import ArgumentError
from ..formats import UNIT_ROUNDOFF
from ..types import SCALE_DTYPES, Format, Problem, Rounding
from . import build, dense, quick_batch, stream
from .registry import Call, Grouped, Kernel, register
from .stream import Cost, groups_of

ROWS = (1, 2, 4, 8, 16)
# Of an expert in one reading of its weight: two readings for eight rows each take less than one for sixteen.
EXPERT_ROWS = (1, 2, 4, 8)
EXPERTS = "PPPPPPiiiiiiiii"
SIZES = stream.sizes_of(ROWS)
# Bytes of shared memory that a thread block of an sm_90 may have.
HOPPER_SHARED = 227 << 10


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
        return 256 + (4 * max(self.groups, 1) if self.format.zero == "float" else 0)

    @property
    def limit(self) -> float:
        return 0.67 if self.rows <= 8 else 0.9


class Experts(Shape):
    """One specialisation of quick_sm80.cu for the weights of many experts."""

    ENTRY: ClassVar[str] = "quick_grouped"

    @staticmethod
    def warps_of(format: Format, rows: int, groups: int) -> int:
        # Beside zeros that take registers of their own, those of the shares would spill.
        return 8 if format.zero == "float" and rows == 8 else Shape.warps_of(format, rows, groups)

    @property
    def defines(self) -> build.Defines:
        return (*super().defines, ("LQ_GROUPED", 1))


def few_rows(format: Format) -> int:
    """Beyond so many rows Hopper's warpgroups are faster."""
    return 8 if format.bits < 8 else 2


def _run(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor,
    other: Tensor | None = None,
) -> None:  # fmt: skip
    if x.shape[0] <= few_rows(call.format) or not quick_batch.run(x, parts, bias, call, out, other):
        stream.run(Shape, SIZES, ROWS[0], x, parts, bias, call, out, other)


class ExpertsLauncher:
    """The launches of one call for so many experts on one device, for one number of rows of an expert."""

    def __init__(self, call: Call, plan: stream.Cut, device_index: int, modern: bool, sms: int) -> None:
        shape = plan.shape
        self.function = build.load_cuda(shape.SOURCE, shape.ENTRY, EXPERTS, shape.defines, device_index, plan.shared)
        # As many as run at once: they share out what there is to do by themselves.
        self.grid = (plan.split, stream.at_once(plan.split, sms), 1)
        self.threads, self.shared, self.modern = 32 * shape.warps, plan.shared, modern
        sizes = (plan.tiles, plan.range, stream.stored_groups(call), stream.span_of(call))
        self.values, self.wide = (call.n, call.k, *sizes), call.k % 8 == 0

    def __call__(self, x: Tensor, parts: Sequence[int], ends: Tensor, out: Tensor, queue: int) -> None:
        at = x.data_ptr()
        pointers = (at, *parts[:3], ends.data_ptr(), out.data_ptr())
        values = (*pointers, len(ends), len(x), *self.values, int(self.wide and not at & 15))
        self.function.launch(self.grid, self.threads, self.shared, (self.grid[0], 1, 1), queue, values, self.modern)


@functools.lru_cache(maxsize=4096)
def experts_launcher(
    call: Call, x_dtype: torch.dtype, rows: int, experts: int, device_index: int
) -> ExpertsLauncher | None:
    """What runs `experts` experts that have rows, `rows` of each at a time; None where x does not fit."""
    p = torch.cuda.get_device_properties(device_index)
    gpu = (p.multi_processor_count, p.shared_memory_per_block_optin, p.major >= 9)
    plan = stream.cut(Experts, replace(call, n=experts * call.n), x_dtype, rows, gpu)
    return None if plan is None else ExpertsLauncher(call, plan, device_index, gpu[2], gpu[0])


def expert_rows(m: int, experts: int) -> int:
    """Rows of an expert in one reading: seldom has one more than four times its share of all m."""
    wanted = min(m, -(-4 * m // experts))
    return next((rows for rows in EXPERT_ROWS if rows >= wanted), EXPERT_ROWS[-1])


def _run_experts(x: Tensor, parts: Sequence[Tensor], ends: Tensor, call: Call, out: Tensor) -> None:
    index, experts, rows = x.device.index, min(len(ends), len(x)), expert_rows(len(x), len(ends))
    addresses = stream.pointers(parts, call)
    launch = experts_launcher(call, x.dtype, rows, experts, index)
    while launch is None and rows > 1:
        rows //= 2
        launch = experts_launcher(call, x.dtype, rows, experts, index)
    if launch is None:
        raise ArgumentError("k", call.k, "as much as a row of x leaves room for in shared memory")
    launch(x, addresses, ends, out, torch._C._cuda_getCurrentRawStream(index))


def _experts_seconds(problem: Problem, experts: int, layout: str, device: Device) -> sympy.Expr:
    """Each expert that has rows is read once for eight of them, at the rate at which one weight is."""
    eight = next(cost for cost in COSTS if cost.m == EXPERT_ROWS[-1])
    passes = sympy.Min(experts, problem.m) * sympy.ceiling(problem.m / (eight.m * experts))
    return device.launch + eight.start + passes * eight.work(problem, layout, device)


def _accepts(call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    return "affine weights" if call.format.form != "affine" else stream.refusal(call, x_dtype)


def _rounding(call: Call, x_dtype: torch.dtype) -> Rounding:
    # The product with a scale is rounded, and a scale of another type before; codes less a whole zero of at most 8 bits
    # are exact in x's dtype, another zero is rounded, and the difference.
    u, f = UNIT_ROUNDOFF[x_dtype], call.format
    times = 1 + 2 * (f.zero != "none") + (SCALE_DTYPES[f.scale_dtype] != x_dtype)
    return Rounding(weight=times * u + 2.0**-22, accumulate=2.0**-22, out=u)


# Least squares over lqcompile/measured/nvidia_h200_quick.json and, of nvidia_h200_models.json, what `models.fitted`
# names, 3 to 4 % off there (median); sixteen rows, which only other GPUs than Hopper's take so, within 30 %.
COSTS = (
    Cost(2, 2.2e-6, 1.0, 9.0e-9, 0.4e-9),
    Cost(4, 2.5e-6, 1.0, 10.8e-9, 1.5e-9),
    Cost(8, 2.3e-6, 1.0, 21.6e-9, 2.2e-9),
    Cost(16, 1.5e-6, 3.2),
)


def _seconds(problem: Problem, layout: str, device: Device) -> sympy.Expr:
    few = stream.seconds(COSTS, problem, layout, device)
    call, m = Call(layout, problem.format, problem.n, problem.k), problem.m
    if device.arch != "sm_90" or call.k % 8:
        return few
    plans = [quick_batch.plan(call, problem.x_dtype, r, device.processors, HOPPER_SHARED) for r in quick_batch.TILES]
    pieces = [
        (device.launch + p.seconds, m <= r) for p, r in zip(plans, quick_batch.TILES, strict=True) if p is not None
    ]
    if len(pieces) < len(plans):
        return few
    beyond = device.launch + quick_batch.seconds_beyond(call, problem.x_dtype, m, device.processors, HOPPER_SHARED)
    return sympy.Piecewise((few, m <= few_rows(problem.format)), *pieces, (beyond, True))


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
        epilogues=("silu_mul", "add"),
        grouped=Grouped(_run_experts, stream.refusal, _experts_seconds),
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
        several = Experts(f, x_dtype, 8, groups, Experts.warps_of(f, 8, groups), 2, epilogue="silu_mul")
        yield "quick_sm80.cu", "quick_grouped", several.defines
        yield "quick_dense.cu", "quick_dense", stream.dense_defines(f, x_dtype)
    table = Format("table", 3, 64, "none", "float32")
    yield "quick_dense.cu", "quick_dense", stream.dense_defines(table, torch.float16)


def _hopper() -> Iterator[tuple[str, str, build.Defines]]:
    for (f, x_dtype), rows in itertools.product(_SPREAD, (16, 128)):
        batch = quick_batch.Batch(f, x_dtype, rows, groups_of(f, 1024) or 0, 8, 4, 1, 2)
        yield "quick_sm90.cu", "quick_batch", batch.defines


CUDA_VARIANTS, HOPPER_VARIANTS = list(_variants()), list(_hopper())
