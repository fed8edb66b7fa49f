"""bitsandbytes: 4 bits by a table (NF4, FP4), 8 bits by a map, one absmax for each block of the flat weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...types import Problem


def _scaled(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Flat values times the absmax of their block; the last block may be short."""
    flat, absmax = values.reshape(-1), absmax.reshape(-1)
    if flat.numel() % blocksize == 0:
        return (flat.view(-1, blocksize) * absmax.view(-1, 1)).view(-1)
    return flat * absmax.repeat_interleave(blocksize)[: flat.numel()]


def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return _scaled(code[A.long().reshape(-1)], absmax, blocksize).view(A.shape).to(dtype)


def dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    # The library's own table, in the order of the codes: what it makes of each of them with an absmax of 1.
    every = torch.arange(16, dtype=torch.uint8, device=A.device)
    ones = torch.ones(1, dtype=torch.float32, device=A.device)
    pairs = (every[::2] * 16 + every[1::2]).view(-1, 1)
    library = torch.ops.bitsandbytes.dequantize_4bit.default
    table = library(pairs, ones, blocksize, quant_type, [1, 16], torch.float32).view(16)
    packed = A.reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(-1)
    size = 1
    for length in shape:
        size *= length
    return _scaled(table[codes[:size].long()], absmax, blocksize).view(list(shape)).to(dtype)


def gemm_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, blocksize: int, quant_type: str,
    bias: Tensor | None = None, absmax_8bit: Tensor | None = None, absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if absmax_8bit is not None:
        # The absmax of blocks is itself quantized, in blocks of 256.
        assert absmax_code is not None and absmax_offset is not None
        absmax = dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    return dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype)


def gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:  # fmt: skip
    n, k = shapeB
    packed = B.reshape(-1).view(torch.uint8)
    if absmax.ndim == 2 and tuple(absmax.shape) == (k // blocksize, n):
        # The order for CPUs with AVX-512: bytes [n/32, k/2, 32], of 32 rows two columns each, low nibbles first.
        pairs = packed.view(n // 32, k // 2, 32)
        codes = torch.cat([pairs & 15, pairs >> 4], -1).view(n // 32, k // 2, 32, 2).transpose(1, 2)
        scale = absmax.t().reshape(-1)
    else:
        codes, scale = torch.stack([packed >> 4, packed & 15], -1), absmax
    values = code.to(torch.float32)[codes.reshape(-1)[: n * k].long()]
    return _scaled(values, scale.to(torch.float32), blocksize).view(n, k).to(A.dtype)


DEQUANTIZE = {
    "bitsandbytes::dequantize_blockwise": dequantize_blockwise,
    "bitsandbytes::dequantize_4bit": dequantize_4bit,
}
FUSED = {"bitsandbytes::gemm_4bit": gemm_4bit, "bitsandbytes::gemv_4bit": gemv_4bit}
OPERANDS = {"bitsandbytes::gemm_4bit": ("A", "B", "bias"), "bitsandbytes::gemv_4bit": ("A", "B", "")}


def _gemm_cost(kind: str, problem: Problem) -> tuple[float, float] | None:
    # By way of a dense weight: 26 ms for 4096 x 4096 and one row, on one core that reads 17 GB/s.
    return (26.0, 1.0) if kind == "cpu" else None


def _gemv_cost(kind: str, problem: Problem) -> tuple[float, float] | None:
    # 0.86 ms for the same, and 0.39 ms for each further row.
    return (0.5, 0.4) if kind == "cpu" else None


COST = {"bitsandbytes::gemm_4bit": _gemm_cost, "bitsandbytes::gemv_4bit": _gemv_cost}
