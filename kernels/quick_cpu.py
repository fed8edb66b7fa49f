"""QUICK on x86-64: affine weights by quick.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu, dense
from .registry import Call, Kernel, register


def _run(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor) -> None:
    cpu.run("quick.cpp", x, parts, bias, call, out)


def _accepts(call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    return "affine weights" if call.format.form != "affine" else cpu.refusal(call)


register(
    Kernel(
        name="quick_cpu",
        layouts=("quick",),
        devices=("cpu",),
        summary="affine weights; groups of 32, 64, 128 i or k; exact dots of codes with digits of x",
        run=_run,
        accepts=_accepts,
        rounding=cpu.rounding,
        seconds=cpu.seconds,
        batch_invariant=True,
    )
)

dense.FAST["quick", "cpu"] = cpu.dequantize
