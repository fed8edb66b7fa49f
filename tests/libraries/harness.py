"""Runs one model through torch.compile with our passes, and measures every rewritten matmul against float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lqcompile.config import Config
from lqcompile.formats import UNIT_ROUNDOFF, bound, dequantize
from lqcompile.kernels import ops, registry
from lqcompile.passes import pipeline
from lqcompile.passes.constants import fake_value
from lqcompile.passes.merge import join
from lqcompile.passes.pipeline import Outcome
from lqcompile.passes.plan import Plan
from lqcompile.prepare import tracing
from lqcompile.types import Decision

Make = Callable[[], tuple[nn.Module, Any]]


class Backend:
    """Runs the passes on every graph, in strict mode, and then the lowered graph, eagerly."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.modules: list[fx.GraphModule] = []

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = pipeline.run(module, inputs, Config(strict=True))
        self.outcomes.append(outcome)
        self.modules.append(module)
        lowered = outcome.lowered
        if lowered is None:
            return module.forward
        return lambda *args: lowered.module(*lowered.packed, *[args[i] for i in lowered.kept])


@dataclass
class Row:
    """What became of one model. `wrong` is "", or what is: an error beyond a bound, a tensor that was changed."""

    name: str
    decisions: list[Decision] = field(default_factory=list)
    worst: float = 0.0
    off: float = 0.0
    graphs: int = 0
    wrong: str = ""

    @property
    def rewritten(self) -> int:
        return sum(d.outcome == "rewritten" for d in self.decisions)

    def __str__(self) -> str:
        kinds: dict[str, int] = {}
        for d in self.decisions:
            miss = f" at {d.near_misses[0].at[:60]}" if d.near_misses else ""
            kept = f"kept {d.reason and d.reason.name}{miss}"
            text = f"{d.format} {d.rule} {d.proof}" if d.outcome == "rewritten" else kept
            kinds[text] = kinds.get(text, 0) + 1
        what = "; ".join(f"{n} x {text}" if n > 1 else text for text, n in kinds.items()) or "no matmul"
        errors = f"{self.worst:.2f} of bound, eager {self.off:.1e}"
        return f"{self.name:34} {what} | graphs {self.graphs} | {errors} {self.wrong}"


def measure(name: str, make: Make) -> Row:
    """Compiles a model, as `prepare` does, and runs it; kernels are compared with float64 at every element."""
    torch._dynamo.reset()
    row = Row(name)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model, x = make()
        model, inputs = model.eval(), x if isinstance(x, tuple) else (x,)
        wanted = model(*inputs)
        before, set_before = facts(model), settings()
        backend = Backend()
        with tracing():
            got = torch.compile(model, backend=backend)(*inputs)
        if facts(model) != before:
            row.wrong += "a tensor of the model was changed; "
        if settings() != set_before:
            row.wrong += "a global setting was changed; "
    row.decisions = [d for outcome in backend.outcomes for d in outcome.decisions]
    row.graphs = len(backend.outcomes)
    for outcome in backend.outcomes:
        for plan in outcome.plans:
            row.worst = max(row.worst, _against_float64(plan))
    wanted, got = (getattr(y, "logits", y) for y in (wanted, got))
    # What eager computes in shows in the dtypes of its own intermediate results.
    fakes = [fake_value(n) for m in backend.modules for n in m.graph.nodes]
    u = max(UNIT_ROUNDOFF.get(t.dtype, 0.0) for t in (wanted, *(f for f in fakes if isinstance(f, Tensor))))
    row.off = float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))
    if row.worst > 1:
        row.wrong += "beyond the bound of float64; "
    if not row.off <= max(2.0**-16, 64 * u):
        row.wrong += "far from eager; "
    return row


def _against_float64(plan: Plan) -> float:
    """The worst error of the planned kernel over its bound, for some rows of x."""
    worst, dtype = 0.0, plan.match.dtype
    again = [m.recovered.again(m.recovered.sources) for m in plan.bundle.matches]
    for packed, w in zip(plan.packed, join(again, plan.bundle.epilogue, plan.experts > 0), strict=True):
        w64 = dequantize(w).T if packed.across else dequantize(w)
        x = torch.randn(5, w64.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        what = packed.n, packed.k, packed.format.spec
        if packed.across:
            y = x @ ops.DEQUANTIZE(packed.parts, plan.choice.layout, *what, dtype)
            y = y if packed.perm is None else y[:, packed.perm]
        else:
            fed = x if packed.perm is None else x[:, packed.perm]
            y = ops.GEMMS[plan.choice.layout](fed, packed.parts, None, None, *what, "", plan.choice.route)
        call = registry.Call(plan.choice.layout, packed.format, packed.n, packed.k)
        rounding = registry.discover()[plan.choice.pieces[0].kernel].rounding(call, dtype)
        y64 = x.double() @ w64.T
        worst = max(worst, float(((y.double() - y64).abs() / bound(y64, x.double(), w64, rounding)).max()))
    return worst


def facts(model: nn.Module) -> list[Any]:
    """What must be as before of every tensor of a model: where and which version it is, and a sum of its bytes."""
    found: list[Any] = []
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        for inner in _flat(t):
            data = inner.detach().as_subclass(Tensor).contiguous().reshape(-1)
            total = int(data.view(torch.uint8).long().sum()) if data.numel() else 0
            found.append((name, inner.data_ptr(), inner._version, total))
    return found


def settings() -> dict[str, Any]:
    """Global settings of PyTorch that must be as before."""
    return {
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "random": torch.get_rng_state().sum().item(),
        "dynamo": torch._dynamo.config.get_config_copy(),
        "freezing": torch._inductor.config.freezing,
    }


def _flat(t: Any) -> list[Tensor]:
    if not is_traceable_wrapper_subclass(t):
        return [t]
    return [inner for name in t.__tensor_flatten__()[0] for inner in _flat(getattr(t, name))]


def linear(n: int = 128, k: int = 256, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A float layer to quantize."""
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias).to(dtype).requires_grad_(False)


def rows(k: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, k, generator=torch.Generator().manual_seed(1)).to(dtype)
