"""From scales of every single weight back to scales of groups: how many inputs share one, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Reason, Refused

SMALLEST = 4
# Elements that are looked at at a time: few enough to stay in a cache, in float64.
CHUNK = 1 << 16


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
        return self.columns(t, n, k)[..., 0].contiguous()


def stride_of_change(t: Tensor, k: int) -> int:
    """The largest size of consecutive columns within which a piece [n, k] never changes; k for a uniform one."""
    if t.numel() <= 1 or k <= 1:
        return k
    size = k
    for part in t.split(max(1, CHUNK // k)):
        groups = part.reshape(-1, size)
        # Most parts only confirm what the first of them says.
        if size == 1 or bool((groups == groups[:, :1]).all()):
            continue
        changes = (part[:, 1:] != part[:, :-1]).any(0).nonzero().flatten().add_(1).tolist()
        size = math.gcd(size, *changes)
    return size


def find_groups(pieces: Sequence[Tensor], k: int) -> Groups:
    """The groups in which every piece [n, k] is constant. Raises Refused(GROUPS) if there are none of useful size."""
    if k == 0:
        return Groups(1, None)
    size = math.gcd(*(stride_of_change(p, k) for p in pieces)) if pieces else k
    if size >= min(SMALLEST, k):
        return Groups(size, None)
    varying = [p for p in pieces if p.numel() > 1]
    # Act-order: the columns of a group are scattered, but all its columns carry the same scales.
    signature, inverse, counts = torch.unique(torch.cat(varying), dim=1, return_inverse=True, return_counts=True)
    size = math.gcd(k, *counts.tolist())
    if size < SMALLEST or signature.shape[1] == k:
        raise Refused(Reason.GROUPS, f"groups of {size}")
    return Groups(size, torch.argsort(inverse, stable=True))
