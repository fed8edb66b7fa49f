"""torch.compile(model, backend="lq"): every matmul against a quantized weight, on fused low-bit kernels."""

from .backend import explain, refresh
from .errors import ArgumentError, LqError, Reason, StrictError
from .prepare import prepare
from .quantize import QuantLinear, quantize
from .report import Report

__all__ = [
    "ArgumentError",
    "LqError",
    "QuantLinear",
    "Reason",
    "Report",
    "StrictError",
    "explain",
    "prepare",
    "quantize",
    "refresh",
]
