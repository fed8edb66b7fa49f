"""LUT-GEMM on NVIDIA GPUs: which specialisation of lut.cu runs a call, how its work is cut, and the dense weight."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from ..device import Device
from ..formats import UNIT_ROUNDOFF
from ..types import Format, Problem, Rounding
from . import build, dense, stream
from .layout import LUT
from .registry import Call, Kernel, register
from .stream import Cost, groups_of

BITS, BYTES, HALVES = 0, 1, 2
# Rows of x of the specialisations of lut.cu, and by a number of rows which of them takes it.
ROWS = {"affine": (1, 2, 4, 8), "binary": (1, 2, 4, 8), "table": (2, 4, 8)}
SIZES = {form: stream.sizes_of(rows) for form, rows in ROWS.items()}
WITHOUT_BITS = {form: stream.sizes_of([r for r in rows if r > 1]) for form, rows in ROWS.items()}


class Shape(stream.Shape):
    """One specialisation of lut.cu."""

    SOURCE: ClassVar[str] = "lut.cu"
    ENTRY: ClassVar[str] = "lut_gemm"

    @property
    def mode(self) -> int:
        """x as bits, bytes or halves: what each further row costs grows less from one to the next."""
        if self.format.form == "table" or self.rows > 4:
            return HALVES
        return BITS if self.rows == 1 else BYTES

    @property
    def defines(self) -> build.Defines:
        return (("LQ_FORM", stream.FORMS[self.format.form]), ("LQ_MODE", self.mode), *super().defines)

    @staticmethod
    def warps_of(format: Format, rows: int, groups: int) -> int:
        if rows == 4 and format.form != "table":
            return 16 if groups <= 1 and format.bits <= 4 else 8
        return 16 if groups < 4 and format.bits * max(groups, 1) <= (8 if rows == 8 else 12) else 8

    @property
    def columns(self) -> int:
        return 8 if self.mode == HALVES else self.rows

    @property
    def extra(self) -> int:
        return 256 * 32 * 4 if self.format.form == "table" else 0

    @property
    def block(self) -> int:
        facts = 1 + max(self.groups, 1) * (4, 2, 1)[self.mode]
        return (384, 512, 256)[self.mode] + facts * 4 * self.columns // self.rows

    @property
    def limit(self) -> float:
        return (0.67, 0.8 if self.rows == 2 else 1.25, 1.6)[self.mode]

    @property
    def effort(self) -> int:
        return (1200, 800, 800)[self.mode]


@functools.cache
def _multiplies_bits(device_index: int) -> bool:
    """Whether tensor cores take single bits; from Blackwell on the compiler writes out a long emulation."""
    return torch.cuda.get_device_properties(device_index).major < 10


def _run(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor,
    other: Tensor | None = None,
) -> None:  # fmt: skip
    form = call.format.form
    if form == "table" and parts[-1].ndim > 1:
        # A look-up needs the whole table in shared memory, for every lane.
        return dense.run(x, parts, bias, call, out, other)
    sizes = SIZES if _multiplies_bits(x.device.index) else WITHOUT_BITS
    stream.run(Shape, sizes[form], ROWS[form][0], x, parts, bias, call, out, other)


def _accepts(call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    if call.format.form == "table" and call.format.bits > 4:
        return "tables of at most 4 bits"
    return stream.refusal(call, x_dtype)


def _rounding(call: Call, x_dtype: torch.dtype) -> Rounding:
    # A table of a whole weight is looked up as halves, one by row or group goes by the dense weight. Other weights are
    # sums of planes in float32, whose rounding is relative to the planes, and they may cancel.
    u = UNIT_ROUNDOFF[x_dtype]
    return Rounding(weight=u if call.format.form == "table" else 2.0**-11, accumulate=2.0**-22, out=u)


# Least squares over lqcompile/measured/nvidia_h200.json and, of nvidia_h200_models.json, what `models.fitted` names:
# 3 to 8 % off there (median), and tables, which only the first has, 2 %, at m = 8 8 %.
SUMS = (
    Cost(1, 2.0e-6, 1.09, 0.5e-9, 3.9e-9),
    Cost(2, 2.2e-6, 1.23, 0.0, 12.9e-9),
    Cost(4, 2.9e-6, 1.59, 12.3e-9, 24.4e-9),
    Cost(8, 3.4e-6, 2.3, 6.3e-9),
)
LOOKUPS = (Cost(2, 4.6e-6, 1.39), Cost(4, 4.6e-6, 1.51), Cost(8, 3.1e-6, 2.51))


def _seconds(problem: Problem, layout: str, device: Device) -> sympy.Expr:
    return stream.seconds(LOOKUPS if problem.format.form == "table" else SUMS, problem, layout, device)


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
        epilogues=("silu_mul", "add"),
    )
)


def dequantize(parts: Sequence[Tensor], call: Call, dtype: torch.dtype) -> Tensor | None:
    """The dense weight [n, k] by lut_dense.cu; None for what it does not take."""
    return stream.dense_weight(parts, call, dtype, "lut_dense", 8, dense_defines(call.format, dtype))


dense.FAST["lut", "cuda"] = dequantize


def dense_defines(f: Format, dtype: torch.dtype) -> build.Defines:
    """The specialisation of lut_dense.cu for a format and an output dtype."""
    nibbles = int(LUT.widths(f, "cuda") == (4,) and f.form == "table")
    return (("LQ_NIBBLES", nibbles), *stream.dense_defines(f, dtype))


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
            shape = Shape(f, x_dtype, rows, groups, Shape.warps_of(f, rows, groups), 2)
            yield "lut.cu", "lut_gemm", shape.defines
        yield "lut_dense.cu", "lut_dense", dense_defines(f, x_dtype)


CUDA_VARIANTS = list(_variants())
