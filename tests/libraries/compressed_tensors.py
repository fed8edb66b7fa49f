"""compressed-tensors: weights stored compressed and decompressed in forward."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn
from torch.nn import functional as F

from .harness import Make, linear, rows


class Compressed(nn.Module):
    """A layer whose tensors are what the library's compressor makes; forward lets it decompress them."""

    def __init__(
        self, format: str, args: QuantizationArgs, dtype: torch.dtype, weight: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.scheme = QuantizationScheme(targets=["Linear"], weights=args)
        self.compressor = BaseCompressor.load_from_registry(format)
        weight = linear(dtype=dtype).weight.data if weight is None else weight
        state = self.compressor.compress({"weight": weight, **_parameters(weight, args)}, self.scheme)
        # The shape as a number is what the library itself keeps of it beside its compressed tensors.
        self.shape = {"weight_shape": torch.Size(state.pop("weight_shape").tolist())} if "weight_shape" in state else {}
        self.names = list(state)
        for name, value in state.items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stored = {name: getattr(self, name) for name in self.names}
        state = self.compressor.decompress(stored | self.shape, self.scheme)
        return F.linear(x, state["weight"].to(x.dtype))


def _parameters(weight: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    from compressed_tensors.quantization.utils import calculate_qparams

    found: dict[str, torch.Tensor] = {}
    more: dict[str, Any] = {}
    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    if args.strategy == "tensor":
        low, high = weight.amin().view(1), weight.amax().view(1)
    else:
        low, high = groups.amin(-1), groups.amax(-1)
    if args.strategy == "tensor_group":
        most = weight.abs().amax().float()
        found["weight_global_scale"] = (448.0 * 6.0 / most).view(1)
        more["global_scale"] = found["weight_global_scale"]
    scale, zero = calculate_qparams(low, high, args, **more)
    found["weight_scale"] = scale
    if not args.symmetric:
        found["weight_zero_point"] = zero
    return found


def _with(format: str, dtype: torch.dtype = torch.float32, **args: Any) -> Make:
    return lambda: (Compressed(format, QuantizationArgs(**args), dtype), rows(dtype=dtype))


CASES: dict[str, Make] = {
    **{
        f"packed {bits} {strategy}{'' if symmetric else ' zero'}": _with(
            "pack-quantized", num_bits=bits, strategy=strategy, symmetric=symmetric,
            group_size=64 if strategy == "group" else None)
        for bits in (4, 8, 2, 3) for strategy, symmetric in (("group", True), ("channel", True), ("group", False))
    },
    "packed 4 bf16": _with("pack-quantized", torch.bfloat16, num_bits=4, strategy="group", group_size=32),
    "int 8 channel": _with("int-quantized", num_bits=8, strategy="channel"),
    "int 8 tensor": _with("int-quantized", num_bits=8, strategy="tensor"),
    "naive 4 group": _with("naive-quantized", num_bits=4, strategy="group", group_size=64),
    "float 8 channel": _with("float-quantized", num_bits=8, type="float", strategy="channel"),
    "float 8 tensor bf16": _with("float-quantized", torch.bfloat16, num_bits=8, type="float", strategy="tensor"),
    "nvfp4": _with("nvfp4-pack-quantized", torch.bfloat16, num_bits=4, type="float", strategy="tensor_group",
                   group_size=16, scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn),
    "mxfp4": _with("mxfp4-pack-quantized", torch.bfloat16, num_bits=4, type="float", strategy="group", group_size=32,
                   scale_dtype=torch.uint8, zp_dtype=torch.uint8),
}  # fmt: skip
