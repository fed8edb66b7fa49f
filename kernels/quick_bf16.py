"""QUICK for many rows of bfloat16 on x86-64 with AMX: affine weights, rounded to bfloat16, by quick_bf16.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import Tensor

from ..device import Device
from ..formats import UNIT_ROUNDOFF
from ..types import Problem, Rounding
from . import cpu, native
from .layout import LAYOUTS
from .registry import Call, Kernel, register


def _run(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor) -> None:
    cpu.run("quick_bf16.cpp", x, parts, bias, call, out, native.AMX_BF16)


def _accepts(call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    if call.format.form != "affine":
        return "affine weights"
    if x_dtype != torch.bfloat16:
        return "x of bfloat16"
    return cpu.refusal(call) or (None if native.has(native.AMX_BF16) else "x86-64 with AMX for bfloat16")


def _rounding(call: Call, x_dtype: torch.dtype) -> Rounding:
    u = UNIT_ROUNDOFF[torch.bfloat16]
    return Rounding(weight=u + 2.0**-22, accumulate=2.0**-24, out=u)


def _seconds(problem: Problem, layout: str, device: Device) -> sympy.Expr:
    """A read of the packed weight, its unpacking for each chunk of x, and the arithmetic."""
    size = problem.n * problem.k
    read = LAYOUTS[layout].packed_bytes(problem.format, problem.n, problem.k, "cpu") / device.bandwidth
    unpack = UNPACK * size / device.rate * sympy.Max(1, problem.m / CHUNK)
    work = 2.0 * sympy.Max(problem.m, LEAST) * size / (RATE * device.rate)
    return device.launch + read + unpack + work


# Rows of x that share an unpacked weight, as in quick_bf16.cpp.
CHUNK = 512
# From int4 g128 at m = 32 to 512 on one core of a Sapphire Rapids: rows that take no longer than one, for unpacking is
# not hidden by so little arithmetic; and rates in units of the device's dense float32 rate.
LEAST = 48
UNPACK, RATE = 10.0, 6.6

register(
    Kernel(
        name="quick_bf16",
        layouts=("quick",),
        devices=("cpu",),
        summary="affine weights, rounded to bf16, many rows of bf16; groups of 32, 64, 128 i or k; AMX",
        run=_run,
        accepts=_accepts,
        rounding=_rounding,
        seconds=_seconds,
        batch_invariant=True,
    )
)
