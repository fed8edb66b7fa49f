"""Scales that outputs share, as hqq has them along axis 0: packed transposed, and the outputs put back in order."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lqcompile
from lqcompile.errors import Reason
from lqcompile.formats import UNIT_ROUNDOFF, bound
from lqcompile.passes import pipeline
from lqcompile.passes.constants import Constants
from lqcompile.passes.recognise import Recogniser
from lqcompile.types import Rounding

from .libraries.harness import Backend
from .memory import peak
from .models import close, compiled


class Across(nn.Module):
    """Every (n/group)th output shares a scale and a zero point for each input; or, `near`, those side by side."""

    def __init__(
        self, n=128, k=32, group=64, bits=4, zero="float", dtype=torch.float32, bias=False, near=False, seed=0
    ) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.size, self.near, one = (n, k), near, 1 if near else 0
        shape, of_each = [group, n // group, k], [1, n // group, k]
        shape, of_each = ([t[1], t[0], t[2]] if near else t for t in (shape, of_each))
        assert of_each[one] == 1
        codes = torch.randint(0, 1 << bits, shape, generator=g)
        signed = zero == "none"
        self.register_buffer("codes", (codes - (1 << bits - 1)).to(torch.int8) if signed else codes.to(torch.uint8))
        self.register_buffer("scale", (torch.rand(of_each, generator=g) * 0.1 + 0.01).to(dtype))
        zeros = torch.rand(of_each, generator=g) * (1 << bits)
        self.zero = {"none": None, "float": zeros.to(dtype), "int": zeros.to(torch.uint8)}[zero]
        self.bias = nn.Parameter(torch.randn(n, generator=g).to(dtype), requires_grad=False) if bias else None

    def weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight [n, k]."""
        scale = self.scale if dtype is None else self.scale.to(dtype)
        codes = self.codes.to(scale.dtype)
        codes = codes if self.zero is None else codes - self.zero.to(scale.dtype)
        return (codes * scale).view(self.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight(), self.bias)


def rows(m: int, k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(1)).to(dtype)


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.data())
def test_results_are_within_the_bound(data):
    group, dtype = data.draw(st.sampled_from((4, 12, 64))), data.draw(st.sampled_from(tuple(UNIT_ROUNDOFF)[:3]))
    n, k = group * data.draw(st.integers(1, 5)), data.draw(st.sampled_from((1, 3, 32, 100)))
    zero, bits = data.draw(st.sampled_from(("none", "float", "int"))), data.draw(st.sampled_from((1, 2, 3, 4, 8)))
    bias, near = data.draw(st.booleans()), data.draw(st.booleans())
    hypothesis.assume(zero != "none" or bits > 1)
    model = Across(n, k, group, bits, zero, dtype, bias, near, seed=data.draw(st.integers(0, 99))).eval()
    x, backend = rows(data.draw(st.integers(1, 9)), k, dtype), Backend()
    torch._dynamo.reset()
    with torch.no_grad():
        y = torch.compile(model, backend=backend)(x)
    (decision,) = backend.outcomes[0].decisions
    assert decision.outcome == "rewritten", decision
    w64, u = model.weight(torch.float64), UNIT_ROUNDOFF[dtype]
    y64, extra = x.double() @ w64.T, torch.zeros((), dtype=torch.float64)
    allowed = bound(y64, x.double(), w64, Rounding(u + 2.0**-22, 2.0**-24, u))
    if bias:
        # It is added to what was rounded before.
        y64, extra = y64 + model.bias.double(), u * (y64.abs() + model.bias.double().abs() + allowed) + 2.0**-24
    assert bool(((y.double() - y64).abs() <= allowed + extra).all())


def decided(model: nn.Module, *inputs: torch.Tensor):
    torch._dynamo.reset()
    return lqcompile.explain(model, *inputs, options={"strict": True}).decisions


def test_the_decision_says_so():
    with torch.no_grad():
        (decision,) = decided(Across(128, 32).eval(), rows(3, 32))
    assert (decision.outcome, decision.rule, decision.problem["n"], decision.problem["k"]) == (
        "rewritten",
        "affine",
        128,
        32,
    )
    assert decision.problem["across"] is True and decision.format.group == 64
    assert [p.kernel for p in decision.pieces] == ["dense"]
    assert decision.bytes_after < decision.bytes_before / 4
    assert [s.text.split("(")[0] for s in decision.after if s.role in ("constant", "matmul")] == [
        "dequantize.v2",
        "matmul",
    ]


class Nibbles(Across):
    """The same codes, two a byte."""

    def __init__(self, n, k) -> None:
        super().__init__(n, k)
        low, high = self.codes.chunk(2)
        self.codes = low | high << 4

    def weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        codes = torch.cat([self.codes & 15, self.codes >> 4]).to(self.scale.dtype)
        return ((codes - self.zero) * self.scale).view(self.size)


@pytest.mark.parametrize(("kind", "reason"), [(Across, Reason.SLOWER), (Nibbles, None)])
def test_codes_of_a_byte_each_are_left_to_inductor_on_a_cpu(kind, reason):
    # It has nothing to unpack, and multiplies by as dense a weight.
    with torch.no_grad():
        (decision,) = decided(kind(2048, 1024).eval(), rows(1, 1024))
    assert decision.reason is reason


def test_outputs_in_place_are_not_moved():
    with torch.no_grad():
        (apart,), (near,) = (decided(Across(128, 32, near=near).eval(), rows(3, 32)) for near in (False, True))
    assert ["index_select" in " ".join(s.text for s in d.after) for d in (apart, near)] == [True, False]


class ByInput(nn.Module):
    """One scale for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-8, 8, (48, 32), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(32) + 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes * self.scale).t()


def test_a_scale_for_each_input_is_a_group_of_all_outputs():
    model, x = ByInput().eval(), rows(3, 32)
    with torch.no_grad():
        (decision,) = decided(model, x)
        assert (decision.outcome, decision.format.group) == ("rewritten", 48)
        assert close(compiled(model)(x), model(x))


def test_one_graph_serves_every_number_of_rows():
    model = Across(192, 32, bias=True).eval()
    torch._dynamo.reset()
    fast = compiled(model)
    with torch.no_grad():
        for m in (4, 9, 33):
            x = rows(m, 32)
            torch._dynamo.mark_dynamic(x, 0)
            assert close(fast(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def scaled(m: Across) -> None:
    m.scale.mul_(1.7)


def recoded(m: Across) -> None:
    m.codes.bitwise_xor_(5)


def reordered(m: Across) -> None:
    other = Across(64, 64, group=16, near=not m.near, seed=3)
    m.near, m.codes, m.scale, m.zero = other.near, other.codes, other.scale, other.zero


def along_inputs(m: Across) -> None:
    m.scale.fill_(0.5)
    m.zero.fill_(3.0)


@pytest.mark.parametrize("change", [scaled, recoded, reordered, along_inputs], ids=lambda f: f.__name__)
def test_what_changes_is_used(change):
    # As many inputs as outputs: a weight read the wrong way round would fit.
    model, x = Across(64, 64, group=16).eval(), rows(3, 64)
    torch._dynamo.reset()
    fast = compiled(model)
    with torch.no_grad():
        assert close(fast(x), model(x))
        change(model)
        assert close(fast(x), model(x))


def test_groups_along_inputs_may_become_groups_along_outputs():
    model, x = Across(64, 64, group=16).eval(), rows(3, 64)
    scale, zero = model.scale.clone(), model.zero.clone()
    along_inputs(model)
    torch._dynamo.reset()
    fast = compiled(model)
    with torch.no_grad():
        assert close(fast(x), model(x))
        model.scale.copy_(scale)
        model.zero.copy_(zero)
        assert close(fast(x), model(x))


class Pair(nn.Module):
    """Gate and up of one x, as an epilogue and a merge would take them, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = Across(128, 32, seed=1), Across(128, 32, seed=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.gate(x)) * self.up(x) + self.gate(x + 1)


def test_they_are_never_merged_but_share_a_tied_weight():
    model, x, backend = Pair().eval(), rows(3, 32), Backend()
    torch._dynamo.reset()
    with torch.no_grad():
        assert close(torch.compile(model, backend=backend)(x), model(x))
    (outcome,) = backend.outcomes
    assert all(d.outcome == "rewritten" and not {"together", "epilogue"} & set(d.problem) for d in outcome.decisions)
    assert len(outcome.decisions) == 3 and len({id(plan.packed) for plan in outcome.plans}) == 2


class ByVector(Across):
    """Multiplied by a vector, which autocast does not touch on a CPU, or touches, as `op` has it."""

    def __init__(self, op) -> None:
        super().__init__(128, 32, bias=True)
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.op(self.bias, self.weight(), x)


@pytest.mark.parametrize("op", [torch.addmv, lambda b, w, x: torch.mv(w, x) + b, lambda b, w, x: F.linear(x, w, b)],
                         ids=["addmv", "mv", "linear"])  # fmt: skip
def test_autocast_is_as_in_eager(op):
    model, x, backend = ByVector(op).eval(), rows(1, 32)[0], Backend()
    torch._dynamo.reset()
    with torch.no_grad():
        y, wanted = torch.compile(model, backend=backend)(x), model(x)
    assert backend.outcomes[0].decisions[0].outcome == "rewritten" and y.dtype == wanted.dtype
    assert float((y - wanted).abs().max()) <= (
        1e-4 if wanted.dtype == torch.float32 else 2**-6 * float(wanted.abs().max())
    )


class Batch(nn.Module):
    """Two weights in a batch, whose scales are those of inputs, or of outputs."""

    def __init__(self, *by: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-8, 8, (2, 64, 64), dtype=torch.int8))
        self.by, self.scale = by, nn.Parameter(torch.rand(2, 64) + 0.1, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.stack([s.unsqueeze(i).expand(64, 64) for i, s in zip(self.by, self.scale, strict=True)])
        return torch.bmm(x, (self.codes * scale).mT)


@pytest.mark.parametrize(("by", "reason"), [((0, 0), None), ((0, 1), Reason.GROUPS), ((1, 0), Reason.GROUPS)])
def test_a_batch_is_read_one_way(by, reason):
    model, x, backend = Batch(*by).eval(), torch.randn(2, 3, 64), Backend()
    torch._dynamo.reset()
    with torch.no_grad():
        assert close(torch.compile(model, backend=backend)(x), model(x))
    (decision,) = backend.outcomes[0].decisions
    assert decision.reason is reason and bool(decision.problem.get("across")) is (reason is None)


def test_no_float64_copy_is_made_to_recognise_one():
    model, graphs = Across(2048, 2048).eval(), []

    def keep(module, inputs):
        graphs.append((module, inputs))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep)(rows(1, 2048))
    ((module, inputs),) = graphs
    constants = Constants(module.graph, pipeline.static_values(module, inputs))
    assert peak(Recogniser(module, constants, strict=True).run) < 6 * 2048 * 2048


def test_no_dense_weight_is_kept_for_backward():
    model, x = Across(128, 32).eval(), rows(3, 32).requires_grad_()
    (decision,) = decided(model, x)
    assert (decision.outcome, decision.reason) == ("kept", Reason.GROUPS)
    (decision,) = decided(model, x.detach())
    assert decision.outcome == "rewritten"


def test_fewer_outputs_than_a_group_can_have_are_kept():
    model = Across(9, 32, group=3, bits=8).eval()
    with torch.no_grad():
        (decision,) = decided(model, rows(3, 32))
    assert (decision.outcome, decision.reason) == ("kept", Reason.GROUPS)


def test_convert_leaves_them_and_says_so():
    model = nn.Sequential(Across(128, 32)).eval()
    with torch.no_grad():
        converted = lqcompile.convert(model, rows(3, 32))
    (decision,) = lqcompile.conversion(converted).decisions
    assert (decision.outcome, decision.reason) == ("kept", Reason.LAYER)
    assert decision.near_misses[0].at == "scales shared by 64 outputs"
