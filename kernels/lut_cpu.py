"""LUT-GEMM on x86-64: binary weights by lut.cpp, few rows of x by look-ups and more plane by plane."""

from __future__ import annotations

from . import cpu

cpu.declare(
    "lut_cpu",
    "lut",
    "lut.cpp",
    forms=("binary",),
    summary="binary weights; look-ups for few rows, exact dots for more",
    rounding=cpu.rounding,
    seconds=cpu.seconds,
)
