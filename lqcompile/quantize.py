"""Float weights to quantized ones: round-to-nearest, NF4, binary coding, and the module that holds them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ArgumentError
from .formats import GROUPED, code_range, validate

# The planes are the kernels' own layout by rows, which any device reads.
from .kernels.layout import LUT, PLAIN, QUICK
from .types import SCALE_DTYPES, Format, QWeight

Group = int | str | None
Dtype = torch.dtype | None
Choose = Callable[[str, nn.Linear], bool]
Places = list[tuple[str, nn.Module, str]]
METHODS = ("rtn", "nf4", "bcq")
NAME_OF_DTYPE = {dtype: name for name, dtype in SCALE_DTYPES.items()}
# QLoRA, arXiv 2305.14314, appendix E.
NF4_LEVELS = (
    -1.0, -0.696192801, -0.525073051, -0.394917488, -0.284441382, -0.18477343, -0.0910500363, 0.0,
    0.0795802996, 0.160930201, 0.246112302, 0.337915242, 0.440709829, 0.562617004, 0.722956836, 1.0,
)  # fmt: skip


def rtn(weight: Tensor, bits: int, group: Group, symmetric: bool = False, scale_dtype: Dtype = None) -> QWeight:
    """Round-to-nearest affine quantization of a float `weight` [n, k]; `bits` 1..8, symmetric 2..8.

    `group` consecutive inputs share a scale; None or "row": one group per row. Asymmetric: uint8 codes, int16
    zeros in [0, 2**bits - 1], a range that includes 0. Symmetric: int8 codes, no zero. No element is off by
    more than scale/2: scales are rounded up to `scale_dtype` (default: the weight's), then codes are chosen.
    Raises ArgumentError for unusable arguments, inf or NaN, and scales that `scale_dtype` cannot hold.
    """
    w, scale = _Options("rtn", bits, group, symmetric, scale_dtype).grouped("weight", weight)
    codes, zero = (w / scale.to(w.dtype).unsqueeze(-1)).round_(), None
    if not symmetric:
        low = w.amin(-1).double().clamp_(max=0)
        zero = low.div_(scale.double()).neg_().round_().clamp_(max=(1 << bits) - 1).to(torch.int16)
        codes.add_(zero.unsqueeze(-1))
    format = Format("affine", bits, w.shape[2], "none" if symmetric else "int", NAME_OF_DTYPE[scale.dtype])
    codes = codes.clamp_(*code_range(format)).to(torch.int8 if symmetric else torch.uint8)
    return QWeight(format, len(w), weight.shape[1], codes.view(weight.shape), scale=scale, zero=zero)


def nf4(weight: Tensor, group: Group, scale_dtype: Dtype = None) -> QWeight:
    """NF4 (QLoRA, arXiv 2305.14314, appendix E) of a float `weight` [n, k]: table[codes] * absmax.

    The table is float32 [16], the codes uint8. `group`, `scale_dtype` and the errors are as in `rtn`.
    """
    w, scale = _Options("nf4", 4, group, False, scale_dtype).grouped("weight", weight)
    table = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=w.device)
    middles = (table[1:] + table[:-1]).to(w.dtype) / 2
    codes = torch.bucketize(w / scale.to(w.dtype).unsqueeze(-1), middles, out_int32=True).to(torch.uint8)
    format = Format("table", 4, w.shape[2], "none", NAME_OF_DTYPE[scale.dtype])
    return QWeight(format, len(w), weight.shape[1], codes.view(weight.shape), scale=scale, table=table)


def bcq(
    weight: Tensor, bits: int, group: Group, rounds: int = 15, offset: bool = True, scale_dtype: Dtype = None
) -> QWeight:
    """Binary-coding quantization of a float `weight` [n, k]: w = sum_i alpha_i * (+-1) + offset; `bits` 1..8.

    Two starts, the signs of successive residuals (Guo et al., arXiv 1702.03871) and the uniform grid, take up
    to `rounds` rounds (Xu et al., arXiv 1802.00150): alpha and offset by least squares per group, then each
    weight to the nearest of its 2**bits levels. Each group keeps its best. uint8 codes [n, k], alpha
    [n, k/group, bits], offset [n, k/group]. `group`, `scale_dtype` and the errors are as in `rtn`.
    """
    w, scale = _Options("bcq", bits, group, not offset, scale_dtype, rounds).grouped("weight", weight)
    parts = []
    # Chunks of rows bound the working memory; groups do not see each other.
    for rows in w.split(max(1, (1 << 20) // max(1, weight.shape[1]))):
        problem = _Binary(rows, bits, offset, scale.dtype)
        *_, (_, fit) = problem.refine(rounds)
        parts.append(problem.weight(fit))
    names = ("codes", "alpha") + ("offset",) * offset
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return dataclasses.replace(parts[0], n=weight.shape[0], **joined)


def bcq_rounds(
    weight: Tensor, bits: int, group: Group, rounds: int = 15, offset: bool = True, scale_dtype: Dtype = None
) -> Iterator[tuple[float, QWeight]]:
    """What `bcq` does, round by round: yields (sum of squared errors, QWeight), the start first.

    The error never increases; the iteration ends early when no group gains from another round.
    """
    w, scale = _Options("bcq", bits, group, not offset, scale_dtype, rounds).grouped("weight", weight)
    problem = _Binary(w, bits, offset, scale.dtype)
    for error, fit in problem.refine(rounds):
        yield float((error * problem.unit[:, 0].square()).sum()), problem.weight(fit)


class _Binary:
    """The groups of a weight, sorted once: a round then costs 2**bits searches a group, not one a weight.

    A fit is float64 [groups, bits + 1], alpha and then the offset, in units that bring its group to [-1, 1].
    """

    def __init__(self, w: Tensor, bits: int, offset: bool, dtype: torch.dtype) -> None:
        self.bits, self.offset, self.dtype, self.shape = bits, offset, dtype, w.shape
        flat = w.reshape(-1, w.shape[-1]).double()
        # A power of two, so that squares neither overflow nor vanish and the units cost no rounding.
        exponent = torch.frexp(flat.abs().amax(-1, keepdim=True)).exponent
        self.unit = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
        flat = flat / self.unit
        self.x = flat.float()
        self.ordered = self.x.sort(-1).values
        self.prefix = F.pad(self.ordered.cumsum(-1, dtype=torch.float64), (1, 0))
        self.energy = flat.square_().sum(-1)
        patterns = torch.arange(1 << bits, device=w.device)[:, None]
        self.signs = (patterns >> torch.arange(bits, device=w.device) & 1).double() * 2 - 1
        ones = torch.ones_like(patterns, dtype=torch.float64) if offset else self.signs[:, :0]
        self.basis = torch.cat([self.signs, ones], 1)

    def refine(self, rounds: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the squared error [groups] and the fit after the start and after each round."""
        groups = len(self.x)
        active = torch.arange(2 * groups, device=self.x.device)
        state = self.split(self.starts(), active % groups)
        for round in range(rounds + 1):
            if round:
                tried = self.split(self.solve(*(part[active] for part in state[2:])), active % groups)
                # More than noise must be gained; NaN, from an alpha that overflowed dtype, compares false.
                better = tried[0] < state[0][active] * (1 - 2.0**-14)
                active = active[better]
                for part, tried_part in zip(state, tried, strict=True):
                    part[active] = tried_part[better]
            error, best = state[0].view(2, groups).min(0)
            yield error, state[1][best * groups + torch.arange(groups, device=best.device)]
            if not len(active):
                return

    def starts(self) -> Tensor:
        fit = self.unit.new_zeros((len(self.x), self.bits + 1))
        if self.offset:
            fit[:, -1] = self.prefix[:, -1] / self.x.shape[1]
        rest = self.x - fit[:, -1:]
        for plane in range(self.bits):
            fit[:, plane] = rest.abs().mean(-1)
            rest -= torch.where(rest < 0, -1.0, 1.0) * fit[:, plane, None]
        low, high = self.ordered[:, :1].double(), self.ordered[:, -1:].double()
        if not self.offset:
            high = torch.maximum(-low, high)
            low = -high
        # DESIGN section 5: counting i from 0, alpha_i = 2^(i-1) * step.
        powers = 2.0 ** torch.arange(-1, self.bits - 1, device=low.device, dtype=torch.float64)
        grid = torch.cat([(high - low) / ((1 << self.bits) - 1) * powers, (low + high) / 2], 1)
        return torch.cat([fit, grid])

    def levels(self, fit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels, order = (fit[:, :-1] @ self.signs.T + fit[:, -1:]).sort(-1)
        return levels, order, ((levels[:, 1:] + levels[:, :-1]) / 2).float()

    def split(self, fit: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """The error of a fit, the fit as stored, how many weights choose each level and what they sum to."""
        unit = self.unit[rows]
        fit = (fit * unit).to(self.dtype).double() / unit
        levels, order, middles = self.levels(fit)
        cuts = torch.searchsorted(self.ordered[rows], middles, right=True)
        cuts = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=self.x.shape[1])
        count, total = cuts.diff().double(), self.prefix[rows].gather(1, cuts).diff()
        error = (self.energy[rows] + (levels * (levels * count - 2 * total)).sum(-1)).clamp_(min=0)
        return error, fit, count.scatter(1, order, count), total.scatter(1, order, total)

    def solve(self, count: Tensor, total: Tensor) -> Tensor:
        width, group = self.basis.shape[1], self.x.shape[1]
        gram = count @ (self.basis[:, :, None] * self.basis[:, None]).flatten(1) / group
        gram = gram.view(-1, width, width)
        # Planes that coincide make the system singular; a ridge below float32's resolution does no harm.
        gram.diagonal(dim1=1, dim2=2).add_(1e-9)
        return F.pad(torch.linalg.solve(gram, total @ self.basis / group), (0, 1 - self.offset))

    def weight(self, fit: Tensor) -> QWeight:
        n, groups, group = self.shape
        _, order, middles = self.levels(fit)
        codes = order.to(torch.uint8).gather(1, torch.searchsorted(middles, self.x)).view(n, groups * group)
        fit = (fit * self.unit).to(self.dtype).view(n, groups, self.bits + 1)
        alpha, offset = (part.contiguous() for part in fit.split([self.bits, 1], -1))
        form = ("binary", self.bits, group, "float" if self.offset else "none", NAME_OF_DTYPE[self.dtype])
        held = {"alpha": alpha, "offset": offset[..., 0] if self.offset else None}
        return QWeight(Format(*form), n, groups * group, codes, **held)


@dataclasses.dataclass(frozen=True)
class _Options:
    method: str
    bits: int
    group: Group
    symmetric: bool = False
    scale_dtype: Dtype = None
    rounds: int = 15

    def __post_init__(self) -> None:
        group, dtypes, nf4 = self.group, (None, *NAME_OF_DTYPE), self.method == "nf4"
        least, most = (4, 4) if nf4 else (2 if self.method == "rtn" and self.symmetric is True else 1, 8)
        for name, good, accepted in (
            ("method", self.method in METHODS, " | ".join(METHODS)),
            ("bits", type(self.bits) is int and least <= self.bits <= most, f"an int, {least} to {most}"),
            ("symmetric", type(self.symmetric) is bool, "a bool"),
            ("symmetric", not nf4 or not self.symmetric, "False, for nf4"),
            ("group", group in (None, "row") or (type(group) is int and group > 0), 'int > 0 | None | "row"'),
            ("scale_dtype", self.scale_dtype in dtypes, " | ".join(map(str, dtypes))),
            ("rounds", type(self.rounds) is int and self.rounds >= 0, "an int >= 0"),
        ):
            if not good:
                raise ArgumentError(name, getattr(self, name), accepted)

    def grouped(self, name: str, weight: Any) -> tuple[Tensor, Tensor]:
        """The weight [n, k/group, group] in float32 or 64 and its scales (bcq: absmax), or ArgumentError."""
        plain = isinstance(weight, Tensor) and type(weight.detach()) is Tensor and weight.ndim == 2
        if not plain or weight.is_meta or weight.dtype not in (*NAME_OF_DTYPE, torch.float64):
            shown = tuple(getattr(weight, key, None) for key in ("__class__", "dtype", "shape", "device"))
            raise ArgumentError(name, shown, "a plain tensor [n, k], float16 | bfloat16 | float32 | float64")
        n, k = weight.shape
        group = self.group if isinstance(self.group, int) else max(k, 1)
        if k % group:
            raise ArgumentError("group", group, f"a divisor of k={k}, the inputs of {name}")
        dtype = self.scale_dtype or (weight.dtype if weight.dtype in NAME_OF_DTYPE else torch.float32)
        w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).reshape(n, k // group, group)
        low, high = (t.double() for t in w.aminmax(dim=-1))
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise ArgumentError(name, "inf or NaN", "finite weights")
        low, high, levels = low.clamp(max=0), high.clamp(min=0), 1 << self.bits
        scale = torch.maximum(-low, high) if self.method != "rtn" else (high - low) / (levels - 1)
        if self.method == "rtn" and self.symmetric:
            scale = torch.maximum(high / (levels // 2 - 1), -low / (levels // 2))
        near, info = scale.to(dtype), torch.finfo(dtype)
        if self.method == "rtn":
            # One unit in the last place up, where rounding went down: the range must not be cut off.
            ints = near.view(torch.int32 if near.itemsize == 4 else torch.int16)
            near = (ints + (near.double() < scale)).to(ints.dtype).view(dtype)
        lost = (scale > 0) & ((near < info.tiny) | ~near.isfinite())
        if bool(lost.any()):
            accepted = f"{info.tiny:.3g} to {info.max:.6g}; scale_dtype=torch.float32 (or torch.bfloat16)"
            raise ArgumentError(f"scale of {name}", float(scale[lost][0]), accepted)
        # A group of zeros takes scale 1: its codes give exact zeros, and nobody divides by zero.
        return w, near.masked_fill_(scale == 0, 1)

    def apply(self, weight: Tensor) -> QWeight:
        if self.method == "rtn":
            return rtn(weight, self.bits, self.group, self.symmetric, self.scale_dtype)
        if self.method == "nf4":
            return nf4(weight, self.group, self.scale_dtype)
        return bcq(weight, self.bits, self.group, self.rounds, not self.symmetric, self.scale_dtype)


class QuantLinear(nn.Module):
    """A linear layer of packed codes in plain PyTorch, so that it runs wherever PyTorch does.

    Buffers only, but for the bias: `tensors`, planes as kernels/layout.py cuts them. forward dequantizes in
    the scale's dtype, casts to x's and calls F.linear. Built by `from_weight` or by `lqcompile.quantize`.
    """

    def __init__(self, format: Format, n: int, k: int, tensors: Mapping[str, Tensor], bias: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self._format = k, n, format
        for name, value in tensors.items():
            self.register_buffer(name, value)
        if bias is not None and tuple(bias.shape) != (n,):
            raise ArgumentError("bias.shape", tuple(bias.shape), f"({n},)")
        kept = bias is None or isinstance(bias, nn.Parameter)
        self.register_parameter("bias", bias if kept else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def from_weight(cls, weight: QWeight, bias: Tensor | None = None) -> QuantLinear:
        """Packs `weight`; a `bias` [n] that is a Parameter is kept. Raises ArgumentError if malformed."""
        layout = LUT if validate(weight).format.form == "binary" else QUICK
        planes = layout.pack(weight, PLAIN)[: len(layout.widths(weight.format, PLAIN))]
        tensors = {f"plane{i}": plane for i, plane in enumerate(planes)}
        given = {name: getattr(weight, name) for name in (*GROUPED, "table", "perm")}
        tensors.update((name, value) for name, value in given.items() if value is not None)
        return cls(weight.format, weight.n, weight.k, tensors, bias)

    @property
    def format(self: Any) -> Format:
        """What the buffers hold; its scale_dtype follows `.to(dtype)`."""
        dtype = (self.alpha if self._format.form == "binary" else self.scale).dtype
        name = NAME_OF_DTYPE.get(dtype, self._format.scale_dtype)
        return dataclasses.replace(self._format, scale_dtype=name)

    def qweight(self) -> QWeight:
        """The weight that `from_weight` packed, exactly; after `.to(dtype)`, with floats of that dtype."""
        codes = self._codes()
        if (low := code_range(self._format)[0]) < 0:
            codes = (codes.to(torch.int16) + low).to(torch.int8)
        given = {name: self._buffers.get(name) for name in (*GROUPED, "table", "perm")}
        return QWeight(self.format, self.out_features, self.in_features, codes, **given)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self._parameters["bias"])

    @property
    def weight(self: Any) -> Tensor:
        """The dense weight [n, k] in the scale's dtype, anew; nn.TransformerEncoderLayer reads a Linear's."""
        f, groups = self._format, self.in_features // self._format.group
        codes = self._codes().view(self.out_features, groups, f.group)
        if f.form == "binary":
            signs = torch.stack([(codes >> i) & 1 for i in range(f.bits)], -1).to(self.alpha.dtype) * 2 - 1
            dense = (self.alpha.unsqueeze(2) * signs).sum(-1)
            dense = dense + self.offset.unsqueeze(-1) if f.zero == "float" else dense
        else:
            dense = self._values(codes) * self.scale.unsqueeze(-1)
        dense = dense.view(self.out_features, self.in_features)
        return dense[:, torch.argsort(self.perm)] if "perm" in self._buffers else dense

    def _values(self: Any, codes: Tensor) -> Tensor:
        f, dtype = self._format, self.scale.dtype
        if f.form == "table":
            table = self.table.to(dtype)
            if table.ndim == 1:
                return table[codes.to(torch.int32)]
            rows = table.view(codes.shape[0], -1, 1 << f.bits).expand(-1, codes.shape[1], -1)
            return rows.gather(-1, codes.to(torch.int64))
        if f.zero == "none":
            return (codes.to(torch.int16) + code_range(f)[0]).to(dtype)
        return codes.to(dtype) - self.zero.unsqueeze(-1).to(dtype)

    def _codes(self) -> Tensor:
        shift, parts = 0, []
        layout = LUT if self._format.form == "binary" else QUICK
        for i, width in enumerate(layout.widths(self._format, PLAIN)):
            plane, mask = getattr(self, f"plane{i}"), (1 << width) - 1
            fields = torch.stack([(plane >> low) & mask for low in range(0, 8, width)], -1).flatten(1)
            parts.append(fields[:, : self.in_features] << shift)
            shift += width
        return functools.reduce(torch.bitwise_or, parts)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bias={self.bias is not None}, format={self.format}, {self.format.scale_dtype} scales"


def quantize(
    model: nn.Module, bits: int = 4, group: Group = 128, method: str = "rtn", *, symmetric: bool = False,
    scale_dtype: Dtype = None, modules: Choose | None = None, rounds: int = 15
) -> nn.Module:  # fmt: skip
    """Replaces every nn.Linear of `model` by a QuantLinear, in place, and returns `model`.

    `method` is "rtn", "nf4" (bits=4) or "bcq" (`rounds` as there; symmetric: no offset); `bits`, `group`,
    `symmetric` and `scale_dtype` as in `rtn`. `modules(name, linear)` chooses layers; subclasses of nn.Linear
    are left alone. Layers that are shared, or tie a weight, stay so; float weights go one by one. A `model`
    that is itself a Linear cannot change in place: its QuantLinear is returned. Raises ArgumentError, naming
    the argument or the layer, before anything is changed.
    """
    options = _Options(method, bits, group, symmetric, scale_dtype, rounds)
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "an nn.Module")
    if modules is not None and not callable(modules):
        raise ArgumentError("modules", modules, "None, or a callable (name, linear) -> bool")
    # One level above the model, so that a model that is itself a Linear is a child like any other.
    holder = nn.Sequential(model)
    plan = []
    for places in _chosen(holder, modules):
        name, parent, attribute = places[0]
        weight = getattr(parent, attribute)._parameters.get("weight")
        options.grouped(f"weight of layer {name!r}", weight)
        plan.append((places, id(weight)))
    # A name that outlived the loop would keep its float weight alive.
    weight = linear = None
    made: dict[int, QuantLinear] = {}
    for places, key in plan:
        linear = getattr(*places[0][1:])
        if key not in made:
            made[key] = layer = QuantLinear.from_weight(options.apply(linear.weight), linear.bias)
        else:
            n, k = linear.weight.shape
            layer = QuantLinear(made[key].format, n, k, dict(made[key].named_buffers()), linear.bias)
        layer.training = linear.training
        layer.__dict__.update((key, value) for key, value in vars(linear).items() if "forward_" in key)
        for _, parent, attribute in places:
            setattr(parent, attribute, layer)
    return holder[0]


def _chosen(holder: nn.Sequential, modules: Choose | None) -> list[Places]:
    """For each Linear to replace, every place (name, parent, attribute) where it is registered."""
    found: dict[nn.Module, Places] = {}
    for prefix, parent in holder.named_modules():
        for attribute, child in parent._modules.items():
            # Subclasses may promise more than F.linear: nn.MultiheadAttention reads its projection's weight.
            if type(child) is nn.Linear:
                # The holder calls the model "0": every path under it starts with "0.".
                found.setdefault(child, []).append((f"{prefix}.{attribute}"[2:], parent, attribute))
    wanted: Any = modules or (lambda name, linear: True)
    chosen = [places for linear, places in found.items() if any(wanted(place[0], linear) for place in places)]
    if not chosen:
        which = f"a Linear that `modules` accepts, of {len(found)}" if found else "an nn.Linear"
        raise ArgumentError("model", type(holder[0]).__name__, f"a model with at least {which}")
    return chosen
