"""Quantized layers of any library become packed ones, in place: the originals are freed, layer by layer."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import backend, profile
from .config import Config, make
from .errors import ArgumentError, Reason, Refused, StrictError
from .kernels.registry import X_DTYPES
from .packed import PackedLinear, plan
from .passes import layer
from .passes.layer import Layer
from .passes.pack import Packed
from .passes.prove import Reader
from .passes.recognise import LOW_BIT, Kept
from .passes.verify import miswired
from .prepare import run_once, tracing
from .report import Report
from .types import Decision, NearMiss, Where

# Rows of x where the model was not called, or with one: libraries have other code for one row.
ROWS = 4
UNKNOWN = "what it is called on: give convert the inputs of a call in which it is called on one tensor"
OPTIONS = ("strict", "explain", "workload", "mesh", "plan")
Place = tuple[str, nn.Module, str]

_REPORTS: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Call:
    """One tensor that a layer is called on."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def convert(model: nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """Replaces every layer of `model` that is one matmul against a quantized weight by a PackedLinear, in place.

    The model is called once on `inputs` and `kwargs`, where there are any, to see what each layer is called on; without
    them that is taken from the layers' in_features and dtypes. A layer is replaced where its weight is proved, as
    `backend="lq"` proves it, and freed before the next one is packed. Shared layers stay shared. What cannot be
    replaced stays as it is; `conversion(model)` tells what became of each. Returns the model, or, for a model that is
    itself such a layer and so cannot change in place, the PackedLinear.

    options   "strict" (raise StrictError for a failure of ours), "explain" (print the report) and "workload", as for
              torch.compile(backend="lq"); "mesh" and "plan" as parallelize_module takes them, of the styles of
              lqcompile.parallel: each layer is cut as soon as it is packed, and its other parts are freed
    Raises ArgumentError for a model that is no module, for an unknown option, and for a plan that cannot be kept to;
    and whatever the model raises.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
    unknown = [name for name in options or {} if name not in OPTIONS]
    if unknown:
        raise ArgumentError("options", unknown[0], " | ".join(OPTIONS))
    given = dict(options or {})
    mesh, styles = given.pop("mesh", None), given.pop("plan", None)
    if (mesh is None) != (styles is None) or not isinstance(styles, (Mapping, type(None))):
        raise ArgumentError("options", {"mesh": mesh, "plan": styles}, "a mesh and a plan {name: style}, or neither")
    config = make(None, given)
    # One level above the model: a model that is itself a layer is a child like any other.
    holder, gradients = nn.Sequential(model), torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        calls = _observed(model, inputs, kwargs) if inputs or kwargs else {}
        report = _Conversion(holder, calls, config, mesh, styles or {}).run()
    converted = holder[0]
    _REPORTS[converted] = report
    backend.record(report, config.explain)
    return converted


def conversion(model: nn.Module) -> Report:
    """What `convert` made of each layer of `model`. Raises ArgumentError for a model that it did not return."""
    if model not in _REPORTS:
        raise ArgumentError("model", type(model).__name__, "what lqcompile.convert returned in this process")
    return _REPORTS[model]


def _observed(model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[nn.Module, Call | None]:
    """What each module is first called on; None for anything but one tensor."""
    calls: dict[nn.Module, Call | None] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        one = len(args) == 1 and isinstance(args[0], Tensor)
        calls.setdefault(module, Call(tuple(args[0].shape), args[0].dtype) if one else None)

    hook = register_module_forward_pre_hook(note)
    try:
        run_once(model, inputs, kwargs)
    finally:
        hook.remove()
    return calls


class _Conversion:
    """One run over the layers of a model."""

    def __init__(
        self, holder: nn.Module, calls: dict[nn.Module, Call | None], config: Config, mesh: Any,
        styles: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._holder, self._calls, self._config = holder, calls, config
        self._reader, self._trace = Reader(), Trace()
        self._decisions: list[Decision] = []
        self._device = torch.device("cpu")
        owners = Counter(id(t) for m in holder.modules() for t in own_tensors(m))
        self._tied = {key for key, count in owners.items() if count > 1}
        # By the tensors that it was made of, held here so that their ids stay theirs.
        self._shared: dict[tuple[Any, ...], tuple[list[Tensor], Packed]] = {}
        self._mesh, self._styles, self._cut = mesh, styles, set[str]()

    def run(self) -> Report:
        with self._trace:
            for name, places in _layers(self._holder):
                self._visit(name, places)
        for pattern in self._styles:
            if pattern not in self._cut:
                raise ArgumentError("options['plan']", pattern, "names of layers that are packed; see the report")
        facts: dict[str, Any] = {"name": str(self._device), "kind": self._device.type, "real": True}
        if self._device.type in ("cpu", "cuda"):
            facts["name"] = profile.of(self._device).name
        return Report(facts, tuple(self._decisions))

    def _visit(self, name: str, places: Sequence[Place]) -> None:
        module = getattr(*places[0][1:])
        call = self._calls.pop(module, None) if module in self._calls else _guess(module)
        try:
            packed, decision = self._packed(name, module, call)
        except Refused as refusal:
            near = (NearMiss("", refusal.reason, refusal.at),) if refusal.at else ()
            plain = refusal.reason is Reason.NOT_QUANTIZED
            packed, decision = None, Decision(_where(name, module), "kept", reason=refusal.reason,
                                              near_misses=() if plain else near)  # fmt: skip
        except StrictError:
            raise
        except Exception as error:
            if self._config.strict:
                raise StrictError(f"{name}: {type(error).__name__}: {error}") from error
            what = f"{type(error).__name__}: {error}"[:200]
            packed, decision = None, Decision(_where(name, module), "kept", reason=Reason.PASS_FAILED,
                                              near_misses=(NearMiss("", Reason.PASS_FAILED, what),))  # fmt: skip
        if decision is not None:
            self._decisions.append(decision)
        if packed is not None:
            packed.training, packed.path = module.training, name
            for pattern, style in self._styles.items():
                if _matches(name, pattern):
                    self._cut.add(pattern)
                    style._apply(packed, self._mesh)
            for _, parent, attribute in places:
                setattr(parent, attribute, packed)

    def _packed(self, name: str, module: nn.Module, call: Call | None) -> tuple[PackedLinear | None, Decision | None]:
        """The layer in its packed form, and what to tell of it. Raises Refused."""
        if isinstance(module, PackedLinear):
            raise Refused(Reason.PACKED)
        if _is_plain(module):
            raise Refused(Reason.NOT_QUANTIZED)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        # A forward of the instance's own is a hook by another name: accelerate's are.
        if any(hooks) or is_parametrized(module) or "forward" in vars(module):
            raise Refused(Reason.HOOKED)
        if call is None or call.dtype not in X_DTYPES or not call.shape:
            return None, self._no_layer(name, module, UNKNOWN)
        # A few rows are enough, and leave all layers alike; but a library may have other code for them.
        few = (*(1 for _ in call.shape[2:]), ROWS, call.shape[-1]) if len(call.shape) > 1 else call.shape
        told: Decision | None = None
        for shape in dict.fromkeys((few, call.shape)):
            packed, decision = self._attempt(name, module, shape, call.dtype)
            if packed is not None:
                return packed, decision
            told = decision or told
        return None, told

    def _attempt(
        self, name: str, module: nn.Module, shape: Sequence[int], dtype: torch.dtype
    ) -> tuple[PackedLinear | None, Decision | None]:
        self._device = own_tensors(module)[0].device
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self._device, dtype)
        traced = self._trace(module, x)
        if isinstance(traced, str):
            return None, self._no_layer(name, module, traced)
        graph, args, wanted = traced
        found = layer.read(graph, args, self._reader, self._config.strict)
        if found is None:
            return None, self._no_layer(name, module, "no matmul")
        if isinstance(found, Layer):
            try:
                made = self._pack(name, found, x, wanted)
                self._trace.known.add(graph)
                return made
            except Refused as refusal:
                if refusal.reason is Reason.PASS_FAILED and self._config.strict:
                    raise StrictError(f"{name}: {refusal.at}") from refusal
                near = (NearMiss("", refusal.reason, refusal.at),)
                found = Kept(found.match.where, found.match.anchor, refusal.reason, near)
        misses = () if found.reason is Reason.NOT_QUANTIZED else found.near_misses
        where = dataclasses.replace(found.where, path=name)
        return None, Decision(where, "kept", reason=found.reason, near_misses=misses)

    def _no_layer(self, name: str, module: nn.Module, at: str) -> Decision | None:
        """What is told of a module that is no layer: nothing, where it has no low-bit data but indices or masks."""
        if not any(_low_bit(t) and t.dtype not in (torch.int64, torch.bool) for t in own_tensors(module)):
            return None
        return Decision(
            _where(name, module), "kept", reason=Reason.LAYER, near_misses=(NearMiss("", Reason.LAYER, at[:200]),)
        )

    def _pack(self, name: str, found: Layer, x: Tensor, wanted: Tensor | None) -> tuple[PackedLinear, Decision]:
        """The packed layer, checked against what is `wanted` for x, where that is known. Raises Refused."""
        w, match, workload = found.weight, found.match, self._config.workload
        dtypes: dict[str, Any] = {"x_dtype": found.x_dtype, "compute": found.compute, "result": found.result}
        dtype, device = found.compute or found.x_dtype, w.codes.device
        choice = plan(w.format, w.n, w.k, dtype, device, workload, fused=match.recovered.fused)
        sources = list(match.recovered.sources)
        key = (match.recovered.key, *(id(t) for t in sources))
        if key in self._shared:
            packed = PackedLinear(self._shared[key][1], found.bias, **dtypes, workload=workload)
        else:
            packed = PackedLinear.from_weight(w, found.bias, **dtypes, workload=workload)
        if wanted is not None:
            with torch.no_grad():
                _verify(packed, x, wanted)
        if any(id(t) in self._tied for t in sources):
            self._shared[key] = (sources, packed.packed)
        bytes_ = packed.packed.bytes
        decision = Decision(
            where=dataclasses.replace(match.where, path=name),
            outcome="rewritten",
            problem={"m": "m", "n": w.n, "k": w.k, "x_dtype": str(dtype).removeprefix("torch."),
                     "bias": found.bias is not None},
            format=w.format,
            rule=match.recovered.rule,
            proof=match.recovered.proof,
            layout=packed.layout,
            pieces=choice.pieces,
            bytes_before=w.n * w.k * dtype.itemsize,
            bytes_after=bytes_,
            candidates=choice.candidates,
            dense=choice.dense,
            light=bytes_ / profile.of(device).bandwidth,
        )  # fmt: skip
        return packed, decision


def _verify(packed: PackedLinear, x: Tensor, wanted: Tensor) -> None:
    """The weight is proved; this proves the wiring around it, on random rows. Raises Refused."""
    got = packed(x)
    # No second copy of the dense weight, in float32, is needed for its norm.
    size = torch.linalg.vector_norm(packed.weight, dtype=torch.float32)
    added_up = x.double().norm() * size / packed.in_features**0.5
    wrong = miswired(got, wanted, added_up)
    if got.dtype != wanted.dtype:
        wrong = f"gives {got.dtype}, not {wanted.dtype}"
    if wrong:
        raise Refused(Reason.PASS_FAILED, wrong)


class _Traced(Exception):
    """Ends a call of which all is known but its result."""


class Trace:
    """Dynamo's graph of a layer with its real tensors. Layers of equal structure, by Dynamo's guards, share a graph.

    Layers are run to their end but for those of `known` graphs. To be used as a context; nothing of what was traced
    outlives it.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[torch.fx.GraphModule, Sequence[Any], Any]] = []
        self.known: set[torch.fx.GraphModule] = set()

    def __enter__(self) -> Trace:
        def call(module: nn.Module, x: Tensor) -> Any:
            return module(x)

        self._call = call
        self._run = torch.compile(call, backend=self._capture, fullgraph=True, dynamic=False)
        return self

    def __exit__(self, *_: Any) -> None:
        torch._dynamo.eval_frame.remove_from_cache(self._call)
        del self._call, self._run

    def _capture(self, graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if graph in self.known:
                self._seen.append((graph, args, None))
                raise _Traced
            result = graph.forward(*args)
            self._seen.append((graph, args, result))
            return result

        return run

    def __call__(self, module: nn.Module, x: Tensor) -> tuple[torch.fx.GraphModule, Sequence[Any], Tensor | None] | str:
        """The graph, its arguments and, unless it is known, its result on x; or what stood in the way of one."""
        with contextlib.ExitStack() as settings:
            settings.enter_context(tracing())
            # Each kind of layer is one more variant of the same function.
            limits = {n: 1 << 16 for n in ("recompile_limit", "accumulated_recompile_limit")}
            settings.enter_context(torch._dynamo.config.patch(limits))
            try:
                result = self._run(module, x)
            except _Traced:
                graph, args, _ = self._seen.pop()
                return graph, args, None
            except Exception as error:  # noqa: BLE001
                self._seen.clear()
                return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        seen, self._seen = self._seen, []
        if len(seen) != 1:
            return "no operation on tensors"
        graph, args, results = seen[0]
        if not isinstance(result, Tensor) or len(results) != 1 or results[0] is not result:
            return "it returns more than one tensor"
        return graph, args, result


def _layers(holder: nn.Module) -> list[tuple[str, list[Place]]]:
    """Every module that may be a layer, by name, with each place where it stands: no module itself, so that it can be
    freed.
    """
    found: dict[nn.Module, list[Place]] = {}
    for prefix, parent in holder.named_modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                # The holder calls the model "0": every path under it starts with "0.".
                found.setdefault(child, []).append((f"{prefix}.{attribute}".lstrip(".")[2:], parent, attribute))
    inside: dict[nn.Module, bool] = {}

    def holds(module: nn.Module) -> bool:
        """Whether a module has a candidate inside, so that it is none itself."""
        if module not in inside:
            inside[module] = any([_may_be(child) or holds(child) for child in module.children()])
        return inside[module]

    return [(places[0][0], places) for m, places in found.items() if _may_be(m) and not holds(m)]


def _matches(name: str, pattern: str) -> bool:
    """As parallelize_module reads its plan: part by part."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def own_tensors(module: nn.Module) -> list[Tensor]:
    """The tensors of a module itself: parameters, buffers and plain attributes."""
    every = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return [t for t in every if isinstance(t, Tensor)]


def _low_bit(t: Tensor) -> bool:
    return is_traceable_wrapper_subclass(t) or (t.dtype in LOW_BIT and t.ndim >= 2)


def _is_plain(module: nn.Module) -> bool:
    """One of torch's own linear layers with a plain float weight."""
    return isinstance(module, nn.Linear) and type(module) is nn.Linear and not any(map(_low_bit, own_tensors(module)))


def _may_be(module: nn.Module) -> bool:
    """Whether a module may be a quantized layer, or is a linear one of which it is told that it is not quantized."""
    if isinstance(module, PackedLinear) or (isinstance(module, nn.Linear) and is_parametrized(module)):
        return True
    if isinstance(module, ParametrizationList):
        return False
    if type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, nn.Linear):
        return any(map(_low_bit, own_tensors(module)))
    return any(_low_bit(t) or (t.is_floating_point() and t.ndim >= 2) for t in own_tensors(module))


def _guess(module: nn.Module) -> Call | None:
    """What a layer is called on, by its own numbers."""
    k = next((k for k in (getattr(module, n, None) for n in ("in_features", "infeatures")) if isinstance(k, int)), None)
    floats = [t.dtype for t in own_tensors(module) if t.dtype in X_DTYPES]
    compute = getattr(module, "compute_dtype", None)
    dtype = compute if isinstance(compute, torch.dtype) else floats[0] if floats else torch.get_default_dtype()
    return None if k is None else Call((ROWS, k), dtype)


def _where(name: str, module: nn.Module) -> Where:
    return Where(name, "", 0, "", type(module).__name__)
