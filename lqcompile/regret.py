"""What the cost model's choices cost: of each problem of a bench the time of what it chose over that of the best."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from . import cost, models, profile
from .device import Device
from .errors import ArgumentError
from .kernels import registry
from .results import Row
from .types import Format, Problem

Way = tuple[str, str]


@dataclass(frozen=True)
class Point:
    """One problem: seconds of each of our ways (kernel, layout), as predicted and as measured.

    dense   seconds of the vendor's matmul on a dense weight, None where not timed
    fitted  whether costs were fitted to it
    """

    n: int
    k: int
    m: int
    format: str
    x_dtype: str
    predicted: Mapping[Way, float]
    measured: Mapping[Way, float]
    dense: float | None = None
    fitted: bool = False

    @property
    def chosen(self) -> Way:
        """What is predicted to be the fastest."""
        return min(self.predicted, key=self.predicted.__getitem__)

    @property
    def best(self) -> Way:
        """What was the fastest."""
        return min(self.measured, key=self.measured.__getitem__)

    @property
    def problem(self) -> tuple[int, int, int, str, str]:
        """What tells it from other points of one device."""
        return self.n, self.k, self.m, self.format, self.x_dtype

    def regret(self, way: Way) -> float:
        """How many times longer than the best a way took."""
        return self.measured[way] / self.measured[self.best]

    def within(self, layout: str) -> Way | None:
        """What is predicted to be the fastest in one layout; None where that cannot hold the weight."""
        ways = [way for way in self.predicted if way[1] == layout]
        return min(ways, key=self.predicted.__getitem__) if ways else None


def points(rows: Iterable[Row], device: torch.device) -> list[Point]:
    """The problems of some rows that more than one of our ways was timed for; predictions for the real `device`."""
    timed: dict[tuple[int, int, int, str, str], dict[Way, float]] = defaultdict(dict)
    dense: dict[tuple[int, int, int, str, str], float | None] = {}
    for row in rows:
        asked = (row.n, row.k, row.m, row.format, row.x_dtype)
        if row.kind == "ours" and row.median:
            timed[asked][row.kernel, row.layout] = row.median
            dense[asked] = row.dense
    facts, found = profile.of(device), []
    for asked, measured in timed.items():
        n, k, m, format, x_dtype = asked
        if len(measured) > 1:
            problem = Problem(sympy.Integer(m), (m, m), n, k, Format.parse(format), getattr(torch, x_dtype), device)
            predicted = {way: seconds(problem, way, facts) for way in measured}
            found.append(Point(n, k, m, format, x_dtype, predicted, measured, dense[asked], models.fitted(problem)))
    return found


@functools.lru_cache(maxsize=256)
def seconds(problem: Problem, way: Way, facts: Device) -> float:
    """The predicted time of a problem whose m is a number."""
    kernel, layout = way
    return cost.sample(registry.discover()[kernel].seconds(problem, layout, facts), [0])[0]


def document(found: Sequence[Point]) -> dict[str, Any]:
    """Points and their summary as plain values; a way is "kernel/layout"."""

    def plain(point: Point) -> dict[str, Any]:
        ways = {
            name: {_joined(way): float(f"{s:.4g}") for way, s in getattr(point, name).items()}
            for name in ("predicted", "measured")
        }
        return {**dataclasses.asdict(dataclasses.replace(point, predicted={}, measured={})), **ways}

    return {"summary": summary(found), "points": [plain(point) for point in found]}


def read(document: Mapping[str, Any]) -> list[Point]:
    """The points of a document. Raises ArgumentError where they are none."""
    found = []
    for plain in document.get("points", ()):
        ways = {
            name: {tuple(way.split("/")): s for way, s in plain.get(name, {}).items()}
            for name in ("predicted", "measured")
        }
        try:
            found.append(Point(**{**plain, **ways}))
        except TypeError as error:
            raise ArgumentError("points", plain, ", ".join(f.name for f in dataclasses.fields(Point))) from error
    return found


def summary(found: Sequence[Point]) -> dict[str, Any]:
    """What the choices cost, over all points and over those that nothing was fitted to; policies beside it.

    always in  the fastest kernel, as predicted, of one layout alone
    always     one way alone; a dense weight: the vendor's matmul, which needs the memory of one
    error      of predicted seconds, relative to measured ones
    """
    new = [point for point in found if not point.fitted]
    layouts = sorted({layout for point in found for _, layout in point.measured})
    policies: dict[str, list[float]] = {}
    for layout in layouts:
        picks = [(point, point.within(layout)) for point in found]
        policies[f"always in {layout}"] = [point.regret(way) for point, way in picks if way is not None]
    for way in sorted({way for point in found for way in point.measured}):
        policies[f"always {_name(way)}"] = [point.regret(way) for point in found if way in point.measured]
    policies["a dense weight"] = [point.dense / point.measured[point.best] for point in found if point.dense]
    errors: dict[str, list[float]] = defaultdict(list)
    for point in found:
        for way, measured in point.measured.items():
            errors[_joined(way)].append(abs(point.predicted[way] / measured - 1))
    return {
        "chosen": _spread([point.regret(point.chosen) for point in found]),
        "chosen, not fitted": _spread([point.regret(point.chosen) for point in new]),
        "policies": {name: _spread(regrets) for name, regrets in policies.items() if regrets},
        "median error": statistics.median(e for every in errors.values() for e in every) if errors else None,
        "median error of the chosen": statistics.median(
            abs(p.predicted[p.chosen] / p.measured[p.chosen] - 1) for p in found
        )
        if found
        else None,
        "median errors": {name: statistics.median(every) for name, every in sorted(errors.items())},
    }


def report(found: Sequence[Point]) -> str:
    """The worst choices, then what all of them cost, beside always taking one way, and how far predictions are off."""
    if not found:
        return "regret: no problem that more than one of our kernels was timed for"
    choices, told = [point.regret(point.chosen) for point in found], summary(found)
    lines = [f"regret: {len(found)} problems, what was chosen over what was fastest"]
    for regret, point in sorted(zip(choices, found, strict=True), key=lambda pair: -pair[0])[:5]:
        if regret > 1.005:
            shown = f"{point.n}x{point.k} m={point.m} {point.format} {point.x_dtype}"
            lines.append(f"  {regret:5.2f}x  {shown}: {_name(point.chosen)}, {_name(point.best)} is faster")
    for name, spread in [(n, told[n]) for n in ("chosen", "chosen, not fitted")] + [*told["policies"].items()]:
        if spread:
            whole = "" if spread["points"] == len(found) else f" ({spread['points']} problems)"
            figures = f"mean {spread['mean']:.3f}  95 % {spread['95 %']:.2f}  worst {spread['worst']:.2f}"
            lines.append(f"  {name:<24}{figures}{whole}")
    lines.append(f"  predictions are off by {100 * told['median error']:.0f} % (median)")
    lines += [f"    {name:<22}{100 * off:.0f} %" for name, off in told["median errors"].items()]
    return "\n".join(lines)


def _name(way: Way) -> str:
    kernel, layout = way
    return f"{kernel} ({layout})"


def _joined(way: Way) -> str:
    return "/".join(way)


def _spread(regrets: Sequence[float]) -> dict[str, float]:
    """Empty for none."""
    ordered = sorted(regrets)
    if not ordered:
        return {}
    most = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"points": len(ordered), "mean": statistics.fmean(ordered), "95 %": most, "worst": ordered[-1]}
