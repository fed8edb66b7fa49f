"""Draws many cases, compiles them sixteen to a graph, and compares every element with what the program means.

    python -m tests.fuzz --cases 10000 --kind dressings --seed 0 [--idiom affine] [--spelling linear] [--only relu]

Case i is drawn from seed + i alone: `--seed <its number> --cases 1` runs it by itself. Exit code 1 on any failure.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lqcompile.config import Config
from lqcompile.formats import UNIT_ROUNDOFF
from lqcompile.passes import pipeline
from lqcompile.passes.pipeline import Outcome
from lqcompile.types import Decision

from .corpus import Case, draw
from .mutations import BETWEEN
from .spellings import SPELLINGS, Tensors

BATCH = 16
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
    """A backend that runs the passes in strict mode and then the lowered graph, eagerly."""

    def __init__(self) -> None:
        self.outcome = Outcome()

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.outcome = pipeline.run(module, inputs, Config(strict=True))
        lowered = self.outcome.lowered
        if lowered is None:
            return module.forward
        return lambda *args: lowered.module(*lowered.packed, *[args[i] for i in lowered.kept])


class Exact(TorchFunctionMode):
    """Makes every floating dtype that a program names float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("half", "bfloat16", "float"):
            return args[0].double()
        wide = lambda a: torch.float64 if isinstance(a, torch.dtype) and a in LOW else a  # noqa: E731
        return func(*tree_map(wide, args), **tree_map(wide, kwargs or {}))


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Float64 throughout."""
    torch.set_default_dtype(torch.float64)
    try:
        with Exact():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.dtype in LOW else t.clone()


def _flat(result: Any) -> list[Tensor]:
    return [t.double() for t in tree_leaves(result)]


def _strides(t: Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def wrong_elements(case: Case, got: Any, eager: Any, rewritten: bool) -> str:
    """What is wrong with a result, or "". What was not rewritten must be eager's own, bit for bit."""
    for a, b in zip(tree_leaves(got), tree_leaves(eager), strict=True):
        if (a.shape, a.dtype, _strides(a)) != (b.shape, b.dtype, _strides(b)):
            return f"{a.dtype} {tuple(a.shape)} strides {a.stride()}, eager {b.dtype} {tuple(b.shape)} {b.stride()}"
        if not rewritten and not torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)):
            return "a kept matmul changed its result"
    if not rewritten:
        return ""
    t, x = {name: _double(v) for name, v in (case.tensors | case.extra).items()}, case.x.double()
    native = case.weight({name: v.clone() for name, v in (case.tensors | case.extra).items()}, case.x).double()
    u = max(UNIT_ROUNDOFF[case.x.dtype], UNIT_ROUNDOFF.get(case.autocast, 0.0))
    coarse = max([u, *(UNIT_ROUNDOFF.get(v.dtype, 0.0) for v in case.tensors.values())])
    with exactly():
        w = case.weight(t, x)
        truths = [_flat(case.apply(x, v, t)) for v in (w, native)]
        subnormal = 2.0**-25 if u == 2.0**-11 else 0.0
        largest = w.abs().amax(1, keepdim=True).expand(w.shape)
        # The kernel holds scales in float32: a few of its roundings beside the one of the weight itself.
        off = (1.01 * u + 2.0**-20) * w.abs() + 2.0**-18 * largest + subnormal
        if case.expect == "either":
            # Where no algebra follows, some roundings of eager are kept and others are not.
            off = off + 2 * (native - w).abs()
            off = off + 4 * coarse * w.abs() if case.breaking in BETWEEN else off
        positive = t | {name: v.abs() for name, v in t.items() if name == "bias"}
        none, some, most, all_ = (
            _flat(case.apply(x.abs(), v, positive)) for v in (torch.zeros_like(w), off, largest, w.abs())
        )
    coarse = 2.0**-8 if case.expect == "either" else coarse
    for i, (a, b) in enumerate(zip(_flat(got), _flat(eager), strict=True)):
        scale = case.slack * u + 2 * math.sqrt(case.x.numel()) * 2.0**-24
        allowed = some[i] - none[i] + scale * all_[i] + 2 * subnormal
        error = torch.minimum(*((a - truth[i]).abs() for truth in truths))
        overflow = ~b.isfinite() & ~a.isfinite()
        bad = ~(error <= allowed) & ~overflow
        if bool(bad.any()):
            j = int(bad.flatten().nonzero()[0])
            place = [int(p) for p in torch.unravel_index(torch.tensor(j), a.shape)] if a.ndim else []
            a, b, exact, limit = (v.flatten()[j] for v in (a, b, truths[0][i], allowed))
            values = f"got {a:.9g}, exact {exact:.9g}, eager {b:.9g}, allowed {limit:.3g}"
            return f"{int(bad.sum())} elements off, first {place}: {values}"
        far = ~((a - b).abs() <= 16 * coarse * most[i] + 2 * allowed + 64 * coarse * all_[i]) & ~overflow
        if bool(far.any()):
            return f"{int(far.sum())} elements far from eager"
    return ""


@dataclass
class Verdict:
    """What became of one case. `failure` is "", or what is wrong: refused, wrong, reason, changed or error."""

    case: Case
    decisions: list[Decision]
    failure: str = ""
    detail: str = ""
    analysed: int = 0


def run_batch(cases: Sequence[Case], dynamic: bool = False) -> list[Verdict]:
    """Compiles the cases in one graph and judges each. Raises what compiling raises."""
    model, capture = Batch(cases), Capture()
    xs, extras = [c.x for c in cases], [c.extra for c in cases]
    before = [{name: v.clone() for name, v in c.tensors.items()} for c in cases]
    versions = [{name: v._version for name, v in c.tensors.items()} for c in cases]

    def restore() -> None:
        for case, old in zip(cases, before, strict=True):
            if case.breaking == "buffer_written":
                for name, value in old.items():
                    case.tensors[name].copy_(value)

    torch._dynamo.reset()
    if dynamic:
        for case in cases:
            if SPELLINGS.get(case.spelling, ("rows",))[0] in ("rows", "matrix") and case.x.shape[0] > 1:
                torch._dynamo.maybe_mark_dynamic(case.x, 0)
    with torch.no_grad():
        torch.manual_seed(0)
        eager = model(xs, extras)
        restore()
        torch.manual_seed(0)
        got = torch.compile(model, backend=capture, fullgraph=True)(xs, extras)
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
    torch._dynamo.reset()
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


def fuzz(seed: int, count: int, kind: str, show: int = 20, **fixed: str | None) -> Tally:
    """Runs `count` cases and prints each failure with the seed that draws it. `fixed`: idiom, spelling, only."""
    tally, start, shown = Tally(), time.perf_counter(), 0
    for first in range(seed, seed + count, BATCH):
        seeds = range(first, min(first + BATCH, seed + count))
        for number, verdict in zip(seeds, judge(seeds, kind, **fixed), strict=True):
            tally.add(verdict)
            if verdict.failure:
                shown += 1
                if shown <= show:
                    print(f"FAIL --kind {kind} --seed {number} --cases 1: {verdict.failure}: {verdict.detail}")
                    print(f"     {verdict.case}", flush=True)
        if first == seed:
            gc.collect()
            gc.freeze()
        elif (first - seed) % (BATCH * 8) == 0:
            gc.collect()
        if (first - seed) % (BATCH * 100) == BATCH * 99:
            print(
                f"{tally.cases} cases, {time.perf_counter() - start:.0f} s, {dict(tally.failures)}",
                flush=True,
            )
    return tally


def judge(
    seeds: Sequence[int],
    kind: str,
    idiom: str | None = None,
    spelling: str | None = None,
    only: str | None = None,
) -> list[Verdict]:
    """The verdicts on the cases of some seeds, compiled together; one by one if that raises."""

    def drawn() -> list[Case]:
        return [draw(Random(f"{number}"), kind, idiom, spelling, only) for number in seeds]

    try:
        return run_batch(drawn(), dynamic=seeds[0] // BATCH % 8 == 5)
    except Exception as error:  # noqa: BLE001  a failure to compile is a finding
        text = "".join(traceback.format_exception_only(error)).strip()[:600]
        if len(seeds) == 1:
            return [Verdict(drawn()[0], [], "error", text)]
        alone = [verdict for number in seeds for verdict in judge([number], kind, idiom, spelling, only)]
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
    a = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    start = time.perf_counter()
    tally = fuzz(a.seed, a.cases, a.kind, a.show, idiom=a.idiom, spelling=a.spelling, only=a.only)
    print(tally)
    print(f"{a.kind} from seed {a.seed}: {1000 * (time.perf_counter() - start) / a.cases:.0f} s per 1000 cases")
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
