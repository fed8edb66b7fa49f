"""NNCF, AMD Quark, Brevitas."""

from __future__ import annotations

import torch
from torch import nn

from .harness import Make, linear, rows


class Wrapped(nn.Module):
    """NNCF keeps its hooks in a submodule of the model, so that is to be more than a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _nncf(mode: str, **more: int) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        import nncf

        model = Wrapped()
        data = nncf.Dataset([rows()])
        return nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode), dataset=data, **more), rows()

    return make


class Quark(nn.Module):
    """Quark's own operation for constants; its layers cut the graph at a switch of DTensor that Dynamo cannot trace."""

    def __init__(self, dtype: str, scheme: str, group: int) -> None:
        super().__init__()
        import quark.torch.kernel

        assert quark.torch.kernel
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


def _brevitas(bits: int) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        import brevitas.nn as qnn

        torch.manual_seed(0)
        layer = qnn.QuantLinear(256, 128, bias=False, weight_bit_width=bits)
        return layer.eval().requires_grad_(False), rows()

    return make


CASES: dict[str, Make] = {
    "nncf int4 sym": _nncf("INT4_SYM", group_size=64, ratio=1.0, all_layers=True),
    "nncf int4 asym": _nncf("INT4_ASYM", group_size=64, ratio=1.0, all_layers=True),
    "nncf int8 asym": _nncf("INT8_ASYM"),
    "nncf int8 sym": _nncf("INT8_SYM"),
    "quark uint4 groups": lambda: (Quark("uint4", "per_group", 64), rows()),
    "quark int8 channel": lambda: (Quark("int8", "per_channel", 256), rows()),
    "brevitas 4 bits": _brevitas(4),
    "brevitas 8 bits": _brevitas(8),
}  # fmt: skip
