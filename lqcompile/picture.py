"""The picture of a bench: for each weight time against M, as predicted and as measured, with crossings and light."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import sympy
import torch

from . import cost, profile
from .device import Device
from .kernels import registry
from .kernels.layout import LAYOUTS
from .regret import Point
from .report import CURVE
from .types import Candidate, Format, Problem
from .viewer import PLOT, apart, asset, plot, templates

# Panels beside each other, of so many at the most; room for names at the right of each, and least steps between those.
ACROSS, MOST = 2, 12
NAMES, STEP = 150, 12
HEAD, GAP = 64, 30


def svg(points: Sequence[Point], device: torch.device) -> str:
    """One SVG image, with a panel for each of the first weights of `points`, which were measured on `device`."""
    weights: dict[tuple[int, int, str, str], list[Point]] = defaultdict(list)
    for point in points:
        weights[point.n, point.k, point.format, point.x_dtype].append(point)
    panels, facts = [], profile.of(device)
    for i, found in enumerate(list(weights.values())[:MOST]):
        drawn, first = plot(_curve(found, device, facts)), found[0]
        for line, label in zip(drawn["lines"], apart([line["end"] for line in drawn["lines"]], STEP), strict=True):
            line["label"] = label
        row, column = divmod(i, ACROSS)
        place = {"x": column * (PLOT[0] + NAMES), "y": HEAD + row * (PLOT[1] + GAP)}
        name = f"{first.n} x {first.k}  {first.format}  {first.x_dtype}"
        panels.append({**place, "name": name, "plot": drawn})
    left = len(weights) - len(panels)
    rest = f"; {left} more weights are not drawn" if left else ""
    rows = -(-len(panels) // ACROSS)
    return (
        templates()
        .get_template("picture.svg")
        .render(
            panels=panels,
            title=f"lq bench on {facts.name}{rest}",
            wide=max(min(len(panels), ACROSS) * (PLOT[0] + NAMES), 900),
            high=HEAD + rows * (PLOT[1] + GAP),
            css=asset("page.css"),
        )
    )


def _curve(found: Sequence[Point], device: torch.device, facts: Device) -> dict[str, Any]:
    """What `plot` draws of one weight: predictions at every M up to the largest that was measured."""
    first = found[0]
    format, m = Format.parse(first.format), sympy.Symbol("m", positive=True, integer=True)
    problem = Problem(m, (1, 1 << 31), first.n, first.k, format, getattr(torch, first.x_dtype), device)
    ways = list(dict.fromkeys(way for point in found for way in point.measured))
    candidates = [
        Candidate(name, layout, registry.discover()[name].seconds(problem, layout, facts)) for name, layout in ways
    ]
    most = max(2, *(point.m for point in found))
    ms = [at for at in CURVE if at < most] + [most]
    lines = [
        {
            "name": f"{c.kernel} ({c.layout})",
            "seconds": cost.sample(c.seconds, ms),
            "measured": [(p.m, p.measured[c.kernel, c.layout]) for p in found if (c.kernel, c.layout) in p.measured],
        }
        for c in candidates
    ]
    lines.append(
        {
            "name": "dense weight",
            "seconds": cost.sample(cost.dense(problem, facts), ms),
            "measured": [(p.m, p.dense) for p in found if p.dense],
        }
    )
    sizes = [LAYOUTS[layout].packed_bytes(format, first.n, first.k, device.type) for _, layout in ways]
    crossings = [piece.low for piece in cost.pieces(candidates, 1, most)[1:]]
    return {"m": ms, "lines": lines, "light": min(sizes) / facts.bandwidth, "crossings": crossings}
