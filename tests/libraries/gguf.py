"""GGUF: byte matrices with scales inside, dequantized by diffusers and by transformers."""

from __future__ import annotations

import importlib.util

import numpy
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import nn
from torch.nn import functional as F

from .harness import Make, linear, rows


def packed(kind: str, n: int = 128, k: int = 512) -> torch.Tensor:
    """uint8 [n, bytes of a row]: quantized by gguf, or random bytes with finite scales where it cannot quantize."""
    type_ = GGMLQuantizationType[kind]
    try:
        return torch.from_numpy(quants.quantize(linear(n, k).weight.numpy(), type_))
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[type_]
        g = torch.Generator().manual_seed(3)
        bytes_ = torch.randint(0, 256, (n, k // block, size), dtype=torch.uint8, generator=g)
        for place in _halves(kind, size):
            half = torch.rand((n, k // block), generator=g) * 0.01 + 1e-4
            bytes_[..., place : place + 2] = half.half().unsqueeze(-1).view(torch.uint8)
        finite = quants.dequantize(bytes_.view(n, -1).numpy(), type_)
        assert numpy.isfinite(finite).all()
        return bytes_.view(n, -1)


def _halves(kind: str, size: int) -> tuple[int, ...]:
    """Where the float16 scales of a block stand."""
    return {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))


def _diffusers(kind: str, dtype: torch.dtype = torch.float32) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        bytes_ = packed(kind)
        layer = GGUFLinear(512, 128, False, dtype)
        layer.weight = GGUFParameter(bytes_, quant_type=GGMLQuantizationType[kind])
        return layer, rows(512, dtype)

    return make


class Transformers(nn.Module):
    """What transformers computes for a GGUF weight."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = int(GGMLQuantizationType[kind]), dtype
        self.register_buffer("weight", packed(kind))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from transformers.integrations.gguf.dequant import dequantize

        return F.linear(x, dequantize(self.weight, self.kind, self.dtype).view(128, 512))


KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
DIFFUSERS: dict[str, Make] = {
    **{f"diffusers {kind}": _diffusers(kind) for kind in KINDS},
    "diffusers Q4_K bf16": _diffusers("Q4_K", torch.bfloat16),
}
CASES: dict[str, Make] = {
    **(DIFFUSERS if importlib.util.find_spec("diffusers") else {}),
    **{
        f"transformers {kind}": lambda kind=kind: (Transformers(kind, torch.float32), rows(512))
        for kind in (*(k for k in KINDS if k not in ("Q5_0", "Q5_1")), "IQ2_XXS", "IQ3_XXS")
    },
    "transformers Q4_K bf16": lambda: (Transformers("Q4_K", torch.bfloat16), rows(512, torch.bfloat16)),
}
