"""Dequantize into a dense tile, then let the vendor's matmul run: the readable truth, and the path for large m."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import sympy
import torch

from .. import cost
from ..device import Device
from ..formats import UNIT_ROUNDOFF, code_range
from ..types import Problem, Rounding
from . import epilogues
from .layout import LAYOUTS
from .registry import Call, Grouped, Kernel, discover, register

# By layout and device type: a kernel that makes the dense weight, or None where it does not take the call.
FAST: dict[tuple[str, str], Callable[[Sequence[torch.Tensor], Call, torch.dtype], torch.Tensor | None]] = {}


def dequantize(parts: Sequence[torch.Tensor], call: Call, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [n, k] that `parts` hold, computed in float32 or better and rounded once to `dtype`."""
    discover()
    fast = FAST.get((call.layout, parts[0].device.type))
    made = None if fast is None else fast(parts, call, dtype)
    return _by_torch(parts, call, dtype) if made is None else made


def _by_torch(parts: Sequence[torch.Tensor], call: Call, dtype: torch.dtype) -> torch.Tensor:
    f = call.format
    work = torch.float64 if dtype == torch.float64 else torch.float32
    # In bytes where codes are looked up: they are a quarter of the traffic of floats.
    stored = work if f.form == "affine" else torch.uint8
    codes, named, table = LAYOUTS[call.layout].read(parts, f, call.n, call.k, stored, parts[0].device.type)
    shape = (call.n, call.k // f.group, f.group)
    if f.form == "binary":
        # Level by level in float64: the planes of a small weight may cancel, and a sum of theirs would keep the error.
        levels = _levels(named["alpha"].to(torch.float64), named.get("offset"))
        index = codes.view(shape).long()
        return levels.to(dtype).gather(-1, index).view(call.n, call.k)
    if table is not None:
        index = codes.view(shape).long()
        table = table.to(work)
        rows = table.view(1 if table.ndim == 1 else call.n, -1, 1 << f.bits)
        dense = rows.expand(call.n, shape[1], 1 << f.bits).gather(-1, index)
    else:
        dense = codes.view(shape)
        # One pass less where the zero is one number: codes are stored from 0, a signed format counts from its least.
        low = code_range(f)[0]
        dense = dense.sub_(named["zero"].unsqueeze(-1).to(work)) if "zero" in named else dense.add_(low)
    return dense.mul_(named["scale"].unsqueeze(-1).to(work)).view(call.n, call.k).to(dtype)


def _levels(alpha: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """The 2**bits values that the weights of each group can take, [n, groups, 2**bits] in float64."""
    bits = alpha.shape[-1]
    code = torch.arange(1 << bits, device=alpha.device)
    signs = ((code >> torch.arange(bits, device=alpha.device).unsqueeze(1)) & 1).to(torch.float64) * 2 - 1
    levels = alpha @ signs
    return levels if offset is None else levels + offset.unsqueeze(-1).to(torch.float64)


def run(
    x: torch.Tensor, parts: Sequence[torch.Tensor], bias: torch.Tensor | None, call: Call, out: torch.Tensor,
    other: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """y[m, n] = x[m, k] @ w[n, k].T + bias[n] and the call's epilogue into `out`, by way of the dense weight."""
    if call.epilogue:
        return epilogues.unfused(run, x, parts, bias, call, out, other)
    w = dequantize(parts, call, x.dtype).t()
    if bias is None:
        torch.mm(x, w, out=out)
    else:
        torch.addmm(bias, x, w, out=out)


def _accepts(call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    return None


def _rounding(call: Call, x_dtype: torch.dtype) -> Rounding:
    u = UNIT_ROUNDOFF[x_dtype]
    return Rounding(weight=u + 2.0**-22, accumulate=2.0**-24, out=u)


def _seconds(problem: Problem, layout: str, device: Device) -> sympy.Expr:
    f, planes, start = problem.format, len(LAYOUTS[layout].widths(problem.format)), device.launch
    if (layout, device.kind) not in FAST:
        each = (PLANE[f.form] * planes + SCALED) / device.rate
    elif device.kind == "cpu":
        each = UNPACKED[problem.x_dtype.itemsize == 2] * (1.2 if f.form == "table" else 1.0) / device.rate
    else:
        # Codes are read, the dense weight is written; planes take arithmetic.
        more, times = STARTS[layout]
        start += more
        each = times * (f.bits / 8 + problem.x_dtype.itemsize) / device.bandwidth
        if layout == "lut":
            once, plane = PLANES[f.form]
            each = max(each, (once + plane * f.bits) / device.processors)
    return start + each * problem.n * problem.k + cost.dense(problem, device)


def _experts(x: torch.Tensor, parts: Sequence[torch.Tensor], ends: torch.Tensor, call: Call, out: torch.Tensor) -> None:
    """By way of the dense weights of all experts and torch's grouped matmul, which does not wait for `ends` here."""
    w = dequantize(parts, replace(call, n=len(ends) * call.n), x.dtype).view(len(ends), call.n, call.k)
    y = torch._grouped_mm(x, w.transpose(1, 2), offs=ends)
    out.copy_(epilogues.finish(y, None, call.epilogue) if call.epilogue else y)


def _accepts_experts(call: Call, x_dtype: torch.dtype) -> str | None:
    # Where torch has no kernel of its own for experts, it reads their ends on the CPU.
    return None if x_dtype == torch.bfloat16 and call.k % 8 == 0 else "experts by x of bfloat16, k a multiple of 8"


def _experts_seconds(problem: Problem, experts: int, layout: str, device: Device) -> sympy.Expr:
    """The dense weights of all experts are made; those of experts that have rows are read again."""
    f, bytes, m = problem.format, problem.x_dtype.itemsize, problem.m
    each = problem.n * problem.k / device.bandwidth
    read = sympy.Min(experts, m) * cost.CUBLAS[1] * bytes * each
    work = 2.0 * m * problem.n * problem.k / device.rate_of(problem.x_dtype)
    starts = 2 * device.launch + STARTS[layout][0] + cost.CUBLAS[0]
    return starts + experts * (f.bits / 8 + bytes) * each + sympy.Max(read, work, evaluate=False)


# Operations of a dense float32 matmul in the time that it takes to dequantize a weight on one core with AMX: by torch
# for each plane and once; by dense.cpp to float32, and to 16 bits.
PLANE, SCALED = {"affine": 530.0, "binary": 650.0, "table": 600.0}, 190.0
UNPACKED = (165.0, 215.0)
# On a GPU: seconds beyond a launch, and times the traffic; in layout lut what a weight and each of its planes take one
# multiprocessor. By lqcompile/measured/nvidia_h200_models.json, within 20 %.
STARTS = {"lut": (4e-6, 1.0), "quick": (2e-6, 1.1)}
PLANES = {"affine": (60e-12, 19e-12), "binary": (33e-12, 31e-12), "table": (60e-12, 19e-12)}


register(
    Kernel(
        name="dense",
        layouts=("lut", "quick"),
        devices=("cpu", "cuda"),
        summary="every format; dequantize to a dense tile, then the vendor's matmul",
        run=run,
        accepts=_accepts,
        rounding=_rounding,
        seconds=_seconds,
        grouped=Grouped(_experts, _accepts_experts, _experts_seconds),
    )
)
