"""Which layout a weight is packed in, and which kernel serves which range of m."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .. import autotune, cost, profile
from ..device import Device
from ..errors import Reason, Refused
from ..kernels import grouped, registry
from ..kernels.layout import LAYOUTS
from ..kernels.registry import Call
from ..types import Candidate, Format, Piece, Problem
from . import meanings
from .constants import fake_value
from .evaluate import undisturbed
from .merge import Bundle, bias_of, join, join_biases, widest
from .pack import Packed, adjoined, pack
from .prove import Recovered
from .recognise import Match

# How much faster something must be to be worth more memory; and by how many launches, where time is little else.
MARGIN, LAUNCHES = 1.05, 10


@dataclass(frozen=True)
class Plan:
    """How one bundle is run: a packed weight for each place of its batch, and a kernel for each range of m.

    bias     that of several matches, as their op takes it
    experts  whose weights are packed as one, 0 where they are not
    turns    1, 2 to so many, where x does not come with `ends` of its own
    """

    bundle: Bundle
    choice: Choice
    packed: tuple[Packed, ...]
    m: sympy.Expr
    m_range: tuple[int, int | None]
    device: Device
    bias: Tensor | None = None
    experts: int = 0
    turns: Tensor | None = None

    @property
    def match(self) -> Match:
        """The first match, whose x the op reads."""
        return self.bundle.matches[0]

    @property
    def route(self) -> str:
        """As the op takes it: where each expert has as many rows, m counts those of one, and the op sees all."""
        alike = self.experts and self.match.contraction.routing is None
        return self.choice.route_of(self.experts if alike else 1)

    def share(self, match: Match) -> float:
        """How much of the op is one match's."""
        return match.n / max(1, sum(m.n for m in self.bundle.matches))

    @property
    def bytes(self) -> int:
        """Bytes of the packed weights on the device that was planned for."""
        if self.device.kind == fake_value(self.match.x).device.type:
            return sum(p.bytes for p in self.packed)
        # A table is stored as float32 everywhere.
        copies = [(p, LAYOUTS[layout]) for p in self.packed for layout in p.layouts]
        tables = sum(4 * p.parts[-1].numel() for p, _ in copies if p.format.form == "table")
        return sum(layout.packed_bytes(p.format, p.n, p.k, self.device.kind) for p, layout in copies) + tables


@dataclass(frozen=True)
class Choice:
    """The layout for one problem, or two of them, what was compared in it, and the same matmul on a dense weight.

    `seconds` are those of the whole workload.
    """

    seconds: float
    layout: str
    pieces: tuple[Piece, ...]
    candidates: tuple[Candidate, ...]
    dense: Candidate

    @property
    def route(self) -> str:
        """As `route_of`, for the rows that it was planned for."""
        return self.route_of(1)

    def route_of(self, times: int) -> str:
        """The pieces as the custom op of the first one's layout takes them (see ops.py), with `times` as many rows."""
        first, last = self.pieces[0], self.pieces[-1]
        ways = [p.kernel if p.layout == first.layout else f"{p.kernel}/{p.layout}" for p in self.pieces]
        most = [p.high and p.high * times for p in self.pieces]
        return ",".join(w if p is last else f"{w}@{m}" for w, p, m in zip(ways, self.pieces, most, strict=True))


class Planner:
    """Plans the bundles of one graph for `device`, by default the one that they are on, and for a workload.

    Matmuls that share a weight share its packed copy. `copies` is 2 where a weight may be packed in two layouts;
    `autotune` times what could run a shape, unless it is planned for another device; `threads` are those that it will
    run with on a CPU, by default as many as now.
    """

    def __init__(
        self, values: Mapping[fx.Node, Tensor], workload: Mapping[int, float], device: Device | None = None, *,
        copies: int = 1, autotune: bool = False, threads: int | None = None,
    ) -> None:  # fmt: skip
        self._values, self._workload, self._device, self._copies = values, workload, device, copies
        self._autotune, self._threads = autotune and device is None, threads or torch.get_num_threads()
        self._packed: dict[tuple[Any, ...], tuple[Packed, ...]] = {}
        self._kept: list[Bundle] = []
        self._choices: dict[tuple[Any, ...], Choice | Refused] = {}

    def plan(self, bundle: Bundle) -> Plan:
        """The plan of a bundle. Raises Refused where no kernel accepts it, or where less in one op is as fast."""
        choice, m, m_range, device = self._choice(bundle.matches)
        match = bundle.matches[0]
        given = match.contraction.routing is not None
        together = None if given else self._of_experts(match, choice, m_range, device)
        experts, choice = match.places if given or together else 0, together or choice
        if bundle.epilogue and not any(bundle.epilogue in registry.KERNELS[p.kernel].epilogues for p in choice.pieces):
            raise Refused(Reason.NO_KERNEL, bundle.epilogue)
        if len(bundle.matches) > 1:
            apart = sum(self._choice([match])[0].seconds for match in bundle.matches)
            if choice.seconds >= apart:
                raise Refused(Reason.SLOWER, f"{len(bundle.matches)} matmuls in one")
        recovered = [match.recovered for match in bundle.matches]
        # By identity, kept alive here: equal weights of two layers are two packs.
        key = (*map(id, recovered), choice.layout, bundle.epilogue == "silu_mul", experts)
        if recovered[0].layout:
            self._packed[key] = (adjoined(recovered),)
        elif key not in self._packed:
            weights, across = join(recovered, bundle.epilogue, experts > 0), recovered[0].across
            self._packed[key] = tuple(pack(w, choice.layout, across) for w in weights)
            self._kept.append(bundle)
        bias = None
        if len(bundle.matches) > 1:
            leaves = [bias_of(match) for match in bundle.matches]
            biases = [None if leaf is None else self._values[leaf] for leaf in leaves]
            bias = join_biases(biases, [match.n for match in bundle.matches], bundle.epilogue)
        packed = self._packed[key]
        turns = None
        if experts and match.contraction.ends is None:
            turns = torch.arange(1, experts + 1, dtype=torch.int32, device=packed[0].parts[0].device)
        return Plan(bundle, choice, packed, m, m_range, device, bias, experts, turns)

    def _of_experts(
        self, match: Match, apart: Choice, m_range: tuple[int, int | None], device: Device
    ) -> Choice | None:  # fmt: skip
        """How the weights of a batch are run in one op, None where one after the other is as fast."""
        if not match.roles.batch or match.places == 1 or len(match.roles.m) > 1 or match.recovered.across:
            return None
        recovered, m = match.recovered, sympy.Symbol("m", positive=True, integer=True)
        rows, limits = match.places * m, (m_range[0], m_range[1] or 1 << 31)
        on = fake_value(match.x).device
        problem = Problem(m, limits, match.n, recovered.k, widest(recovered.formats), match.dtype, on)
        able = [
            dataclasses.replace(c, seconds=sympy.sympify(c.seconds).subs(m, rows))
            for c in _expert_candidates(problem, match.places, device)
        ]
        layouts = dict.fromkeys(c.layout for c in able)
        seconds = sympy.sympify(cost.dense(problem, device, match.places)).subs(m, rows)
        dense = dataclasses.replace(apart.dense, seconds=seconds)
        choices = [self._among([c for c in able if c.layout == name], name, m_range, dense) for name in layouts]
        best = min(choices, key=lambda choice: choice.seconds, default=None)
        return best if best is not None and best.seconds < match.places * apart.seconds else None

    def _choice(self, matches: Sequence[Match]) -> tuple[Choice, sympy.Expr, tuple[int, int | None], Device]:
        """For the matmuls of one x in one op: the layout and kernels, m with its range, and the device."""
        match = matches[0]
        x = fake_value(match.x)
        m, m_range = _rows(match, x)
        recovered, n = match.recovered, sum(match.n for match in matches)
        if recovered.across and x.requires_grad and fake_value(match.output).requires_grad:
            raise Refused(Reason.GROUPS, "the backward pass would keep the dense weight")
        # The weights of a batch share one route, but each may have turned out to be of another format.
        given = match.contraction.routing is not None
        formats = (widest(recovered.formats),) if given else tuple(dict.fromkeys(recovered.formats))
        limits = (m_range[0], m_range[1] or 1 << 31)
        problem = Problem(m, limits, n, recovered.k, formats[0], match.dtype, x.device)
        with with_threads(self._threads):
            device = self._device or profile.of(problem.device)
        own = (recovered.layout,) if recovered.layout else ()
        found = self._chosen(
            problem, formats, m_range, device, fused=recovered.fused, across=recovered.across, layouts=own,
            packed=bool(own), experts=match.places if given else 0, apart=_apart(recovered),
        )  # fmt: skip
        return found, m, m_range, device

    def choice(
        self, format: Format, n: int, k: int, x_dtype: torch.dtype, on: torch.device, layouts: Sequence[str] = (),
        fused: str = "",
    ) -> Choice:  # fmt: skip
        """What runs one packed weight for any number of rows, in one of `layouts` (none: any). Raises Refused."""
        problem = Problem(sympy.Symbol("m"), (1, 1 << 31), n, k, format, x_dtype, on)
        device = self._device or profile.of(on)
        own = tuple(layouts)
        return self._chosen(problem, (format,), (1, None), device, fused=fused, layouts=own, packed=True)

    def _chosen(
        self, problem: Problem, formats: tuple[Format, ...], m_range: tuple[int, int | None], device: Device, **how: Any
    ) -> Choice:
        """As `_choose`, once for each kind of problem."""
        asked = (m_range, problem.n, problem.k, formats, problem.x_dtype, device, *how.items())
        if asked not in self._choices:
            try:
                self._choices[asked] = self._choose(problem, formats, m_range, device, **how)
            except Refused as refused:
                self._choices[asked] = refused
        choice = self._choices[asked]
        if isinstance(choice, Refused):
            raise choice
        return choice

    def _choose(
        self, problem: Problem, formats: Sequence[Format], m_range: tuple[int, int | None], device: Device, fused: str,
        layouts: Sequence[str] = (), packed: bool = False, across: bool = False, experts: int = 0, apart: bool = False,
    ) -> Choice:  # fmt: skip
        """The layout, and in it the kernels, that are the fastest for `problem` among those that take all `formats`.

        Of `layouts`, if any. Raises Refused where none does, or where the library's own operation `fused` ("" for
        none) is faster, or, for a weight that need not be `packed`, what Inductor makes of a dequantization. A weight
        packed `across` is dequantized, multiplied by, and the outputs put in order. `apart`: see cost.inductor.
        """
        m = sympy.Symbol("m", positive=True, integer=True)
        priced = Problem(m, problem.m_range, problem.n, problem.k, problem.format, problem.x_dtype, problem.device)
        dense = Candidate("dense weight", "", cost.dense(priced, device, experts or 1))
        if experts:
            able = [] if across else _expert_candidates(priced, experts, device)
        elif across:
            turned = dataclasses.replace(priced, n=priced.k, k=priced.n)
            ordered = device.launch + 2 * m * priced.n * priced.x_dtype.itemsize / device.bandwidth
            able = [
                dataclasses.replace(c, seconds=c.seconds + ordered)
                for c in _candidates(turned, formats, device, tuple(LAYOUTS))
                if c.kernel == "dense"
            ]
        else:
            able = _candidates(priced, formats, device, layouts or tuple(LAYOUTS))
        if not able:
            raise Refused(Reason.NO_KERNEL, f"{problem.format} on {device.kind}")
        if self._autotune and not across and not experts:
            with with_threads(self._threads), undisturbed():
                dense, *able = autotune.timed(priced, m_range, [dense, *able], self._workload, device)
        found_in = tuple(dict.fromkeys(c.layout for c in able))
        choices = [self._among([c for c in able if c.layout == layout], layout, m_range, dense) for layout in found_in]
        best = min(choices, key=lambda choice: choice.seconds)
        if self._copies > 1 and not experts and m_range[0] != m_range[1]:
            for both in itertools.permutations(found_in, 2):
                found = self._among([c for c in able if c.layout in both], "+".join(both), m_range, dense)
                # Twice the memory must be worth it; the op is that of the layout which few rows are read from.
                if found.seconds * MARGIN < best.seconds and found.pieces[0].layout == both[0]:
                    best = found
        # A library's own kernel is taken over only where ours is faster. What Inductor makes of a dequantization must
        # be faster by a margin to be left alone, and by more than launches: packed, the weight takes less memory.
        theirs = meanings.seconds(fused, priced, device)
        if not fused and not packed and not experts:
            theirs = MARGIN * cost.inductor(dense.seconds, priced, device, apart) + LAUNCHES * device.launch
        if theirs is not None:
            own = self._among([Candidate(fused or "inductor", "", theirs)], "", m_range, dense)
            if own.seconds <= best.seconds:
                raise Refused(Reason.SLOWER, fused)
        return best

    def _among(
        self, candidates: Sequence[Candidate], layout: str, m_range: tuple[int, int | None], dense: Candidate
    ) -> Choice:
        pieces = cost.pieces(candidates, *m_range)
        seconds = cost.total(pieces, candidates, *m_range, self._workload)
        return Choice(seconds, layout, pieces, tuple(candidates), dense)


def _apart(recovered: Recovered) -> bool:
    """Whether the user's codes take a byte each, or more."""
    codes = max((t.nbytes for t in recovered.sources if not t.is_floating_point()), default=0)
    return codes >= len(recovered.formats) * recovered.n * recovered.k


@contextlib.contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Meanwhile torch uses so many threads on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _candidates(problem: Problem, formats: Sequence[Format], device: Device, layouts: Sequence[str]) -> list[Candidate]:
    """Each kernel in each of `layouts` that is its own, where it takes all `formats`."""
    return [
        Candidate(kernel.name, name, kernel.seconds(problem, name, device))
        for name in layouts
        if all(f.form in LAYOUTS[name].forms for f in formats)
        for kernel in registry.discover().values()
        if name in kernel.layouts
        and device.kind in kernel.devices
        and all(
            kernel.accepts(Call(name, f, problem.n, problem.k), problem.x_dtype, device.kind) is None for f in formats
        )
    ]


def _expert_candidates(problem: Problem, experts: int, device: Device) -> list[Candidate]:
    """Each kernel in each of its layouts that multiplies rows by weights of experts; problem.m are the rows of all."""
    return [
        Candidate(kernel.name, name, grouped.seconds(kernel, problem, experts, name, device))
        for kernel in registry.discover().values()
        for name in kernel.layouts
        if problem.format.form in LAYOUTS[name].forms
        and grouped.refusal(kernel, Call(name, problem.format, problem.n, problem.k), problem.x_dtype, device.kind)
        is None
    ]


def _rows(match: Match, x: Tensor) -> tuple[sympy.Expr, tuple[int, int | None]]:
    """m as an expression, and its bounds. Reads the shape environment; adds no guard to it."""
    from torch.utils._sympy.value_ranges import bound_sympy

    expression: Any = sympy.Integer(1)
    environment = None
    labels, wanted = match.roles.x_labels, match.roles.m
    if match.contraction.ids is not None:
        labels = wanted = match.contraction.chosen
        x = fake_value(match.contraction.ids)
    for label, size in zip(labels, x.shape, strict=True):
        if label in wanted:
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
