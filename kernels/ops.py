"""The custom ops: lq::lut_gemm and lq::quick_gemm, their checks, gradients and Inductor lowering.

    y[..., n] = x[..., k] @ w[n, k].T + bias[n]        x float16 | bfloat16 | float32, y of x's dtype

`parts` hold w as the op's layout stores `format`; `route` names the kernel for each range of m, the product of x's
leading sizes: "lut@8,dense" is `lut` up to m = 8 and `dense` above. The overload name is the version of the ops'
meaning: Inductor's caches know an op by its name alone, so a change of meaning needs a new one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from ..errors import ArgumentError
from ..types import Format
from . import registry
from .dense import dequantize as _dequantize
from .layout import LAYOUTS, check_parts
from .registry import X_DTYPES, Call

VERSION = "v1"
LIBRARY = Library("lq", "DEF")
_GEMM = "(Tensor x, Tensor[] parts, Tensor? bias, int n, int k, str format, str route) -> Tensor"


@functools.lru_cache(maxsize=4096)
def parse_route(route: str) -> tuple[tuple[int | None, registry.Kernel], ...]:
    """The kernels of a route with the greatest m of each, None for the last. Raises ArgumentError."""
    kernels, pieces = registry.discover(), []
    entries = route.split(",")
    for i, entry in enumerate(entries):
        name, _, limit = entry.partition("@")
        if name not in kernels:
            raise ArgumentError("route", route, f"kernels of {', '.join(sorted(kernels))}")
        if bool(limit) == (i == len(entries) - 1) or (limit and not limit.isdecimal()):
            raise ArgumentError("route", route, "name@m for each kernel but the last, such as 'lut@8,dense'")
        pieces.append((int(limit) if limit else None, kernels[name]))
    return tuple(pieces)


def _check(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call) -> None:
    """The one validator: raises ArgumentError unless every shape, dtype, stride and device is as declared."""
    check_parts(LAYOUTS[call.layout], parts, call.format, call.n, call.k)
    if x.dtype not in X_DTYPES:
        raise ArgumentError("x.dtype", x.dtype, " | ".join(map(str, X_DTYPES)))
    if x.ndim < 1 or x.shape[-1] != call.k:
        raise ArgumentError("x.shape", tuple(x.shape), f"[..., {call.k}]")
    if x.device != parts[0].device:
        raise ArgumentError("x.device", x.device, f"{parts[0].device}, where the weight is")
    if bias is not None and (tuple(bias.shape) != (call.n,) or bias.dtype != x.dtype or bias.device != x.device):
        raise ArgumentError(
            "bias",
            f"{bias.dtype} {tuple(bias.shape)} on {bias.device}",
            f"{x.dtype} [{call.n}] on {x.device}",
        )


def _launch(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, route: str, out: Tensor) -> None:
    _check(x, parts, bias, call)
    if out.numel() == 0:
        return
    if call.k == 0:
        out.zero_() if bias is None else out.copy_(bias)
        return
    if x.ndim != 2:
        x, out = x.reshape(-1, call.k), out.view(-1, call.n)
    x = x.contiguous()
    for limit, kernel in parse_route(route):
        if limit is None or x.shape[0] <= limit:
            refusal = _refusal(kernel, call, x.dtype, x.device.type)
            if refusal is not None:
                raise ArgumentError("route", route, f"for {call} on {x.device}, kernel {kernel.name}: {refusal}")
            return kernel.run(x, parts, bias, call, out)


@functools.lru_cache(maxsize=4096)
def _refusal(kernel: registry.Kernel, call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    if call.layout not in kernel.layouts or device not in kernel.devices:
        return f"{' | '.join(kernel.layouts)} on {' | '.join(kernel.devices)}"
    return kernel.accepts(call, x_dtype, device)


@functools.lru_cache(maxsize=4096)
def _call(layout: str, format: str, n: int, k: int) -> Call:
    return Call(layout, Format.parse(format), n, k)


def _extern(*args: Any, out: Tensor) -> None:
    """What Inductor's generated code calls: x, parts, [bias], then the constants. No dispatcher, no allocation."""
    *tensors, layout, n, k, format, route, has_bias = args
    bias = tensors.pop() if has_bias else None
    _launch(tensors[0], tensors[1:], bias, _call(layout, format, n, k), route, out)


def _define(layout: str) -> Any:
    name = f"{layout}_gemm"
    LIBRARY.define(f"{name}.{VERSION}{_GEMM}")
    op = getattr(getattr(torch.ops.lq, name), VERSION)

    def run(x: Tensor, parts: list[Tensor], bias: Tensor | None, n: int, k: int, format: str, route: str) -> Tensor:
        call = _call(layout, format, n, k)
        out = x.new_empty((*x.shape[:-1], n))
        _launch(x, parts, bias, call, route, out)
        return out

    def fake(x: Tensor, parts: list[Tensor], bias: Tensor | None, n: int, k: int, format: str, route: str) -> Tensor:
        _check(x, parts, bias, _call(layout, format, n, k))
        parse_route(route)
        return x.new_empty((*x.shape[:-1], n))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, parts, _, ctx.n, ctx.k, ctx.format, _ = inputs
        ctx.dtype = x.dtype
        # The packed parts, never the dense weight: it is dequantized again in backward.
        ctx.save_for_backward(*parts)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            parts = list(ctx.saved_tensors)
            dequantize = getattr(torch.ops.lq.dequantize, VERSION)
            grad_x = grad @ dequantize(parts, layout, ctx.n, ctx.k, ctx.format, ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, ctx.n).sum(0)
        return grad_x, [None] * len(ctx.saved_tensors), grad_bias, None, None, None, None

    LIBRARY.impl(f"{name}.{VERSION}", run, "CompositeExplicitAutograd")
    torch.library.register_fake(op, fake, lib=LIBRARY)
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=LIBRARY)
    return op


def _define_dequantize() -> Any:
    LIBRARY.define(
        f"dequantize.{VERSION}(Tensor[] parts, str layout, int n, int k, str format, ScalarType dtype) -> Tensor"
    )
    op = getattr(torch.ops.lq.dequantize, VERSION)

    def checked(parts: list[Tensor], layout: str, n: int, k: int, format: str) -> Call:
        if layout not in LAYOUTS:
            raise ArgumentError("layout", layout, " | ".join(LAYOUTS))
        call = _call(layout, format, n, k)
        check_parts(LAYOUTS[layout], parts, call.format, n, k)
        return call

    def run(parts: list[Tensor], layout: str, n: int, k: int, format: str, dtype: torch.dtype) -> Tensor:
        return _dequantize(parts, checked(parts, layout, n, k, format), dtype)

    def fake(parts: list[Tensor], layout: str, n: int, k: int, format: str, dtype: torch.dtype) -> Tensor:
        checked(parts, layout, n, k, format)
        return parts[0].new_empty((n, k), dtype=dtype)

    LIBRARY.impl(f"dequantize.{VERSION}", run, "CompositeExplicitAutograd")
    torch.library.register_fake(op, fake, lib=LIBRARY)
    return op


GEMMS = {layout: _define(layout) for layout in LAYOUTS}
DEQUANTIZE = _define_dequantize()


@functools.cache
def register_lowerings() -> None:
    """Lets Inductor call the launcher directly: 0.1 us an op instead of 3 through the dispatcher (BACKEND.md, 4)."""
    from torch._inductor import ir
    from torch._inductor.lowering import fallback_handler, register_lowering
    from torch._inductor.select_algorithm import ExternKernelChoice
    from torch._inductor.virtualized import V

    name = f"lq_gemm_{VERSION}"
    ExternKernelChoice(_extern, name=name)

    def lower(layout: str, op: Any) -> Callable[..., Any]:
        def lowering(x: Any, parts: list[Any], bias: Any, n: int, k: int, format: str, route: str) -> Any:
            if V.graph.cpp_wrapper:
                return fallback_handler(op, add_to_fallback_set=False)(x, parts, bias, n, k, format, route)
            x = ir.ExternKernel.require_contiguous(x)
            tensors = [x, *map(ir.ExternKernel.realize_input, parts)]
            if bias is not None:
                tensors.append(ir.ExternKernel.require_contiguous(bias))
            size = [*x.get_size()[:-1], n]
            strides = ir.FlexibleLayout.contiguous_strides(size)
            return ir.TensorBox.create(
                ir.ExternKernelOut(
                    layout=ir.FixedLayout(x.get_device(), x.get_dtype(), size, strides),
                    inputs=tensors,
                    constant_args=(layout, n, k, format, route, bias is not None),
                    python_kernel_name=f"extern_kernels.{name}",
                )
            )

        return lowering

    for layout, op in GEMMS.items():
        register_lowering(op, type_promotion_kind=None)(lower(layout, op))
