"""NNCF: weights compressed to 4 and 8 bits."""

from __future__ import annotations

import nncf
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
        model = Wrapped()
        data = nncf.Dataset([rows()])
        return nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode), dataset=data, **more), rows()

    return make


CASES: dict[str, Make] = {
    "int4 sym": _nncf("INT4_SYM", group_size=64, ratio=1.0, all_layers=True),
    "int4 asym": _nncf("INT4_ASYM", group_size=64, ratio=1.0, all_layers=True),
    "int8 asym": _nncf("INT8_ASYM"),
    "int8 sym": _nncf("INT8_SYM"),
}
