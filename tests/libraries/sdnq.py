"""SDNQ: integers and small floats of any width, codebooks, SVD."""

from __future__ import annotations

from typing import Any

import sdnq
import torch
from torch import nn

from lqcompile.errors import Reason

from .harness import Make, linear, rows


def _with(weights: str, dtype: torch.dtype = torch.float32, bias: bool = True, **more: Any) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        model = nn.Sequential(linear(bias=bias, dtype=dtype))
        from sdnq.quantizer import sdnq_post_load_quant

        model = sdnq_post_load_quant(model, weights_dtype=weights, minimum_allowed_numel=1, add_skip_keys=False,
                                     torch_dtype=dtype, **more)  # fmt: skip
        return model, rows(dtype=dtype)

    return make


assert sdnq
CASES: dict[str, Make] = {
    **{f"int{b}": _with(f"int{b}") for b in (8, 7, 6, 5, 4, 3, 2)},
    **{f"uint{b}": _with(f"uint{b}") for b in (8, 7, 6, 5, 4, 3, 2, 1)},
    **{
        f: _with(f)
        for f in ("float8_e4m3fn", "float8_e5m2", "float7_e3m3fn", "float6_e3m2fn", "float5_e2m2fn", "float4_e2m1fn",
                  "float3_e1m1fn", "float2_e1m0fn")
    },
    "int8 rows bf16": _with("int8", torch.bfloat16, group_size=-1),
    "uint4 groups bf16": _with("uint4", torch.bfloat16, group_size=32),
    "int4 svd": _with("int4", use_svd=True, svd_rank=8),
    "uint4 codebook": _with("uint4", use_codebook=True),
    "int4 hadamard": _with("int4", use_hadamard=True),
}  # fmt: skip
KEPT = {
    # A low-rank float matrix is added, or a rotation multiplied, inside the weight.
    "int4 svd": Reason.TOO_MANY_LEVELS,
    "int4 hadamard": Reason.TOO_MANY_LEVELS,
}
