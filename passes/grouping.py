"""From scales of every single weight back to scales of groups: how many inputs, or outputs, share one; which order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import Reason, Refused
from .algebra import Form
from .deferred import Block, codes_of, defer, held, spans, unrepeated

SMALLEST = 4


@dataclass(frozen=True)
class Groups:
    """Groups of `size` inputs, after the columns were put in the order `perm` (None: as they are)."""

    size: int
    perm: Tensor | None

    def columns(self, t: Tensor, n: int, k: int) -> Tensor:
        """A piece at full size [n, k/size, size], columns in group order."""
        t = t.expand(n, k) if t.numel() == 1 else t
        t = t if self.perm is None else t[:, self.perm]
        return t.reshape(n, k // self.size, self.size)

    def each(self, t: Tensor, n: int, k: int) -> Tensor:
        """A piece that is the same within each group, once for each group: [n, k/size]."""
        if t.numel() == 1:
            return held(t).expand(n, k // self.size).contiguous()
        t, repeat = unrepeated(t) if self.perm is None else (t, 1)
        first = slice(None, None, self.size // repeat) if self.perm is None else self.perm[:: self.size]
        return (
            torch.cat([block[:, first].clone() for block in _blocks(t)])
            if t.numel()
            else t.new_empty((n, k // self.size))
        )


def _blocks(t: Tensor) -> Iterator[Tensor]:
    """The rows of a piece, some at a time."""
    return (Block().part(t, low, high) for low, high in spans(t))


def stride_of_change(t: Tensor, k: int) -> int:
    """The largest size of consecutive columns within which a piece [n, k] never changes; k for a uniform one."""
    if t.numel() <= 1 or k <= 1:
        return k
    t, repeat = unrepeated(t)
    size = k // repeat
    for block in _blocks(t):
        groups = block.reshape(-1, size)
        # Most blocks only confirm what the first of them says.
        if size == 1 or bool((groups == groups[:, :1]).all()):
            continue
        changes = (block[:, 1:] != block[:, :-1]).any(0).nonzero().flatten().add_(1).tolist()
        size = math.gcd(size, *changes)
    return size * repeat


def find_groups(pieces: Sequence[Tensor], k: int) -> Groups:
    """The groups in which every piece [n, k] is constant. Raises Refused(GROUPS) if there are none of useful size."""
    if k == 0:
        return Groups(1, None)
    size = math.gcd(*(stride_of_change(p, k) for p in pieces)) if pieces else k
    if size >= min(SMALLEST, k):
        return Groups(size, None)
    # Act-order: the columns of a group are scattered, but all its columns carry the same scales.
    varying = [p for p in pieces if p.numel() > 1]
    size, group = _alike(varying, 1)
    if size < SMALLEST:
        raise Refused(Reason.GROUPS, f"groups of {size}")
    return Groups(size, torch.argsort(group, stable=True))


def turned(form: Form) -> tuple[Form, Tensor | None]:
    """The form of w.T [k, n] where outputs share what belongs to an input, those that do side by side, and their order.

    Its column j is output order[j]; None: each is in its place. Codes are held, as bytes, and of the rest what differs.
    Raises Refused: GROUPS where less than SMALLEST outputs share.
    """
    n, k = form.shape
    several = len(form.terms) > 1
    coarse = [several and _alike([t.codes.expand(n, k)], 0)[0] >= SMALLEST for t in form.terms]
    pieces = [*(t.coef for t in form.terms), *(t.codes for t, c in zip(form.terms, coarse, strict=True) if c)]
    varying = [p.expand(n, k) for p in (*pieces, form.offset) if p.numel() > 1]
    size, group = _alike(varying, 0) if varying else (n, torch.zeros(n, device=form.offset.device))
    if size < SMALLEST:
        raise Refused(Reason.GROUPS, f"each scale shared by {size} outputs")
    order = torch.argsort(group, stable=True)
    in_place = torch.equal(order, torch.arange(n, device=order.device))

    def shared(piece: Tensor) -> Tensor:
        if piece.numel() == 1:
            return piece
        each = defer(_rows(piece.expand(n, k), order[::size]).t().contiguous())
        return each.unsqueeze(-1).expand(k, n // size, size).reshape(k, n)

    def own(codes: Tensor) -> Tensor:
        codes, least, most = codes_of(codes, (n, k))
        if max(-least, most) > 2**15 - 1:
            raise Refused(Reason.TOO_MANY_LEVELS, "codes")
        return codes.t() if in_place else codes[order].t()

    terms = (
        replace(t, coef=shared(t.coef), codes=shared(t.codes) if c else own(t.codes))
        for t, c in zip(form.terms, coarse, strict=True)
    )
    return Form((k, n), tuple(terms), shared(form.offset)), None if in_place else order


def _rows(t: Tensor, which: Tensor) -> Tensor:
    """Some rows of a piece."""
    ordered, place = which.sort()
    blocks = list(spans(t))
    ends = torch.searchsorted(ordered, torch.tensor([high for _, high in blocks], device=which.device)).tolist()
    found = [
        Block().part(t, low, high)[ordered[first:last] - low]
        for (low, high), first, last in zip(blocks, [0, *ends], ends, strict=False)
    ]
    return torch.cat(found)[torch.argsort(place)]


def _alike(pieces: Sequence[Tensor], axis: int) -> tuple[int, Tensor]:
    """The size of equal groups of rows (axis 0), or columns, that are the same in every piece, and each one's group."""
    signature = torch.stack([_signature(p, axis) for p in pieces])
    _, group, counts = torch.unique(signature, dim=1, return_inverse=True, return_counts=True)
    return math.gcd(*counts.tolist()), group


def _signature(t: Tensor, axis: int) -> Tensor:
    """A number for each row (axis 0) or column of a piece: equal for equal ones, and hardly ever for others."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (t.shape[1 - axis],), generator=generator).to(t.device) | 1
    found = []
    for low, high in spans(t):
        # By their bits, and modulo 2**64, so that no order of additions matters; 0 has one sign.
        bits = Block().part(t, low, high).to(torch.float64).add(0.0).contiguous().view(torch.int64)
        found.append(bits.mul_(factors if axis == 0 else factors[low:high, None]).sum(1 - axis))
    return torch.cat(found) if axis == 0 else torch.stack(found).sum(0)
