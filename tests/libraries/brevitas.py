"""Brevitas: float weights that forward rounds to codes."""

from __future__ import annotations

import brevitas.nn as qnn
import torch
from torch import nn

from .harness import Make, rows


def _brevitas(bits: int) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        layer = qnn.QuantLinear(256, 128, bias=False, weight_bit_width=bits)
        return layer.eval().requires_grad_(False), rows()

    return make


CASES: dict[str, Make] = {
    "4 bits": _brevitas(4),
    "8 bits": _brevitas(8),
}
