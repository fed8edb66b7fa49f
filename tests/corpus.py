"""Cases for the recogniser, drawn from one `random.Random`: an idiom, packed and dressed in some way, in some spelling.

A case is a program y = apply(x, weight(t, x), t) over stored tensors t. What it means is what it computes: the same
program on float64 tensors is its truth, so a dressing need not say what it does, only leave the weight quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lqcompile.errors import Reason
from lqcompile.passes import idioms

from .mutations import MUTATIONS, WRONG, Broken
from .spellings import DRESSINGS, SPELLINGS, Tensors, arranged, generator, index_for

Dtypes = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class Case:
    """One program with its input. `matmuls` of it take the weight; `slack` counts the roundings after them."""

    idiom: str
    spelling: str
    drawn: list[str]
    tensors: Tensors
    x: Tensor
    weight: Callable[[Tensors, Tensor], Tensor]
    apply: Callable[[Tensor, Tensor, Tensors], Any]
    matmuls: int = 1
    slack: int = 2
    autocast: torch.dtype | None = None
    extra: Tensors = field(default_factory=dict)
    expect: str = "rewritten"
    reasons: frozenset[Reason] = frozenset()
    breaking: str = ""

    def forward(self, x: Tensor, t: Tensors) -> Any:
        if self.autocast is None:
            return self.apply(x, self.weight(t, x), t)
        with torch.autocast("cpu", dtype=self.autocast):
            return self.apply(x, self.weight(t, x), t)

    def __str__(self) -> str:
        dtype = str(self.x.dtype).removeprefix("torch.")
        stored = ", ".join(f"{k} {str(v.dtype)[6:]}{list(v.shape)}" for k, v in (self.tensors | self.extra).items())
        return f"{self.idiom} / {self.spelling} / {' + '.join(self.drawn)} / x {dtype}{list(self.x.shape)} / {stored}"


def draw(random: Random, kind: str = "dressings", idiom: str | None = None, spelling: str | None = None,
         only: str | None = None) -> Case:  # fmt: skip
    """A valid case ("dressings") or a broken one ("mutations"); `only` names its dressing or mutation."""
    names = [idioms.name_of(i) for i in idioms.discover()]
    idiom = idiom or random.choice(names)
    n, k = random.choice((4, 8, 12, 16, 24, 48)), random.choice((16, 32, 48, 64, 96, 128))
    after = spelling == "scale_after" or (spelling is None and idiom != "by_value" and random.random() < 0.06)
    if after and only is None:
        return _scale_after(random, idiom, n, k, kind)
    breaking = (only or random.choice(list(MUTATIONS))) if kind == "mutations" else None
    tensors, dequantize, drawn = _source(random, idiom, n, k, breaking)
    names, unpacks = list(tensors), {}
    for name in list(tensors):
        if random.random() < (0.6 if breaking is None else 0.2):
            packed = _packed(random, name, tensors[name])
            if packed is not None:
                label, stored, unpacks[name] = packed
                del tensors[name]
                tensors |= stored
                drawn.append(label)
    case = _spelled(random, idiom, n, k, spelling, tensors)
    broken = MUTATIONS[breaking](random, tensors, case.x, n, k) if breaking in MUTATIONS else Broken()
    tensors |= broken.tensors
    for name in broken.inputs:
        case.extra[name] = tensors.pop(name)
    if breaking is not None:
        drawn, case.breaking = [breaking, *drawn], breaking
        case.expect, case.reasons = broken.expect, frozenset(broken.reasons)
    steps = []
    wanted = [only] if only in DRESSINGS else random.choices(list(DRESSINGS), k=random.choice((0, 1, 1, 2, 3)))
    for label in wanted if breaking is None or random.random() < 0.4 else ():
        tensors |= (extra := {f"d{len(steps)}": v for v in index_for(random, label, n, k)})
        steps.append((DRESSINGS[label], next(iter(extra), "")))
        drawn.append(label)

    def weight(t: Tensors, x: Tensor) -> Tensor:
        t = broken.before(t, x)
        # From what is stored (or was changed above) to what the idiom's own function takes.
        w = dequantize(**{name: unpacks[name](t) if name in unpacks else t[name] for name in names})
        w = broken.between(w, t, x)
        for step, index in steps:
            w = step(w, t[index] if index else None)
        return w.to(x.dtype)

    case.weight, case.tensors = weight, tensors
    case.drawn = [*drawn, *case.drawn] or ["plain"]
    if case.autocast is not None:
        try:
            case.forward(case.x, tensors | case.extra)
        except RuntimeError:
            # Autocast on a CPU knows no cat of float16 beside bfloat16, and the like.
            case.autocast = None
    if broken.expect == "non_finite":
        finite = bool(torch.isfinite(weight(tensors | case.extra, case.x)).all())
        case.expect = "either" if finite or case.matmuls > 2 else "kept"
    return case


def _source(
    random: Random, idiom: str, n: int, k: int, breaking: str | None
) -> tuple[Tensors, Callable[..., Tensor], list[str]]:
    if breaking in WRONG:
        return *WRONG[breaking](random, n, k), []
    own = [s for s in SOURCES if s[0] == idiom]
    if own and random.random() < 0.35:
        _, label, make = random.choice(own)
        return *make(random, n, k), [label]
    module = next(i for i in idioms.discover() if idioms.name_of(i) == idiom)
    return *module.example(random, n, k), []


def _grouped(random: Random, n: int, k: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """group, codes [n, k] of 4 bits or fewer, scale [n, groups], zero [n, groups]."""
    g = generator(random)
    group = random.choice([s for s in (4, 8, 16, 32, k) if k % s == 0])
    bits, dtype = random.choice((2, 3, 4)), random.choice(Dtypes)
    codes = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    scale = (torch.rand((n, k // group), generator=g) * 0.1 + 0.01).to(dtype)
    return group, codes, scale, torch.randint(0, 1 << bits, (n, k // group), generator=g, dtype=torch.uint8)


def _act_order(random: Random, n: int, k: int) -> tuple[Tensors, Callable[..., Tensor]]:
    group, codes, scale, zero = _grouped(random, n, k)
    index = (torch.arange(k) // group)[torch.randperm(k, generator=generator(random))]
    if random.random() < 0.5:
        # GPTQ's own way: everything is stored with K first.
        t = {"codes": codes.t().contiguous(), "scale": scale.t().contiguous(), "zero": zero.t().contiguous()}
        return t | {"g_idx": index.to(torch.int32)}, lambda codes, scale, zero, g_idx: (
            scale[g_idx.long()] * (codes.to(torch.int32) - zero[g_idx.long()].to(torch.int32))
        ).t()
    return (
        {"codes": codes, "scale": scale, "zero": zero, "g_idx": index},
        lambda codes, scale, zero, g_idx: (
            (codes.to(scale.dtype) - zero[:, g_idx].to(scale.dtype)) * scale.index_select(1, g_idx)
        ),
    )


def _repeated(random: Random, n: int, k: int) -> tuple[Tensors, Callable[..., Tensor]]:
    group, codes, scale, zero = _grouped(random, n, k)
    return (
        {"codes": codes, "scale": scale, "zero": zero},
        lambda codes, scale, zero: (
            (codes.to(scale.dtype) - zero.to(scale.dtype).repeat_interleave(group, dim=1))
            * scale.repeat_interleave(group, dim=1)
        ),
    )


def _nested(random: Random, n: int, k: int) -> tuple[Tensors, Callable[..., Tensor]]:
    group, codes, scale, _ = _grouped(random, n, k)
    coarse = torch.randint(1, 256, scale.shape, generator=generator(random), dtype=torch.uint8)
    return {"codes": codes, "coarse": coarse, "scale": scale[:, :1] / 16}, lambda codes, coarse, scale: (
        codes.view(n, -1, group) * (coarse.to(scale.dtype) * scale).unsqueeze(-1)
    ).view(n, k)


def _fp8(random: Random, n: int, k: int) -> tuple[Tensors, Callable[..., Tensor]]:
    _, _, scale, _ = _grouped(random, n, k)
    dtype = random.choice((torch.float8_e4m3fn, torch.float8_e5m2))
    codes = torch.randn((n, k), generator=generator(random)).to(dtype)
    return {"codes": codes, "scale": scale[:, :1]}, lambda codes, scale: codes.to(scale.dtype) * scale


SOURCES: list[tuple[str, str, Callable[[Random, int, int], tuple[Tensors, Callable[..., Tensor]]]]] = [
    ("affine", "act_order", _act_order),
    ("affine", "repeated", _repeated),
    ("affine", "nested", _nested),
    ("table", "fp8", _fp8),
]


def _packed(random: Random, name: str, t: Tensor) -> tuple[str, Tensors, Callable[[Tensors], Tensor]] | None:
    """Another way to store an integer tensor, and the function that unpacks it."""
    if t.is_floating_point() or t.numel() == 0:
        return None
    how = random.choice(
        ("low_first", "high_first", "bytes_as_words", "divided", "words", "planes", "wide", "transposed")
    )
    shape, dtype, key = t.shape, t.dtype, f"{name}_{how}"
    low = min(int(t.min()), 0)
    values = t.to(torch.int64) - low
    bits = max(1, int(values.max()).bit_length())
    if how == "wide":
        wide = random.choice([d for d in (torch.int16, torch.int32, torch.int64)])
        return how, {key: t.to(wide)}, lambda s: s[key].to(dtype)
    if how == "transposed":
        return how, {key: t.transpose(0, -1).contiguous()}, lambda s: s[key].transpose(0, -1).contiguous()
    if how == "planes":
        planes = torch.stack([(values >> i) & 1 for i in range(bits)]).to(random.choice((torch.bool, torch.uint8)))

        def joined(s: Tensors) -> Tensor:
            total = s[key][0].to(torch.int32)
            for i in range(1, bits):
                total = total + (s[key][i].to(torch.int32) << i)
            return (total + low).to(dtype)

        return how, {key: planes}, joined
    width = next((w for w in (1, 2, 4, 8) if w >= bits), 0)
    per = (32 if how == "words" else 8) // (width or 8)
    if not width or t.numel() % 32:
        return None
    shifts = [width * i for i in range(per)]
    shifts = shifts[::-1] if how == "high_first" else shifts
    fields = values.reshape(-1, per)
    packed = torch.stack([fields[:, i] << s for i, s in enumerate(shifts)]).sum(0)
    mask = (1 << width) - 1
    if how == "words":
        stored = {key: packed.to(torch.int32), f"{key}_shifts": torch.tensor(shifts, dtype=torch.int32)}
        return (
            how,
            stored,
            lambda s: (((s[key].unsqueeze(-1) >> s[f"{key}_shifts"]) & mask) + low).to(dtype).view(shape),
        )
    packed = packed.to(torch.uint8)
    if how == "bytes_as_words":
        return (
            how,
            {key: packed.view(torch.int32)},
            lambda s: (
                (torch.stack([(s[key].view(torch.uint8) >> i) & mask for i in shifts], -1).to(torch.int16) + low)
                .to(dtype)
                .view(shape)
            ),
        )
    if how == "divided":
        return (
            how,
            {key: packed},
            lambda s: (
                (torch.stack([s[key].to(torch.int32) // (1 << i) % (mask + 1) for i in shifts], 1) + low)
                .to(dtype)
                .reshape(shape)
            ),
        )

    def unpacked(s: Tensors) -> Tensor:
        fields = [torch.bitwise_right_shift(s[key], i).bitwise_and(mask) for i in shifts]
        return (torch.stack(fields, dim=-1).to(torch.int16) + low).to(dtype).reshape(shape)

    return how, {key: packed}, unpacked


def _spelled(random: Random, idiom: str, n: int, k: int, spelling: str | None, tensors: Tensors) -> Case:
    spelling = spelling or random.choice(list(SPELLINGS))
    arrangement, call = SPELLINGS[spelling]
    dtype = random.choice(Dtypes)
    autocast = random.choice((torch.bfloat16, torch.float16)) if random.random() < 0.08 else None
    _, x = arranged(random, arrangement, k, torch.float32 if autocast else dtype)
    x = x.to(autocast).to(x.dtype) if autocast else x
    if "bias" in spelling or spelling.startswith("add") or spelling in ("conv2d", "baddbmm"):
        tensors["bias"] = torch.randn(n, generator=generator(random)).to(autocast or dtype).to(x.dtype)
    use = random.choices(("once", "twice", "split", "inplace"), (12, 1, 1, 2))[0]
    use = "once" if use == "split" and n < 16 else use
    labels = [use] if use != "once" else []
    labels += [f"autocast_{autocast}".replace("torch.", "")] if autocast else []
    parts = [n // 2, n // 4, n - n // 2 - n // 4]
    applied = {
        "once": call,
        "twice": lambda x, w, t: (call(x, w, t), call(x + x, w, t)),
        "split": lambda x, w, t: tuple(call(x, part, t) for part in w.split(parts)),
        "inplace": lambda x, w, t: call(x, w, t).mul_(2).add_(1).relu_(),
    }[use]
    slack = 2 if use == "once" and "bias" not in tensors else 8
    return Case(
        idiom,
        spelling,
        labels,
        tensors,
        x,
        lambda t, x: x,
        applied,
        {"twice": 2, "split": 3}.get(use, 1),
        slack,
        autocast,
    )


def _scale_after(random: Random, idiom: str, n: int, k: int, kind: str) -> Case:
    """Bare codes in the matmul and one scale for each output feature behind it."""
    g, dtype = generator(random), random.choice(Dtypes)
    top = 1 << random.choice((1, 2, 3, 7))
    codes = {
        "affine": lambda: torch.randint(-top, top, (n, k), generator=g, dtype=torch.int8),
        "binary": lambda: torch.randint(0, 2, (n, k), generator=g, dtype=torch.int8) * 2 - 1,
        "table": lambda: torch.randn((n, k), generator=g).to(torch.float8_e4m3fn),
    }[idiom]()
    scale = (torch.rand(n, generator=g) * 0.1 + 0.01).to(random.choice((dtype, torch.float32)))
    how, scaled = random.choice((
        ("scale_after", lambda y, s: y * s),
        ("scale_before", lambda y, s: s.view(1, -1) * y),
        ("float_scale_after", lambda y, s: (y.float() * s.float()).to(y.dtype)),
        ("divided_after", lambda y, s: y / s),
    ))  # fmt: skip
    form, call = random.choice((("linear", lambda x, w: F.linear(x, w)), ("at", lambda x, w: x @ w.t())))
    _, x = arranged(random, "rows", k, dtype)
    tensors = {"codes": codes, "scale": scale}
    case = Case(idiom, "scale_after", [how, form], tensors, x, lambda t, x: t["codes"].to(x.dtype),
                lambda x, w, t: scaled(call(x, w), t["scale"]), slack=6)  # fmt: skip
    if kind == "mutations":
        case.drawn.insert(0, broken := random.choice(("scale_after_relu", "scale_along_rows", "scale_after_from_x")))
        applies = {
            "scale_after_relu": lambda x, w, t: scaled(call(x, w).relu(), t["scale"]),
            "scale_along_rows": lambda x, w, t: call(x, w) * t["scale"][0],
            "scale_after_from_x": lambda x, w, t: scaled(call(x, w), t["scale"] * x.abs().amax()),
        }
        case.apply, case.expect = applies[broken], "either"
    return case
