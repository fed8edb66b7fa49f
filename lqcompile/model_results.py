"""The results of `lq bench --model`: a row for each way at each point; as text, JSON, README's table and picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import ArgumentError
from .report import size
from .results import objects
from .table import Line
from .timing import Samples
from .viewer import Axes, apart, templates

SCHEMA = 1
PHASES = ("decode", "prefill", "generate", "layer")
VERDICTS = ("ok", "WRONG", "FAILED", "skipped")
HEADINGS = (
    "phase",
    "batch",
    "way",
    "tokens/s",
    "spread",
    "ms",
    "light",
    "weights",
    "memory",
    "compile",
    "error",
    "same",
)
WIDTHS = (8, 5, 9, 10, 6, 9, 6, 9, 9, 8, 14, 6)
# Of the picture, in pixels: the frame, room at the left for numbers and at the right for names.
PICTURE = (640, 360, 60, 110)
# Least pixels between two names.
STEP = 16


@dataclass(frozen=True)
class Row:
    """One way at one point: `tokens` tokens of each of `batch` sequences in a call, 1 in a step of decoding.

    "decode" and "prefill" are a model of ours, "layer" one layer of it, "generate" is one of transformers through
    `generate`.

    seconds          of a call, the median, with `least` and `most`, over `samples` samples; None where not timed
    compile_seconds  of the first call, with an empty Inductor cache; pass_seconds: of those, our passes' own
    weight_bytes     that every call reads, as the way holds them; light: seconds in which they can be read
    memory_bytes     of the GPU, at most, from the model's tensors to the last checked call; None on a CPU
    error            relative, of the logits of the worst sequence, against float32; allowed: what is still right
    same             greedy tokens equal to eager's, of `checked`
    rewritten        quantized layers that "lq" rewrote, or that were packed, of `quantized`; None for other ways
    """

    way: str
    phase: str
    batch: int
    tokens: int
    verdict: str
    note: str = ""
    seconds: float | None = None
    least: float | None = None
    most: float | None = None
    samples: int = 0
    compile_seconds: float | None = None
    pass_seconds: float | None = None
    weight_bytes: int | None = None
    memory_bytes: int | None = None
    light: float | None = None
    error: float | None = None
    allowed: float | None = None
    same: int = 0
    checked: int = 0
    rewritten: int | None = None
    quantized: int | None = None

    @property
    def bad(self) -> bool:
        """Whether a run must not end well with it: another way may fail where ours may not."""
        return self.verdict == "WRONG" or (self.way, self.verdict) == ("lq", "FAILED")

    def timed(self, s: Samples) -> Row:
        """The row with its times."""
        return replace(self, seconds=s.median, least=s.least, most=s.most, samples=s.count)

    @property
    def throughput(self) -> float | None:
        """Tokens a second, of all sequences together."""
        return self.batch * self.tokens / self.seconds if self.seconds else None

    @property
    def share(self) -> float | None:
        """Of the speed of light: 1 where nothing but reading the weights takes time."""
        return self.light / self.seconds if self.light and self.seconds else None


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """The rows of a results document. Raises ArgumentError where it is not one of this schema."""
    if (document.get("kind"), document.get("schema")) != ("model", SCHEMA):
        raise ArgumentError("schema", (document.get("kind"), document.get("schema")), f"('model', {SCHEMA})")
    found = objects(document, Row)
    for row in found:
        if row.phase not in PHASES or row.verdict not in VERDICTS:
            raise ArgumentError("row", (row.phase, row.verdict), f"{' | '.join(PHASES)}; {' | '.join(VERDICTS)}")
    return found


def table(document: Mapping[str, Any]) -> str:
    """Tokens a second of each way at each point of a results document, and the ratio of lq to it, as Markdown.

    Raises ArgumentError for another schema.
    """
    rows = rows_of(document)
    ways = list(dict.fromkeys(row.way for row in rows))
    points = dict.fromkeys((row.phase, row.batch, row.tokens) for row in rows)
    found = {(row.way, row.phase, row.batch, row.tokens): row.throughput for row in rows}
    lines = ["| tokens/s | " + " | ".join(ways) + " |", "|" + "---|" * (1 + len(ways))]
    for phase, batch, tokens in points:
        ours = found.get(("lq", phase, batch, tokens))
        cells = []
        for way in ways:
            theirs = found.get((way, phase, batch, tokens))
            ratio = f" ({ours / theirs:.2f}x)" if ours and theirs and way != "lq" else ""
            cells.append(f"{theirs:,.0f}{ratio}" if theirs else "-")
        lines.append(f"| {named(phase, batch, tokens)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def named(phase: str, batch: int, tokens: int) -> str:
    """A point in words."""
    return f"prompt of {tokens}" if phase == "prefill" else f"{phase}, batch {batch}"


def heading() -> Line:
    """The names of the columns of `line`."""
    return "dim", _aligned(HEADINGS)


def line(row: Row) -> Line:
    """A row as text; the error stands beside what is allowed, `same` counts greedy tokens equal to eager's."""
    shown = [row.phase, str(row.batch), row.way, row.verdict, *("-" for _ in HEADINGS[4:])]
    if row.seconds and row.throughput and row.least is not None and row.most is not None:
        shown[3:6] = (
            f"{row.throughput:,.1f}",
            f"{100 * (row.most - row.least) / row.seconds:.0f}%",
            f"{1e3 * row.seconds:.3f}",
        )
    for place, value in (
        (6, None if row.share is None else f"{100 * row.share:.0f}%"),
        (7, None if row.weight_bytes is None else size(row.weight_bytes)),
        (8, None if row.memory_bytes is None else size(row.memory_bytes)),
        (9, None if row.compile_seconds is None else f"{row.compile_seconds:.1f} s"),
        (10, None if row.error is None or row.allowed is None else f"{row.error:.4f}/{row.allowed:.4f}"),
        (11, f"{row.same}/{row.checked}" if row.checked else None),
    ):
        shown[place] = value or "-"
    style = {"ok": "bold" if row.way == "lq" else "", "skipped": "dim"}.get(row.verdict, "bold red")
    return style, _aligned(shown) + (f"  {row.note}" if row.note else "")


def _aligned(cells: Sequence[str]) -> str:
    left = (0, 2)
    both = enumerate(zip(cells, WIDTHS, strict=True))
    return "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in both).rstrip()


def written(path: Path | None, document: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The document with its rows, which a file at `path`, where one is asked for, holds then."""
    whole = {**document, "rows": [asdict(row) for row in rows]}
    if path is not None:
        path.write_text(json.dumps(whole, indent=1) + "\n")
    return whole


def summary(rows: Sequence[Row]) -> list[Line]:
    """For each point, how lq compares with every other way that was timed."""
    lines: list[Line] = []
    for ours in (row for row in rows if row.way == "lq" and row.seconds):
        others = [
            f"{row.seconds / ours.seconds:.2f}x {row.way}"
            for row in rows
            if row.seconds and ours.seconds and row.way != "lq"
            if (row.phase, row.batch, row.tokens) == (ours.phase, ours.batch, ours.tokens)
        ]
        if others:
            lines.append(("bold", f"{named(ours.phase, ours.batch, ours.tokens)}: lq is {', '.join(others)}"))
    return lines


def extrapolated(one: Sequence[Row], some: Sequence[Row], layers: int, whole: int) -> list[dict[str, Any]]:
    """Seconds of `whole` layers where 1 and `layers` were timed: every further layer takes as long as those between.

    Plain values and no rows, so that they are not taken for measurements.
    """
    short = {(row.way, row.phase, row.batch, row.tokens): row.seconds for row in one}
    found = []
    for row in some:
        first = short.get((row.way, row.phase, row.batch, row.tokens))
        if first and row.seconds:
            seconds = first + (whole - 1) * (row.seconds - first) / (layers - 1)
            point = {"way": row.way, "phase": row.phase, "batch": row.batch, "tokens": row.tokens}
            found.append({**point, "from_layers": [1, layers], "layers": whole, "seconds": seconds})
    return found


def told(found: Sequence[Mapping[str, Any]]) -> list[Line]:
    """What was extrapolated, in words that say so."""
    lines: list[Line] = []
    for e in found:
        low, high = e["from_layers"]
        rate = f"{e['batch'] * e['tokens'] / e['seconds']:,.1f} tokens/s, {1e3 * e['seconds']:.3f} ms"
        point = f"{e['way']}, {named(e['phase'], e['batch'], e['tokens'])}"
        lines.append(("yellow", f"EXTRAPOLATED from {low} and {high} layers to {e['layers']}, {point}: {rate}"))
    return lines


def picture(document: Mapping[str, Any]) -> str:
    """Tokens a second against batch, a line for each way, on logarithmic axes, as SVG.

    Raises ArgumentError for another schema.
    """
    rows = [row for row in rows_of(document) if row.phase == "decode" and row.throughput]
    ways: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row.batch):
        ways.setdefault(row.way, []).append((row.batch, row.throughput or 0.0))
    width, height, left, right = PICTURE
    batches = sorted({row.batch for row in rows}) or [1]
    every = [tokens for line in ways.values() for _, tokens in line] or [1.0]
    axes = Axes((left, width - right), (height - 40, 20), (batches[0], batches[-1]), every)
    names = sorted(ways, key=lambda way: ways[way][-1][1])
    places = apart([axes.y(ways[way][-1][1]) for way in names], STEP)
    return (
        templates()
        .get_template("throughput.svg")
        .render(
            title=f"{document['model']}: tokens a second against batch",
            width=width,
            height=height,
            left=left,
            right=width - right,
            bottom=height - 40,
            xs=[{"x": axes.x(batch), "text": str(batch)} for batch in batches],
            ys=[{"y": axes.y(v), "text": f"{v:,.0f}" if v >= 1 else f"{v:g}"} for v in axes.decades],
            lines=[
                {
                    "way": way,
                    "points": [{"x": axes.x(batch), "y": axes.y(tokens)} for batch, tokens in ways[way]],
                    "label": place,
                }
                for way, place in zip(names, places, strict=True)
            ],
        )
    )
