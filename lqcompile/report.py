"""What was decided, as a value: the Decisions of one compile, as text (table), JSON (here) and HTML (viewer)."""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import cost
from .device import measured
from .errors import Reason
from .types import Decision, Piece, Step

SCHEMA = 1
# Without these alone a model holds no quantized weight that was missed.
UNQUANTIZED = frozenset({Reason.NOT_QUANTIZED, Reason.INPUT_WEIGHT})
# Nobody needs to do anything about these.
SETTLED = UNQUANTIZED | {Reason.PACKED}
TOP = "(top level)"
# Predicted speed-ups below this are told: the cost model is not sure of the last few percent.
SLOW = 0.95
# Rows of x at which curves are drawn: half powers of two.
CURVE = tuple(sorted({round(2 ** (i / 2)) for i in range(27)}))


@dataclass(frozen=True)
class PassRecord:
    """One pass over one graph, or over several when merged: seconds taken, nodes changed."""

    name: str
    seconds: float
    changed: int


@dataclass(frozen=True)
class Report:
    """Every decision of one compile. The order of the decisions changes neither text nor JSON.

    device     facts of the device that was planned for; `name` is printed, `real` is False for one that is not here
    decisions  one for each matmul of the graphs
    warnings   sentences for the user, such as a pass that was rolled back
    breaks     where Dynamo cut the model into several graphs, and why
    """

    device: Mapping[str, Any]
    decisions: tuple[Decision, ...]
    passes: tuple[PassRecord, ...] = ()
    warnings: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()

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

    @property
    def refuted(self) -> int:
        """How many kept matmuls failed a proof or a verification: Exit.PROOF_FAILED of `lq explain`."""
        return sum(d.reason in (Reason.PROOF_FAILED, Reason.PASS_FAILED) for d in self.decisions)

    @property
    def quantized(self) -> int:
        """How many matmuls have a weight that is quantized, or that may be: all but those of UNQUANTIZED."""
        return sum(d.reason not in UNQUANTIZED for d in self.decisions)

    @property
    def packed(self) -> int:
        """How many kept matmuls run on a weight that was packed before: there was nothing to rewrite."""
        return sum(d.reason is Reason.PACKED for d in self.decisions)

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
            tuple(dict.fromkeys(b for r in parts for b in r.breaks)),
        )

    def document(self) -> dict[str, Any]:
        """Schema 1 as plain values: decisions sorted by module path, no time of day.

        Equal surroundings and curves stand once, in `structures` and `curves`; decisions name them by place.
        """
        structures, curves = _Once(), _Once()
        decisions = [_decision(id, d, self.device, structures, curves) for id, d in with_ids(self.decisions)]
        found = predicted(self.decisions)
        return {
            "schema": SCHEMA,
            "lqcompile": version("lqcompile"),
            "torch": version("torch"),
            "device": dict(self.device),
            "verdict": self.verdict(),
            "next": self.next_step(),
            "totals": {
                "matmuls": len(self.decisions),
                "rewritten": self.rewritten,
                "kept": self.kept,
                "bytes_before": self.bytes_before,
                "bytes_after": self.bytes_after,
                "predicted_speedup": None if found is None else _short(found[1]),
            },
            "decisions": decisions,
            "structures": structures.values,
            "curves": curves.values,
            "passes": [{"name": p.name, "ms": round(1e3 * p.seconds, 3), "changed": p.changed} for p in self.passes],
            "warnings": list(self.warnings),
            "graph_breaks": list(self.breaks),
        }

    def json(self) -> str:
        """`document` as text: ASCII, one JSON object."""
        return json.dumps(self.document(), indent=1, default=str)

    def text(self) -> str:
        """The report for a reader: verdict first, at most 100 columns, without colour."""
        from .table import lines

        return "\n".join(line for _, line in lines(self))

    def html(self, path: str | Path | None = None) -> str:
        """The report as one HTML page that needs no other file and no network; also written to `path`, if given."""
        from .viewer import page

        text = page(self.document())
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        return self.text()

    def verdict(self) -> str:
        """The first line that matters, in one sentence."""
        total = len(self.decisions)
        if not total:
            return "no matmul was compiled, so there was nothing to rewrite"
        if not self.quantized:
            return f"nothing is quantized: no weight of {total} matmuls is, so Inductor compiled them all"
        counts = f"{self.rewritten} of {total} matmuls rewritten"
        if self.packed:
            more = f", {self.rewritten} more rewritten" if self.rewritten else ""
            counts = f"{self.packed} of {total} matmuls packed already{more}"
        if not self.rewritten:
            return counts
        found = predicted(self.decisions)
        how = "measured" if all(map(tuned, self.decisions)) else "predicted"
        speed = "" if found is None else f"      {how} {found[1]:.2g}x at M={found[0]}"
        return f"{counts}      weights {size(self.bytes_before)} -> {size(self.bytes_after)}{speed}"

    def next_step(self) -> str:
        """What to do now, in one sentence."""
        missed = self.quantized - self.rewritten - self.packed
        if not self.decisions:
            return "check that the model was called, and that torch.compile sees its matmuls"
        if missed:
            first = next(id for id, d in with_ids(self.decisions) if d.reason and d.reason not in SETTLED)
            return f"{missed} quantized but kept: start with  lq why {_word(first)}"
        if not self.quantized:
            return Reason.NOT_QUANTIZED.advice
        plain = self.kept - self.packed
        rest = f"; without a quantized weight: {plain}" if plain else ""
        found = predicted(self.decisions)
        # Said where it matters: the weights are smaller, and the user may have hoped for speed.
        slow = f"; that saves memory, not time, at M={found[0]}" if found is not None and found[1] < SLOW else ""
        return f"nothing: every quantized weight is packed{rest}{slow}"


class _Once:
    """A list without repetitions."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        key = json.dumps(value, sort_keys=True, default=str)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]


def with_ids(decisions: Iterable[Decision]) -> Iterator[tuple[str, Decision]]:
    """Each decision with its id: the module path, then path#2, path#3 where a path has several. Sorted."""

    def order(d: Decision) -> tuple[str, ...]:
        w, rest = d.where, (d.outcome, d.format, d.reason, d.near_misses, d.pieces)
        natural = re.sub(r"\d+", lambda digits: digits[0].zfill(6), w.path or TOP)
        problem = str(sorted(map(str, d.problem.items())))
        return (natural, w.path, w.file, f"{w.line:09}", w.op, problem, str(rest))

    taken: set[str] = set()
    for d in sorted(decisions, key=order):
        path = d.where.path or TOP
        id, count = path, 1
        while id in taken:
            count += 1
            id = f"{path}#{count}"
        taken.add(id)
        yield id, d


def predicted(decisions: Iterable[Decision]) -> tuple[int, float] | None:
    """The least M of the rewritten matmuls and how many times faster they are then than on dense weights; or None."""
    ours = theirs = 0.0
    least = []
    for d in decisions:
        if d.dense is not None and d.pieces and math.isfinite(d.pieces[0].seconds):
            m = d.pieces[0].low
            ours += d.pieces[0].seconds
            theirs += cost.sample(d.dense.seconds, [m])[0]
            least.append(m)
    return (min(least), theirs / ours) if least and ours > 0 else None


def tuned(d: Decision) -> bool:
    """Whether what a matmul takes was timed while compiling; true of one that was kept."""
    return d.outcome != "rewritten" or (d.dense is not None and bool(d.dense.measured))


def timed(d: Decision, device: Mapping[str, Any]) -> float | None:
    """How many times faster than dense `lq bench` measured this problem on this device, at its least M; or None."""
    if d.format is None or not d.pieces:
        return None
    asked = (d.problem.get("n"), d.problem.get("k"), d.pieces[0].low, d.format.spec, d.problem.get("x_dtype"))
    return _timings(str(device.get("name"))).get((*asked, d.pieces[0].kernel))


@functools.cache
def _timings(device: str) -> dict[tuple[Any, ...], float]:
    rows = (row for f in measured().values() if f.get("device", {}).get("name") == device for row in f["rows"])
    return {
        (r["n"], r["k"], r["m"], r["format"], r["x_dtype"], r["kernel"]): r["dense"] / r["median"]
        for r in rows
        if r["kind"] == "ours" and r["median"] and r["dense"]
    }


def _decision(id: str, d: Decision, device: Mapping[str, Any], structures: _Once, curves: _Once) -> dict[str, Any]:
    out: dict[str, Any] = {
        "id": id,
        "file": d.where.file,
        "line": d.where.line,
        "code": d.where.code,
        "op": d.where.op,
        "outcome": d.outcome,
        "problem": dict(d.problem),
    }
    if d.format is not None:
        f = d.format
        out["format"] = {name: getattr(f, name) for name in ("form", "bits", "group", "zero", "scale_dtype")}
        out["formula"] = str(f)
    if d.outcome == "rewritten":
        out |= {"rule": d.rule, "proof": d.proof, "layout": d.layout}
        out |= {"bytes_before": d.bytes_before, "bytes_after": d.bytes_after}
        found, faster, how = predicted([d]), timed(d, device), "lq bench on this device"
        if found is not None and tuned(d):
            faster, found, how = found[1], None, "autotune"
        out["predicted"] = None if found is None else {"m": found[0], "speedup": _short(found[1])}
        out["measured"] = None if faster is None else {"m": d.pieces[0].low, "speedup": _short(faster), "by": how}
        out["pieces"] = [
            {
                "when": when(p),
                "low": p.low,
                "high": p.high,
                "kernel": p.kernel,
                "copy": copy_of(p, d.pieces),
                "seconds": p.seconds if math.isfinite(p.seconds) else None,
            }
            for p in d.pieces
        ]
        if d.candidates and d.dense is not None:
            out["curve"] = curves.place(_curve(d))
    if d.reason is not None:
        out |= {"reason": d.reason.name.lower(), "sentence": d.reason.sentence, "advice": advice(d)}
    out["near_misses"] = [{"rule": m.rule, "reason": m.reason.name.lower(), "at": m.at} for m in d.near_misses]
    if d.before:
        out["structure"] = structures.place({"before": _steps(d.before), "after": _steps(d.after)})
    return out


def advice(d: Decision) -> str:
    """What to change so that a kept matmul is rewritten."""
    return d.advice or (d.reason.advice if d.reason else "please report this")


def _steps(steps: Iterable[Step]) -> list[dict[str, Any]]:
    # What every step has, and what is not empty.
    always = ("text", "value", "role")
    return [{name: value for name, value in vars(s).items() if value or name in always} for s in steps]


def _curve(d: Decision) -> dict[str, Any]:
    assert d.dense is not None
    every = [*d.candidates, d.dense]
    several = len({c.layout for c in d.candidates}) > 1
    lines = [
        {
            "name": f"{c.kernel} ({c.layout})" if several and c.layout else c.kernel,
            "seconds": [_short(s) for s in cost.sample(c.seconds, CURVE)],
            "measured": [[m, _short(s)] for m, s in c.measured],
        }
        for c in every
    ]
    crossings = [p.low for p in cost.pieces(d.candidates, 1, None)[1:]]
    return {"m": list(CURVE), "lines": lines, "light": _short(d.light), "crossings": crossings}


def _short(value: float) -> float:
    """Three digits: what a reader sees, and a page need not carry more."""
    return float(f"{value:.3g}") if math.isfinite(value) else 0.0


def copy_of(p: Piece, pieces: Sequence[Piece]) -> str:
    """The layout of the copy that a piece reads, where its weight has several; else ""."""
    return p.layout if len({each.layout for each in pieces}) > 1 else ""


def when(p: Piece) -> str:
    """A range of M in words."""
    if p.high is None:
        return f"M >= {p.low}" if p.low > 1 else "any M"
    if p.low == p.high:
        return f"M = {p.low}"
    return f"{p.low} <= M <= {p.high}" if p.low > 1 else f"M <= {p.high}"


def size(count: int) -> str:
    """A number of bytes in words, with decimal units: 42.5 MB."""
    power = min(len(str(count)) - 1, 14) // 3
    return f"{count} B" if not power else f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def _word(text: str) -> str:
    """A name as a shell takes it, printable and short."""
    from .table import fit

    return shlex.quote(fit(text, 60))
