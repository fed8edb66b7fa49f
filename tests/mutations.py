"""Ways to break a case: what depends on the input must be kept; what stays constant may be read, but only as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F

from lqcompile.errors import Reason

from .spellings import Tensors, generator

Source = tuple[Tensors, Callable[..., Tensor]]


def _same(t: Tensors, x: Tensor) -> Tensors:
    return t


def _keep(w: Tensor, t: Tensors, x: Tensor) -> Tensor:
    return w


@dataclass
class Broken:
    """What a mutation changes: stored tensors, which of them become inputs, and steps around dequantizing."""

    expect: str = "either"
    reasons: Iterable[Reason] = ()
    tensors: Tensors = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    before: Callable[[Tensors, Tensor], Tensors] = _same
    between: Callable[[Tensor, Tensors, Tensor], Tensor] = _keep


Mutation = Callable[[Random, Tensors, Tensor, int, int], Broken]
MUTATIONS: dict[str, Mutation] = {}


def _mutation(make: Mutation) -> Mutation:
    MUTATIONS[make.__name__] = make
    return make


def _floats(t: Tensors) -> list[str]:
    return [name for name, v in t.items() if v.is_floating_point() and v.dtype.itemsize > 1 and name != "bias"]


def _main_codes(t: Tensors) -> str:
    low = [name for name, v in t.items() if not v.is_floating_point() or v.dtype.itemsize == 1]
    return max(low, key=lambda name: t[name].numel() * t[name].element_size())


@_mutation
def scale_from_x(random: Random, t: Tensors, x: Tensor, n: int, k: int) -> Broken:
    name = random.choice(_floats(t))
    of = random.choice((lambda x: x.abs().amax(), lambda x: x.flatten()[0], lambda x: x.sum() + 1))
    return Broken("kept", (Reason.SCALE_FROM_INPUT,), before=lambda t, x: t | {name: t[name] * of(x).to(t[name].dtype)})


@_mutation
def offset_from_x(random: Random, t: Tensors, x: Tensor, n: int, k: int) -> Broken:
    return Broken("kept", (Reason.SCALE_FROM_INPUT,), between=lambda w, t, x: w - x.flatten()[0].to(w.dtype))


@_mutation
def codes_from_outside(random: Random, t: Tensors, x: Tensor, n: int, k: int) -> Broken:
    reasons = (Reason.FREE_TENSOR, Reason.INPUT_WEIGHT, Reason.SCALE_FROM_INPUT)
    return Broken("kept", reasons, inputs=(_main_codes(t),))


@_mutation
def scale_from_outside(random: Random, t: Tensors, x: Tensor, n: int, k: int) -> Broken:
    return Broken("kept", (Reason.SCALE_FROM_INPUT,), inputs=(random.choice(_floats(t)),))


def _put(w: Tensor, x: Tensor) -> Tensor:
    w[0] = x.flatten()[0].to(w.dtype)
    return w


def _put_corner(w: Tensor, x: Tensor) -> Tensor:
    w.t()[:1, -1:].mul_(x.flatten()[0].to(w.dtype))
    return w


def _put_half(w: Tensor, x: Tensor) -> Tensor:
    # Dynamo takes no strided out=.
    w = w.contiguous()
    torch.mul(w, x.flatten()[0].to(w.dtype), out=w)
    return w


@_mutation
def written_from_x(random: Random, t: Tensors, x: Tensor, n: int, k: int) -> Broken:
    write = random.choice((_put, _put_corner, _put_half, lambda w, x: w.add_(x.flatten()[0].to(w.dtype)),
                           lambda w, x: w.copy_(w * x.amax().to(w.dtype))))  # fmt: skip
    reasons = (Reason.SCALE_FROM_INPUT, Reason.INPUT_WEIGHT, Reason.MUTATED)
    return Broken("kept", reasons, between=lambda w, t, x: write(w, x))


@_mutation
def buffer_written(random: Random, t: Tensors, x: Tensor, n: int, k: int) -> Broken:
    name, codes = random.choice(_floats(t)), _main_codes(t)
    times = random.choice((2.0, 1.0))

    def scale(t: Tensors) -> None:
        t[name].mul_(times)

    def flip(t: Tensors) -> None:
        t[codes].copy_(t[codes].flip(0))

    def one(t: Tensors) -> None:
        t[name].view(-1)[:1] = t[name].view(-1)[-1:] * 2

    write = random.choice((scale, flip, one))

    def before(t: Tensors, x: Tensor) -> Tensors:
        write(t)
        return t

    def between(w: Tensor, t: Tensors, x: Tensor) -> Tensor:
        write(t)
        return w

    chosen = {"before": before} if random.random() < 0.6 else {"between": between}
    return Broken("kept", (Reason.MUTATED,), **chosen)


@_mutation
def random_op(random: Random, t: Tensors, x: Tensor, n: int, k: int) -> Broken:
    draw = random.choice((
        lambda w: F.dropout(w, 0.5, True),
        lambda w: w * torch.rand_like(w),
        lambda w: w + torch.randn(n, k).to(w.dtype),
        lambda w: w * torch.bernoulli(torch.full_like(w, 0.5)),
        lambda w: w[torch.randperm(n)],
    ))  # fmt: skip
    return Broken("kept", (Reason.UNSUPPORTED_OP,), between=lambda w, t, x: draw(w))


@_mutation
def non_finite(random: Random, t: Tensors, x: Tensor, n: int, k: int) -> Broken:
    name = random.choice(_floats(t))
    value = t[name].clone()
    value.view(-1)[random.randrange(value.numel())] = random.choice((float("nan"), float("inf"), float("-inf")))
    return Broken("non_finite", (Reason.NON_FINITE,), {name: value})


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "abs": torch.abs,
    "clamp": lambda w: w.clamp(-0.1, 0.2),
    "clamp_wide": lambda w: w.clamp(-1e4, 1e4),
    "tanh": torch.tanh,
    "square": lambda w: w * w,
    "rounded": lambda w: (w * 4).round() / 4,
    "truncated": lambda w: w.to(torch.bfloat16).to(w.dtype),
    "off_by_one_column": lambda w: w.roll(1, 1),
    "last_column_zero": lambda w: torch.cat([w[:, :-1], torch.zeros_like(w[:, :1])], 1),
    "tril": torch.tril,
    "eye_added": lambda w: w + 0.1 * torch.eye(w.shape[0], w.shape[1], dtype=w.dtype),
    "kept_positive": lambda w: torch.where(w > 0, w, 0.5),
    "shuffled_within_rows": lambda w: w.sort(1).values,
    "first_row_doubled": lambda w: torch.cat([w[:1] * 2, w[1:]]),
    "one_row_everywhere": lambda w: w[:1].expand(w.shape[0], -1),
    "sum_of_rows": lambda w: w + w.flip(0),
    "inverted": lambda w: 1 / (w.abs() + 1),
    "cumulated": lambda w: w.cumsum(1),
    "normalized": lambda w: w / w.norm(dim=1, keepdim=True),
    "one_element_replaced": lambda w: torch.cat([w.flatten()[:-1], w.new_full((1,), 0.3)]).view(w.shape),
}


def _between(change: Callable[[Tensor], Tensor]) -> Mutation:
    return lambda random, t, x, n, k: Broken(between=lambda w, t, x: change(w))


MUTATIONS |= {name: _between(change) for name, change in BETWEEN.items()}


@_mutation
def one_weight_off(random: Random, t: Tensors, x: Tensor, n: int, k: int) -> Broken:
    factor = torch.ones(n, k)
    factor[random.randrange(n), random.randrange(k)] = 1.01
    if random.random() < 0.5:
        return Broken(tensors={"factor": factor}, between=lambda w, t, x: w * t["factor"].to(w.dtype))

    def between(w: Tensor, t: Tensors, x: Tensor) -> Tensor:
        w[n // 2, k // 3] *= 1.01
        return w

    return Broken(between=between)


def _codes(random: Random, n: int, k: int, top: int = 16, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, top, (n, k), generator=generator(random), dtype=dtype)


def _scale(random: Random, *shape: int) -> Tensor:
    scale = torch.rand(shape, generator=generator(random)) * 0.1 + 0.01
    return scale.to(random.choice((torch.float16, torch.bfloat16, torch.float32)))


def _group(random: Random, k: int) -> int:
    return random.choice([g for g in (4, 8, 16, k) if k % g == 0])


def _pair(random: Random, n: int, k: int, top: int = 16) -> tuple[int, Tensors]:
    group = _group(random, k)
    return group, {"codes": _codes(random, n, k, top), "scale": _scale(random, n, k // group)}


def _wide(scale: Tensor, group: int) -> Tensor:
    return scale.repeat_interleave(group, 1)


def _zero_after(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    t["zero"] = _codes(random, n, k // group)
    return t, lambda codes, scale, zero: codes * _wide(scale, group) - _wide(zero, group)


def _wrong_group(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    return t, lambda codes, scale: codes * scale.repeat(1, group)


def _swapped_axes(random: Random, n: int, k: int) -> Source:
    return {"codes": _codes(random, n, k), "scale": _scale(random, k)}, lambda codes, scale: codes * scale


def _axis_0(random: Random, n: int, k: int) -> Source:
    t = {"codes": _codes(random, n, k), "scale": _scale(random, n // 4, k)}
    if random.random() < 0.5:
        # As hqq has it: every (n/4)th output.
        return t, lambda codes, scale: (codes.view(4, n // 4, k) * scale).view(n, k)
    return t, lambda codes, scale: (codes.view(n // 4, 4, k) * scale.unsqueeze(1)).view(n, k)


def _float_codes(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    noise = torch.randn((n, k), generator=generator(random)) * random.choice((1e-6, 1e-4, 1e-2))
    t["codes"] = t["codes"].to(random.choice((torch.float32, torch.float16))) + noise
    t["zero"] = _codes(random, n, k // group)
    cast = random.choice((lambda c: c, lambda c: c.to(torch.int16)))
    return (
        t,
        lambda codes, scale, zero: (cast(codes) - _wide(zero, group)).to(scale.dtype) * _wide(scale, group),
    )


def _two_groups(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    t["other"] = _scale(random, n, 2)
    return t, lambda codes, scale, other: codes * _wide(scale, group) * _wide(other, k // 2)


def _transposed_scale(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    return t, lambda codes, scale: codes * _wide(scale.t().reshape(n, -1), group)


def _swapped_nibbles(random: Random, n: int, k: int) -> Source:
    packed, scale = _codes(random, n, k // 2, 256), _scale(random, n, 1)
    return {
        "packed": packed,
        "scale": scale,
    }, lambda packed, scale: torch.cat([packed >> 4, packed & 15], 1) * scale


def _sign_extended(random: Random, n: int, k: int) -> Source:
    packed, scale = _codes(random, n, k // 2, 256).view(torch.int8), _scale(random, n, 1)
    return {
        "packed": packed,
        "scale": scale,
    }, lambda packed, scale: torch.stack([packed & 15, packed >> 4], -1).view(n, k) * scale


def _shifted_scale(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    return t, lambda codes, scale: codes * _wide(scale, group).roll(1, 1)


def _two_sums(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    t |= {"more": _codes(random, n, k), "fine": _scale(random, n, 1)}
    return t, lambda codes, scale, more, fine: codes * _wide(scale, group) + more * fine


def _product(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    t["more"] = _codes(random, n, k, random.choice((2, 4, 40)))
    return t, lambda codes, scale, more: codes * more * _wide(scale, group)


def _big_codes(random: Random, n: int, k: int) -> Source:
    group = _group(random, k)
    codes = _codes(random, n, k, random.choice((257, 300, 3000)), torch.int16)
    return {
        "codes": codes,
        "scale": _scale(random, n, k // group),
    }, lambda codes, scale: codes * _wide(scale, group)


def _odd_scales(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    scale = t["scale"].view(-1)
    for value in random.choices((0.0, -0.05, 1e-7, 6e4, -0.0), k=3):
        scale[random.randrange(scale.numel())] = value
    return t, lambda codes, scale: (codes.to(torch.int16) - 8) * _wide(scale, group)


def _few_codes(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k, random.choice((1, 2)))
    t["codes"][: n // 2] = random.choice((0, 7))
    t["zero"] = _scale(random, n, 1)
    return t, lambda codes, scale, zero: (codes - zero) * _wide(scale, group)


def _lora(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    t |= {"a": _scale(random, n, 2).float(), "b": _scale(random, 2, k).float() * random.choice((0, 1))}
    return t, lambda codes, scale, a, b: (codes * _wide(scale, group)).float() + a @ b


def _sparse(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    t["mask"] = _codes(random, n, k, 2).to(random.choice((torch.bool, torch.float32, torch.uint8)))
    return t, lambda codes, scale, mask: (codes - 8.0) * _wide(scale, group) * mask


def _wrapped(random: Random, n: int, k: int) -> Source:
    group, t = _pair(random, n, k)
    t["zero"] = _codes(random, n, k // group)
    return t, lambda codes, scale, zero: ((codes - _wide(zero, group)) << 3) * _wide(scale, group)


def _unused_codes(random: Random, n: int, k: int) -> Source:
    t = {"codes": _codes(random, n, k), "w": torch.randn((n, k), generator=generator(random))}
    return t, lambda codes, w: w + codes * 0.0


WRONG: dict[str, Callable[[Random, int, int], Source]] = {
    make.__name__.strip("_"): make
    for make in (
        _zero_after, _wrong_group, _swapped_axes, _axis_0, _float_codes, _two_groups, _transposed_scale,
        _swapped_nibbles, _sign_extended, _shifted_scale, _two_sums, _product, _big_codes, _odd_scales, _few_codes,
        _lora, _sparse, _wrapped, _unused_codes,
    )
}  # fmt: skip
MUTATIONS |= dict.fromkeys(WRONG, lambda random, t, x, n, k: Broken())
