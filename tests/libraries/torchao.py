"""torchao: weight-only configurations and prototypes.

Not here: intN of mixed_precision and MX in a linear layer (the library refuses), CodebookTensor (fails under Dynamo).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torchao.quantization as ao
from torch import nn
from torch.nn import functional as F
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor

from lqcompile.errors import Reason

from .harness import Make, linear, rows


def _with(config: Callable[[], Any], dtype: torch.dtype = torch.float32, bias: bool = False) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        model = nn.Sequential(linear(bias=bias, dtype=dtype))
        ao.quantize_(model, config())
        return model, rows(dtype=dtype)

    return make


def _prototype(path: str, name: str, **arguments: Any) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(f"torchao.prototype.{path}"), name)(**arguments)


def _intx(bits: int, granularity: Any, **more: Any) -> Callable[[], Any]:
    weight_dtype = getattr(torch, f"int{bits}")
    return lambda: ao.IntxWeightOnlyConfig(weight_dtype=weight_dtype, granularity=granularity, **more)


class Dequantizing(nn.Module):
    """A layer that asks a tensor of the library for its dense self."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.dtype = nn.Parameter(weight, requires_grad=False), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.dequantize(self.dtype))


def _mx(elements: torch.dtype, dtype: torch.dtype = torch.float32) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        return Dequantizing(MXTensor.to_mx(linear(dtype=dtype).weight.data, elements, 32), dtype), rows(dtype=dtype)

    return make


class Codebook(nn.Module):
    """The CoreML codebook: a table for each block of columns."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("codes", torch.randint(0, 16, (128, 256), dtype=torch.int32, generator=g))
        self.register_buffer("table", torch.randn(1, 4, 16, 1, generator=g))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torchao.prototype.quantization.codebook_coreml.codebook_ops import dequantize_codebook

        return F.linear(x, dequantize_codebook(self.codes, self.table, 4, [-1, 64], output_dtype=torch.float32))


def _asymmetric() -> Any:
    return ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(64), mapping_type=ao.MappingType.ASYMMETRIC
    )


CASES: dict[str, Make] = {
    **{f"intx {b} groups": _with(_intx(b, PerGroup(64))) for b in range(1, 9)},
    "intx 4 rows": _with(_intx(4, PerAxis(0)), bias=True),
    "intx 3 rows bf16": _with(_intx(3, PerAxis(0)), torch.bfloat16),
    "intx 4 asymmetric": _with(_asymmetric),
    "intx 4 bf16": _with(_intx(4, PerGroup(32)), torch.bfloat16),
    "intx 4 f16 scales": _with(_intx(4, PerGroup(32), scale_dtype=torch.float16)),
    "int8 rows": _with(lambda: ao.Int8WeightOnlyConfig(granularity=PerRow()), bias=True),
    "int8 rows bf16": _with(lambda: ao.Int8WeightOnlyConfig(granularity=PerRow()), torch.bfloat16),
    "int8 tensor": _with(lambda: ao.Int8WeightOnlyConfig(granularity=PerTensor())),
    "int8 groups": _with(lambda: ao.Int8WeightOnlyConfig(granularity=PerGroup(64))),
    "float8 rows": _with(ao.Float8WeightOnlyConfig, torch.bfloat16),
    "float8 rows f32": _with(ao.Float8WeightOnlyConfig),
    "nf4": _with(_prototype("_nf4tensor_api", "NF4WeightOnlyConfig"), torch.bfloat16),
    "nvfp4": _with(_prototype("mx_formats.inference_workflow", "NVFP4WeightOnlyConfig"), torch.bfloat16),
    "nvfp4 f32, one scale": _with(
        _prototype("mx_formats.inference_workflow", "NVFP4WeightOnlyConfig", use_dynamic_per_tensor_scale=False)
    ),
    "mx fp8 e4m3": _mx(torch.float8_e4m3fn, torch.bfloat16),
    "mx fp8 e5m2": _mx(torch.float8_e5m2),
    "mx fp4": _mx(torch.float4_e2m1fn_x2, torch.bfloat16),
    "codebook coreml": lambda: (Codebook(), rows()),
    "quantized training int8": _with(
        _prototype("quantized_training.int8", "Int8WeightOnlyQuantizedTrainingConfig")
    ),
    "int4 packed": _with(
        _prototype("quantization.int4", "PrototypeInt4WeightOnlyConfig", group_size=64), torch.bfloat16
    ),
    "gguf prototype": _with(_prototype("quantization.gguf.api", "GGUFWeightOnlyConfig")),
}  # fmt: skip
KEPT = {
    # Not rounded to codes by this version of the library.
    "gguf prototype": Reason.NOT_QUANTIZED,
    "int4 packed": Reason.SLOWER,
}
