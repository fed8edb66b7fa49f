"""No algebra to read (an opaque operation, bit tricks): the exact values alone say what the weight is.

Each group holds at most 16 distinct values. Evenly spaced, exactly, they are codes with a scale; of any spacing they
are a table of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import torch
from torch import Tensor

from ...errors import Reason, Refused
from ...formats import narrowest
from ...types import Format, QWeight
from ..algebra import Form, Term
from ..deferred import Block, held
from ..evaluate import Weight
from ..grouping import SMALLEST
from . import affine

RANK = 90
LEVELS = 16
SOME = 16
GROUPS = (256, 128, 64, 32, 16, 8)


def read(weight: Weight) -> QWeight:
    """Evenly spaced values first, then the table that stores the least; the largest groups among equals."""
    n, k = weight.shadow.shape
    some = Block().part(weight.shadow, 0, min(n, SOME))
    # To sort all would take seconds: a few rows tell most that are no such weight.
    sizes = [g for g in (k, *(g for g in GROUPS if g < k and k % g == 0)) if _few(some, g)]
    w = held(weight.shadow) if sizes else some
    if w.numel() == 0 or bool((w == w.reshape(-1)[0]).all()):
        raise Refused(Reason.NOT_QUANTIZED, "one value")
    best: tuple[int, int, Tensor] | None = None
    for group in sizes:
        ordered = w.reshape(n, k // group, group).sort(-1).values
        most = _levels(ordered)
        if most > LEVELS:
            continue
        found = _evenly(w, ordered, group)
        if found is not None:
            return affine.read(replace(weight, form=found))
        size = (k // group) * (1 << (most - 1).bit_length()) * 32 + k * (most - 1).bit_length()
        # A table must cost less than the weights it replaces, or there were no codes to find.
        if (best is None or size < best[0]) and group > SMALLEST and size < 16 * k:
            best = (size, group, ordered)
    if best is None:
        raise Refused(Reason.TOO_MANY_LEVELS, "values")
    return _tabled(w, best[2], best[1])


def _few(w: Tensor, group: int) -> bool:
    return w.numel() > 0 and _levels(w.reshape(-1, group).sort(-1).values) <= LEVELS


def _levels(ordered: Tensor) -> int:
    """The most distinct values that a row of sorted ones holds."""
    return int((ordered[..., 1:] != ordered[..., :-1]).sum(-1).max()) + 1


def _evenly(w: Tensor, ordered: Tensor, group: int) -> Form | None:
    """The weight as codes * step + least, if every value of each group lies exactly on such a grid of 16 steps."""
    n, k = w.shape
    gaps = ordered[..., 1:] - ordered[..., :-1]
    step = torch.where(gaps > 0, gaps, torch.inf).amin(-1, keepdim=True)
    step = torch.where(step.isinf(), torch.ones_like(step), step)
    least = ordered[..., :1]
    grouped = w.view(n, k // group, group)
    codes = ((grouped - least) / step).round()
    # Where zero is on the grid, count from it: the step is then exact although least may not be.
    origin = (least / step).round()
    centred = bool((origin * step == least).all())
    rebuilt = (codes + origin) * step if centred else codes * step + least
    if bool((codes >= LEVELS).any()) or not torch.equal(rebuilt, grouped):
        return None
    wide = lambda t: t.expand(n, k // group, group).reshape(n, k)  # noqa: E731
    whole = (codes + origin if centred else codes).to(torch.int32).view(n, k)
    offset = torch.zeros((), dtype=torch.float64, device=w.device) if centred else wide(least)
    return Form((n, k), (Term(wide(step), whole),), offset)


def _tabled(w: Tensor, ordered: Tensor, group: int) -> QWeight:
    n, k = w.shape
    rank = torch.zeros(ordered.shape, dtype=torch.int64, device=w.device)
    rank[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).cumsum(-1)
    bits = max(1, int(rank.max()).bit_length())
    table = torch.zeros((n, k // group, 1 << bits), dtype=torch.float64, device=w.device).scatter_(-1, rank, ordered)
    grouped = w.view(n, k // group, group).contiguous()
    # The place of each value among the distinct ones: where it stands in the sorted row.
    place = torch.searchsorted(ordered.contiguous(), grouped).clamp_(max=group - 1)
    codes = rank.gather(-1, place).to(torch.uint8).view(n, k)
    scale = torch.ones((n, k // group), dtype=torch.float64, device=w.device)
    table = table[:, 0] if group == k else table
    return QWeight(Format("table", bits, group, "none", narrowest(scale)), n, k, codes, scale=scale, table=table)


def example(random: Random, n: int, k: int) -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """Weights dequantized by arithmetic that no algebra follows: a chain of comparisons, or powers of two."""
    generator = torch.Generator().manual_seed(random.getrandbits(31))
    codes = torch.randint(0, 4, (n, k), generator=generator)
    scale = (torch.rand((n, 1), generator=generator) + 0.1).to(torch.float32)
    if random.random() < 0.5:
        levels = torch.randn(4, generator=generator)

        def chain(codes: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
            w = (codes == 0) * levels[0]
            for i in range(1, 4):
                w = torch.where(codes == i, levels[i], w)
            return w * scale

        return {"codes": codes, "levels": levels, "scale": scale}, chain
    return {"codes": codes, "scale": scale}, lambda codes, scale: torch.exp2(-codes.to(torch.float32)) * scale
