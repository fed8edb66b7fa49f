"""From scales of every single weight back to scales of groups: how many inputs share one, and in which order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Reason, Refused
from .deferred import Block, held, spans, unrepeated

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
    size, inverse = _alike(varying)
    if size < SMALLEST:
        outputs = _alike([p.t() for p in varying])[0]
        shared = f", each scale shared by {outputs} outputs instead" if outputs >= SMALLEST else ""
        raise Refused(Reason.GROUPS, f"groups of {size}{shared}")
    return Groups(size, torch.argsort(inverse, stable=True))


def _alike(pieces: Sequence[Tensor]) -> tuple[int, Tensor]:
    """The size of equal groups into which the columns fall that are the same in every piece, and each one's group."""
    signature = torch.stack([_signature(p) for p in pieces])
    _, inverse, counts = torch.unique(signature, dim=1, return_inverse=True, return_counts=True)
    return math.gcd(*counts.tolist()), inverse


def _signature(t: Tensor) -> Tensor:
    """A number [k] for each column of a piece: equal for equal columns, and hardly ever for others."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (t.shape[0], 1), generator=generator).to(t.device)
    total = torch.zeros(t.shape[1], dtype=torch.int64, device=t.device)
    for low, high in spans(t):
        # By their bits, and modulo 2**64, so that no order of additions matters; 0 has one sign.
        bits = Block().part(t, low, high).add(0.0).contiguous().view(torch.int64)
        total += bits.mul_(factors[low:high] | 1).sum(0)
    return total
