"""Dequantize into a dense tile, then let the vendor's matmul run: the readable truth, and the path for large m."""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch.nn import functional as F

from ..device import Device
from ..formats import UNIT_ROUNDOFF, code_range
from ..types import Problem, Rounding
from .layout import LAYOUTS, unpack_plane
from .registry import Call, Kernel, register


def dequantize(parts: Sequence[torch.Tensor], call: Call, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [n, k] that `parts` hold, computed in float32 or better and rounded once to `dtype`."""
    f = call.format
    work = torch.float64 if dtype == torch.float64 else torch.float32
    names = LAYOUTS[call.layout].names(f)
    named = dict(zip(names, parts, strict=True))
    planes = [p for name, p in named.items() if name.startswith("plane")]
    widths = LAYOUTS[call.layout].widths(f)
    shape = (call.n, call.k // f.group, f.group)
    if f.form == "binary":
        dense = torch.zeros(shape, dtype=work, device=parts[0].device)
        for i, plane in enumerate(planes):
            sign = unpack_plane(plane, 1, call.k, work).contiguous().mul_(2).sub_(1).view(shape)
            dense.addcmul_(sign, named["alpha"][..., i, None].to(work))
        if "offset" in named:
            dense += named["offset"].unsqueeze(-1).to(work)
        return dense.view(call.n, call.k).to(dtype)
    if f.form == "table":
        index = _codes(planes, widths, call.k, torch.int32)
        table = named["table"].to(work)
        if table.ndim == 1:
            dense = F.embedding(index, table.unsqueeze(1)).view(shape)
        else:
            rows = table.view(call.n, -1, 1 << f.bits).expand(call.n, shape[1], 1 << f.bits)
            dense = rows.gather(-1, index.view(shape).long())
    else:
        dense = _codes(planes, widths, call.k, work).view(shape)
        # One pass less where the zero is one number: codes are stored from 0, a signed format counts from its least.
        low = code_range(f)[0]
        dense = dense.sub_(named["zero"].unsqueeze(-1).to(work)) if "zero" in named else dense.add_(low)
    return dense.mul_(named["scale"].unsqueeze(-1).to(work)).view(call.n, call.k).to(dtype)


def _codes(planes: Sequence[torch.Tensor], widths: Sequence[int], k: int, dtype: torch.dtype) -> torch.Tensor:
    codes, shift = unpack_plane(planes[0], widths[0], k, dtype), widths[0]
    for plane, width in zip(planes[1:], widths[1:], strict=True):
        codes = codes.add(unpack_plane(plane, width, k, dtype), alpha=1 << shift)
        shift += width
    return codes.contiguous()


def _run(
    x: torch.Tensor, parts: Sequence[torch.Tensor], bias: torch.Tensor | None, call: Call, out: torch.Tensor
) -> None:
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
    size, planes = problem.n * problem.k, len(LAYOUTS[layout].widths(problem.format))
    # Each plane is looked up, scaled, and written as float32; the matmul reads the result.
    unpack = size * (8.0 * (planes + 1) + problem.x_dtype.itemsize) / device.bandwidth
    return device.launch + unpack + 2.0 * problem.m * size / device.rate


register(
    Kernel(
        name="dense",
        layouts=("lut", "quick"),
        devices=("cpu", "cuda"),
        summary="every format; dequantize to a dense tile, then the vendor's matmul",
        run=_run,
        accepts=_accepts,
        rounding=_rounding,
        seconds=_seconds,
    )
)
