"""Weights of a table of up to 16 numbers on x86-64, such as NF4: few rows of x, in float32, by table.cpp."""

from __future__ import annotations

import sympy
import torch

from ..device import Device
from ..formats import UNIT_ROUNDOFF
from ..types import Problem, Rounding
from . import cpu, native
from .layout import LAYOUTS
from .registry import Call


def _rounding(call: Call, x_dtype: torch.dtype) -> Rounding:
    return Rounding(weight=2.0**-22, accumulate=2.0**-23, out=UNIT_ROUNDOFF[x_dtype])


def _seconds(problem: Problem, layout: str, device: Device) -> sympy.Expr:
    """A read of the packed weight, or its look-ups, which some rows of x share, and products."""
    size = problem.n * problem.k
    read = 1.15 * LAYOUTS[layout].packed_bytes(problem.format, problem.n, problem.k, "cpu") / device.bandwidth
    one, more, rows = OPERATIONS[native.isas()[0].name in cpu.NARROW]
    each = sympy.Piecewise((one, problem.m <= 1), (more * sympy.ceiling(problem.m / rows), True))
    return device.launch + sympy.Max(read, each * size / device.rate)


# Operations of a dense float32 matmul in the time that a weight takes with one row of x and with more, and how many
# those are: by AVX-512 and by AVX2. From g64 of 4096 x 4096 on one core of a Sapphire Rapids.
OPERATIONS = ((7.0, 14.0, 4), (22.0, 24.0, 2))

cpu.declare(
    "table_cpu",
    "quick",
    "table.cpp",
    forms=("table",),
    summary="weights of a table of up to 16 numbers; products in float32",
    rounding=_rounding,
    seconds=_seconds,
)
