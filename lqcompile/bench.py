"""`lq bench`: every kernel that accepts a problem, checked against float64, then timed beside the vendor's matmul."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import picture, profile, regret, timing
from .cli import Exit
from .errors import ArgumentError
from .formats import random_weight
from .kernels import pages, registry
from .kernels.layout import LAYOUTS
from .neighbours import NEIGHBOURS, Held, Neighbour
from .quantize import NAME_OF_DTYPE
from .request import Options
from .results import TIMED, Row, clocks, committed, facts, head, heading, line, short, summary, table
from .trial import Candidate, Outcome, dense, ours, theirs, truth_of
from .types import Problem, QWeight

__all__ = ["Options", "bench", "committed", "table"]

T = TypeVar("T")
# Of the problems of whole models, what is predicted to take so many times as long as another kernel of its layout is
# not timed: it would not be chosen, and thousands of small launches take long.
HOPELESS = {"cuda": 12.0, "cpu": math.inf}


def bench(options: Options, command: Sequence[str] = ("lq", "bench")) -> int:
    """Prints a row for each candidate of each problem, then a summary. Exit.PROOF_FAILED if a kernel of ours is wrong.

    Raises ArgumentError for options that do not go together. `options.json` is written after every problem, so that
    what was measured survives whatever stops the rest.
    """
    problems = options.problems()
    here = torch.cuda.device(options.device) if options.device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), here:
        return _Session(options, command).run(problems)


class _Weight:
    """One weight, packed once in each layout that a kernel wants, with the copies that are rotated over."""

    def __init__(self, problem: Problem, calls: Iterable[registry.Call], others: Iterable[Neighbour], rotation: int):
        self.qweight: QWeight = random_weight(problem.format, problem.n, problem.k, problem.device)
        self.packed: dict[str, list[list[Tensor]]] = {}
        for layout in sorted({call.layout for call in calls}):
            parts = LAYOUTS[layout].pack(self.qweight)
            count = timing.copies(sum(part.numel() * part.element_size() for part in parts), rotation)
            self.packed[layout] = [parts, *(pages.together(parts) for _ in range(count - 1))]
        self.others: list[tuple[Neighbour, Held | str, list[Any]]] = []
        for other in others:
            try:
                held = other.prepare(problem)
                count = min(timing.copies(held.bytes, rotation), other.copies)
                copies = [held.weight, *(other.copy(held.weight) for _ in range(count - 1))]
                self.others.append((other, held, copies))
            except Exception as error:  # noqa: BLE001  foreign code may raise anything; the rest is still measured
                self.others.append((other, first_line(error), []))


class _Session:
    """One run of the bench: what it was asked for, what it holds at the moment, and the rows so far."""

    def __init__(self, options: Options, command: Sequence[str]) -> None:
        self.options, self.timer, self.begun = options, timing.timer(options.device), time.monotonic()
        self.rows: list[Row] = []
        self.points: list[regret.Point] = []
        self.skipped: list[dict[str, str]] = []
        wanted = options.neighbours and not options.draw
        others = [other for other in NEIGHBOURS if wanted and options.device.type in other.devices]
        missing = {other.name: other.missing() for other in others}
        self.others = [other for other in others if missing[other.name] is None]
        self.cache: dict[str, tuple[Any, Any]] = {}
        self.document: dict[str, Any] = {
            **facts(options.device, command),
            "cache_bytes": timing.cache_bytes(options.device),
            "rotation_bytes": self.timer.rotation,
            "dense": self.timer.dense,
            "light": self.timer.light_name(),
            "neighbours": {name: why or "used" for name, why in missing.items()},
        }

    def run(self, problems: Sequence[Problem]) -> int:
        problems = self.resumed(problems)
        print(head(self.document), heading(self.timer.dense), sep="\n\n", flush=True)
        for i, problem in enumerate(problems):
            limit = self.options.time_limit
            if limit is not None and time.monotonic() - self.begun > limit:
                for left in problems[i:]:
                    self.skip(left, "time limit", quiet=True)
                print(f"time limit of {limit:g} s: the last {len(problems) - i} of {len(problems)} problems skipped")
                break
            try:
                found = self.measure(problem)
            except torch.OutOfMemoryError:
                self.cache.clear()
                self.skip(problem, "out of memory")
                continue
            for row in found:
                print(line(row), flush=True)
            self.rows += found
            if self.options.regret or self.options.draw or self.options.picture is not None:
                self.points += regret.points(found, self.options.device)
            self.write()
        self.document["clocks_at_end"] = clocks(self.options.device)
        self.write()
        print("", summary(self.rows, len(self.skipped)), sep="\n")
        if self.options.regret or self.options.draw:
            print("", regret.report(self.points), sep="\n")
        if self.options.picture is not None:
            self.options.picture.write_text(picture.svg(self.points, self.options.device))
        bad = any(row.kind == "ours" and row.verdict in ("WRONG", "FAILED") for row in self.rows)
        return Exit.PROOF_FAILED if bad else Exit.FINE

    def resumed(self, problems: Sequence[Problem]) -> list[Problem]:
        """What is left of some problems. Raises ArgumentError where the file to go on with is of another device."""
        path = self.options.json
        if not self.options.resume or path is None or not path.exists():
            return list(problems)
        before = json.loads(path.read_text())
        if before.get("device") != self.document["device"]:
            raise ArgumentError("--resume", str(path), f"results of {self.document['device']['name']}")
        self.points = regret.read(before)
        done = {point.problem for point in self.points}
        return [p for p in problems if (p.n, p.k, int(p.m), p.format.spec, NAME_OF_DTYPE[p.x_dtype]) not in done]

    def measure(self, problem: Problem) -> list[Row]:
        """The rows of one problem; none, with a note, where nothing of ours or of a neighbour accepts it."""
        n, k, f = problem.n, problem.k, problem.format
        if k % f.group:
            return self.skip(problem, f"group {f.group} does not divide k={k}")
        wanted = self.accepting(problem)
        if self.options.draw:
            wanted = self.hopeful(problem, wanted)
        others = [other for other in self.others if other.accepts(problem) is None]
        if not wanted and not others:
            return self.skip(problem, "no kernel accepts it")
        calls = [call for _, call in wanted]
        key = (n, k, f, problem.x_dtype, tuple(other.name for other in others))
        weight = self.cached("weight", key, lambda: _Weight(problem, calls, others, self.timer.rotation))
        dense_copies = self.cached("dense", (n, k, problem.x_dtype), lambda: self.dense(problem))
        x = torch.randn((int(problem.m), k), device=problem.device).to(problem.x_dtype)
        bias = torch.randn(n, device=problem.device).to(problem.x_dtype) if self.options.bias else None
        truth = truth_of(weight.qweight, x, bias)
        candidates = [dense(self.timer.dense, dense_copies, x, bias)]
        candidates += [ours(kernel, call, weight.packed[call.layout], x, bias, truth) for kernel, call in wanted]
        rows: list[Row] = []
        for other, held, copies in weight.others:
            if isinstance(held, str):
                failed = Candidate("neighbour", other.name, "", 0, [])
                rows.append(_row(problem, self.options.bias, failed, ("FAILED", None, held)))
            else:
                candidates.append(theirs(other, held, copies, x))
        return self.timed(problem, candidates) + rows

    def accepting(self, problem: Problem) -> list[tuple[registry.Kernel, registry.Call]]:
        """Each kernel, in each of its layouts that can hold the format, unless it refuses or was not asked for."""
        found = []
        for name, kernel in sorted(registry.discover().items()):
            if problem.device.type not in kernel.devices or name not in (self.options.kernels or (name,)):
                continue
            for layout in kernel.layouts:
                call = registry.Call(layout, problem.format, problem.n, problem.k)
                held = problem.format.form in LAYOUTS[layout].forms
                if held and kernel.accepts(call, problem.x_dtype, problem.device.type) is None:
                    found.append((kernel, call))
        return found

    def hopeful(
        self, problem: Problem, wanted: Sequence[tuple[registry.Kernel, registry.Call]]
    ) -> list[tuple[registry.Kernel, registry.Call]]:
        """Those of `wanted` that may be chosen in their layouts."""
        facts, most = profile.of(problem.device), HOPELESS[problem.device.type]
        ways = [(kernel.name, call.layout) for kernel, call in wanted]
        predicted = {way: regret.seconds(problem, way, facts) for way in ways}
        least = {layout: min(s for way, s in predicted.items() if way[1] == layout) for _, layout in ways}
        return [pair for pair, way in zip(wanted, ways, strict=True) if predicted[way] <= most * least[way[1]]]

    def cached(self, name: str, key: Any, make: Callable[[], T]) -> T:
        """What was made last under `name`, if for this key; the old one is let go before the new one is made."""
        if self.cache.get(name, (None, None))[0] != key:
            self.cache.pop(name, None)
            self.cache[name] = (key, make())
        return self.cache[name][1]

    def dense(self, problem: Problem) -> list[Tensor]:
        weight = torch.randn((problem.n, problem.k), device=problem.device).to(problem.x_dtype)
        count = timing.copies(weight.numel() * weight.element_size(), self.timer.rotation)
        return [weight, *(weight.clone() for _ in range(count - 1))]

    def light(self, size: int) -> Candidate | None:
        try:
            runs, how = self.timer.light(size)
            return Candidate("light", "light", "", size, runs, check=lambda: ("unchecked", None, how))
        except Exception as error:  # noqa: BLE001  without a compiler there is no light; everything else is measured
            if not self.document["light"].startswith("none: "):
                self.document["light"] = f"none: {first_line(error)}"
                print(f"no light: {first_line(error)}")
            return None

    def timed(self, problem: Problem, candidates: list[Candidate]) -> list[Row]:
        """Checks every candidate, times those that are right, all in turns, and looks at their last results again."""
        sizes = () if self.options.draw else sorted({c.bytes for c in candidates if c.kind != "dense"})
        lights = [self.light(size) for size in sizes]
        candidates = [*candidates, *(c for c in lights if c is not None)]
        outcomes = [_attempt(c.check) for c in candidates]
        samplers: dict[int, timing.Sampler] = {}
        for i, candidate in enumerate(candidates):
            if outcomes[i][0] in TIMED:
                try:
                    samplers[i] = self.timer.sampler(candidate.runs)
                except Exception as error:  # noqa: BLE001  one that cannot be captured must not cost the others
                    outcomes[i] = ("FAILED", outcomes[i][1], first_line(error))
        found = timing.interleaved([*samplers.values()], self.options.repeats)
        samples = dict(zip(samplers, found, strict=True))
        for i in samplers:
            if not candidates[i].recheck():
                outcomes[i] = ("WRONG", outcomes[i][1], "right alone, wrong when launched again and again")
                del samples[i]
        medians = {i: s.median for i, s in samples.items()}
        vendor = next((medians[i] for i in medians if candidates[i].kind == "dense"), None)
        light = {candidates[i].bytes: medians[i] for i in medians if candidates[i].kind == "light"}
        for i, c in enumerate(candidates):
            if i in samples and c.bytes * len(c.runs) <= self.timer.rotation:
                outcomes[i] = (*outcomes[i][:2], f"{len(c.runs)} copies stay in the cache")
        rows = [
            _row(problem, self.options.bias, c, outcomes[i], samples.get(i), light.get(c.bytes), vendor)
            for i, c in enumerate(candidates)
        ]
        order = ("dense", "light", "ours", "neighbour")
        return sorted(rows, key=lambda row: order.index(row.kind))

    def skip(self, problem: Problem, why: str, quiet: bool = False) -> list[Row]:
        shape = f"{problem.n}x{problem.k}"
        self.skipped.append({"shape": shape, "format": problem.format.spec, "m": str(problem.m), "why": why})
        if not quiet:
            print(f"{shape} {short(problem.format.spec)} m={problem.m} skipped: {why}", flush=True)
        return []

    def write(self) -> None:
        if self.options.json is not None:
            # Of whole models only what choices cost is kept: rows of some hundred problems are a megabyte.
            rows = [] if self.options.draw else [dataclasses.asdict(row) for row in self.rows]
            document = {**self.document, "skipped": self.skipped, "rows": rows}
            if self.points:
                facts = dataclasses.asdict(profile.of(self.options.device))
                document |= {"profile": facts, **regret.document(self.points)}
            self.options.json.write_text(json.dumps(document, indent=1) + "\n")


def _attempt(check: Callable[[], Outcome]) -> Outcome:
    try:
        return check()
    except Exception as error:  # noqa: BLE001  one broken candidate must not cost the measurements of the others
        return "FAILED", None, first_line(error)


def _row(
    problem: Problem,
    bias: bool,
    c: Candidate,
    outcome: Outcome,
    samples: timing.Samples | None = None,
    light: float | None = None,
    vendor: float | None = None,
) -> Row:
    verdict, error, note = outcome
    return Row(
        n=problem.n,
        k=problem.k,
        m=int(problem.m),
        format=problem.format.spec,
        x_dtype=NAME_OF_DTYPE[problem.x_dtype],
        bias=bias,
        kind=c.kind,
        kernel=c.kernel,
        layout=c.layout,
        bytes=c.bytes,
        copies=len(c.runs),
        verdict=verdict,
        note=note,
        error=error,
        median=samples.median if samples else None,
        least=samples.least if samples else None,
        most=samples.most if samples else None,
        samples=samples.count if samples else 0,
        light=light,
        dense=vendor,
    )


def first_line(error: Exception | Warning | str) -> str:
    """Its kind and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
