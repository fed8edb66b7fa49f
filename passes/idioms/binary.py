"""sum_i alpha_i * b_i + z with b_i in {-1, +1}, grouped along K: binary coding (LUT-GEMM, arXiv 2206.09557, 3.1)."""

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
from ..grouping import find_groups

RANK = 10


def read(weight: Weight) -> QWeight:
    """Terms whose codes have two values each: several, or a single one of -1 and +1."""
    n, k = weight.shadow.shape
    terms = weight.form.terms
    if not 1 <= len(terms) <= 8 or any(t.levels is not None or t.codes.numel() == 0 for t in terms):
        raise Refused(Reason.TOO_MANY_LEVELS, "planes")
    alphas, planes, offset = [], [], weight.form.offset
    for term in terms:
        codes, low, high = codes_of(term.codes, (n, k))
        if low == high or (len(terms) == 1 and (low, high) != (-1, 1)):
            raise Refused(Reason.TOO_MANY_LEVELS, "planes")
        plane = codes == high
        if not bool((plane | (codes == low)).all()):
            raise Refused(Reason.TOO_MANY_LEVELS, "planes")
        alphas.append(term.coef * ((high - low) / 2))
        offset = offset + term.coef * ((high + low) / 2)
        planes.append(plane)
    groups = find_groups([*alphas, offset], k)
    codes = torch.zeros((n, k), dtype=torch.uint8, device=weight.shadow.device)
    for i, plane in enumerate(planes):
        codes |= groups.columns(plane, n, k).reshape(n, k).to(torch.uint8) << i
    alpha = torch.stack([groups.each(a, n, k) for a in alphas], -1)
    z = groups.each(offset, n, k)
    shifted = bool((z != 0).any())
    name = narrowest(torch.cat([alpha.flatten(), z.flatten()]))
    format = Format("binary", len(terms), groups.size, "float" if shifted else "none", name)
    return QWeight(format, n, k, codes, alpha=alpha, offset=z if shifted else None, perm=groups.perm)


def example(random: Random, n: int, k: int) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """One to four planes, as signs, booleans or packed bits, summed by a loop or over a dimension."""
    planes = random.randint(1, 4)
    group = random.choice([g for g in (4, 8, 16, 32, k) if k % g == 0])
    dtype = random.choice((torch.float16, torch.bfloat16, torch.float32))
    generator = torch.Generator().manual_seed(random.getrandbits(31))
    bit = torch.randint(0, 2, (planes, n, k // group, group), generator=generator, dtype=torch.uint8)
    alpha = torch.rand((planes, n, k // group, 1), generator=generator).add_(0.1)
    alpha = (alpha * torch.tensor([0.5**i for i in range(planes)]).view(-1, 1, 1, 1) * 0.2).to(dtype)
    kind = random.choice(("signs", "where", "packed", "loop", "offset"))
    if kind == "where":
        return {
            "bit": bit.bool(),
            "alpha": alpha,
        }, lambda bit, alpha: torch.where(bit, alpha, -alpha).sum(0).view(n, k)
    if kind == "packed":
        packed = sum(bit[i] << i for i in range(planes))
        assert isinstance(packed, Tensor)

        def unpacked(packed: Tensor, alpha: Tensor) -> Tensor:
            signs = [((packed >> i) & 1).to(torch.int8) * 2 - 1 for i in range(planes)]
            return sum((s * a for s, a in zip(signs, alpha, strict=True)), torch.zeros_like(alpha[0])).view(n, k)

        return {"packed": packed, "alpha": alpha}, unpacked
    signs = bit.to(torch.int8) * 2 - 1
    if kind == "offset":
        z = (torch.randn((n, k // group, 1), generator=generator) * 0.05).to(dtype)
        return {"signs": signs, "alpha": alpha, "z": z}, lambda signs, alpha, z: ((signs * alpha).sum(0) + z).reshape(
            n, k
        )
    if kind == "loop":

        def loop(signs: Tensor, alpha: Tensor) -> Tensor:
            w = signs[0].to(alpha.dtype) * alpha[0]
            for i in range(1, planes):
                w = w + signs[i].to(alpha.dtype) * alpha[i]
            return w.reshape(n, k)

        return {"signs": signs, "alpha": alpha}, loop
    return {
        "signs": signs,
        "alpha": alpha,
    }, lambda signs, alpha: (signs.to(alpha.dtype) * alpha).sum(0).reshape(n, k)
