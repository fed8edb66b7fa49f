"""optimum-quanto."""

from __future__ import annotations

import torch
from optimum import quanto
from torch import nn

from lqcompile.errors import Reason

from .harness import Make, linear, rows


def _with(weights: str, dtype: torch.dtype = torch.float32, bias: bool = False) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        model = nn.Sequential(linear(bias=bias, dtype=dtype))
        quanto.quantize(model, weights=getattr(quanto, weights))
        quanto.freeze(model)
        return model.requires_grad_(False), rows(dtype=dtype)

    return make


CASES: dict[str, Make] = {
    "qint4": _with("qint4"),
    "qint2": _with("qint2", bias=True),
    "qint4 f16": _with("qint4", torch.float16),
    "qint8": _with("qint8"),
    "qint8 bf16 bias": _with("qint8", torch.bfloat16, bias=True),
    "qfloat8 e4m3": _with("qfloat8_e4m3fn"),
    "qfloat8 e5m2": _with("qfloat8_e5m2"),
    "qfloat8 bf16": _with("qfloat8", torch.bfloat16),
}
KEPT = {"qint8 bf16 bias": Reason.SLOWER}
