"""A packed weight: its tensors in one layout or in two, which keep their places when it is packed again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Reason, Refused
from ..formats import refit
from ..kernels import pages
from ..kernels.layout import LAYOUTS
from ..types import Format, QWeight
from .prove import Recovered


@dataclass(eq=False)
class Packed:
    """One weight in its layout, or in two: "lut+quick" has the parts of the one, then those of the other.

    The tensors of `parts` keep their addresses when the weight is packed again. `perm` is in which order the op takes
    its inputs; of a transposed weight, packed `across`, in which order the user takes its outputs, that are `k` here.
    """

    layout: str
    format: Format
    n: int
    k: int
    parts: list[Tensor]
    perm: Tensor | None
    across: bool = False

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts of the copies, in the order of their parts."""
        return tuple(self.layout.split("+"))

    def update(self, weight: QWeight) -> bool:
        """Packs new values into the same tensors. False, with nothing changed, if they do not fit this format."""
        table = self.parts[-1] if self.format.form == "table" else None
        fitted = refit(weight, self.format, None if table is None else tuple(table.shape))
        if fitted is None or (weight.n, weight.k) != (self.n, self.k) or (fitted.perm is None) != (self.perm is None):
            return False
        fresh = _parts(fitted, self.layouts)
        for old, new in zip(self.parts, fresh, strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                return False
        for old, new in zip(self.parts, fresh, strict=True):
            old.copy_(new)
        if self.perm is not None and fitted.perm is not None:
            self.perm.copy_(_order(fitted.perm, self.across))
        return True

    def holds(self, given: Sequence[Sequence[Tensor]]) -> bool:
        """Whether the parts of several weights are views of these still, and their one table, if any, is this one."""
        *whole, last = zip(self.parts, zip(*given, strict=True), strict=True)
        shared = self.format.form == "table" and self.parts[-1].ndim == 1
        if shared and not all(torch.equal(last[0], table) for table in last[1]):
            return False
        for one, parts in whole if shared else (*whole, last):
            starts = itertools.accumulate((part.nbytes for part in parts), initial=one.data_ptr())
            if any(part.data_ptr() != start for part, start in zip(parts, starts, strict=False)):
                return False
        return True

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        tensors = self.parts if self.perm is None else [*self.parts, self.perm]
        return sum(t.numel() * t.element_size() for t in tensors)


def pack(w: QWeight, layout: str, across: bool = False) -> Packed:
    """A weight in a layout, or in two."""
    order = None if w.perm is None else _order(w.perm, across)
    return Packed(layout, w.format, w.n, w.k, _parts(w, layout.split("+")), order, across)


def adjoined(recovered: Sequence[Recovered]) -> Packed:
    """Packed weights as one of all their rows, of whose parts theirs become views. Raises Refused."""
    first, parts = recovered[0], list[Tensor]()
    for each in zip(*(r.sources for r in recovered), strict=True):
        # One table of all rows is that of each.
        whole = each[0] if first.formats[0].form == "table" and each[0].ndim == 1 else pages.adjoin(each)
        if whole is None:
            raise Refused(Reason.NO_KERNEL, "weights whose memory is not theirs alone")
        parts.append(whole)
    return Packed(first.layout, first.formats[0], sum(r.n for r in recovered), first.k, parts, None)


def _order(perm: Tensor, across: bool) -> Tensor:
    """What to index inputs by, or, `across`, outputs: those are found where their columns of codes stand."""
    return torch.argsort(perm) if across else perm


def _parts(w: QWeight, layouts: Sequence[str]) -> list[Tensor]:
    return [part for layout in layouts for part in LAYOUTS[layout].pack(w)]
