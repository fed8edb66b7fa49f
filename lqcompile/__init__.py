"""torch.compile(model, backend="lq"): every matmul against a quantized weight, on fused low-bit kernels."""

from .archive import load_packed, save_packed
from .backend import explain, refresh
from .convert import conversion, convert
from .errors import ArgumentError, LqError, Reason, StrictError
from .packed import PackedLinear
from .prepare import prepare
from .quantize import QuantLinear, quantize
from .report import Report

__all__ = [
    "ArgumentError",
    "LqError",
    "PackedLinear",
    "QuantLinear",
    "Reason",
    "Report",
    "StrictError",
    "conversion",
    "convert",
    "explain",
    "load_packed",
    "prepare",
    "quantize",
    "refresh",
    "save_packed",
]
