"""QUICK on x86-64: affine weights by quick.cpp."""

from __future__ import annotations

from . import cpu, dense

cpu.declare(
    "quick_cpu",
    "quick",
    "quick.cpp",
    forms=("affine",),
    summary="affine weights; exact dots of codes with digits of x",
    rounding=cpu.rounding,
    seconds=cpu.seconds,
)

dense.FAST["quick", "cpu"] = cpu.dequantize
