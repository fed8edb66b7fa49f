"""Quantized models as anyone might write them, for tests and measurements."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Dequant(nn.Module):
    """A 4-bit linear layer as anyone might write it: two codes a byte, a scale and a zero point a group."""

    def __init__(self, n: int, k: int, group: int = 32, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.n, self.group = n, group
        self.register_buffer("q", torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=g))
        self.scale = nn.Parameter(torch.rand(n, k // group, 1, generator=g) * 0.1 + 0.01, requires_grad=False)
        self.register_buffer("zero", torch.randint(0, 16, (n, k // group, 1), dtype=torch.uint8, generator=g))
        self.bias = nn.Parameter(torch.randn(n, generator=g))

    def weight(self) -> torch.Tensor:
        """The dense weight [n, k]."""
        codes = torch.stack([self.q & 15, self.q >> 4], -1).view(self.n, -1, self.group)
        return ((codes.float() - self.zero.float()) * self.scale).view(self.n, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight().to(x.dtype), self.bias.to(x.dtype))


def mlp() -> nn.Sequential:
    return nn.Sequential(Dequant(64, 128, seed=1), nn.ReLU(), Dequant(32, 64, seed=2)).eval()


def compiled(model: nn.Module, **options):
    """`model` compiled for "lq", in strict mode."""
    return torch.compile(model, backend="lq", options={"strict": True, **options})


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two float32 results agree."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)
