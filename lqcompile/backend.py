"""The torch.compile door: rewrite the Dynamo graph, keep the packed weights fresh, hand the rest to Inductor."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import operator
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from . import profile
from .config import Config, make
from .device import Device
from .errors import ArgumentError, Refused
from .freshness import Snapshot
from .kernels import ops
from .passes import pipeline
from .passes.constants import fake_value
from .passes.evaluate import undisturbed
from .passes.lower import copy_module
from .passes.merge import bias_of, join, join_biases
from .passes.once import once
from .passes.pack import Packed
from .passes.pipeline import Outcome
from .passes.plan import Plan
from .passes.prove import Recovered
from .passes.surroundings import described
from .report import PassRecord, Report

_LIVE: weakref.WeakSet[Compiled] = weakref.WeakSet()
_RECORDING: list[list[Report]] = []
_PLANNING: list[Device | None] = []


def lq(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend "lq" of torch.compile.

    mode      as Inductor's: "default", "reduce-overhead", "max-autotune", ...
    options   "strict", "check_weights", "explain" (see config.Config), "mode", and any option of Inductor
    Raises ArgumentError for an unknown option, StrictError for a failure of ours in strict mode.
    """
    config = make(mode, options)
    planned = _PLANNING[-1] if _PLANNING else None
    outcome = pipeline.run(module, example_inputs, config, planned)
    if _RECORDING or config.explain:
        record(report_of(module, outcome, planned), config.explain)
    if _PLANNING:
        return module.forward
    for warning in outcome.warnings:
        warnings.warn(warning, stacklevel=2)
    return _compile(module, example_inputs, config, outcome)


def _reset() -> None:
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


lq.reset = _reset  # type: ignore[attr-defined]


def _compile(module: fx.GraphModule, inputs: Sequence[Any], config: Config, outcome: Outcome) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    ops.register_lowerings()
    patches = {**config.inductor, "post_grad_custom_pre_pass": _Fingerprint(config)}
    lowered = outcome.lowered
    if lowered is not None:
        # Held until compiled, as the mode only remembers them weakly: with dynamic=True the sizes of packed tensors
        # would become symbols, and one of them equal to M by chance.
        fakes = _static_fakes(lowered.packed)
        taken = [*lowered.packed, *(inputs[i] for i in lowered.kept)]
        try:
            compiled: Any = compile_fx(lowered.module, taken, config_patches=patches)
            # A bound method: Dynamo copies the attributes of an object that it wraps, and would keep old weights alive.
            return Compiled(module, inputs, config, outcome, compiled).__call__
        except Exception as error:
            if config.strict:
                raise
            warnings.warn(f"lqcompile left a graph to Inductor: {type(error).__name__}: {error}", stacklevel=3)
        finally:
            del fakes
    plain: Any = compile_fx(copy_module(module)[0], list(inputs), config_patches=patches)
    return plain


def _static_fakes(tensors: Sequence[Tensor]) -> list[Tensor]:
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return []
    return [context.fake_mode.from_tensor(t, static_shapes=True) for t in tensors]


class _Fingerprint(CustomGraphPass):
    """The pass `once`, whose uuid puts our version and options into both of Inductor's cache keys.

    A pass that the user had set runs before it.
    """

    def __init__(self, config: Config) -> None:
        previous = config.inductor.get("post_grad_custom_pre_pass", torch._inductor.config.post_grad_custom_pre_pass)
        passes = previous if isinstance(previous, (list, tuple)) else [previous]
        self._previous = [p for p in passes if p is not None]
        self._text = f"{version()} {ops.VERSION} once {config.fingerprint}"

    def __call__(self, graph: fx.Graph) -> None:
        for previous in self._previous:
            previous(graph)
        once(graph)

    def uuid(self) -> Any:
        theirs = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self._previous]
        # A pass without an identity makes the graph uncacheable, as it does without us.
        if any(identity is None for identity in theirs):
            return None
        return hashlib.sha256(f"{self._text} {theirs}".encode()).hexdigest()


@functools.cache
def version() -> str:
    """The installed version of lqcompile."""
    return importlib.metadata.version("lqcompile")


class Compiled:
    """A compiled graph and the packed weights that it takes in place of their sources."""

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        config: Config,
        outcome: Outcome,
        compiled: Callable[..., Any],
    ) -> None:
        self._module, self._config = module, config
        self._place = {n: i for i, n in enumerate(n for n in module.graph.nodes if n.op == "placeholder")}
        self._adopt(inputs, outcome, compiled)
        _LIVE.add(self)

    def _adopt(self, inputs: Sequence[Any], outcome: Outcome, compiled: Callable[..., Any]) -> None:
        lowered = outcome.lowered
        self._compiled = compiled
        self._packed = lowered.packed if lowered else ()
        self._kept = _getter(lowered.kept if lowered else range(len(self._place)))
        values = outcome.constants.values if outcome.constants else {}
        # Plans that share a packed weight hold the same one.
        held = {id(plan.packed): _Held.of(plan, self._place, values) for plan in outcome.plans}
        self._held = list(held.values())
        self._sources = _getter(sorted({i for held in self._held for i in held.places}))
        self._snapshot: Snapshot | None = Snapshot(self._sources(inputs))

    def __call__(self, *args: Any) -> Any:
        snapshot = self._snapshot
        if snapshot is None or (self._config.check_weights == "every_call" and snapshot.changed(self._sources(args))):
            self._refresh(args)
        return self._compiled(*self._packed, *self._kept(args))

    def _refresh(self, args: tuple[Any, ...]) -> None:
        """Packs again what has changed, in place. Weights that no longer fit their format are planned anew."""
        try:
            with undisturbed():
                fits = all([held.update(args) for held in self._held])
        except Refused:
            fits = False
        if fits:
            self._snapshot = Snapshot(self._sources(args))
            return
        outcome = pipeline.run(self._module, args, self._config)
        for warning in outcome.warnings:
            warnings.warn(warning, stacklevel=3)
        module = outcome.lowered.module if outcome.lowered else copy_module(self._module)[0]
        # Dynamo traces the lowered graph again, outside of the compilation that made it: shapes stay as dynamic.
        self._adopt(args, outcome, torch.compile(module, backend="inductor", options=dict(self._config.inductor)))

    def forget(self) -> None:
        """The next call packs every weight again."""
        self._snapshot = None


@dataclass
class _Held:
    """What a plan's packed weights were made of: `where`, and `bias_at`, it stands among the graph's arguments.

    -1 is none of them. `biases` are those that the plan copied into its own.
    """

    packed: tuple[Packed, ...]
    bias: Tensor | None
    epilogue: str
    experts: bool
    recovered: list[Recovered]
    where: list[list[int]]
    biases: list[Tensor | None]
    bias_at: list[int]

    @staticmethod
    def of(plan: Plan, place: Mapping[fx.Node, int], values: Mapping[fx.Node, Tensor]) -> _Held:
        matches = plan.bundle.matches
        taken = [None if plan.bias is None else bias_of(m) for m in matches]
        return _Held(
            plan.packed,
            plan.bias,
            plan.bundle.epilogue,
            plan.experts > 0,
            [m.recovered for m in matches],
            [[place.get(n, -1) for n in m.source_nodes] for m in matches],
            [None if bias is None else values[bias] for bias in taken],
            [-1 if bias is None else place.get(bias, -1) for bias in taken],
        )

    @property
    def places(self) -> set[int]:
        """Of the arguments that may change."""
        return {i for where in (*self.where, self.bias_at) for i in where if i >= 0}

    def update(self, args: tuple[Any, ...]) -> bool:
        """Packs what `args` hold now into the same tensors; False if it does not fit. Raises Refused.

        What was packed already is read where it is: it fits while it is there.
        """

        def now(where: Sequence[int], before: Sequence[Any]) -> list[Any]:
            return [args[i] if i >= 0 else old for i, old in zip(where, before, strict=True)]

        given = [now(where, r.sources) for r, where in zip(self.recovered, self.where, strict=True)]
        biases = now(self.bias_at, self.biases)
        if self.recovered[0].layout:
            fresh = self.recovered
            if not self.packed[0].holds(given):
                return False
            for r, parts in zip(fresh, given, strict=True):
                r.sources = tuple(parts)
        else:
            fresh = [r.again(sources) for r, sources in zip(self.recovered, given, strict=True)]
            weights = join(fresh, self.epilogue, self.experts)
            if any(r.across != self.recovered[0].across for r in fresh):
                return False
            if not all(p.update(w) for p, w in zip(self.packed, weights, strict=True)):
                return False
        bias = join_biases(biases, [r.n for r in fresh], self.epilogue)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        # They hold the new tensors, so that the old may be freed.
        for r in fresh:
            r.forget()
        self.recovered, self.biases = fresh, biases
        return True


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda args: tuple(args[i] for i in places)


def refresh(model: torch.nn.Module | None = None) -> None:
    """Makes every compiled graph pack its weights again on its next call.

    Only needed after a change that leaves no trace, such as `p.data.mul_(2)` or a write through numpy, with
    options={"check_weights": "never"}, or for tensors made in inference mode. Graphs are not told apart by model: to
    pack again is always right. Raises ArgumentError unless `model` is a module or None.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module, or None for all")
    for compiled in list(_LIVE):
        compiled.forget()


def explain(model: Callable[..., Any], *inputs: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Runs `model(*inputs, **kwargs)` once, without compiling, and reports what "lq" would make of each matmul.

    options   as torch.compile(backend="lq") takes them, and "arch": a GPU to plan for that is not here, like "sm_90"
    Raises ArgumentError for an unknown option, and whatever the model itself raises.
    """
    given = dict(options or {})
    arch = given.pop("arch", None)
    device = None if arch is None else Device.null(arch)
    make(None, given)
    function = getattr(model, "_orig_mod", model)
    with planning(device) as reports:
        # Not by its name: what Dynamo compiled before for "lq" would answer, and nothing be planned.
        torch.compile(function, backend=functools.partial(lq, options=given))(*inputs, **kwargs)
    return Report.merged(reports)


@contextlib.contextmanager
def planning(device: Device | None = None) -> Iterator[list[Report]]:
    """Meanwhile "lq" only plans, for `device` or the one that tensors are on: graphs run as they are, uncompiled.

    Collects a report of every graph, and at the end one of where Dynamo cut the model.
    """
    from torch._dynamo.utils import graph_break_reasons

    before = len(graph_break_reasons)
    _PLANNING.append(device)
    try:
        with recording() as reports:
            try:
                yield reports
            finally:
                cuts = tuple(_cut(reason) for reason in graph_break_reasons[before:] if reason.graph_break)
                if cuts:
                    reports.append(Report(reports[0].device if reports else {}, (), breaks=cuts))
    finally:
        _PLANNING.pop()


def _cut(reason: Any) -> str:
    """A graph break in one line: the user's file and line, and the first sentence of Dynamo's reason."""
    frame = reason.user_stack[-1] if reason.user_stack else None
    place = f"{frame.filename}:{frame.lineno}  {(frame.line or '').strip()}" if frame else "somewhere"
    return f"{place}  ({str(reason.reason).strip().splitlines()[0]})"


@contextlib.contextmanager
def recording() -> Iterator[list[Report]]:
    """Collects the report of every graph that "lq" compiles meanwhile."""
    reports: list[Report] = []
    _RECORDING.append(reports)
    try:
        yield reports
    finally:
        # By identity: two empty recordings are equal.
        _RECORDING[:] = [other for other in _RECORDING if other is not reports]


def record(report: Report, explain: bool) -> None:
    """Hands a report to whoever collects them, and to the user who asked to have it explained."""
    for reports in _RECORDING:
        reports.append(report)
    if explain:
        print(report.text(), file=sys.stderr, flush=True)


def report_of(module: fx.GraphModule, outcome: Outcome, planned: Device | None = None) -> Report:
    """The report of one graph; `planned` is the device that was planned for where that is not the tensors' own."""
    fakes = (fake_value(n) for n in module.graph.nodes)
    kind = next((t.device for t in fakes if isinstance(t, Tensor)), torch.device("cpu"))
    device = planned or (profile.of(kind) if kind.type in ("cpu", "cuda") else None)
    facts: dict[str, Any] = {"name": device.name if device else str(kind), "kind": device.kind if device else kind.type}
    facts["real"] = planned is None
    passes = tuple(PassRecord(*record) for record in outcome.passes)
    told = list(outcome.warnings)
    try:
        decisions = described(outcome)
    except Exception as error:  # noqa: BLE001
        # A report must not cost the user the compile that it is of.
        decisions = outcome.decisions
        told.append(f"what stands around the matmuls could not be told: {type(error).__name__}: {error}")
    return Report(facts, tuple(decisions), passes, tuple(told))
