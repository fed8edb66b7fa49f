"""torchao: weight-only configurations and prototypes."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torchao.quantization as ao
from torch import nn
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor

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


def _mx(elements: Any, dtype: torch.dtype = torch.float32) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        layer = linear(dtype=dtype)
        layer.weight = nn.Parameter(MXTensor.to_mx(layer.weight.data, elements, 32), requires_grad=False)
        return layer, rows(dtype=dtype)

    return make


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
    "codebook coreml": _with(
        _prototype("quantization.codebook_coreml", "CodebookWeightOnlyConfig", dtype=torch.uint4, block_size=[-1, 64])
    ),
    "codebook 8": _with(
        _prototype("quantization.codebook.codebook_quantized_tensor", "CodebookWeightOnlyConfig", dtype=torch.uint8)
    ),
    "codebook lut groups": _with(
        _prototype("quantization.codebook_groupwise.api", "GroupwiseLutWeightConfig", lut_block_shape=[2, -1],
                   use_qdq_reference=True)
    ),
    "quantized training int8": _with(
        _prototype("quantized_training", "Int8WeightOnlyQuantizedTrainingConfig")
    ),
    **{
        f"naive int{n}": _with(functools.partial(_prototype(
            "quantization.mixed_precision.scripts.naive_intNwo", "IntNWeightOnlyConfig", n=n, group_size=64)))
        for n in (2, 3, 4, 5, 6, 8)
    },
    "int4 packed": _with(lambda: ao.Int4WeightOnlyConfig(group_size=64, int4_packing_format="opaque"), torch.bfloat16),
    "gguf prototype": _with(_prototype("quantization.gguf.api", "GGUFWeightOnlyConfig")),
}  # fmt: skip
