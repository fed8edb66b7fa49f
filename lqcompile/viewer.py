"""A report as one HTML page that needs no other file, no server and no network. Made from the report's JSON alone.

Equal structures and curves are drawn once and shown by whichever matmul is chosen. Python draws, a few lines of
JavaScript choose: layers by networkx, SVG and HTML by jinja2, which escapes everything that comes from the model.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
import networkx

from .report import size
from .table import brief

Step = Mapping[str, Any]
# Of a box and of the gaps between boxes, in pixels.
WIDE, HIGH, ACROSS, DOWN = 168, 38, 14, 26
LETTERS = 22
# Of the plot of a curve, in pixels: the frame, and room for numbers at its left and below.
PLOT = (520, 300, 56, 30)
# Deeper paths end in one long name.
DEEPEST = 8
STYLES = 6


@dataclass
class Branch:
    """A module of the model: the modules in it, and its matmuls as (name, decision) pairs."""

    path: str
    branches: dict[str, Branch] = field(default_factory=dict)
    leaves: list[tuple[str, int]] = field(default_factory=list)
    total: int = 0
    rewritten: int = 0


def page(document: Mapping[str, Any]) -> str:
    """The HTML of a report. Raises nothing for any name: what cannot be shown in HTML is shown as U+FFFD."""
    script = asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    structures = [
        {"before": drawing(s["before"]), "after": drawing(s["after"]), "diff": difference(s)}
        for s in document["structures"]
    ]
    text = (
        templates()
        .get_template("page.html")
        .render(
            report=document,
            tree=tree(document["decisions"]),
            structures=structures,
            curves=[plot(curve) for curve in document["curves"]],
            css=asset("page.css"),
            script=script,
            digest=digest,
            data=_data(document),
            size=size,
        )
    )
    # Characters that no HTML may hold: controls, and halves of surrogate pairs.
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", text)


def asset(name: str) -> str:
    """The text of a file of the folder page."""
    return resources.files(__package__).joinpath("page", name).read_text(encoding="utf-8")


@functools.cache
def templates() -> jinja2.Environment:
    """What is in the folder page, as templates."""
    loader = jinja2.FunctionLoader(asset)
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _data(document: Mapping[str, Any]) -> str:
    """What the script reads, as JSON that no name can end early."""
    kept = {name: document[name] for name in ("decisions", "passes", "totals")}
    text = json.dumps(kept, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def tree(decisions: Sequence[Mapping[str, Any]]) -> Branch:
    """The decisions by module path."""
    root = Branch("")
    parts = [d["id"].split(".", DEEPEST) for d in decisions]
    modules_of = {tuple(found[:i]) for found in parts for i in range(1, len(found))}
    for i, (d, found) in enumerate(zip(decisions, parts, strict=True)):
        *modules, name = found
        own, _, count = name.partition("#")
        if (*modules, own) in modules_of:
            # A matmul of a module that has modules of its own stands in it, by what it calls.
            modules, name = [*modules, own], f"{d['op']}#{count}" if count else d["op"]
        branch = root
        for part in [None, *modules]:
            if part is not None:
                path = f"{branch.path}.{part}" if branch.path else part
                branch = branch.branches.setdefault(part, Branch(path))
            branch.total += 1
            branch.rewritten += d["outcome"] == "rewritten"
        branch.leaves.append((name, i))
    return root


def drawing(steps: Sequence[Step]) -> dict[str, Any]:
    """Boxes and lines of the graph of `steps`, each box as low as what reads it allows; sizes in pixels."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(steps)))
    graph.add_edges_from((source, i) for i, step in enumerate(steps) for source in step.get("inputs", ()))
    rows = [sorted(row) for row in networkx.topological_generations(graph.reverse())][::-1]
    centre: dict[int, float] = {}
    for row in rows[::-1]:
        # Above the middle of what reads it; the wish of a box gives way to that of the box at its left.
        wish = {i: _mean([centre[r] for r in graph.successors(i)], float(i)) for i in row}
        edge = -math.inf
        for i in sorted(row, key=lambda i: (wish[i], i)):
            centre[i] = max(wish[i] if graph.out_degree(i) else 0.0, edge + WIDE + ACROSS)
            edge = centre[i]
        # What was pushed to the right comes back by half: a row stands in the middle above its readers.
        back = _mean([centre[i] - wish[i] for i in row if graph.out_degree(i)], 0.0)
        centre |= {i: centre[i] - back for i in row}
    left = min(centre.values(), default=0.0) - WIDE / 2
    level = {i: y for y, row in enumerate(rows) for i in row}
    boxes: list[dict[str, Any]] = [
        {
            "x": round(centre[i] - WIDE / 2 - left) + 2,
            "y": level[i] * (HIGH + DOWN) + 2,
            "op": _short(step["text"]),
            "value": _short(step["value"]),
            "title": f"{step['text']}  {step['value']}  {step.get('source', '')}".strip(),
            "kind": f"{step['role']} {step.get('state', '')}".strip(),
        }
        for i, step in enumerate(steps)
    ]
    lines = [_line(boxes[a], boxes[b]) for a, b in graph.edges]
    return {
        "boxes": boxes,
        "lines": lines,
        "width": max((b["x"] for b in boxes), default=0) + WIDE + 2,
        "height": len(rows) * (HIGH + DOWN) - DOWN + 4,
        "steps": [{"state": "", "source": "", "code": "", **step} for step in steps],
    }


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _line(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    x0, y0, x1, y1 = a["x"] + WIDE // 2, a["y"] + HIGH, b["x"] + WIDE // 2, b["y"]
    return f"M{x0} {y0}C{x0} {y0 + DOWN // 2 + 4} {x1} {y1 - DOWN // 2 - 4} {x1} {y1}"


def _short(text: str) -> str:
    text = brief(text)
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 2]}.."


def difference(structure: Mapping[str, Sequence[Step]]) -> list[tuple[str, str]]:
    """What lowering took out (-), put in (+) and left, as (sign, line) pairs; empty where nothing changed."""
    before, after = structure["before"], structure["after"]
    if not after:
        return []
    lines = [("-" if s.get("gone") else " ", f"%{i} = {s['text']}  {s['value']}") for i, s in enumerate(before)]
    new = ("packed", "matmul")
    fresh = [(i, s) for i, s in enumerate(after) if s["role"] in new or s.get("state") == "understood"]
    return lines + [("+", f"%{i}' = {_primed(s['text'])}  {s['value']}") for i, s in fresh]


def _primed(text: str) -> str:
    return re.sub(r"(%\d+)", r"\1'", text)


class Axes:
    """Two logarithmic axes: where, in pixels, a pair of positive numbers stands.

    wide, high   pixels of the least and of the greatest x; of the whole decades below and above all of `ys`
    xs           the least and the greatest x
    """

    def __init__(
        self, wide: tuple[float, float], high: tuple[float, float], xs: tuple[float, float], ys: Sequence[float]
    ) -> None:
        self._wide, self._high, self._xs = wide, high, xs
        low = math.floor(math.log10(min(ys)))
        self._decades = low, max(math.ceil(math.log10(max(ys))), low + 1)

    @property
    def decades(self) -> list[float]:
        """The powers of ten on the upright axis."""
        return [10.0**e for e in range(self._decades[0], self._decades[1] + 1)]

    def x(self, value: float) -> float:
        (first, last), (start, end) = self._xs, self._wide
        return round(start + math.log(value / first) / (math.log(last / first) or 1.0) * (end - start), 1)

    def y(self, value: float) -> float:
        (low, high), (start, end) = self._decades, self._high
        return round(start + (math.log10(max(value, 10.0**low)) - low) / (high - low) * (end - start), 1)


def apart(places: Sequence[float], step: float) -> list[float]:
    """Places of names, in their order, each moved down until it is a step below the one above it."""
    found = list(places)
    at = -math.inf
    for i in sorted(range(len(found)), key=found.__getitem__):
        at = found[i] = max(found[i], at + step)
    return found


def plot(curve: Mapping[str, Any]) -> dict[str, Any]:
    """Time against M on logarithmic axes: a line for each kernel and the dense weight, light, and the crossings.

    What was measured is dots.
    """
    ms, lines, light = curve["m"], curve["lines"], curve["light"]
    every = [s for line in lines for s in line["seconds"] if s > 0] + [light] * (light > 0)
    every += [s for line in lines for _, s in line.get("measured", ())]
    width, height, left, below = PLOT
    axes = Axes((left, width - 10), (height - below, 10), (1, max(ms[-1], 2)), every or [1e-6, 1e-5])
    x, y = axes.x, axes.y
    drawn = [
        {
            "name": line["name"],
            "style": "dense" if line["name"] == "dense weight" else f"k{i % STYLES}",
            "points": " ".join(f"{x(m)},{y(s)}" for m, s in zip(ms, line["seconds"], strict=True)),
            "end": y(line["seconds"][-1]),
            "dots": [{"x": x(m), "y": y(s)} for m, s in line.get("measured", ())],
        }
        for i, line in enumerate(lines)
    ]
    shown = [i for i, m in enumerate(ms) if m in (1, 2, 4, 8, 16, 64, 512, 4096)]
    return {
        "width": width,
        "height": height,
        "left": left,
        "bottom": height - below,
        "lines": drawn,
        "light": y(light) if light > 0 else None,
        "crossings": [{"m": m, "x": x(m)} for m in curve["crossings"] if m <= ms[-1]],
        "xs": [{"x": x(m), "text": str(m)} for m in (1, 8, 64, 512, 4096) if m <= ms[-1]],
        "ys": [{"y": y(value), "text": _seconds(value)} for value in axes.decades],
        "rows": [[str(ms[i]), *(_seconds(line["seconds"][i]) for line in lines)] for i in shown],
        "light_text": _seconds(light),
    }


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
