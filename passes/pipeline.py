"""The passes in order: recognise, plan, lower, verify. Each is timed; if one fails, the graph is used as it was."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch._guards import GuardSource

from ..config import Config
from ..device import Device
from ..errors import Reason, Refused, StrictError
from ..types import Candidate, Decision
from .constants import Constants, fake_value
from .lower import Lowered, lower
from .merge import bundles
from .plan import Plan, Planner, with_threads
from .ready import ready
from .recognise import Kept, Match, Recogniser
from .verify import Broken, verify

T = TypeVar("T")


@dataclass
class Outcome:
    """What became of one graph. `lowered` is None where nothing was rewritten."""

    decisions: list[Decision] = field(default_factory=list)
    lowered: Lowered | None = None
    plans: list[Plan] = field(default_factory=list)
    constants: Constants | None = None
    passes: list[tuple[str, float, int]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    analysed: int = 0
    found: list[Match | Kept] = field(default_factory=list)


def run(module: fx.GraphModule, inputs: Sequence[Any], config: Config, device: Device | None = None) -> Outcome:
    """Runs the passes over Dynamo's graph and its real inputs. Never changes `module`; raises only in strict mode.

    `device` is to be planned for in place of the one that the inputs are on: the lowered graph is then to be shown,
    not to be run.
    """
    outcome = Outcome()
    values, threads = static_values(module, inputs), torch.get_num_threads()
    # One thread for small codes: to start others for each small operation costs more, 30 times on a busy machine.
    few = max((w.numel() for w in values.values() if not w.is_floating_point()), default=0) < 1 << 22
    with with_threads(1 if few else threads):
        _run(outcome, module, values, config, device, threads)
    return outcome


def _run(
    outcome: Outcome, module: fx.GraphModule, values: dict[fx.Node, Tensor], config: Config, device: Device | None,
    threads: int,
) -> None:  # fmt: skip
    found = outcome.found
    try:
        constants = outcome.constants = Constants(module.graph, values)
        recogniser = Recogniser(module, constants, config.strict, threads=torch.get_num_threads())
        with with_threads(1):
            found += _timed(outcome, "recognise", recogniser.run, lambda f: sum(isinstance(m, Match) for m in f))
        outcome.analysed = recogniser.reader.analysed
        plans, refused = _timed(
            outcome, "plan", lambda: _plan(found, constants, config, device, threads), lambda p: len(p[0])
        )
        while plans and outcome.lowered is None:
            _lower(outcome, module, constants, plans, refused, config.strict, runs=device is None)
        by_node = {match.anchor: plan for plan in plans for match in plan.bundle.matches}
        for item in found:
            node = item.anchor if isinstance(item, Match) else item.node
            outcome.decisions.append(_decision(item, by_node.get(node), refused.get(node)))
    except Exception as error:
        if config.strict:
            raise StrictError(f"{type(error).__name__}: {error}") from error
        outcome.lowered, outcome.plans = None, []
        last = traceback.extract_tb(error.__traceback__)[-1]
        outcome.warnings.append(
            f"lqcompile left a graph to Inductor: {type(error).__name__} at {last.filename}:{last.lineno}: {error}"
        )
        outcome.decisions = [_decision(item, None, Reason.PASS_FAILED) for item in found]


def _lower(
    outcome: Outcome, module: fx.GraphModule, constants: Constants, plans: list[Plan], refused: dict[fx.Node, Reason],
    strict: bool, runs: bool,
) -> None:  # fmt: skip
    """Lowers and verifies; a plan that is found broken is taken out, to be tried again without it."""
    lowered = _timed(outcome, "lower", lambda: lower(module, constants, plans), lambda _: len(plans))
    try:
        if runs:
            _timed(outcome, "verify", lambda: verify(module, constants, plans, lowered), lambda _: 0)
    except Broken as broken:
        if strict:
            raise
        outcome.warnings.append(f"lqcompile left a matmul to Inductor: {broken}")
        plans.remove(broken.plan)
        refused |= {match.anchor: Reason.PASS_FAILED for match in broken.plan.bundle.matches}
    else:
        outcome.lowered, outcome.plans = lowered, plans


def static_values(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Tensor]:
    """The real tensors of the graph's parameters, buffers and attributes, and of Python modules."""
    values: dict[fx.Node, Tensor] = {}
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=True):
        # A tensor of a Python module is no argument of the call; that it is replaced shows as for a parameter.
        origin = getattr(getattr(node, "_dynamo_source", None), "guard_source", None)
        static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
        fake = fake_value(node)
        if origin is GuardSource.GLOBAL and isinstance(fake, Tensor):
            static = all(isinstance(size, int) for size in fake.shape)
        if isinstance(value, Tensor) and static and isinstance(fake, Tensor):
            values[node] = value
    for node in module.graph.nodes:
        if node.op == "get_attr":
            owner: Any = module
            for name in str(node.target).split("."):
                owner = getattr(owner, name)
            if isinstance(owner, Tensor):
                values[node] = owner
    return values


def _timed(outcome: Outcome, name: str, work: Callable[[], T], count: Callable[[T], int]) -> T:
    start = time.perf_counter()
    result = work()
    outcome.passes.append((name, time.perf_counter() - start, count(result)))
    return result


def _plan(
    found: Sequence[Match | Kept], constants: Constants, config: Config, device: Device | None, threads: int
) -> tuple[list[Plan], dict[fx.Node, Reason]]:
    planner = Planner(
        constants.values, config.workload, device, copies=config.copies, autotune=config.autotune, threads=threads
    )
    plans, refused = [], {}
    with torch.inference_mode(False), torch.no_grad():
        # What is packed is for the device that it is on.
        packed = ready(found, constants) if device is None else []
        matches = [match for match in found if isinstance(match, Match)]
        left = [bundle for bundle in bundles(matches, constants) + bundles(packed, constants) if not bundle.done]
        readers = Counter(id(match.recovered) for bundle in left for match in bundle.matches)
        while left:
            bundle = left.pop(0)
            try:
                plans.append(planner.plan(bundle))
            except Refused as refusal:
                less = [simpler for simpler in bundle.simpler() if not simpler.done]
                if less:
                    left = less + left
                    continue
                refused[bundle.matches[0].anchor] = refusal.reason
            # Codes take more than what is packed of them: they go before those of the next bundle are packed.
            for recovered in [match.recovered for match in bundle.matches]:
                readers[id(recovered)] -= 1
                if not readers[id(recovered)]:
                    recovered.forget()
    return plans, refused


def _decision(item: Match | Kept, plan: Plan | None, refused: Reason | None) -> Decision:
    if isinstance(item, Kept):
        merged = _merged(plan) if plan else {}
        return Decision(item.where, "kept", merged, reason=item.reason, near_misses=item.near_misses)
    r = item.recovered
    problem: dict[str, Any] = {"n": r.n, "k": r.k, "x_dtype": str(item.dtype).removeprefix("torch.")}
    if plan is None:
        return Decision(item.where, "kept", problem, r.formats[0], reason=refused or Reason.PASS_FAILED)
    problem = {"m": str(plan.m), **problem, "bias": item.bias is not None}
    share = plan.share(item)
    problem |= {**_merged(plan), **({"across": True} if r.across else {})}
    before = len(r.formats) * r.n * r.k * item.dtype.itemsize
    return Decision(
        where=item.where,
        outcome="rewritten",
        problem=problem,
        format=r.formats[0],
        rule=r.rule,
        proof=r.proof,
        layout=plan.choice.layout,
        pieces=tuple(replace(p, seconds=share * p.seconds) for p in plan.choice.pieces),
        bytes_before=before,
        bytes_after=round(share * plan.bytes),
        candidates=tuple(_part(c, share) for c in plan.choice.candidates),
        dense=_part(plan.choice.dense, share),
        light=share * plan.bytes / plan.device.bandwidth,
    )


def _merged(plan: Plan) -> dict[str, Any]:
    """What is done in one op, for a report."""
    together = len(plan.bundle.matches)
    told = {"together": together if together > 1 else 0, "experts": plan.experts, "epilogue": plan.bundle.epilogue}
    return {name: value for name, value in told.items() if value}


def _part(candidate: Candidate, share: float) -> Candidate:
    return candidate if share == 1 else replace(candidate, seconds=share * candidate.seconds)
