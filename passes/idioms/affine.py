"""(codes - zero) * scale, or codes * scale + offset, in groups along K. How the codes were packed does not matter."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from ...errors import Reason, Refused
from ...formats import narrowest
from ...types import Format, QWeight
from ..deferred import codes_of
from ..evaluate import Weight
from ..grouping import Groups, find_groups, stride_of_change

RANK = 20


def read(weight: Weight) -> QWeight:
    """One integer term; whatever is constant in each group beside it is a zero point."""
    n, k = weight.shadow.shape
    terms = [t for t in weight.form.terms if t.levels is None]
    if not terms or len(terms) != len(weight.form.terms):
        raise Refused(Reason.TOO_MANY_LEVELS, "codes")
    fine = sorted(terms, key=lambda t: stride_of_change(t.codes, k)) if len(terms) > 1 else terms
    if len(fine) > 1 and stride_of_change(fine[1].codes, k) < 4 <= k:
        raise Refused(Reason.TOO_MANY_LEVELS, "a sum of two code tensors")
    codes, least, most = codes_of(fine[0].codes, (n, k))
    if max(-least, most) > 2**15 - 1:
        raise Refused(Reason.TOO_MANY_LEVELS, "codes")
    coef, offset = fine[0].coef, weight.form.offset
    for other in fine[1:]:
        offset = offset + other.coef * other.codes.to(torch.float64)
    groups = find_groups([coef, offset], k)
    scale, shift = groups.each(coef, n, k), groups.each(offset, n, k)
    grouped = groups.columns(codes, n, k)
    if bool((shift == 0).all()):
        return _integer(grouped, scale, groups, n, k)
    return _shifted(grouped, scale, shift, groups, n, k)


def _bits(span: int) -> int:
    bits = max(1, span.bit_length())
    if bits > 8:
        raise Refused(Reason.TOO_MANY_LEVELS, f"{span + 1} levels")
    return bits


def _finish(
    codes: Tensor, bits: int, zero: str, scale: Tensor, zeros: Tensor | None, groups: Groups, n: int, k: int
) -> QWeight:
    name = narrowest(scale)
    code_dtype = torch.int8 if zero == "none" else torch.uint8
    format = Format("affine", bits, groups.size, zero, name)
    # Codes that both types hold are the same bits in either.
    codes = codes.reshape(n, k).view(code_dtype) if codes.dtype.itemsize == 1 else codes.reshape(n, k).to(code_dtype)
    return QWeight(format, n, k, codes, scale=scale, zero=zeros, perm=groups.perm)


def _integer(codes: Tensor, scale: Tensor, groups: Groups, n: int, k: int) -> QWeight:
    """Codes that count from an integer: signed where that takes no more bits, else with a zero for each group."""
    if codes.numel() == 0:
        return _finish(codes, 1, "none", scale, None, groups, n, k)
    low, high, least, most, span = _extremes(codes)
    signed = max(1, most.bit_length() + 1 if most >= 0 else 1, (-least - 1).bit_length() + 1 if least < 0 else 1)
    bits = _bits(span)
    if signed <= bits:
        return _finish(codes, signed, "none", scale, None, groups, n, k)
    # Within what fits, the zero nearest to none: 0 for unsigned codes, and in the range of the codes where it can be.
    zero = torch.minimum((-low).clamp(min=0), (1 << bits) - 1 - high)
    codes = _counted_from(codes, -zero)
    return _finish(codes, bits, "int", scale, zero.to(torch.int16), groups, n, k)


def _extremes(codes: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    """The least and the greatest code of each group, and of all; and the widest range of a group."""
    # On a CPU two passes take a quarter of the time of aminmax along the last axis.
    low, high = codes.amin(-1).to(torch.int32), codes.amax(-1).to(torch.int32)
    least, most, span = torch.stack([low.min(), high.max(), (high - low).max()]).tolist()
    return low, high, least, most, span


def _counted_from(codes: Tensor, low: Tensor) -> Tensor:
    """codes - low for each group, in place if it can be; they are 0 to 255, so what is cut off does not matter."""
    codes = codes.view(torch.uint8) if codes.dtype == torch.int8 else codes.to(torch.uint8)
    return codes.sub_(low.to(torch.uint8).unsqueeze(-1))


def _shifted(codes: Tensor, scale: Tensor, shift: Tensor, groups: Groups, n: int, k: int) -> QWeight:
    """codes * scale + offset: the zero is whatever number makes it so."""
    low, _, least, most, span = _extremes(codes)
    bits = _bits(span)
    if (1 << bits) > most - least:
        low = torch.full_like(low, 0 if least >= 0 and most < (1 << bits) else least)
    codes = _counted_from(codes, low)
    # A group of scale 0 holds its offset alone: let that be the scale, and -1 the zero of codes that are all 0.
    flat = scale == 0
    codes.masked_fill_(flat.unsqueeze(-1), 0)
    scale = torch.where(flat, shift, scale)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.where(flat, torch.full_like(shift, -1.0), -low.to(torch.float64) - shift / safe)
    whole = bool(((zero == zero.round()) & (zero.abs() < 2**15)).all())
    zeros = zero.to(torch.int16) if whole else zero
    return _finish(codes, bits, "int" if whole else "float", scale, zeros, groups, n, k)


def example(random: Random, n: int, k: int) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """Codes of 1 to 8 bits and groups of any divisor of k, with one of the spellings that libraries use."""
    bits = random.choice((1, 2, 3, 4, 4, 8))
    group = random.choice([g for g in (4, 8, 16, 32, 64, k) if k % g == 0])
    dtype = random.choice((torch.float16, torch.bfloat16, torch.float32))
    generator = torch.Generator().manual_seed(random.getrandbits(31))
    codes = torch.randint(0, 1 << bits, (n, k // group, group), generator=generator, dtype=torch.uint8)
    scale = (torch.rand((n, k // group, 1), generator=generator) * 0.1 + 0.01).to(dtype)
    zero = torch.randint(0, 1 << bits, (n, k // group, 1), generator=generator, dtype=torch.uint8)
    kind = random.choice(("int", "float", "cast", "offset", "signed", "none"))
    if kind == "signed":
        half = 1 << bits - 1
        return {
            "codes": (codes.to(torch.int16) - half).to(torch.int8),
            "scale": scale,
        }, lambda codes, scale: (codes.to(scale.dtype) * scale).view(n, k)
    if kind == "none":
        return {"codes": codes, "scale": scale}, lambda codes, scale: (codes * scale).reshape(n, k)
    if kind == "offset":
        offset = (torch.randn((n, k // group, 1), generator=generator) * 0.1).to(dtype)
        return {"codes": codes, "scale": scale, "offset": offset}, lambda codes, scale, offset: (
            codes.to(scale.dtype) * scale + offset
        ).reshape(n, k)
    if kind == "float":
        zero = (torch.rand((n, k // group, 1), generator=generator) * (1 << bits)).to(dtype)
        return {"codes": codes, "scale": scale, "zero": zero}, lambda codes, scale, zero: (
            (codes.to(scale.dtype) - zero) * scale
        ).reshape(n, k)
    if kind == "int":
        return {"codes": codes, "scale": scale, "zero": zero}, lambda codes, scale, zero: (
            (codes.to(torch.int16) - zero.to(torch.int16)).to(scale.dtype) * scale
        ).reshape(n, k)
    return {"codes": codes, "scale": scale, "zero": zero}, lambda codes, scale, zero: (
        scale * (codes.to(scale.dtype) - zero.to(scale.dtype))
    ).reshape(n, k)
