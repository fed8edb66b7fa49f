"""Our own dequantization: of a packed layer whose weight something else multiplies by, a mixture of experts say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...formats import code_range
from ...kernels.layout import LAYOUTS
from ...types import Format


def dequantize(parts: Sequence[Tensor], layout: str, n: int, k: int, format: str, dtype: torch.dtype) -> Tensor:
    f = Format.parse(format)
    codes, named, table = LAYOUTS[layout].read(parts, f, n, k, torch.uint8, parts[0].device.type)
    codes = codes.view(n, k // f.group, f.group)
    if f.form == "binary":
        planes = [(((codes >> i) & 1) * 2.0 - 1) * named["alpha"][..., i, None].float() for i in range(f.bits)]
        dense = sum(planes[1:], planes[0])
        return (dense + named["offset"].float().unsqueeze(-1) if "offset" in named else dense).view(n, k).to(dtype)
    scale = named["scale"].float().unsqueeze(-1)
    if table is None:
        zero = named["zero"].float().unsqueeze(-1) if "zero" in named else -code_range(f)[0]
        return ((codes.float() - zero) * scale).view(n, k).to(dtype)
    if table.ndim == 1:
        return (table[codes.long()] * scale).view(n, k).to(dtype)
    rows = table.view(n, -1, 1 << f.bits).expand(n, codes.shape[1], 1 << f.bits)
    return (rows.gather(-1, codes.long()) * scale).view(n, k).to(dtype)


DEQUANTIZE = {"lq::dequantize": dequantize}
