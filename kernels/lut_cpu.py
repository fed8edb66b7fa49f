"""LUT-GEMM on x86-64: binary weights by lut.cpp, one row of x by look-ups and more plane by plane."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu
from .registry import Call, Kernel, register


def _run(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor) -> None:
    cpu.run("lut.cpp", x, parts, bias, call, out)


def _accepts(call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    return "binary weights" if call.format.form != "binary" else cpu.refusal(call)


register(
    Kernel(
        name="lut_cpu",
        layouts=("lut",),
        devices=("cpu",),
        summary="binary weights; groups of 32, 64, 128 i or k; look-ups for one row, exact dots for more",
        run=_run,
        accepts=_accepts,
        rounding=cpu.rounding,
        seconds=cpu.seconds,
        batch_invariant=True,
    )
)
