"""`lq why` and `lq diff`, from the JSON of reports alone: one matmul from near, and what two reports differ in."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ArgumentError
from .report import SCHEMA
from .table import Line, brief, fit, wrap

Document = Mapping[str, Any]
MOST_LINES = 60


def read(path: str | Path) -> Document:
    """A report that `lq explain --json` wrote. Raises ArgumentError where it is none, OSError where there is none."""
    return parse(Path(path).read_bytes(), str(path))


def parse(data: bytes, name: str) -> Document:
    """A report from its JSON; `name` says in errors where it was. Raises ArgumentError where it is none."""
    try:
        found = json.loads(data)
        keys = {d["id"] for d in found["decisions"]}
        good = found["schema"] == SCHEMA and all(isinstance(key, str) for key in keys)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ArgumentError("report", name, f"JSON of schema {SCHEMA}, as lq explain --json writes it")
    return found


def find(document: Document, layer: str) -> Mapping[str, Any]:
    """The decision with the id `layer`, or the only one that contains it. Raises ArgumentError with near names."""
    ids = {d["id"]: d for d in document["decisions"]}
    if layer in ids:
        return ids[layer]
    inside = [id for id in ids if layer in id]
    if len(inside) == 1:
        return ids[inside[0]]
    near = (inside or difflib.get_close_matches(layer, ids, n=5, cutoff=0.3) or list(ids))[:5]
    raise ArgumentError("layer", layer, " | ".join(fit(name, 60) for name in near) or "none: the report is empty")


def why(document: Document, layer: str) -> Iterator[Line]:
    """Why one matmul was kept (or that it was rewritten): code, the weight's expression, the nearest rule, advice.

    Raises ArgumentError for a layer that the report does not have.
    """
    d = find(document, layer)
    rewritten = d["outcome"] == "rewritten"
    said = f"rewritten as {d['formula']}, proof: {d['proof']}" if rewritten else f"kept: {d['sentence']}"
    for line in wrap(f"{fit(d['id'], 70)}   {said}", "", "    "):
        yield "bold green" if rewritten else "bold yellow", line
    if d["file"]:
        yield "", fit(f"  {fit(d['file'], 60, keep_end=True)}:{d['line']}   {d.get('code', '')}", 100)
    steps = document["structures"][d["structure"]]["before"] if "structure" in d else []
    if steps:
        done, total = progress_of(steps)
        yield "", ""
        yield "", f"  the weight as the model computes it; {done} of {total} operations understood"
        yield from _tree(steps)
        stopped = next((s for s in steps if s.get("state") == "stopped"), None)
        if stopped is not None and not rewritten:
            yield "", ""
            place = f"   {fit(stopped['source'], 50, keep_end=True)}" if stopped.get("source") else ""
            yield "red", fit(f"  stopped at  {fit(brief(stopped['text']), 60)}{place}", 100)
            if stopped.get("code"):
                yield "dim", fit(f"              {stopped['code']}", 100)
    if rewritten:
        yield "", ""
        for piece in d["pieces"]:
            yield "", fit(f"  {piece['when']:<20} {_way(piece)}", 100)
        return
    rules = ", ".join(dict.fromkeys(m["rule"] for m in d["near_misses"] if m["rule"]))
    yield "", fit(f"  nearest rule  {rules or 'none: recognition ended before any rule was tried'}", 100)
    for line in wrap(f"what to change: {d['advice']}", "  ", "    "):
        yield "bold", line


def _way(piece: Mapping[str, Any]) -> str:
    return f"{piece['kernel']} ({piece['copy']} copy)" if piece.get("copy") else str(piece["kernel"])


def progress_of(steps: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many operations on the way to the matmul were understood, of how many there are, the matmul included."""
    ways = [s for s in steps if s["role"] in ("constant", "matmul") or s.get("state") == "stopped"]
    return sum(s.get("state") == "understood" for s in ways), len(ways)


def _tree(steps: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    """The matmul at the root, its operands below it; what stands twice is shown once."""
    root = next((i for i, s in enumerate(steps) if s["role"] == "matmul"), len(steps) - 1)
    shown: set[int] = set()
    rows = 0
    stack = [(root, "    ", "    ")]
    while stack:
        i, head, rest = stack.pop()
        step, state = steps[i], steps[i].get("state")
        again = i in shown and bool(step.get("inputs"))
        shown.add(i)
        rows += 1
        if rows > MOST_LINES:
            yield "dim", "    ..."
            return
        mark = {"stopped": "  <-- stopped here"}.get(state or "", "  (above)" if again else "")
        style = {"stopped": "bold red", "understood": "green"}.get(state or "", "dim")
        # Outputs of the passes that follow the matmul are no part of its weight.
        yield style, fit(f"{head}{fit(_name(step), 40)}  {step['value']}{mark}", 100)
        inputs = [] if again else list(dict.fromkeys(step.get("inputs", ())))
        for place in reversed(inputs):
            last = place == inputs[-1]
            stack.append((place, rest + ("`- " if last else "|- "), rest + ("   " if last else "|  ")))


def _name(step: Mapping[str, Any]) -> str:
    kind = {"weight": "  (parameter or buffer)", "input": "  (input)"}.get(step["role"], "")
    return fit(brief(str(step["text"])), 60) + kind


def diff(old: Document, new: Document) -> list[Line]:
    """What was decided otherwise in `new`; empty where every decision is the same."""
    before, after = ({d["id"]: _decided(d) for d in document["decisions"]} for document in (old, new))
    out: list[Line] = []
    for id in sorted({*before, *after}):
        if before.get(id) != after.get(id):
            out.append(("bold", fit(id, 100)))
            out += [("red", fit(f"  - {before[id]}", 100))] if id in before else []
            out += [("green", fit(f"  + {after[id]}", 100))] if id in after else []
    return out


def _decided(d: Mapping[str, Any]) -> str:
    if d["outcome"] != "rewritten":
        return f"kept: {d.get('reason')}"
    ranges = ", ".join(f"{_way(p)} for {p['when']}" for p in d["pieces"])
    return f"rewritten: {d['formula']} by {d['rule']}, {d['proof']}, {d['layout']}: {ranges}"
