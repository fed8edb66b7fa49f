"""AMD Quark."""

from __future__ import annotations

import quark.torch.kernel
import torch
from torch import nn

from .harness import Make, rows


class Quark(nn.Module):
    """Quark's own operation for constants; its layers cut the graph at a switch of DTensor that Dynamo cannot trace."""

    def __init__(self, dtype: str, scheme: str, group: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        shape = (128, 256 // group) if scheme == "per_group" else (128,)
        low, high = {"uint4": (0, 16), "int8": (-128, 128)}[dtype]
        self.register_buffer("codes", torch.randint(low, high, (128, 256), generator=g, dtype=torch.int32))
        self.register_buffer("scale", torch.rand(shape, generator=g) * 0.02 + 1e-3)
        self.register_buffer("zero", torch.randint(max(low, 0), high, shape, generator=g).float())
        self.arguments = (1 if scheme == "per_group" else 0, group, scheme)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = torch.ops.quark.dequantize(self.dtype, self.codes, self.scale, self.zero, *self.arguments)
        return nn.functional.linear(x, w)


assert quark.torch.kernel
CASES: dict[str, Make] = {
    "uint4 groups": lambda: (Quark("uint4", "per_group", 64), rows()),
    "int8 channel": lambda: (Quark("int8", "per_channel", 256), rows()),
}
