"""optimum-quanto: 8-bit integers or floats with one scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from ...types import Problem


def qbytes_mm(A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
    return B.to(scales.dtype) * scales.reshape(-1, 1)


FUSED = {"quanto::qbytes_mm": qbytes_mm}
OPERANDS = {"quanto::qbytes_mm": ("A", "B", "")}


def _cost(kind: str, problem: Problem) -> tuple[float, float] | None:
    if kind != "cpu":
        return None
    # 4096 x 4096 and one row on one core that reads 17 GB/s: 45 ms by way of a dense weight, 106 ms from 8-bit floats.
    if problem.format.form == "table":
        return 106.0, 1.0
    # 0.98 ms, and 0.34 ms for each further row, by PyTorch's own kernel.
    return (0.6, 0.4) if problem.x_dtype == torch.bfloat16 else (43.0, 1.0)


COST = {"quanto::qbytes_mm": _cost}
