"""The custom ops: lq::lut_gemm, lq::quick_gemm and lq::grouped_gemm, their checks, gradients and Inductor lowering.

    y[..., n] = x[..., k] @ w[n, k].T + bias[n]        x float16 | bfloat16 | float32, y of x's dtype

`epilogue` is "", "silu_mul", which leaves n/2 columns, or "add", which adds `other` [..., n] (see epilogues.py).
`parts` hold w as the op's layout stores `format`; `route` names the kernel for each range of m, the product of x's
leading sizes: "lut@8,dense" is `lut` up to m = 8 and `dense` above. "lut@8,quick/quick" reads another copy of w above,
in layout `quick`, whose parts follow those of the op's own. grouped_gemm has a weight for each expert, and `ends` says
which rows of x are whose (see grouped.py). The overload name is the version of the ops' meaning:
Inductor's caches know an op by its name alone, so a change of meaning needs a new one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from ..errors import ArgumentError
from ..types import Format
from . import epilogues, grouped, registry
from .dense import dequantize as _dequantize
from .layout import LAYOUTS, check_parts
from .registry import X_DTYPES, Call

VERSION = "v2"
LIBRARY = Library("lq", "DEF")
_GEMM = (
    "(Tensor x, Tensor[] parts, Tensor? bias, Tensor? other, int n, int k, str format, str epilogue, str route)"
    " -> Tensor"
)


@functools.lru_cache(maxsize=4096)
def parse_route(route: str) -> tuple[tuple[int | None, registry.Kernel, str], ...]:
    """The kernels of a route with the greatest m of each, None for the last, and the layout where it is another one.

    Raises ArgumentError.
    """
    kernels, pieces = registry.discover(), []
    entries = route.split(",")
    for i, entry in enumerate(entries):
        way, _, limit = entry.partition("@")
        name, _, layout = way.partition("/")
        if name not in kernels:
            raise ArgumentError("route", route, f"kernels of {', '.join(sorted(kernels))}")
        if layout and layout not in LAYOUTS:
            raise ArgumentError("route", route, f"layouts of {', '.join(LAYOUTS)}")
        if bool(limit) == (i == len(entries) - 1) or (limit and not limit.isdecimal()):
            raise ArgumentError("route", route, "name@m for each kernel but the last, such as 'lut@8,dense'")
        pieces.append((int(limit) if limit else None, kernels[name], layout))
    return tuple(pieces)


@functools.lru_cache(maxsize=4096)
def copies(call: Call, route: str, device: str) -> tuple[tuple[Call, slice], ...]:
    """For each copy of w that a route reads, the op's own first: the call in its layout, and where its parts stand."""
    *layouts, last = dict.fromkeys([call.layout, *(layout for _, _, layout in parse_route(route) if layout)])
    found, start = [], 0
    for layout in layouts:
        end = start + len(LAYOUTS[layout].names(call.format, device))
        found.append((replace(call, layout=layout), slice(start, end)))
        start = end
    # Parts too many are found with the last copy's.
    return (*found, (replace(call, layout=last), slice(start, None)))


def _check(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, other: Tensor | None, call: Call, route: str
) -> tuple[int | torch.SymInt, ...]:
    """The one validator: raises ArgumentError unless every shape, dtype, stride and device is as declared.

    Returns the shape of y.
    """
    for own, place in copies(call, route, parts[0].device.type if parts else "cpu"):
        check_parts(LAYOUTS[own.layout], parts[place], call.format, call.n, call.k)
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
    if call.epilogue not in epilogues.EPILOGUES:
        raise ArgumentError("epilogue", call.epilogue, " | ".join(map(repr, epilogues.EPILOGUES)))
    if call.epilogue == "silu_mul" and call.n % (2 * epilogues.TURN):
        raise ArgumentError("n", call.n, f"a multiple of {2 * epilogues.TURN} for epilogue 'silu_mul'")
    shape = (*x.shape[:-1], epilogues.outputs(call.epilogue, call.n))
    if (other is None) != (call.epilogue != "add"):
        raise ArgumentError("other", other, f"{'a tensor' if other is None else 'None'} for epilogue {call.epilogue!r}")
    if other is not None and (other.shape != shape or other.dtype != x.dtype or other.device != x.device):
        raise ArgumentError(
            "other", f"{other.dtype} {tuple(other.shape)} on {other.device}", f"{x.dtype} {shape} on {x.device}"
        )
    return shape


def _launch(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, other: Tensor | None, call: Call, route: str,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Runs a call into `out`, or a new tensor, and returns it."""
    shape = _check(x, parts, bias, other, call, route)
    y = x.new_empty(shape) if out is None else out
    if y.numel():
        if x.ndim != 2:
            rows = y.numel() // y.shape[-1]
            x, other = x.reshape(rows, call.k), None if other is None else other.reshape(rows, -1)
        _run(x, parts, bias, other, call, route, y if y.ndim == 2 else y.view(x.shape[0], -1))
    return y


def _run(
    x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, other: Tensor | None, call: Call, route: str, out: Tensor
) -> None:
    other = None if other is None else other.contiguous()
    if call.k == 0:
        y = x.new_zeros(x.shape[0], call.n) if bias is None else bias.expand(x.shape[0], -1)
        out.copy_(epilogues.finish(y.contiguous(), other, call.epilogue) if call.epilogue else y)
        return
    x = x.contiguous()
    for limit, kernel, layout in parse_route(route):
        if limit is None or x.shape[0] <= limit:
            if "/" in route:
                wanted = layout or call.layout
                call, place = next(copy for copy in copies(call, route, x.device.type) if copy[0].layout == wanted)
                parts = parts[place]
            refusal = _refusal(kernel, call, x.dtype, x.device.type)
            if refusal is not None:
                raise ArgumentError("route", route, f"for {call} on {x.device}, kernel {kernel.name}: {refusal}")
            return _by(kernel, x, parts, bias, call, out, other)


def _by(
    kernel: registry.Kernel, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor,
    other: Tensor | None = None,
) -> None:  # fmt: skip
    if call.epilogue in kernel.epilogues:
        kernel.run(x, parts, bias, call, out, other)
    elif not call.epilogue:
        kernel.run(x, parts, bias, call, out)
    else:
        epilogues.unfused(kernel.run, x, parts, bias, call, out, other)


@functools.lru_cache(maxsize=4096)
def _refusal(kernel: registry.Kernel, call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    if call.layout not in kernel.layouts or device not in kernel.devices:
        return f"{' | '.join(kernel.layouts)} on {' | '.join(kernel.devices)}"
    return kernel.accepts(call, x_dtype, device)


@functools.lru_cache(maxsize=4096)
def _call(layout: str, format: str, n: int, k: int, epilogue: str) -> Call:
    return Call(layout, Format.parse(format), n, k, epilogue)


def _extern(*args: Any, out: Tensor) -> None:
    """What Inductor's code calls: x, parts, [bias], [other], then the constants. No dispatcher, no allocation."""
    *tensors, layout, n, k, format, epilogue, route, has_bias = args
    other = tensors.pop() if epilogue == "add" else None
    bias = tensors.pop() if has_bias else None
    _launch(tensors[0], tensors[1:], bias, other, _call(layout, format, n, k, epilogue), route, out)


def _define(layout: str) -> Any:
    name = f"{layout}_gemm"
    LIBRARY.define(f"{name}.{VERSION}{_GEMM}")
    op = getattr(getattr(torch.ops.lq, name), VERSION)

    def run(
        x: Tensor, parts: list[Tensor], bias: Tensor | None, other: Tensor | None, n: int, k: int, format: str,
        epilogue: str, route: str,
    ) -> Tensor:  # fmt: skip
        return _launch(x, parts, bias, other, _call(layout, format, n, k, epilogue), route)

    def fake(
        x: Tensor, parts: list[Tensor], bias: Tensor | None, other: Tensor | None, n: int, k: int, format: str,
        epilogue: str, route: str,
    ) -> Tensor:  # fmt: skip
        return x.new_empty(_check(x, parts, bias, other, _call(layout, format, n, k, epilogue), route))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, parts, bias, _, *ctx.how = inputs
        ctx.dtype, ctx.biased, silu = x.dtype, bias is not None, ctx.how[3] == "silu_mul"
        # The packed parts, never the dense weight: it is dequantized again in backward, as gate and up are computed.
        ctx.save_for_backward(*parts, *([x] if silu else []), *([bias] if silu and bias is not None else []))

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        n, k, format, epilogue, route = ctx.how
        parts, given = list(ctx.saved_tensors), []
        grad_other = grad if epilogue == "add" and ctx.needs_input_grad[3] else None
        if epilogue == "silu_mul":
            parts, given = parts[: -1 - ctx.biased], parts[-1 - ctx.biased :]
            y = op(given[0], parts, given[1] if ctx.biased else None, None, n, k, format, "", route)
            grad = epilogues.gradient(grad.reshape(-1, n // 2), y.reshape(-1, n)).view(y.shape)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            dequantize = getattr(torch.ops.lq.dequantize, VERSION)
            _, own = copies(_call(layout, format, n, k, epilogue), route, grad.device.type)[0]
            grad_x = grad @ dequantize(parts[own], layout, n, k, format, ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, n).sum(0)
        return grad_x, [None] * len(parts), grad_bias, grad_other, None, None, None, None, None

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
        call = _call(layout, format, n, k, "")
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


def _check_grouped(x: Tensor, parts: Sequence[Tensor], ends: Tensor, call: Call) -> tuple[int | torch.SymInt, int]:
    """As `_check`, of the weights of many experts, `call` being that of one. Returns the shape of y."""
    if call.n % grouped.MULTIPLE:
        raise ArgumentError("n", call.n, f"a multiple of {grouped.MULTIPLE}")
    if ends.ndim != 1 or ends.dtype != torch.int32 or not len(ends):
        raise ArgumentError("ends", f"{ends.dtype} {tuple(ends.shape)}", "torch.int32 [experts]")
    if x.ndim != 2:
        raise ArgumentError("x.shape", tuple(x.shape), f"[m, {call.k}]")
    if ends.device != x.device:
        raise ArgumentError("ends.device", ends.device, f"{x.device}, where x is")
    if call.epilogue == "add":
        raise ArgumentError("epilogue", call.epilogue, "'' | 'silu_mul' for experts")
    whole = replace(call, n=len(ends) * call.n, epilogue="")
    _check(x, parts, None, None, whole, "dense")
    if call.epilogue:
        _check(x.new_empty((0, call.k)), grouped.of_expert(parts, 0, len(ends)), None, None, call, "dense")
    return x.shape[0], epilogues.outputs(call.epilogue, call.n)


def _run_grouped(x: Tensor, parts: Sequence[Tensor], ends: Tensor, call: Call, route: str, y: Tensor) -> None:
    if call.k == 0:
        y.zero_()
        return
    kernel = next(kernel for limit, kernel, _ in parse_route(route) if limit is None or x.shape[0] <= limit)
    refusal = grouped.refusal(kernel, call, x.dtype, x.device.type)
    if refusal is not None or "/" in route:
        raise ArgumentError("route", route, f"for experts of {call} on {x.device}: {refusal or 'one layout'}")
    x, ends = x.contiguous(), ends.contiguous()
    if kernel.grouped is not None and x.device.type != "cpu":
        kernel.grouped.run(x, parts, ends, call, y)
    else:
        grouped.one_by_one(functools.partial(_by, kernel), x, parts, ends, call, y)


def _define_grouped() -> Any:
    LIBRARY.define(
        f"grouped_gemm.{VERSION}(Tensor x, Tensor[] parts, Tensor ends, str layout, int n, int k, str format,"
        " str epilogue, str route) -> Tensor"
    )
    op = getattr(torch.ops.lq.grouped_gemm, VERSION)

    def call_of(layout: str, n: int, k: int, format: str, epilogue: str) -> Call:
        if layout not in LAYOUTS:
            raise ArgumentError("layout", layout, " | ".join(LAYOUTS))
        return _call(layout, format, n, k, epilogue)

    def run(
        x: Tensor, parts: list[Tensor], ends: Tensor, layout: str, n: int, k: int, format: str, epilogue: str,
        route: str,
    ) -> Tensor:  # fmt: skip
        call = call_of(layout, n, k, format, epilogue)
        y = x.new_empty(_check_grouped(x, parts, ends, call))
        if y.numel():
            _run_grouped(x, parts, ends, call, route, y)
        return y

    def fake(
        x: Tensor, parts: list[Tensor], ends: Tensor, layout: str, n: int, k: int, format: str, epilogue: str,
        route: str,
    ) -> Tensor:  # fmt: skip
        parse_route(route)
        return x.new_empty(_check_grouped(x, parts, ends, call_of(layout, n, k, format, epilogue)))

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError("lq::grouped_gemm has no gradient: run it under torch.no_grad()")

    LIBRARY.impl(f"grouped_gemm.{VERSION}", run, "CompositeExplicitAutograd")
    torch.library.register_fake(op, fake, lib=LIBRARY)
    torch.library.register_autograd(op, backward, lib=LIBRARY)
    return op


GEMMS = {layout: _define(layout) for layout in LAYOUTS}
DEQUANTIZE = _define_dequantize()
GROUPED = _define_grouped()


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
        def lowering(
            x: Any, parts: list[Any], bias: Any, other: Any, n: int, k: int, format: str, epilogue: str, route: str
        ) -> Any:
            if V.graph.cpp_wrapper:
                plain = fallback_handler(op, add_to_fallback_set=False)
                return plain(x, parts, bias, other, n, k, format, epilogue, route)
            # Once, not for each op that reads it.
            x.realize()
            x = ir.ExternKernel.require_contiguous(x)
            tensors = [x, *map(ir.ExternKernel.realize_input, parts)]
            tensors += [ir.ExternKernel.require_contiguous(t) for t in (bias, other) if t is not None]
            size = [*x.get_size()[:-1], epilogues.outputs(epilogue, n)]
            strides = ir.FlexibleLayout.contiguous_strides(size)
            return ir.TensorBox.create(
                ir.ExternKernelOut(
                    layout=ir.FixedLayout(x.get_device(), x.get_dtype(), size, strides),
                    inputs=tensors,
                    constant_args=(layout, n, k, format, epilogue, route, bias is not None),
                    python_kernel_name=f"extern_kernels.{name}",
                )
            )

        return lowering

    for layout, op in GEMMS.items():
        register_lowering(op, type_promotion_kind=None)(lower(layout, op))
