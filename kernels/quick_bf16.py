"""Many rows of bfloat16 on x86-64 with AMX: weights of any form, rounded to bfloat16, by quick_bf16.cpp."""

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
    u = UNIT_ROUNDOFF[torch.bfloat16]
    return Rounding(weight=u + 2.0**-22, accumulate=2.0**-24, out=u)


def _seconds(problem: Problem, layout: str, device: Device) -> sympy.Expr:
    """A read of the packed weight, its unpacking for each chunk of x, and the arithmetic."""
    size = problem.n * problem.k
    read = LAYOUTS[layout].packed_bytes(problem.format, problem.n, problem.k, "cpu") / device.bandwidth
    each = PLANES[0] + PLANES[1] * problem.format.bits if problem.format.form == "binary" else UNPACK
    unpack = each * size / device.rate * sympy.Max(1, problem.m / CHUNK)
    work = 2.0 * sympy.Max(problem.m, LEAST) * size / (RATE * device.rate)
    return device.launch + read + unpack + work


# Rows of x that share an unpacked weight, as in quick_bf16.cpp.
CHUNK = 512
# From int4 g128 at m = 32 to 512 on one core of a Sapphire Rapids: rows that take no longer than one, for unpacking is
# not hidden by so little arithmetic; and rates in units of the device's dense float32 rate.
LEAST = 48
UNPACK, RATE = 10.0, 6.6
# Instead of UNPACK for binary weights: once, and for each plane.
PLANES = 4.0, 3.0

for name, layout, forms in (("quick_bf16", "quick", ("affine", "table")), ("lut_bf16", "lut", ("binary",))):
    cpu.declare(
        name,
        layout,
        "quick_bf16.cpp",
        forms=forms,
        summary=f"{' and '.join(forms)} weights in bf16, many rows of bf16; AMX",
        isa=native.AMX_BF16,
        x_dtypes=(torch.bfloat16,),
        rounding=_rounding,
        seconds=_seconds,
    )
