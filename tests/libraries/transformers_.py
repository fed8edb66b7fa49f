"""Layers that transformers itself dequantizes: BitNet, MXFP4 experts, blocks of fp8, Metal's affine, Gemma's."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .harness import Make, linear, rows


class BitNet(nn.Module):
    """Ternary weights, four to a byte, as transformers unpacks them; the scale comes after the matmul."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.integrations.bitnet import pack_weights

        self.register_buffer("weight", pack_weights(torch.randint(-1, 2, (128, 256)).float()))
        self.register_buffer("weight_scale", torch.rand(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from transformers.integrations.bitnet import unpack_weights

        return F.linear(x, unpack_weights(self.weight, dtype=x.dtype)) * self.weight_scale


class MxFp4(nn.Module):
    """Experts of gpt-oss: a table, exponents of two for blocks of 32, one batched matmul."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("blocks", torch.randint(0, 256, (4, 64, 8, 16), dtype=torch.uint8, generator=g))
        self.register_buffer("scales", torch.randint(118, 128, (4, 64, 8), dtype=torch.uint8, generator=g))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

        return torch.bmm(x, _convert_moe_packed_tensors(self.blocks, self.scales, dtype=x.dtype))


class Fp8Blocks(nn.Module):
    """8-bit floats with a scale for each block of 128 x 128, as the fine-grained quantizer dequantizes them."""

    def __init__(self) -> None:
        super().__init__()
        w = linear(256, 256).weight
        self.register_buffer("weight", (w * 100).to(torch.float8_e4m3fn))
        self.register_buffer("scale", (torch.rand(2, 2) * 0.01 + 1e-3).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = self.weight.to(self.scale.dtype).view(2, 128, 2, 128)
        w = (blocks * self.scale.view(2, 1, 2, 1)).view(256, 256)
        return F.linear(x, w.to(x.dtype))


class Metal(nn.Module):
    """q * s + b in groups, eight codes to a uint32, as the Metal integration unpacks them."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        words = torch.randint(-(2**31), 2**31, (128, 32), generator=g).to(torch.int32)
        self.register_buffer("weight", words.view(torch.uint32))
        self.register_buffer("scales", torch.rand(128, 4, generator=g) * 0.02)
        self.register_buffer("biases", torch.rand(128, 4, generator=g) * -0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from transformers.integrations.metal_quantization import _affine_dequantize_tensor

        return F.linear(x, _affine_dequantize_tensor(self.weight, self.scales, self.biases, 64, 4))


CASES: dict[str, Make] = {
    "bitnet": lambda: (BitNet(), rows()),
    "bitnet bf16": lambda: (BitNet(), rows(dtype=torch.bfloat16)),
    "mxfp4 experts": lambda: (MxFp4(), torch.randn(4, 5, 256, dtype=torch.bfloat16)),
    "fp8 blocks": lambda: (Fp8Blocks(), rows()),
    "metal": lambda: (Metal(), rows()),
}
