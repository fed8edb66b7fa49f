"""Draws many cases, compiles them sixteen to a graph, and compares every element with what the program means.

    python -m tests.fuzz --cases 10000 --kind dressings --seed 0 [--idiom affine] [--only relu] [--jobs 2]

Case i is drawn from seed + i alone: `--seed <its number> --cases 1` runs it by itself. Exit code 1 on any failure.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, fx, nn

from lqcompile.config import Config
from lqcompile.passes import pipeline
from lqcompile.passes.pipeline import Outcome
from lqcompile.types import Decision

from .corpus import Case, draw
from .oracle import wrong_elements
from .spellings import SPELLINGS, Tensors

BATCH, CHUNK = 16, 800
LOW = (torch.float16, torch.bfloat16, torch.float32)


class Layer(nn.Module):
    """A case as a module, its tensors as buffers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.names, self.body = tuple(case.tensors), case.forward
        for name, value in case.tensors.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, extra: Tensors) -> Any:
        stored = {name: getattr(self, name) for name in self.names}
        return self.body(x, {**stored, **extra})


class Batch(nn.Module):
    """Several cases in one graph."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(case) for case in cases)

    def forward(self, xs: list[Tensor], extras: list[Tensors]) -> list[Any]:
        return [layer(x, extra) for layer, x, extra in zip(self.layers, xs, extras, strict=True)]


class Capture:
    """A backend that runs the passes in strict mode and then the lowered graph, eagerly. `stale`: plan again first."""

    def __init__(self) -> None:
        self.outcome, self.stale = Outcome(), False

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.module = module
        self.outcome = pipeline.run(module, inputs, Config(strict=True))
        return self.run

    def run(self, *args: Any) -> Any:
        if self.stale:
            self.outcome, self.stale = pipeline.run(self.module, args, Config(strict=True)), False
        lowered = self.outcome.lowered
        if lowered is None:
            return self.module(*args)
        return lowered.module(*lowered.packed, *[args[i] for i in lowered.kept])


@dataclass
class Verdict:
    """What became of one case. `failure` is "", or what is wrong: refused, wrong, reason, changed or error."""

    case: Case
    decisions: list[Decision]
    failure: str = ""
    detail: str = ""
    analysed: int = 0


def run_batch(cases: Sequence[Case], dynamic: bool = False, drawings: int = 1) -> list[Verdict]:
    """Compiles the cases in one graph and judges each, and again with `drawings` - 1 other values of its tensors.

    Tracing takes most of the time, and does not see values. Raises what compiling raises.
    """
    model, capture = Batch(cases), Capture()
    torch._dynamo.reset()
    if dynamic:
        for case in cases:
            if SPELLINGS.get(case.spelling, ("rows",))[0] in ("rows", "matrix") and case.x.shape[0] > 1:
                torch._dynamo.maybe_mark_dynamic(case.x, 0)
    compiled = torch.compile(model, backend=capture, fullgraph=True)
    verdicts = []
    for drawing in range(drawings):
        if drawing:
            for case in cases:
                _shuffle(case, drawing)
            capture.stale = True
        verdicts += _one_drawing(cases, model, compiled, capture)
    torch._dynamo.reset()
    return verdicts


def _shuffle(case: Case, seed: int) -> None:
    """Other values for a case: those of each stored tensor, at other places in it."""
    generator = torch.Generator().manual_seed(seed)
    for name, t in case.tensors.items():
        # Shuffled bit by bit, group indices would make unequal groups, and signs other numbers.
        if not name.startswith("g_idx") and name != "signs_planes":
            t.copy_(t.flatten()[torch.randperm(t.numel(), generator=generator)].view(t.shape))


def _one_drawing(
    cases: Sequence[Case], model: nn.Module, compiled: Callable[..., Any], capture: Capture
) -> list[Verdict]:
    xs, extras = [c.x for c in cases], [c.extra for c in cases]
    before = [{name: v.clone() for name, v in c.tensors.items()} for c in cases]
    versions = [{name: v._version for name, v in c.tensors.items()} for c in cases]

    def restore() -> None:
        for case, old in zip(cases, before, strict=True):
            if case.breaking == "buffer_written":
                for name, value in old.items():
                    case.tensors[name].copy_(value)

    with torch.no_grad():
        torch.manual_seed(0)
        eager = model(xs, extras)
        restore()
        torch.manual_seed(0)
        got = compiled(xs, extras)
        restore()
        verdicts = []
        for i, case in enumerate(cases):
            mine = [d for d in capture.outcome.decisions if d.where.path == f"layers.{i}"]
            verdict = _judge(case, mine, got[i], eager[i])
            verdict.analysed = capture.outcome.analysed
            if not verdict.failure and case.breaking != "buffer_written":
                for name, value in case.tensors.items():
                    same = value._version == versions[i][name] and vars(value).keys() <= {"_dynamo_static_input_type"}
                    if not same or not torch.equal(_bits(value), _bits(before[i][name])):
                        verdict.failure, verdict.detail = "changed", f"{name}: {vars(value)}"
            verdicts.append(verdict)
    return verdicts


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def _judge(case: Case, decisions: list[Decision], got: Any, eager: Any) -> Verdict:
    verdict = Verdict(case, decisions)
    rewritten = [d for d in decisions if d.outcome == "rewritten"]
    kept = [d for d in decisions if d.outcome == "kept"]
    reasons = ", ".join(
        f"{d.reason.name if d.reason else None} {[(m.rule, m.reason.name, m.at) for m in d.near_misses]}" for d in kept
    )
    if len(decisions) != case.matmuls:
        verdict.failure, verdict.detail = (
            "error",
            f"{len(decisions)} decisions for {case.matmuls} matmuls: {reasons}",
        )
    elif case.expect == "rewritten" and kept:
        verdict.failure, verdict.detail = "refused", reasons
    elif case.expect == "kept" and rewritten:
        verdict.failure, verdict.detail = (
            "wrong",
            f"rewritten as {rewritten[0].format} by {rewritten[0].rule}",
        )
    elif case.expect == "kept" and any(d.reason not in case.reasons for d in kept):
        verdict.failure, verdict.detail = "reason", f"{reasons}, not {[r.name for r in case.reasons]}"
    if not verdict.failure or verdict.failure in ("refused", "reason"):
        wrong = wrong_elements(case, got, eager, bool(rewritten))
        if wrong:
            verdict.failure, verdict.detail = (
                "wrong",
                f"{wrong}; {[(d.rule, str(d.format)) for d in rewritten]}",
            )
    return verdict


@dataclass
class Tally:
    """Counts of a run."""

    cells: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    spellings: Counter[tuple[str, str]] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    cases: int = 0

    def add(self, verdict: Verdict) -> None:
        case = verdict.case
        self.cases += 1
        self.spellings[case.idiom, case.spelling] += 1
        for label in case.drawn:
            self.cells[case.idiom, case.spelling, label] += 1
        for decision in verdict.decisions:
            kept = decision.reason.name.lower() if decision.reason else ""
            self.outcomes[f"{decision.outcome} {decision.rule or kept}"] += 1
        if verdict.failure:
            self.failures[verdict.failure] += 1

    def merge(self, other: Tally) -> None:
        for name in ("cells", "spellings", "outcomes", "failures"):
            getattr(self, name).update(getattr(other, name))
        self.cases += other.cases

    def __str__(self) -> str:
        lines = []
        for idiom in sorted({idiom for idiom, _ in self.spellings}):
            spellings = {s: count for (i, s), count in self.spellings.items() if i == idiom}
            drawn: Counter[str] = Counter()
            for (i, _, label), count in self.cells.items():
                drawn[label] += count * (i == idiom)
            lines.append(f"{idiom}: {sum(spellings.values())} cases")
            lines += [
                "  " + ", ".join(f"{name} {count}" for name, count in sorted(c.items()) if count)
                for c in (spellings, drawn)
            ]
        lines.append(f"idiom x spelling x drawn: {len(self.cells)} different")
        lines.append("decisions: " + ", ".join(f"{name} {count}" for name, count in self.outcomes.most_common()))
        failures = ", ".join(f"{name} {count}" for name, count in self.failures.most_common())
        lines.append(f"cases {self.cases}, failures: {failures or 'none'}")
        return "\n".join(lines)


def fuzz(seed: int, count: int, kind: str, show: int = 20, drawings: int = 1, **fixed: str | None) -> Tally:
    """Runs `count` programs, each with several drawings of values, and prints each failure with the seed that draws it.

    `fixed`: idiom, spelling, only.
    """
    tally, shown = Tally(), 0
    for first in range(seed, seed + count, BATCH):
        seeds = range(first, min(first + BATCH, seed + count))
        for number, verdict in zip([*seeds] * drawings, judge(seeds, kind, drawings, **fixed), strict=True):
            tally.add(verdict)
            if verdict.failure:
                shown += 1
                if shown <= show:
                    print(f"FAIL --kind {kind} --seed {number} --cases 1: {verdict.failure}: {verdict.detail}")
                    print(f"     {verdict.case}", flush=True)
        if (first - seed) % (BATCH * 8) == 0:
            gc.collect()
    return tally


def spread(seed: int, count: int, jobs: int, work: Callable[[int, int], Tally]) -> Tally:
    """The same in short-lived processes: Dynamo's caches grow with every graph, and never shrink."""
    tally, start = Tally(), time.perf_counter()
    chunks = [(first, min(CHUNK, seed + count - first)) for first in range(seed, seed + count, CHUNK)]
    gc.freeze()
    for i in range(0, len(chunks), jobs):
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
            for part in pool.map(work, *zip(*chunks[i : i + jobs], strict=True)):
                tally.merge(part)
        print(f"{tally.cases} cases, {time.perf_counter() - start:.0f} s, {dict(tally.failures)}", flush=True)
    return tally


def judge(
    seeds: Sequence[int],
    kind: str,
    drawings: int = 1,
    idiom: str | None = None,
    spelling: str | None = None,
    only: str | None = None,
) -> list[Verdict]:
    """The verdicts on the cases of some seeds, compiled together; one by one if that raises."""

    def drawn() -> list[Case]:
        return [draw(Random(f"{number}"), kind, idiom, spelling, only) for number in seeds]

    try:
        return run_batch(drawn(), seeds[0] // BATCH % 8 == 5, drawings)
    except Exception as error:  # noqa: BLE001  a failure to compile is a finding
        text = "".join(traceback.format_exception_only(error)).strip()[:600]
        if len(seeds) == 1:
            return [Verdict(drawn()[0], [], "error", text) for _ in range(drawings)]
        alone = [verdict for number in seeds for verdict in judge([number], kind, drawings, idiom, spelling, only)]
        if not any(v.failure == "error" for v in alone):
            alone[0].failure, alone[0].detail = (
                "error",
                f"only together with the {len(seeds) - 1} cases that follow: {text}",
            )
        return alone


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=160)
    parser.add_argument("--kind", choices=("dressings", "mutations"), default="dressings")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("idiom", "spelling", "only"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--show", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--drawings", type=int, default=1, help="of values for each program; --cases counts programs")
    a = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    start = time.perf_counter()
    fixed = {"drawings": a.drawings, "idiom": a.idiom, "spelling": a.spelling, "only": a.only}
    tally = spread(a.seed, a.cases, a.jobs, functools.partial(fuzz, kind=a.kind, show=a.show, **fixed))
    print(tally)
    print(f"{a.kind} from seed {a.seed}: {1000 * (time.perf_counter() - start) / a.cases:.0f} s per 1000 cases")
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
