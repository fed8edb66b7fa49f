"""PyTorch's own: the decomposed operations of PT2E, and matmuls by packed 8-bit and 4-bit weights."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...types import Problem


def dequantize_per_tensor(
    input: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int, dtype: torch.dtype,
    *, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    return (input.to(out_dtype or torch.float32) - zero_point) * scale


def dequantize_per_channel(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, axis: int, quant_min: int, quant_max: int,
    dtype: torch.dtype, *, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    shape = [-1 if i == axis % input.ndim else 1 for i in range(input.ndim)]
    codes = input.to(scales.dtype)
    codes = codes if zero_points is None else codes - zero_points.view(shape)
    return (codes * scales.view(shape)).to(out_dtype or torch.float32)


def dequantize_per_channel_group(
    w_int8: Tensor, scales: Tensor, zero_points: Tensor | None, quant_min: int, quant_max: int, dtype: torch.dtype,
    group_size: int = 128, output_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    k = w_int8.shape[-1]
    codes = w_int8.reshape(-1, k if group_size > k and scales.shape[-1] == 1 else group_size).to(scales.dtype)
    codes = codes if zero_points is None else codes - zero_points.reshape(-1, 1)
    return (codes * scales.reshape(-1, 1)).reshape(w_int8.shape).to(output_dtype)


def int8pack_mm(self: Tensor, mat2: Tensor, scales: Tensor) -> Tensor:
    return mat2.to(scales.dtype) * scales.view(-1, 1)


def int4pack_mm_for_cpu(self: Tensor, mat2: Tensor, qGroupSize: int, qScaleAndZeros: Tensor) -> Tensor:
    n, k = mat2.shape[0], 2 * mat2.shape[1]
    packed, block = mat2.reshape(-1), _block()
    # Bytes [n/block, k, block/2]: the low nibbles are the first half of the rows of a block.
    pairs = packed[: n // block * block * k // 2].view(n // block, k, block // 2)
    codes = torch.cat([pairs & 15, pairs >> 4], -1).transpose(1, 2).reshape(-1, k // qGroupSize, qGroupSize)
    scale, zero = qScaleAndZeros.transpose(0, 1).unsqueeze(-1).unbind(2)
    # Rows beyond whole blocks are packed otherwise: the shape then tells that this is not what was meant.
    return ((codes.to(scale.dtype) - 8) * scale[: codes.shape[0]] + zero[: codes.shape[0]]).reshape(-1, k)


@functools.cache
def _block() -> int:
    """Rows of a block, which depend on the CPU: what packing makes of rows that are all different shows it."""
    codes = (torch.arange(128, dtype=torch.int32) // 8).view(128, 1).expand(128, 2).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2).reshape(-1)
    return int((packed >> 4)[0]) * 16 or 64


DEQUANTIZE = {
    "quantized_decomposed::dequantize_per_tensor": dequantize_per_tensor,
    "quantized_decomposed::dequantize_per_channel": dequantize_per_channel,
    "quantized_decomposed::dequantize_per_channel_group": dequantize_per_channel_group,
}
FUSED = {"aten::_weight_int8pack_mm": int8pack_mm, "aten::_weight_int4pack_mm_for_cpu": int4pack_mm_for_cpu}
OPERANDS = dict.fromkeys(FUSED, ("self", "mat2", ""))


def _int8pack_cost(kind: str, problem: Problem) -> tuple[float, float] | None:
    # 0.98 ms for 4096 x 4096 and one row on one core that reads 17 GB/s, and 0.34 ms for each further row.
    return (0.6, 0.4) if kind == "cpu" else None


def _int4pack_cost(kind: str, problem: Problem) -> tuple[float, float] | None:
    # 0.80 ms for the same, and 0.33 ms for each further row; of float32 27 ms for every row.
    return (0.5, 0.4 if problem.x_dtype == torch.bfloat16 else 0.006) if kind == "cpu" else None


COST = {"aten::_weight_int8pack_mm": _int8pack_cost, "aten::_weight_int4pack_mm_for_cpu": _int4pack_cost}
