"""What a quantized weight means: its float64 truth, the check that it is well formed, and a matmul's error bound."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from .errors import ArgumentError
from .types import SCALE_DTYPES, Format, QWeight, Rounding

UNIT_ROUNDOFF = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
GROUPED = ("scale", "zero", "alpha", "offset")


def code_range(format: Format) -> tuple[int, int]:
    """The least and the greatest code of a format, inclusive."""
    if format.form == "affine" and format.zero == "none":
        return -(1 << format.bits - 1), (1 << format.bits - 1) - 1
    return 0, (1 << format.bits) - 1


def parts_of(format: Format) -> tuple[str, ...]:
    """The grouped tensors of a format, in the order of `GROUPED`."""
    if format.form == "binary":
        return ("alpha", "offset") if format.zero == "float" else ("alpha",)
    return ("scale",) if format.zero == "none" else ("scale", "zero")


def validate(w: QWeight) -> QWeight:
    """Returns `w` if it is well formed; raises ArgumentError naming the field, its value and what is accepted.

    Checks shapes, dtypes, devices, that every code is in range, that scales are finite, and that `perm` is one.
    """
    f, groups = w.format, w.k // w.format.group
    if type(w.n) is not int or w.n < 0 or type(w.k) is not int or w.k < 0:
        raise ArgumentError("n, k", (w.n, w.k), "ints >= 0")
    if w.k % f.group:
        raise ArgumentError("format.group", f.group, f"a divisor of k={w.k}")
    code_dtype = torch.int8 if code_range(f)[0] < 0 else torch.uint8
    _expect("codes", w.codes, (w.n, w.k), (code_dtype,), w.codes.device)
    if w.codes.numel():
        low, high = code_range(f)
        least, most = torch.stack(torch.aminmax(w.codes)).tolist()
        if least < low or most > high:
            raise ArgumentError("codes", f"[{least}, {most}]", f"codes from {low} to {high} for {f.bits} bits")
    wanted = parts_of(f)
    for name in GROUPED:
        value = getattr(w, name)
        if (name in wanted) != (value is not None):
            raise ArgumentError(name, "given" if value is not None else None, f"{', '.join(wanted)} for {f}")
        if value is None:
            continue
        shape = (w.n, groups, f.bits) if name == "alpha" else (w.n, groups)
        integer_zero = name == "zero" and f.zero == "int"
        dtypes = (torch.int16,) if integer_zero else (*SCALE_DTYPES.values(), torch.float64)
        _expect(name, value, shape, dtypes, w.codes.device)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ArgumentError(name, "inf or NaN", "finite values")
    _validate_table(w, groups)
    if w.perm is not None:
        _expect("perm", w.perm, (w.k,), (torch.int64,), w.codes.device)
        if not torch.equal(w.perm.sort().values, torch.arange(w.k, device=w.perm.device)):
            raise ArgumentError("perm", "not a permutation", f"each of 0..{w.k - 1} once")
    return w


def _validate_table(w: QWeight, groups: int) -> None:
    f = w.format
    if (f.form == "table") != (w.table is not None):
        raise ArgumentError(
            "table", "given" if w.table is not None else None, f"{'a' if f.form == 'table' else 'no'} table"
        )
    if w.table is not None:
        levels = 1 << f.bits
        shapes = ((levels,), (w.n, levels), (w.n, groups, levels))
        if tuple(w.table.shape) not in shapes:
            raise ArgumentError("table.shape", tuple(w.table.shape), " or ".join(map(str, shapes)))
        _expect("table", w.table, tuple(w.table.shape), tuple(UNIT_ROUNDOFF), w.codes.device)
        if not bool(torch.isfinite(w.table).all()):
            raise ArgumentError("table", "inf or NaN", "finite values")


def _expect(
    name: str, t: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if not isinstance(t, torch.Tensor):
        raise ArgumentError(name, type(t).__name__, "a tensor")
    if tuple(t.shape) != shape:
        raise ArgumentError(f"{name}.shape", tuple(t.shape), str(shape))
    if t.dtype not in dtypes:
        raise ArgumentError(f"{name}.dtype", t.dtype, " | ".join(map(str, dtypes)))
    if t.device != device:
        raise ArgumentError(f"{name}.device", t.device, f"{device}, where the codes are")


def rows(w: QWeight, which: slice | torch.Tensor) -> QWeight:
    """Some rows of a weight; a slice shares its memory."""
    held = {name: getattr(w, name)[which] for name in ("codes", *GROUPED) if getattr(w, name) is not None}
    if w.table is not None and w.table.ndim > 1:
        held["table"] = w.table[which]
    return dataclasses.replace(w, n=held["codes"].shape[0], **held)


def columns(w: QWeight, which: torch.Tensor) -> QWeight:
    """Some inputs of a weight, by where their codes stand, each as a group of its own."""
    groups = which // w.format.group
    held = {name: getattr(w, name)[:, groups] for name in GROUPED if getattr(w, name) is not None}
    if w.table is not None and w.table.ndim > 2:
        held["table"] = w.table[:, groups]
    format = dataclasses.replace(w.format, group=1)
    return dataclasses.replace(w, format=format, k=len(which), codes=w.codes[:, which], perm=None, **held)


def concat(weights: Sequence[QWeight]) -> QWeight:
    """The rows of several weights as one. They must share format, k, perm and, unless each row has its own, table."""
    first = weights[0]
    names = [name for name in ("codes", *GROUPED) if getattr(first, name) is not None]
    if first.table is not None and first.table.ndim > 1:
        names.append("table")
    held: dict[str, Any] = {name: torch.cat([getattr(w, name) for w in weights]) for name in names}
    return dataclasses.replace(first, n=sum(w.n for w in weights), **held)


def dequantize(w: QWeight, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The dense weight [n, k], columns in the order of the inputs. float64 is the truth of DESIGN section 5."""
    dense = dequantize_grouped(w, dtype).view(w.n, w.k)
    if w.perm is None:
        return dense
    return torch.empty_like(dense).index_copy_(1, w.perm, dense)


def dequantize_grouped(w: QWeight, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight as [n, k/group, group], columns in the order of the codes."""
    f = w.format
    codes = w.codes.view(w.n, w.k // f.group, f.group)
    if f.form == "binary":
        assert w.alpha is not None
        dense = torch.zeros(codes.shape, dtype=dtype, device=codes.device)
        for plane in range(f.bits):
            sign = ((codes >> plane) & 1).to(dtype).mul_(2).sub_(1)
            dense.addcmul_(sign, w.alpha[..., plane, None].to(dtype))
        return dense if w.offset is None else dense.add_(w.offset.unsqueeze(-1).to(dtype))
    assert w.scale is not None
    if f.form == "table":
        assert w.table is not None
        table = w.table.to(dtype)
        if table.ndim == 1:
            dense = table[codes.long()]
        else:
            rows = table.view(w.n, -1, 1 << f.bits).expand(w.n, codes.shape[1], 1 << f.bits)
            dense = rows.gather(-1, codes.long())
    else:
        dense = codes.to(dtype)
        if w.zero is not None:
            dense = dense.sub_(w.zero.unsqueeze(-1).to(dtype))
    return dense.mul_(w.scale.unsqueeze(-1).to(dtype))


def bound(y64: torch.Tensor, x64: torch.Tensor, w64: torch.Tensor, r: Rounding) -> torch.Tensor:
    """The largest error allowed at each element of y[m, n] = x[m, k] @ w[n, k].T (DESIGN section 6). All float64.

    The sharp, statistical bound with factor 8, capped by the worst case. An x of fixed point adds to both what its
    steps, relative to the largest |x| of each block, can make of w.
    """
    k, squares = x64.shape[-1], w64.square().T
    spread = (x64.square() @ squares).sqrt()
    sharp = r.out * y64.abs() + 8 * (r.weight / math.sqrt(3) + math.sqrt(k) * r.accumulate) * spread
    gamma = k * r.accumulate / (1 - k * r.accumulate)
    worst = r.out * y64.abs() + (r.weight + gamma) * (x64.abs() @ w64.abs().T)
    if r.input:
        padded = torch.nn.functional.pad(x64.abs(), (0, -k % r.block)).unflatten(-1, (-1, r.block))
        most = padded.amax(-1, keepdim=True).expand_as(padded).flatten(-2)[..., :k]
        sharp += 8 * r.input / math.sqrt(3) * (most.square() @ squares).sqrt()
        worst += r.input * (most @ w64.abs().T)
    # The additive term covers outputs in the subnormal range of half precision, for both.
    return torch.minimum(sharp, worst) + 2.0**-24


def narrowest(values: torch.Tensor) -> str:
    """The first of float16, bfloat16, float32 that holds every value exactly, else float32 (which rounds)."""
    for name, dtype in SCALE_DTYPES.items():
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return name
    return "float32"


def refit(w: QWeight, format: Format, table_shape: tuple[int, ...] | None = None) -> QWeight | None:
    """`w` exactly as a weight of another format, or None where that format cannot hold it.

    New values may need fewer bits, larger groups or no zero; the packed buffers of the old ones still hold them.
    """
    f = w.format
    if f.form != format.form or f.bits > format.bits or f.group % format.group:
        return None
    repeat = f.group // format.group
    grouped = {}
    for name in GROUPED:
        value = getattr(w, name)
        grouped[name] = None if value is None else value.repeat_interleave(repeat, dim=1)
    dtype = SCALE_DTYPES[format.scale_dtype]
    for name in ("scale", "alpha", "offset"):
        value = grouped[name]
        exact = value is None or format.scale_dtype == "float32" or torch.equal(value.to(dtype).to(value.dtype), value)
        if not exact:
            return None
    codes, table = w.codes, w.table
    if f.form == "affine" and f.zero != format.zero:
        if format.zero == "none" or f.zero == "float":
            return None
        zero = grouped["zero"]
        if zero is None:
            half = 1 << f.bits - 1
            codes = (codes.to(torch.int16) + half).to(torch.uint8)
            assert grouped["scale"] is not None
            zero = torch.full(grouped["scale"].shape, half, dtype=torch.int16, device=codes.device)
        grouped["zero"] = zero.to(torch.float64) if format.zero == "float" else zero
    if f.form == "binary":
        alpha = grouped["alpha"]
        assert alpha is not None
        grouped["alpha"] = torch.nn.functional.pad(alpha, (0, format.bits - f.bits))
        if (grouped["offset"] is None) != (format.zero == "none"):
            if format.zero == "none":
                return None
            grouped["offset"] = torch.zeros_like(alpha[..., 0])
    if table is not None:
        if table_shape is None or table.ndim != len(table_shape):
            return None
        table = _widened(table, format.bits, repeat)
    return QWeight(format, w.n, w.k, codes, table=table, perm=w.perm, **grouped)


def _widened(table: torch.Tensor, bits: int, repeat: int) -> torch.Tensor:
    table = torch.nn.functional.pad(table, (0, (1 << bits) - table.shape[-1]))
    return table.repeat_interleave(repeat, dim=1) if table.ndim == 3 else table


def random_weight(
    format: Format, n: int, k: int, device: torch.device, generator: torch.Generator | None = None
) -> QWeight:
    """A weight with random codes and parts, made on `device`: no quantizer runs. Its elements are of the order of 1."""
    low, high = code_range(format)
    dtype, groups, levels = SCALE_DTYPES[format.scale_dtype], k // format.group, 1 << format.bits

    def around(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device, generator=generator).add_(0.5)

    parts: dict[str, torch.Tensor] = {}
    if format.form == "binary":
        powers = 2.0 ** torch.arange(-format.bits, 0, device=device)
        parts["alpha"] = (around(n, groups, format.bits) * powers).to(dtype)
        if format.zero == "float":
            parts["offset"] = (around(n, groups) - 1).to(dtype)
    elif format.form == "table":
        parts["scale"] = around(n, groups).to(dtype)
        parts["table"] = torch.randn(levels, device=device, generator=generator)
    else:
        # Powers of two keep a scale out of the subnormal range of half precision at every number of bits.
        parts["scale"] = (around(n, groups) / levels).to(dtype)
        if format.zero == "int":
            parts["zero"] = torch.randint(
                low, high + 1, (n, groups), dtype=torch.int16, device=device, generator=generator
            )
        elif format.zero == "float":
            parts["zero"] = torch.rand((n, groups), device=device, generator=generator).mul_(high)
    code_dtype = torch.int8 if low < 0 else torch.uint8
    codes = torch.randint(low, high + 1, (n, k), dtype=code_dtype, device=device, generator=generator)
    return QWeight(format, n, k, codes, **parts)
