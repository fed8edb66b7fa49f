"""What was decided, printed: the Decisions of one compile as text for a reader and as JSON for a program."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from .errors import Reason
from .types import Decision, Piece

SCHEMA = 1
WIDTH = 100
# Without these alone a model holds no quantized weight that was missed.
UNQUANTIZED = frozenset({Reason.NOT_QUANTIZED, Reason.INPUT_WEIGHT})
TOP = "(top level)"


@dataclass(frozen=True)
class PassRecord:
    """One pass over one graph, or over several when merged: seconds taken, nodes changed."""

    name: str
    seconds: float
    changed: int


@dataclass(frozen=True)
class Report:
    """Every decision of one compile. The order of the decisions changes neither text nor JSON.

    device     facts of the device that was planned for; `name` is printed
    decisions  one for each matmul of the graphs
    warnings   sentences for the user, such as a pass that was rolled back
    """

    device: Mapping[str, Any]
    decisions: tuple[Decision, ...]
    passes: tuple[PassRecord, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def rewritten(self) -> int:
        """How many matmuls run on a packed weight."""
        return sum(d.outcome == "rewritten" for d in self.decisions)

    @property
    def kept(self) -> int:
        """How many matmuls were left to Inductor."""
        return len(self.decisions) - self.rewritten

    @property
    def bytes_before(self) -> int:
        """Bytes of the rewritten weights as they were."""
        return sum(d.bytes_before for d in self.decisions if d.outcome == "rewritten")

    @property
    def bytes_after(self) -> int:
        """Bytes of the rewritten weights as they are packed."""
        return sum(d.bytes_after for d in self.decisions if d.outcome == "rewritten")

    @staticmethod
    def merged(reports: Iterable[Report]) -> Report:
        """One report of several graphs: decisions together, passes summed by name, each warning once."""
        parts = list(reports)
        if not parts:
            return Report({}, ())
        passes: dict[str, PassRecord] = {}
        for p in (p for r in parts for p in r.passes):
            before = passes.get(p.name, PassRecord(p.name, 0.0, 0))
            passes[p.name] = PassRecord(p.name, before.seconds + p.seconds, before.changed + p.changed)
        return Report(
            parts[0].device,
            tuple(d for r in parts for d in r.decisions),
            tuple(passes.values()),
            tuple(dict.fromkeys(w for r in parts for w in r.warnings)),
        )

    def json(self) -> str:
        """Schema 1 as one JSON document: ASCII, decisions sorted by module path, no time of day."""
        document = {
            "schema": SCHEMA,
            "lqcompile": version("lqcompile"),
            "torch": version("torch"),
            "device": dict(self.device),
            "totals": {
                "matmuls": len(self.decisions),
                "rewritten": self.rewritten,
                "kept": self.kept,
                "bytes_before": self.bytes_before,
                "bytes_after": self.bytes_after,
            },
            "decisions": [_decision_json(id, d) for id, d in _with_ids(self.decisions)],
            "passes": [{"name": p.name, "ms": round(1e3 * p.seconds, 3), "changed": p.changed} for p in self.passes],
            "warnings": list(self.warnings),
        }
        return json.dumps(document, indent=1, default=str)

    def text(self) -> str:
        """The report for a reader: verdict first, at most 100 columns, without colour."""
        name = str(self.device.get("name", "unknown device"))
        head = f"lqcompile {version('lqcompile')}   {_fit(name, 50)}   torch {version('torch')}"
        lines = [_fit(head, WIDTH), "", f"  {self.verdict()}"]
        lines += self._rewritten_lines()
        lines += self._kept_lines()
        if self.passes:
            each = ", ".join(f"{_fit(p.name, 30)} {p.seconds:.2f}" for p in self.passes)
            total = sum(p.seconds for p in self.passes)
            lines += ["", *_wrap(f"passes {total:.2f} s: {each}", "  ", "    ")]
        if self.warnings:
            lines += ["", *(line for w in self.warnings for line in _wrap(f"warning: {w}", "  ", "    "))]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def verdict(self) -> str:
        """The first line that matters, in one sentence."""
        total = len(self.decisions)
        if not total:
            return "no matmul was compiled, so there was nothing to rewrite"
        if all(d.reason in UNQUANTIZED for d in self.decisions):
            return f"nothing is quantized: no weight of {total} matmuls is, so Inductor compiled them all"
        counts = f"{self.rewritten} of {total} matmuls rewritten"
        if not self.rewritten:
            return counts
        return f"{counts}      weights {size(self.bytes_before)} -> {size(self.bytes_after)}"

    def _rewritten_lines(self) -> list[str]:
        rows = Counter(
            (_pattern(d.where.path), str(d.format), _kernels(d.pieces))
            for d in self.decisions
            if d.outcome == "rewritten"
        )
        if not rows:
            return []
        table = [("layer", "format", "kernel")]
        table += [(_counted(path, n, 46), format, run) for (path, format, run), n in sorted(rows.items())]
        layer, middle = (max(len(row[i]) for row in table) for i in (0, 1))
        lines = [""]
        for path, format, kernels in table:
            start = f"  {path:<{layer}}  {format:<{middle}}  "
            lines += _wrap(kernels, start, " " * len(start))
        return lines

    def _kept_lines(self) -> list[str]:
        groups: dict[Reason | None, Counter[tuple[str, str, str]]] = defaultdict(Counter)
        for d in self.decisions:
            if d.outcome != "rewritten":
                nearest = "; ".join(f"{m.rule} stopped at {m.at}: {m.reason.sentence}" for m in d.near_misses)
                source = f"{d.where.file}:{d.where.line}" if d.where.file else ""
                groups[d.reason][_pattern(d.where.path), source, nearest] += 1
        lines = ["", f"  {self.kept} kept"] if groups else []
        for reason, rows in sorted(groups.items(), key=lambda g: (-g[1].total(), g[0].name if g[0] else "")):
            sentence, advice = reason.value if reason else ("no reason was recorded", "please report this")
            lines += _wrap(sentence, f"  {rows.total():>5}  ", " " * 9)
            lines += _wrap(advice, " " * 9, " " * 9)
            layer = max(len(_counted(path, n, 44)) for (path, _, _), n in rows.items())
            for (path, source, nearest), n in sorted(rows.items()):
                shown = f"{_counted(path, n, 44):<{layer}}  {_fit(source, 40, keep_end=True)}"
                lines.append(f"{'':11}{shown}".rstrip())
                lines += _wrap(f"nearest: {_fit(nearest, 300)}", " " * 13, " " * 15) if nearest else []
        return lines


def _with_ids(decisions: Iterable[Decision]) -> Iterator[tuple[str, Decision]]:
    """Each decision with its id: the module path, then path#2, path#3 where a path has several. Sorted."""

    def order(d: Decision) -> tuple[str, ...]:
        w = d.where
        return (w.path or TOP, w.file, f"{w.line:09}", w.op, str(sorted(map(str, d.problem.items()))), str(d))

    taken: set[str] = set()
    for d in sorted(decisions, key=order):
        path = d.where.path or TOP
        id, count = path, 1
        while id in taken:
            count += 1
            id = f"{path}#{count}"
        taken.add(id)
        yield id, d


def _decision_json(id: str, d: Decision) -> dict[str, Any]:
    out: dict[str, Any] = {
        "id": id,
        "file": d.where.file,
        "line": d.where.line,
        "op": d.where.op,
        "outcome": d.outcome,
        "problem": dict(d.problem),
    }
    if d.format is not None:
        f = d.format
        out["format"] = {name: getattr(f, name) for name in ("form", "bits", "group", "zero", "scale_dtype")}
    if d.outcome == "rewritten":
        out |= {"rule": d.rule, "proof": d.proof, "layout": d.layout}
        out |= {"bytes_before": d.bytes_before, "bytes_after": d.bytes_after}
        out["pieces"] = [
            {
                "when": _range(p),
                "low": p.low,
                "high": p.high,
                "kernel": p.kernel,
                "seconds": p.seconds if math.isfinite(p.seconds) else None,
            }
            for p in d.pieces
        ]
    if d.reason is not None:
        out |= {"reason": d.reason.name.lower(), "advice": d.reason.advice}
    out["near_misses"] = [{"rule": m.rule, "reason": m.reason.name.lower(), "at": m.at} for m in d.near_misses]
    return out


def _pattern(path: str) -> str:
    return re.sub(r"\b\d+\b", "*", path or TOP)


def _counted(path: str, count: int, width: int) -> str:
    return _fit(path, width) + (f" ({count})" if count > 1 else "")


def _range(p: Piece) -> str:
    if p.high is None:
        return f"M >= {p.low}" if p.low > 1 else "any M"
    if p.low == p.high:
        return f"M = {p.low}"
    return f"{p.low} <= M <= {p.high}" if p.low > 1 else f"M <= {p.high}"


def _kernels(pieces: tuple[Piece, ...]) -> str:
    if len(pieces) == 1:
        return _fit(pieces[0].kernel, 30)
    return ", ".join(f"{_fit(p.kernel, 30)} for {_range(p)}" for p in pieces)


def size(count: int) -> str:
    """A number of bytes in words, with decimal units: 42.5 MB."""
    power = min(len(str(count)) - 1, 14) // 3
    return f"{count} B" if not power else f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _fit(text: str, width: int, keep_end: bool = False) -> str:
    """`text` in at most `width` printable characters, cut in the middle or, to keep its end, in front."""
    # A long name is cut first, at a length that escaping cannot bring below `width`.
    if len(text) > 4 * width:
        text = text[-2 * width :] if keep_end else text[: 2 * width] + text[-2 * width :]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= width:
        return text
    front = 0 if keep_end else (width - 3) // 2
    return f"{text[:front]}...{text[len(text) - (width - 3 - front) :]}"


def _wrap(text: str, first: str, rest: str) -> list[str]:
    clean = _fit(text, 2000)
    return textwrap.wrap(clean, WIDTH, initial_indent=first, subsequent_indent=rest) or [first.rstrip()]
