"""Which layout a weight is packed in, which kernel serves which range of m, and the packed weight itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from .. import cost, profile
from ..device import Device
from ..errors import Reason, Refused
from ..formats import refit
from ..kernels import registry
from ..kernels.layout import LAYOUTS
from ..kernels.registry import Call
from ..types import Candidate, Format, Piece, Problem, QWeight
from . import meanings
from .constants import fake_value
from .prove import Recovered
from .recognise import Match


@dataclass(eq=False)
class Packed:
    """One weight in its layout. The tensors of `parts` keep their addresses when the weight is packed again."""

    layout: str
    format: Format
    n: int
    k: int
    parts: list[Tensor]
    perm: Tensor | None

    def update(self, weight: QWeight) -> bool:
        """Packs new values into the same tensors. False, with nothing changed, if they do not fit this format."""
        table = self.parts[-1] if self.format.form == "table" else None
        fitted = refit(weight, self.format, None if table is None else tuple(table.shape))
        if fitted is None or (weight.n, weight.k) != (self.n, self.k) or (fitted.perm is None) != (self.perm is None):
            return False
        fresh = LAYOUTS[self.layout].pack(fitted)
        for old, new in zip(self.parts, fresh, strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                return False
        for old, new in zip(self.parts, fresh, strict=True):
            old.copy_(new)
        if self.perm is not None and fitted.perm is not None:
            self.perm.copy_(fitted.perm)
        return True

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        tensors = self.parts if self.perm is None else [*self.parts, self.perm]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Plan:
    """How one match is run: a packed weight for each place of its batch, and a kernel for each range of m."""

    match: Match
    layout: str
    route: str
    pieces: tuple[Piece, ...]
    packed: tuple[Packed, ...]
    m: sympy.Expr
    m_range: tuple[int, int | None]
    choice: Choice
    device: Device

    @property
    def bytes(self) -> int:
        """Bytes of the packed weights on the device that was planned for."""
        if self.device.kind == fake_value(self.match.x).device.type:
            return sum(p.bytes for p in self.packed)
        # A table is stored as float32 everywhere.
        tables = sum(4 * p.parts[-1].numel() for p in self.packed if p.format.form == "table")
        packed = (LAYOUTS[p.layout].packed_bytes(p.format, p.n, p.k, self.device.kind) for p in self.packed)
        return sum(packed) + tables


@dataclass(frozen=True)
class Choice:
    """The layout for one problem, what was compared in it, and the same matmul on a dense weight."""

    layout: str
    pieces: tuple[Piece, ...]
    candidates: tuple[Candidate, ...]
    dense: Candidate

    @property
    def route(self) -> str:
        """The pieces as the custom op takes them."""
        return ",".join(p.kernel if p is self.pieces[-1] else f"{p.kernel}@{p.high}" for p in self.pieces)


class Planner:
    """Plans the matches of one graph for `device`, by default the one that they are on, and for a workload.

    Matmuls that share a weight share its packed copy.
    """

    def __init__(self, workload: Mapping[int, float], device: Device | None = None) -> None:
        self._workload, self._device = workload, device
        self._packed: dict[tuple[int, str], tuple[Packed, ...]] = {}
        self._kept: list[Recovered] = []
        self._choices: dict[tuple[Any, ...], Choice] = {}

    def plan(self, match: Match) -> Plan:
        """The plan of a match. Raises Refused where no kernel accepts it."""
        x = fake_value(match.x)
        m, m_range = _rows(match, x)
        first = match.recovered.weights[0]
        problem = Problem(m, (m_range[0], m_range[1] or 1 << 31), first.n, first.k, first.format, match.dtype, x.device)
        device = self._device or profile.of(problem.device)
        fused = match.recovered.fused
        # The weights of a batch share one route, but each may have turned out to be of another format.
        formats = tuple(dict.fromkeys(w.format for w in match.recovered.weights))
        asked = (m_range, first.n, first.k, formats, match.dtype, device, fused)
        if asked not in self._choices:
            self._choices[asked] = self._choose(problem, formats, m_range, device, fused)
        choice = self._choices[asked]
        layout = choice.layout
        # By identity, kept alive here: equal weights of two layers are two packs.
        key = (id(match.recovered), layout)
        if key not in self._packed:
            self._packed[key] = tuple(_pack(w, layout) for w in match.recovered.weights)
            self._kept.append(match.recovered)
        packed, route = self._packed[key], choice.route
        return Plan(match, layout, route, choice.pieces, packed, m, m_range, choice, device)

    def choice(
        self, format: Format, n: int, k: int, x_dtype: torch.dtype, on: torch.device, layouts: Sequence[str] = (),
        fused: str = "",
    ) -> Choice:  # fmt: skip
        """What runs one weight for any number of rows, in one of `layouts` (none: any). Raises Refused."""
        problem = Problem(sympy.Symbol("m"), (1, 1 << 31), n, k, format, x_dtype, on)
        asked = (tuple(layouts), n, k, format, x_dtype, on, fused)
        if asked not in self._choices:
            device = self._device or profile.of(on)
            self._choices[asked] = self._choose(problem, (format,), (1, None), device, fused, layouts)
        return self._choices[asked]

    def _choose(
        self, problem: Problem, formats: Sequence[Format], m_range: tuple[int, int | None], device: Device, fused: str,
        layouts: Sequence[str] = (),
    ) -> Choice:  # fmt: skip
        """The layout, and in it the kernels, that are the fastest for `problem` among those that take all `formats`.

        Raises Refused where none does, or where the library's own operation `fused` ("" for none) is as fast.
        """
        low, high = m_range
        m = sympy.Symbol("m", positive=True, integer=True)
        priced = Problem(m, problem.m_range, problem.n, problem.k, problem.format, problem.x_dtype, problem.device)
        best: tuple[float, Choice] | None = None
        dense = Candidate("dense weight", "", cost.dense(priced, device))
        for name in layouts or LAYOUTS:
            if any(f.form not in LAYOUTS[name].forms for f in formats):
                continue
            calls = [Call(name, f, problem.n, problem.k) for f in formats]
            candidates = [
                Candidate(kernel.name, name, kernel.seconds(priced, name, device))
                for kernel in registry.discover().values()
                if name in kernel.layouts
                and device.kind in kernel.devices
                and all(kernel.accepts(call, problem.x_dtype, device.kind) is None for call in calls)
            ]
            if candidates:
                found = cost.pieces(candidates, low, high)
                seconds = cost.total(found, candidates, low, high, self._workload)
                if best is None or seconds < best[0]:
                    best = (seconds, Choice(name, found, tuple(candidates), dense))
        if best is None:
            raise Refused(Reason.NO_KERNEL, f"{problem.format} on {device.kind}")
        theirs = meanings.seconds(fused, priced, device)
        if theirs is not None:
            # A library's own kernel is taken over only where ours is faster.
            own = Candidate(fused, "", theirs)
            if cost.total(cost.pieces([own], low, high), [own], low, high, self._workload) <= best[0]:
                raise Refused(Reason.SLOWER, fused)
        return best[1]


def _pack(w: QWeight, layout: str) -> Packed:
    return Packed(layout, w.format, w.n, w.k, LAYOUTS[layout].pack(w), w.perm)


def _rows(match: Match, x: Tensor) -> tuple[sympy.Expr, tuple[int, int | None]]:
    """m as an expression, and its bounds. Reads the shape environment; adds no guard to it."""
    from torch.utils._sympy.value_ranges import bound_sympy

    expression: Any = sympy.Integer(1)
    environment = None
    for label, size in zip(match.roles.x_labels, x.shape, strict=True):
        if label in match.roles.m:
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                expression = expression * size.node.expr
            else:
                expression = expression * int(size)
    if environment is None:
        return expression, (int(expression), int(expression))
    bounds = bound_sympy(expression, environment.var_to_range)
    low = max(1, int(bounds.lower)) if bounds.lower.is_finite else 1
    finite = bounds.upper.is_finite and bounds.upper < 1 << 31
    return expression, (low, max(low, int(bounds.upper)) if finite else None)
