"""hqq: 1 to 8 bits along either axis."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from torch import nn

from .harness import Make, linear, rows


def _with(bits: int, axis: int, group: int = 64, dtype: torch.dtype = torch.float32, bias: bool = False,
          as_float: bool = False) -> Make:  # fmt: skip
    def make() -> tuple[nn.Module, torch.Tensor]:
        config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, view_as_float=as_float)
        layer = HQQLinear(linear(bias=bias, dtype=dtype), config, compute_dtype=dtype, device="cpu")
        HQQLinear.set_backend(HQQBackend.PYTORCH)
        return layer, rows(dtype=dtype)

    return make


CASES: dict[str, Make] = {
    **{f"{bits} bits axis {axis}": _with(bits, axis) for axis in (1, 0) for bits in (8, 4, 3, 2, 1)},
    "4 bits bf16 bias": _with(4, 1, dtype=torch.bfloat16, bias=True),
    "4 bits axis 0 f16": _with(4, 0, dtype=torch.float16),
    "4 bits rows": _with(4, 1, group=256),
    "4 bits viewed as float": _with(4, 1, dtype=torch.bfloat16, as_float=True),
}
