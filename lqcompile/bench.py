"""`lq bench`: every kernel that accepts a problem, checked against float64, then timed beside the vendor's matmul."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sympy
import torch
from torch import Tensor

from . import regret, timing
from .cli import Exit
from .errors import ArgumentError
from .kernels import pages, registry
from .kernels.layout import LAYOUTS
from .neighbours import NEIGHBOURS, Held, Neighbour
from .quantize import NAME_OF_DTYPE
from .results import TIMED, Row, clocks, committed, facts, head, heading, line, short, summary, table
from .trial import Candidate, Outcome, dense, ours, random_weight, theirs, truth_of
from .types import SCALE_DTYPES, Format, Problem, QWeight

__all__ = ["Options", "bench", "committed", "table"]

Shape = tuple[int, int]
T = TypeVar("T")
SHAPES: dict[str, tuple[Shape, ...]] = {
    "standard": ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (49152, 12288)),
    # q and o; k and v; gate and up; down; the head.
    "llama3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)),
}
CPU_SHAPES = ((1024, 1024), (4096, 4096))
FORMATS = (
    "binary:2:128:float,binary:3:128:float,binary:4:128:float,affine:4:128:none,affine:4:128:int,"
    "affine:8:128:none,table:4:64:none"
)
FORMAT_HELP = "form:bits:group:zero[:scale_dtype], such as affine:4:128:int; scales default to x's dtype"


@dataclass(frozen=True)
class Options:
    """What `lq bench` was asked for. None is the device's default; `time_limit` is in seconds."""

    device: torch.device
    shapes: tuple[Shape, ...] | None = None
    ms: tuple[int, ...] = (1, 2, 4, 8)
    formats: tuple[str, ...] = tuple(FORMATS.split(","))
    kernels: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    bias: bool = False
    neighbours: bool = True
    json: Path | None = None
    repeats: int = 15
    regret: bool = False
    time_limit: float | None = None

    def problems(self) -> list[Problem]:
        """Every problem, those of one weight together. Raises ArgumentError for a dtype that the device is not for."""
        gpu = self.device.type == "cuda"
        dtypes = self.dtypes or ((torch.float16,) if gpu else (torch.float32,))
        if gpu and torch.float32 in dtypes:
            raise ArgumentError("--dtype", "float32", f"float16 | bfloat16 on {self.device}")
        shapes = self.shapes or (SHAPES["standard"] if gpu else CPU_SHAPES)
        found = []
        for (n, k), dtype, spec, m in itertools.product(shapes, dtypes, self.formats, self.ms):
            full = spec if spec.count(":") == 4 else f"{spec}:{NAME_OF_DTYPE[dtype]}"
            found.append(Problem(sympy.Integer(m), (m, m), n, k, Format.parse(full), dtype, self.device))
        return found


def listed(option: str, text: str, accepted: str, read: Callable[[str], T]) -> tuple[T, ...]:
    found = []
    for piece in text.split(","):
        try:
            found.append(read(piece.strip()))
        except (ValueError, KeyError) as error:
            # A format's own complaint says more than that it was not accepted.
            why = f"; {error}" if isinstance(error, ArgumentError) else ""
            raise ArgumentError(option, piece, accepted + why) from error
    return tuple(dict.fromkeys(found))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def shapes(text: str) -> tuple[Shape, ...]:
    """ "4096x4096,..." or the name of a list. Raises ArgumentError, as all readers of options do."""

    def read(piece: str) -> Shape:
        n, k = piece.split("x")
        return positive(n), positive(k)

    return SHAPES.get(text) or listed("--shapes", text, f"NxK,... | {' | '.join(SHAPES)}", read)


def ms(text: str) -> tuple[int, ...]:
    """ "1,2,4,8": rows of x."""
    return listed("--m", text, "ints of at least 1, such as 1,2,4,8", positive)


def formats(text: str) -> tuple[str, ...]:
    """Specs of a format, each with or without its scale dtype."""

    def read(piece: str) -> str:
        Format.parse(piece if piece.count(":") == 4 else f"{piece}:float16")
        return piece

    return listed("--formats", text, FORMAT_HELP, read)


def kernels(text: str) -> tuple[str, ...]:
    """Names of registered kernels."""
    known = registry.discover()
    return listed("--kernels", text, ", ".join(sorted(known)), lambda name: known[name].name)


def dtypes(text: str) -> tuple[torch.dtype, ...]:
    """Names of x's dtypes."""
    return listed("--dtype", text, " | ".join(SCALE_DTYPES), SCALE_DTYPES.__getitem__)


def device(text: str) -> torch.device:
    """ "cpu", "cuda" or "cuda:1", if it is there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = {"cpu": torch.device("cpu")} | {f"cuda:{i}": torch.device("cuda", i) for i in range(count)}
    if count:
        there["cuda"] = torch.device("cuda", torch.cuda.current_device())
    if text not in there:
        raise ArgumentError("--device", text, " | ".join(sorted(there)))
    return there[text]


def default_device() -> torch.device:
    """The current GPU, or the CPU where there is none."""
    return device("cuda" if torch.cuda.is_available() else "cpu")


def repeats(text: str) -> int:
    """How many samples of each candidate."""
    try:
        return positive(text)
    except ValueError as error:
        raise ArgumentError("--repeats", text, "an int of at least 1") from error


def time_limit(text: str) -> float:
    """Seconds after which no further problem is begun."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ArgumentError("--time-limit", text, "seconds above 0")
    return seconds


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
                count = timing.copies(held.bytes, rotation)
                copies = [held.weight, *(other.copy(held.weight) for _ in range(count - 1))]
                self.others.append((other, held, copies))
            except Exception as error:  # noqa: BLE001  foreign code may raise anything; the rest is still measured
                self.others.append((other, first_line(error), []))


class _Session:
    """One run of the bench: what it was asked for, what it holds at the moment, and the rows so far."""

    def __init__(self, options: Options, command: Sequence[str]) -> None:
        self.options, self.timer, self.begun = options, timing.timer(options.device), time.monotonic()
        self.rows: list[Row] = []
        self.skipped: list[dict[str, str]] = []
        others = [other for other in NEIGHBOURS if options.neighbours and options.device.type in other.devices]
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
            self.write()
        self.document["clocks_at_end"] = clocks(self.options.device)
        self.write()
        print("", summary(self.rows, len(self.skipped)), sep="\n")
        if self.options.regret:
            print("", regret.report(regret.points(self.rows, self.options.device)), sep="\n")
        bad = any(row.kind == "ours" and row.verdict in ("WRONG", "FAILED") for row in self.rows)
        return Exit.PROOF_FAILED if bad else Exit.FINE

    def measure(self, problem: Problem) -> list[Row]:
        """The rows of one problem; none, with a note, where nothing of ours or of a neighbour accepts it."""
        n, k, f = problem.n, problem.k, problem.format
        if k % f.group:
            return self.skip(problem, f"group {f.group} does not divide k={k}")
        wanted = self.accepting(problem)
        others = [other for other in self.others if other.accepts(problem) is None]
        if not wanted and not others:
            return self.skip(problem, "no kernel accepts it")
        calls = [call for _, call in wanted]
        weight = self.cached(
            "weight", (n, k, f, problem.x_dtype), lambda: _Weight(problem, calls, others, self.timer.rotation)
        )
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
        lights = [self.light(size) for size in sorted({c.bytes for c in candidates if c.kind != "dense"})]
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
            rows = [dataclasses.asdict(row) for row in self.rows]
            document = {**self.document, "skipped": self.skipped, "rows": rows}
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
