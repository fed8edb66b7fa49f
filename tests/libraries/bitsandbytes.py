"""bitsandbytes: NF4 and FP4, with plain and with quantized absmax, by its own fused operation or by dequantizing."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn
from torch.nn import functional as F

from lqcompile.errors import Reason

from .harness import Make, linear, rows


def _with(kind: str, nested: bool, dtype: torch.dtype = torch.float32, bias: bool = False) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        source = linear(bias=bias, dtype=dtype)
        layer = bnb.nn.Linear4bit(256, 128, bias=bias, compute_dtype=dtype, quant_type=kind, compress_statistics=nested)
        layer.load_state_dict(source.state_dict())
        return nn.Sequential(layer.to("cpu")).requires_grad_(False), rows(dtype=dtype)

    return make


class Dequantizing(nn.Module):
    """A layer that calls the library to dequantize, and multiplies by itself, as PEFT and others do."""

    def __init__(self, kind: str, nested: bool, dtype: torch.dtype) -> None:
        super().__init__()
        packed, self.state = bnb.functional.quantize_4bit(
            linear(dtype=dtype).weight.data, quant_type=kind, compress_statistics=nested, blocksize=64
        )
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", self.state.absmax)
        if nested:
            self.register_buffer("offset", self.state.offset)
            self.register_buffer("absmax2", self.state.state2.absmax)
            self.register_buffer("code2", self.state.state2.code)
        self.kind, self.nested, self.dtype = kind, nested, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        absmax = self.absmax
        if self.nested:
            blocks = torch.ops.bitsandbytes.dequantize_blockwise(absmax, self.absmax2, self.code2, 256, torch.float32)
            absmax = blocks + self.offset
        w = torch.ops.bitsandbytes.dequantize_4bit(self.packed, absmax, 64, self.kind, [128, 256], self.dtype)
        return F.linear(x, w)


class Blockwise(nn.Module):
    """8 bits by the library's dynamic map, in blocks."""

    def __init__(self) -> None:
        super().__init__()
        q, state = bnb.functional.quantize_blockwise(linear().weight.data, blocksize=64)
        self.register_buffer("q", q)
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("code", state.code)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = torch.ops.bitsandbytes.dequantize_blockwise(self.q, self.absmax, self.code, 64, torch.float32)
        return F.linear(x, w.view(128, 256))


CASES: dict[str, Make] = {
    "nf4": _with("nf4", False),
    "nf4 nested": _with("nf4", True, bias=True),
    "fp4": _with("fp4", False),
    "nf4 bf16": _with("nf4", False, torch.bfloat16),
    "fp4 bf16 nested": _with("fp4", True, torch.bfloat16, bias=True),
    **{
        f"dequantize {kind}{' nested' * nested} {str(dtype)[6:]}": lambda kind=kind, nested=nested, dtype=dtype: (
            Dequantizing(kind, nested, dtype), rows(dtype=dtype)
        )
        for kind in ("nf4", "fp4") for nested in (False, True) for dtype in (torch.float32, torch.bfloat16)
    },
    "blockwise 8 bits": lambda: (Blockwise(), rows()),
}  # fmt: skip
# On a CPU with AVX-512 the library's own kernel reads 4 bits, and ours would make the weight dense.
KEPT = dict.fromkeys(("nf4", "nf4 nested", "fp4", "nf4 bf16", "fp4 bf16 nested"), Reason.SLOWER)
