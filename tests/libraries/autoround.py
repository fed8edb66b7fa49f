"""auto-round's PyTorch layers, both conventions of the zero point."""

from __future__ import annotations

import importlib

import auto_round_extension
import torch
from torch import nn

from .harness import Make, rows


def _with(module: str, bits: int) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        kind = importlib.import_module(f"auto_round_extension.torch.{module}").QuantLinear
        layer = kind(bits=bits, group_size=64, infeatures=256, outfeatures=128, bias=False)
        for name in ("qweight", "qzeros"):
            t = getattr(layer, name)
            t.copy_(torch.randint(-(2**31), 2**31, t.shape, generator=g).to(t.dtype))
        layer.scales = (torch.rand(layer.scales.shape, generator=g) * 0.01 + 1e-3).half()
        layer.post_init()
        return layer, rows(dtype=torch.float16)

    return make


assert auto_round_extension
CASES: dict[str, Make] = {
    f"{module} {bits} bits": _with(module, bits)
    for module in ("qlinear_torch", "qlinear_torch_zp")
    for bits in (2, 3, 4, 8)
}
