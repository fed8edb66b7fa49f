"""What the cost model's choices cost: of each problem of a bench the time of what it chose over that of the best."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from . import cost, profile
from .device import Device
from .kernels import registry
from .results import Row
from .types import Format, Problem

Way = tuple[str, str]


@dataclass(frozen=True)
class Point:
    """One problem: seconds of each of our ways (kernel, layout), as predicted and as measured."""

    n: int
    k: int
    m: int
    format: str
    x_dtype: str
    predicted: Mapping[Way, float]
    measured: Mapping[Way, float]

    @property
    def chosen(self) -> Way:
        """What is predicted to be the fastest."""
        return min(self.predicted, key=self.predicted.__getitem__)

    @property
    def best(self) -> Way:
        """What was the fastest."""
        return min(self.measured, key=self.measured.__getitem__)

    def regret(self, way: Way) -> float:
        """How many times longer than the best a way took."""
        return self.measured[way] / self.measured[self.best]


def points(rows: Sequence[Row], device: torch.device) -> list[Point]:
    """The problems of some rows that more than one of our ways was timed for; predictions for the real `device`."""
    timed: dict[tuple[int, int, int, str, str], dict[Way, float]] = defaultdict(dict)
    for row in rows:
        if row.kind == "ours" and row.median:
            timed[row.n, row.k, row.m, row.format, row.x_dtype][row.kernel, row.layout] = row.median
    facts, found = profile.of(device), []
    for (n, k, m, format, x_dtype), measured in timed.items():
        if len(measured) > 1:
            problem = Problem(sympy.Integer(m), (m, m), n, k, Format.parse(format), getattr(torch, x_dtype), device)
            predicted = {way: _predicted(problem, way, facts) for way in measured}
            found.append(Point(n, k, m, format, x_dtype, predicted, measured))
    return found


def _predicted(problem: Problem, way: Way, facts: Device) -> float:
    kernel, layout = way
    return cost.sample(registry.discover()[kernel].seconds(problem, layout, facts), [0])[0]


def report(found: Sequence[Point]) -> str:
    """The worst choices, then what all of them cost, beside always taking one way, and how far predictions are off."""
    if not found:
        return "regret: no problem that more than one of our kernels was timed for"
    choices = [point.regret(point.chosen) for point in found]
    lines = [f"regret: {len(found)} problems, what was chosen over what was fastest"]
    for regret, point in sorted(zip(choices, found, strict=True), key=lambda pair: -pair[0])[:5]:
        if regret > 1.005:
            shown = f"{point.n}x{point.k} m={point.m} {point.format} {point.x_dtype}"
            lines.append(f"  {regret:5.2f}x  {shown}: {_name(point.chosen)}, {_name(point.best)} is faster")
    lines.append(f"  {'chosen':<24}{_spread(choices)}")
    for way in sorted({way for point in found for way in point.measured}):
        able = [point for point in found if way in point.measured]
        whole = "" if len(able) == len(found) else f" ({len(able)} problems)"
        lines.append(f"  {'always ' + _name(way):<24}{_spread([point.regret(way) for point in able])}{whole}")
    off = [abs(p.predicted[way] / p.measured[way] - 1) for p in found for way in p.measured]
    lines.append(f"  predictions are off by {100 * statistics.median(off):.0f} % (median)")
    return "\n".join(lines)


def _name(way: Way) -> str:
    kernel, layout = way
    return f"{kernel} ({layout})"


def _spread(regrets: Sequence[float]) -> str:
    ordered = sorted(regrets)
    most = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"mean {statistics.fmean(ordered):.3f}  95 % {most:.2f}  worst {ordered[-1]:.2f}"
