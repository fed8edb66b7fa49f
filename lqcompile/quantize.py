"""Float weights to quantized ones: round-to-nearest, NF4 and binary coding, and the plain module that holds the result."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from .errors import ArgumentError
from .formats import GROUPED, code_range, validate

# The planes are the kernels' own layout, so that whoever lowers a QuantLinear finds nothing to repack.
from .kernels.layout import LUT, QUICK, Layout
from .types import SCALE_DTYPES, Format, QWeight

METHODS = ("rtn", "nf4", "bcq")
NAME_OF_DTYPE = {dtype: name for name, dtype in SCALE_DTYPES.items()}
# QLoRA, arXiv 2305.14314, appendix E.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A round must gain this share of a group's error, above what float32 noise could feign, or the group is done.
LEAST_GAIN = 2.0**-14
CHUNK = 1 << 20


def rtn(
    weight: torch.Tensor,
    bits: int,
    group: int | str | None,
    symmetric: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> QWeight:
    """Round-to-nearest affine quantization of a float `weight` [n, k], `bits` 1..8 (symmetric: 2..8).

    `group` consecutive inputs share a scale; None or "row" is one group per row. Asymmetric: uint8 codes and an int16
    zero in [0, 2**bits - 1], over a range that includes 0. Symmetric: signed codes, no zero. No element is off by more
    than scale/2: the scale is rounded up to `scale_dtype` (default: the weight's) before the codes are chosen.
    Raises ArgumentError for unusable arguments, inf or NaN, and scales that `scale_dtype` cannot hold.
    """
    w, scale_dtype = _prepare("weight", weight, bits, group, "rtn", symmetric, scale_dtype)
    scale = _scale("weight", w, bits, "rtn", symmetric, scale_dtype)
    exact = scale.to(_compute_dtype(w)).unsqueeze(-1)
    codes = w.to(exact.dtype).div(exact).round_()
    zero = None
    if not symmetric:
        zero = w.amin(-1).double().clamp(max=0).neg_().div_(scale.double()).round_().clamp_(max=(1 << bits) - 1)
        codes.add_(zero.unsqueeze(-1).to(codes.dtype))
        zero = zero.to(torch.int16)
    format = Format("affine", bits, w.shape[2], "none" if symmetric else "int", NAME_OF_DTYPE[scale_dtype])
    codes = codes.clamp_(*code_range(format)).to(torch.int8 if symmetric else torch.uint8)
    return QWeight(format, *weight.shape, codes.view(weight.shape), scale=scale, zero=zero)


def nf4(weight: torch.Tensor, group: int | str | None, scale_dtype: torch.dtype | None = None) -> QWeight:
    """NF4 (QLoRA, arXiv 2305.14314, appendix E) of a float `weight` [n, k]: w = table[codes] * absmax of the group.

    The table is float32 [16], the codes uint8. `group`, `scale_dtype` and the errors are as in `rtn`.
    """
    w, scale_dtype = _prepare("weight", weight, 4, group, "nf4", False, scale_dtype)
    scale = _scale("weight", w, 4, "nf4", False, scale_dtype)
    exact = scale.to(_compute_dtype(w)).unsqueeze(-1)
    table = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=weight.device)
    middles = table[1:].to(exact.dtype).add(table[:-1]).div_(2)
    codes = torch.bucketize(w.to(exact.dtype).div(exact), middles, out_int32=True).to(torch.uint8)
    format = Format("table", 4, w.shape[2], "none", NAME_OF_DTYPE[scale_dtype])
    return QWeight(format, *weight.shape, codes.view(weight.shape), scale=scale, table=table)


def bcq(
    weight: torch.Tensor,
    bits: int,
    group: int | str | None,
    rounds: int = 15,
    offset: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> QWeight:
    """Binary-coding quantization of a float `weight` [n, k]: w = sum_i alpha_i * (+-1) + offset, `bits` 1..8 planes.

    Two starts, the signs of successive residuals (Guo et al., arXiv 1702.03871) and the uniform grid, are refined for
    at most `rounds` rounds (Xu et al., arXiv 1802.00150, section 3): alpha and offset by least squares per group, then
    each weight to the nearest of its 2**bits levels. The better one of each group is kept. codes uint8 [n, k], alpha
    [n, k/group, bits], offset [n, k/group]. `group`, `scale_dtype` and the errors are as in `rtn`.
    """
    w, scale_dtype = _prepare("weight", weight, bits, group, "bcq", not offset, scale_dtype)
    _check_rounds(rounds)
    _scale("weight", w, bits, "bcq", not offset, scale_dtype)
    chunks = []
    # Chunks of rows bound the working memory and let the easy ones stop early.
    for rows in w.split(max(1, CHUNK // max(1, weight.shape[1]))):
        for _, chunk in _bcq_rounds(rows, bits, rounds, offset, scale_dtype):  # noqa: B007
            pass
        chunks.append(chunk)
    codes, alpha = (torch.cat([getattr(c, name) for c in chunks]) for name in ("codes", "alpha"))
    shift = torch.cat([c.offset for c in chunks]) if offset else None
    return QWeight(chunks[0].format, *weight.shape, codes, alpha=alpha, offset=shift)


def bcq_rounds(
    weight: torch.Tensor,
    bits: int,
    group: int | str | None,
    rounds: int = 15,
    offset: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> Iterator[tuple[float, QWeight]]:
    """What `bcq` does, round by round: yields (sum of squared errors, QWeight), the start first.

    The error never increases; the iteration ends early when no group gains from another round.
    """
    w, scale_dtype = _prepare("weight", weight, bits, group, "bcq", not offset, scale_dtype)
    _check_rounds(rounds)
    _scale("weight", w, bits, "bcq", not offset, scale_dtype)
    return _bcq_rounds(w, bits, rounds, offset, scale_dtype)


def _bcq_rounds(
    w: torch.Tensor, bits: int, rounds: int, offset: bool, scale_dtype: torch.dtype
) -> Iterator[tuple[float, QWeight]]:
    n, groups, group = w.shape
    format = Format("binary", bits, group, "float" if offset else "none", NAME_OF_DTYPE[scale_dtype])
    # Groups are brought to [-1, 1] by a power of two, so that squares neither overflow nor vanish.
    exponent = torch.frexp(w.abs().amax(-1).double()).exponent.reshape(-1, 1)
    unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    x = w.reshape(-1, group).double().div_(unit).float()
    store = functools.partial(_round_in_units, scale_dtype=scale_dtype)
    tries = []
    for start in (_residual_signs, _uniform_grid):
        fit = store(start(x, bits, offset), unit)
        codes, error = _nearest(x, fit, bits)
        tries.append([fit, codes, error, torch.arange(len(x), device=x.device)])
    for round in range(rounds + 1):
        for state in tries if round else ():
            _refine(x, unit, state, bits, offset, store)
        (fit, codes, error, _), (other_fit, other_codes, other_error, _) = tries
        first = error <= other_error
        best = torch.where(first[:, None], fit, other_fit).mul_(unit).to(scale_dtype).view(n, groups, bits + 1)
        yield (
            float((torch.minimum(error, other_error) * unit[:, 0].square()).sum()),
            QWeight(
                format,
                n,
                groups * group,
                torch.where(first[:, None], codes, other_codes).view(n, -1),
                alpha=best[..., :bits].contiguous(),
                offset=best[..., bits].contiguous() if offset else None,
            ),
        )
        if not any(len(active) for *_, active in tries):
            return


def _residual_signs(x: torch.Tensor, bits: int, offset: bool) -> torch.Tensor:
    fit = torch.zeros((len(x), bits + 1), dtype=torch.float64, device=x.device)
    if offset:
        fit[:, bits] = x.mean(-1, dtype=torch.float64)
    rest = x - fit[:, bits:].float()
    for plane in range(bits):
        fit[:, plane] = rest.abs().mean(-1, dtype=torch.float64)
        rest.sub_(torch.where(rest < 0, -1.0, 1.0) * fit[:, plane, None].float())
    return fit


def _uniform_grid(x: torch.Tensor, bits: int, offset: bool) -> torch.Tensor:
    low, high = (t.double() for t in x.aminmax(dim=-1))
    if not offset:
        high = torch.maximum(-low, high)
        low = -high
    step = (high - low) / ((1 << bits) - 1)
    # DESIGN section 5: counting i from 0, alpha_i = 2^(i-1) * step.
    alpha = step[:, None] * 2.0 ** torch.arange(-1, bits - 1, device=x.device, dtype=torch.float64)
    return torch.cat([alpha, (low + high)[:, None] / 2], -1)


def _round_in_units(fit: torch.Tensor, unit: torch.Tensor, scale_dtype: torch.dtype) -> torch.Tensor:
    return (fit * unit).to(scale_dtype).double() / unit


def _nearest(x: torch.Tensor, fit: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    patterns = torch.arange(1 << bits, device=x.device)
    signs = (patterns >> torch.arange(bits, device=x.device)[:, None] & 1).double() * 2 - 1
    levels, order = (fit[:, :bits] @ signs + fit[:, bits:]).float().sort(-1)
    rank = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, x)
    error = (x - levels.gather(1, rank)).square_().sum(-1, dtype=torch.float64)
    return order.to(torch.uint8).gather(1, rank), error


def _refine(
    x: torch.Tensor, unit: torch.Tensor, state: list[torch.Tensor], bits: int, offset: bool, store: Callable
) -> None:
    fit, codes, error, active = state
    if not len(active):
        return
    rows = x[active]
    basis = torch.ones((*rows.shape, bits + offset), device=x.device)
    for plane in range(bits):
        basis[..., plane] = (codes[active] >> plane & 1).float().mul_(2).sub_(1)
    gram = (basis.mT @ basis).double() / x.shape[1]
    # Planes that coincide make the system singular; this much of a ridge is below float32's resolution.
    gram.diagonal(dim1=1, dim2=2).add_(1e-9)
    solved = torch.linalg.solve(gram, (basis.mT @ rows[..., None]).double() / x.shape[1])[..., 0]
    tried = store(F.pad(solved, (0, 1 - offset)), unit[active])
    tried_codes, tried_error = _nearest(rows, tried, bits)
    # NaN, from an alpha that overflowed scale_dtype, compares false and is not taken.
    better = tried_error < error[active] * (1 - LEAST_GAIN)
    active = active[better]
    fit[active], codes[active], error[active] = tried[better], tried_codes[better], tried_error[better]
    state[3] = active


def _compute_dtype(w: torch.Tensor) -> torch.dtype:
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def _check_rounds(rounds: int) -> None:
    if type(rounds) is not int or rounds < 0:
        raise ArgumentError("rounds", rounds, "an int >= 0")


def _check_options(
    bits: int, group: int | str | None, method: str, symmetric: bool, scale_dtype: torch.dtype | None
) -> None:
    if method not in METHODS:
        raise ArgumentError("method", method, " | ".join(METHODS))
    if type(symmetric) is not bool or (symmetric and method == "nf4"):
        raise ArgumentError("symmetric", symmetric, "False, for nf4" if method == "nf4" else "a bool")
    least = 2 if symmetric and method == "rtn" else 1
    if type(bits) is not int or not least <= bits <= 8 or (method == "nf4" and bits != 4):
        raise ArgumentError("bits", bits, "4, for nf4" if method == "nf4" else f"an int from {least} to 8")
    if group not in (None, "row") and (type(group) is not int or group < 1):
        raise ArgumentError("group", group, 'a positive int, or None or "row" for one group per row')
    if scale_dtype is not None and scale_dtype not in NAME_OF_DTYPE:
        raise ArgumentError("scale_dtype", scale_dtype, "None | " + " | ".join(map(str, NAME_OF_DTYPE)))


def _prepare(
    name: str,
    weight: torch.Tensor,
    bits: int,
    group: int | str | None,
    method: str,
    symmetric: bool,
    scale_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.dtype]:
    """The weight as [n, k/group, group] and the scale's dtype, or ArgumentError naming `name` or the option."""
    _check_options(bits, group, method, symmetric, scale_dtype)
    floats = (*NAME_OF_DTYPE, torch.float64)
    if not isinstance(weight, torch.Tensor) or type(weight.detach()) is not torch.Tensor or weight.ndim != 2:
        shown = (type(weight).__name__, tuple(getattr(weight, "shape", ())))
        raise ArgumentError(name, shown, "a plain 2-d tensor [n, k]")
    if weight.dtype not in floats or weight.is_meta:
        raise ArgumentError(name, (weight.dtype, str(weight.device)), f"data of {' | '.join(map(str, floats))}")
    k = weight.shape[1]
    width = group if type(group) is int else max(k, 1)
    if k % width:
        raise ArgumentError("group", group, f"a divisor of k={k}, the inputs of {name}")
    if scale_dtype is None:
        scale_dtype = weight.dtype if weight.dtype in NAME_OF_DTYPE else torch.float32
    return weight.detach().reshape(weight.shape[0], k // width, width), scale_dtype


def _scale(
    name: str, w: torch.Tensor, bits: int, method: str, symmetric: bool, dtype: torch.dtype
) -> torch.Tensor:
    """The scale [n, k/group] of every group (bcq: its absmax), after checking that `dtype` can hold it."""
    low, high = (t.double() for t in w.aminmax(dim=-1))
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ArgumentError(name, "inf or NaN", "finite weights")
    low, high = low.clamp(max=0), high.clamp(min=0)
    if method != "rtn":
        scale = torch.maximum(-low, high)
    elif symmetric:
        most = (1 << bits - 1) - 1
        scale = torch.maximum(high / most, -low / (most + 1))
    else:
        scale = (high - low) / ((1 << bits) - 1)
    rounded = _round_up(scale, dtype) if method == "rtn" else scale.to(dtype)
    info = torch.finfo(dtype)
    lost = (scale > 0) & ((rounded < info.tiny) | ~rounded.isfinite())
    if bool(lost.any()):
        wider = "torch.float32 or torch.bfloat16" if dtype == torch.float16 else "torch.float32"
        advice = "rescale the weight" if dtype == torch.float32 else f"pass scale_dtype={wider}"
        accepted = f"scales from {info.tiny:.3g} to {info.max:.6g} for {dtype}; {advice}"
        raise ArgumentError(f"scale of {name}", float(scale[lost][0]), accepted)
    # A group of zeros takes scale 1: its codes give exact zeros, and nobody divides by it.
    return rounded.masked_fill_(scale == 0, 1)


def _round_up(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    near = values.to(dtype)
    bits = near.view(torch.int32 if near.itemsize == 4 else torch.int16)
    return (bits + (near.double() < values)).to(bits.dtype).view(dtype)


class QuantLinear(nn.Module):
    """A linear layer [out_features, in_features] of packed codes, in plain PyTorch: it runs wherever PyTorch does.

    Buffers only, but for the bias. forward dequantizes in the scale's dtype, casts to x's, and calls F.linear. Built by
    `QuantLinear.from_weight` or `lqcompile.quantize`; `tensors` are the buffers, planes as kernels/layout.py cuts them.
    """

    def __init__(
        self,
        format: Format,
        in_features: int,
        out_features: int,
        tensors: Mapping[str, torch.Tensor],
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._format = format
        for name, value in tensors.items():
            self.register_buffer(name, value)
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise ArgumentError("bias.shape", tuple(bias.shape), f"({out_features},)")
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_weight(cls, weight: QWeight, bias: torch.Tensor | None = None) -> QuantLinear:
        """Packs `weight`. A Parameter given as `bias` [n] is kept as it is; raises ArgumentError if one is malformed."""
        layout = _layout(validate(weight).format)
        planes = layout.pack(weight)[: len(layout.widths(weight.format))]
        tensors = {f"plane{i}": plane for i, plane in enumerate(planes)}
        for name in (*GROUPED, "table", "perm"):
            if (value := getattr(weight, name)) is not None:
                tensors[name] = value
        return cls(weight.format, weight.k, weight.n, tensors, bias)

    @property
    def format(self) -> Format:
        """What the buffers hold; follows `.to(dtype)`."""
        dtype = (self.alpha if self._format.form == "binary" else self.scale).dtype
        return dataclasses.replace(self._format, scale_dtype=NAME_OF_DTYPE.get(dtype, self._format.scale_dtype))

    def qweight(self) -> QWeight:
        """The weight that `from_weight` packed, exactly; after `.to(dtype)`, with its float tensors in that dtype."""
        codes = self._codes()
        if (low := code_range(self._format)[0]) < 0:
            codes = (codes.to(torch.int16) + low).to(torch.int8)
        given = {name: self._buffers.get(name) for name in (*GROUPED, "table", "perm")}
        return QWeight(self.format, self.out_features, self.in_features, codes, **given)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)

    def dequantize(self) -> torch.Tensor:
        """The dense weight [out_features, in_features] in the scale's dtype."""
        form, low = self._format.form, code_range(self._format)[0]
        grouped = (self.out_features, self.in_features // self._format.group, self._format.group)
        if form == "binary":
            bits = torch.stack([self._field(i, 1).view(grouped) for i in range(self._format.bits)], -1)
            signs = (bits.to(self.alpha.dtype) * 2) - 1
            dense = (self.alpha.unsqueeze(2) * signs).sum(-1)
            if self._format.zero == "float":
                dense = dense + self.offset.unsqueeze(-1)
        elif form == "table":
            dense = self._looked_up(self._codes().view(grouped)) * self.scale.unsqueeze(-1)
        else:
            codes = self._codes().view(grouped).to(torch.int16)
            if self._format.zero == "none":
                codes = codes + low
            elif self._format.zero == "int":
                codes = codes - self.zero.unsqueeze(-1)
            dense = codes.to(self.scale.dtype)
            if self._format.zero == "float":
                dense = dense - self.zero.unsqueeze(-1).to(self.scale.dtype)
            dense = dense * self.scale.unsqueeze(-1)
        dense = dense.view(self.out_features, self.in_features)
        return dense[:, torch.argsort(self.perm)] if "perm" in self._buffers else dense

    def _looked_up(self, codes: torch.Tensor) -> torch.Tensor:
        table = self.table.to(self.scale.dtype)
        if table.ndim == 1:
            return table[codes.to(torch.int32)]
        rows = table.view(codes.shape[0], -1, table.shape[-1])
        return rows.expand(-1, codes.shape[1], -1).gather(-1, codes.to(torch.int64))

    def _codes(self) -> torch.Tensor:
        codes, shift = None, 0
        for i, width in enumerate(_layout(self._format).widths(self._format)):
            field = self._field(i, width)
            codes = field if codes is None else codes | (field << shift)
            shift += width
        return codes

    def _field(self, i: int, width: int) -> torch.Tensor:
        plane = getattr(self, f"plane{i}")
        if width == 8:
            return plane
        fields = torch.stack([(plane >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)], -1)
        return fields.flatten(1)[:, : self.in_features]

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{size}, format={self.format}, scale_dtype={self.format.scale_dtype}"


def _layout(format: Format) -> Layout:
    return LUT if format.form == "binary" else QUICK


def quantize(
    model: nn.Module,
    bits: int = 4,
    group: int | str | None = 128,
    method: str = "rtn",
    *,
    symmetric: bool = False,
    scale_dtype: torch.dtype | None = None,
    modules: Callable[[str, nn.Linear], bool] | None = None,
    rounds: int = 15,
) -> nn.Module:
    """Replaces every nn.Linear of `model` by a QuantLinear, in place, and returns `model`.

    `method` is "rtn", "nf4" (bits=4) or "bcq" (`rounds` as in `bcq`; symmetric: no offset); `bits`, `group`, `symmetric`
    and `scale_dtype` are as in `rtn`. `modules(name, linear)` chooses among the layers; only exact nn.Linear are, since
    subclasses may be used by their weight. Layers that are shared, or tie one weight, stay so. A `model` that is itself
    a Linear cannot change in place: its QuantLinear is returned.
    Raises ArgumentError, naming argument or layer, before anything is changed. Float weights go layer by layer.
    """
    _check_options(bits, group, method, symmetric, scale_dtype)
    _check_rounds(rounds)
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "an nn.Module")
    if modules is not None and not callable(modules):
        raise ArgumentError("modules", modules, "None, or a callable (name, linear) -> bool")
    holder = nn.ModuleDict({"": model}) if False else model
    return holder
