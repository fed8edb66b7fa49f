"""AutoAWQ's GEMM layer, in its own order of codes."""

from __future__ import annotations

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from torch import nn

from .harness import Make, rows


def _with(dtype: torch.dtype) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        layer = WQLinear_GEMM(4, 64, 256, 128, True, "cpu")
        for t in (layer.qweight, layer.qzeros):
            t.copy_(torch.randint(-(2**31), 2**31, t.shape, generator=g).to(t.dtype))
        layer.scales = (torch.rand(layer.scales.shape, generator=g) * 0.01 + 1e-3).half()
        layer.bias = torch.randn(128, generator=g).half()
        return layer, rows(dtype=dtype)

    return make


CASES: dict[str, Make] = {"4 bits": _with(torch.float16)}
