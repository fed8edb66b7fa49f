"""table[codes] * scale, in groups along K: NF4, FP4, 8-bit floats, learned codebooks."""

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

RANK = 30


def read(weight: Weight) -> QWeight:
    """One look-up in one table, times a scale."""
    n, k = weight.shadow.shape
    form = weight.form
    if len(form.terms) != 1 or form.terms[0].levels is None or bool((form.offset != 0).any()):
        raise Refused(Reason.TOO_MANY_LEVELS, "table")
    term = form.terms[0]
    assert term.levels is not None
    bits = max(1, (term.levels.numel() - 1).bit_length())
    groups = find_groups([term.coef], k)
    scale = groups.each(term.coef, n, k)
    codes = groups.columns(codes_of(term.codes, (n, k))[0], n, k).reshape(n, k).to(torch.uint8)
    table = torch.zeros(1 << bits, dtype=torch.float64, device=codes.device)
    table[: term.levels.numel()] = term.levels
    format = Format("table", bits, groups.size, "none", narrowest(scale))
    return QWeight(format, n, k, codes, scale=scale, table=table, perm=groups.perm)


def example(random: Random, n: int, k: int) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """A table of 4 to 16 entries, looked up by any of PyTorch's ways, with or without a scale."""
    bits = random.choice((2, 3, 4, 4))
    group = random.choice([g for g in (4, 8, 16, 32, k) if k % g == 0])
    dtype = random.choice((torch.float16, torch.bfloat16, torch.float32))
    generator = torch.Generator().manual_seed(random.getrandbits(31))
    table = torch.randn(1 << bits, generator=generator).sort().values.to(dtype)
    codes = torch.randint(0, 1 << bits, (n, k // group, group), generator=generator)
    scale = (torch.rand((n, k // group, 1), generator=generator) + 0.1).to(dtype)
    look = random.choice(
        (
            lambda table, codes: table[codes],
            lambda table, codes: torch.take(table, codes),
            lambda table, codes: table.index_select(0, codes.flatten()).view(codes.shape),
            lambda table, codes: torch.nn.functional.embedding(codes, table.unsqueeze(1)).squeeze(-1),
            lambda table, codes: table.gather(0, codes.flatten()).view_as(codes),
        )
    )
    if random.random() < 0.3:
        return {"table": table, "codes": codes}, lambda table, codes: look(table, codes).reshape(n, k)
    return {"table": table, "codes": codes, "scale": scale}, lambda table, codes, scale: (
        look(table, codes) * scale
    ).reshape(n, k)
