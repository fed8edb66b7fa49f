"""PyTorch's own: decomposed operations of PT2E, packed int8 and int4 matmuls, reference modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.ao.quantization.fx._decomposed
from torch import nn
from torch.nn import functional as F

from lqcompile.errors import Reason

from .harness import Make, linear, rows


class Layer(nn.Module):
    """Stored tensors, and the function of them and of x that is the layer."""

    def __init__(self, body: Callable[..., torch.Tensor], **tensors: torch.Tensor) -> None:
        super().__init__()
        self.body, self.names = body, tuple(tensors)
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x, *(getattr(self, name) for name in self.names))


def _int8() -> tuple[torch.Tensor, torch.Tensor]:
    w = linear().weight
    s = w.abs().amax(1) / 127
    return (w / s[:, None]).round().to(torch.int8), s


q = torch.ops.quantized_decomposed


def _tensor() -> nn.Module:
    return Layer(lambda x, w: F.linear(x, q.dequantize_per_tensor(w, 0.02, 3, -128, 127, torch.int8)), w=_int8()[0])


def _channel(zero: bool) -> nn.Module:
    w, s = _int8()
    z = torch.arange(128) % 7 if zero else None

    def body(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, *z: torch.Tensor) -> torch.Tensor:
        return F.linear(x, q.dequantize_per_channel(w, s, z[0] if z else None, 0, -128, 127, torch.int8))

    return Layer(body, w=w, s=s, **({} if z is None else {"z": z}))


def _group() -> nn.Module:
    w, _ = _int8()

    def body(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return F.linear(x, q.dequantize_per_channel_group(w, s, z, -128, 127, torch.int8, 64, torch.float32))

    return Layer(body, w=w, s=torch.rand(128, 4) * 0.01 + 1e-3, z=torch.zeros(128, 4))


def _int8pack(dtype: torch.dtype) -> nn.Module:
    w, s = _int8()
    return Layer(lambda x, w, s: torch._weight_int8pack_mm(x, w, s), w=w, s=s.to(dtype))


def _int4pack(dtype: torch.dtype) -> nn.Module:
    codes = torch.randint(0, 16, (128, 256), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    scales = torch.rand(4, 128, 2).mul(0.02).to(dtype)
    return Layer(lambda x, w, s: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 64, s), w=packed, s=scales)


CASES: dict[str, Make] = {
    "per tensor": lambda: (_tensor(), rows()),
    "per channel": lambda: (_channel(False), rows()),
    "per channel zero": lambda: (_channel(True), rows()),
    "per channel group": lambda: (_group(), rows()),
    "int8pack": lambda: (_int8pack(torch.bfloat16), rows(dtype=torch.bfloat16)),
    "int8pack f32": lambda: (_int8pack(torch.float32), rows()),
    "int4pack": lambda: (_int4pack(torch.bfloat16), rows(dtype=torch.bfloat16)),
    "int4pack f32": lambda: (_int4pack(torch.float32), rows()),
}
KEPT = {"int8pack": Reason.SLOWER, "int8pack f32": Reason.SLOWER, "int4pack": Reason.SLOWER}
