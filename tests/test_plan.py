"""What the planner decides by time: which matmuls are left to Inductor, and which weights are packed twice."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import sympy
import torch

import lqcompile
from lqcompile import backend, config, cost
from lqcompile.device import Device
from lqcompile.errors import ArgumentError, Reason, Refused
from lqcompile.formats import dequantize, random_weight
from lqcompile.kernels import ops, registry
from lqcompile.kernels.build import has_nvrtc
from lqcompile.kernels.layout import LAYOUTS
from lqcompile.passes import pipeline
from lqcompile.passes.merge import bundles
from lqcompile.passes.plan import LAUNCHES, MARGIN, Planner
from lqcompile.types import Format, Problem

from .libraries.harness import Backend
from .models import Dequant, close, compiled, mlp

M = sympy.Symbol("m", positive=True, integer=True)
INT4 = Format("affine", 4, 128, "int", "float16")
BOTH = {"copies": 2}
CPU = torch.device("cpu")


def problem(n=4096, k=4096, format=INT4):
    return Problem(M, (1, 1 << 31), n, k, format, torch.float16, torch.device("cuda", 0))


def taking(monkeypatch, seconds):
    """Every kernel takes `seconds(problem, layout, device)`, from now on."""
    for name, kernel in registry.discover().items():
        monkeypatch.setitem(registry.KERNELS, name, dataclasses.replace(kernel, seconds=seconds))


@pytest.mark.parametrize("tied", [False, True])
def test_codes_go_as_soon_as_they_are_packed(tied, monkeypatch):
    layers = [Dequant(32, 32, seed=i) for i in range(5)]
    model = torch.nn.Sequential(*layers, *layers[:1] * tied).eval()
    codes, held = [], []

    def seen(matches, constants):
        codes.extend(weakref.ref(r.weights[0].codes) for r in dict.fromkeys(m.recovered for m in matches))
        return bundles(matches, constants)

    def plan(self, bundle):
        held.append(sum(t() is not None for t in codes))
        return planned(self, bundle)

    planned = Planner.plan
    monkeypatch.setattr(pipeline, "bundles", seen)
    monkeypatch.setattr(Planner, "plan", plan)
    backend = Backend()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(3, 32))
    assert backend.outcomes[0].lowered is not None
    # What is tied is held until the last that reads it is planned.
    assert held == ([5, 5, 4, 3, 2, 1] if tied else [5, 4, 3, 2, 1])
    assert not any(t() is not None for t in codes)


def few_or_many(problem, layout, device):
    """Layout `lut` is for few rows, `quick` for many; they cross at m = 50."""
    return 1e-8 * problem.m if layout == "lut" else sympy.Float(50.5e-8)


@pytest.mark.skipif(not has_nvrtc(), reason="without NVRTC kernels for GPUs accept nothing")
@pytest.mark.parametrize("m", [None, 1, 16, 4096])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (4096, 4096), (49152, 12288)])
def test_what_is_faster_than_inductor_is_rewritten(m, n, k):
    device, m_range = Device.null("sm_90"), (m or 1, m)
    choice = Planner({}, config.WORKLOAD, device)._choose(problem(n, k), [INT4], m_range, device, "")
    assert choice.pieces


@pytest.mark.parametrize(("times", "kept"), [(0.5, False), (1.0, False), (0.99 * MARGIN, False), (1.01 * MARGIN, True)])
@pytest.mark.parametrize("m_range", [(1, None), (4096, 4096)])
def test_what_inductor_does_faster_by_a_margin_is_kept(monkeypatch, times, kept, m_range):
    device = Device.null("sm_90")
    inductor = cost.inductor(cost.dense(problem(), device), problem(), device)
    taking(monkeypatch, lambda problem, layout, device: times * (inductor + LAUNCHES * device.launch / MARGIN))
    planner = Planner({}, config.WORKLOAD, device)
    if kept:
        with pytest.raises(Refused) as refused:
            planner._choose(problem(), [INT4], m_range, device, "")
        assert refused.value.reason is Reason.SLOWER
    else:
        assert planner._choose(problem(), [INT4], m_range, device, "").pieces


def test_inductor_reads_codes_and_writes_a_dense_weight_before_it_multiplies():
    device = Device.null("sm_90")
    dense = cost.sample(cost.dense(problem(), device), [1])[0]
    moved = 4096 * 4096 * (0.5 + 2) / device.bandwidth
    assert cost.sample(cost.inductor(cost.dense(problem(), device), problem(), device), [1])[0] == pytest.approx(
        dense + device.launch + moved
    )
    # Codes that were stored a byte each are read so.
    apart = cost.inductor(cost.dense(problem(), device), problem(), device, apart=True)
    more = 4096 * 4096 * 0.5 / device.bandwidth
    assert cost.sample(apart, [1])[0] == pytest.approx(dense + device.launch + moved + more)


def test_a_kept_matmul_says_so_and_computes_the_same(monkeypatch):
    taking(monkeypatch, lambda problem, layout, device: sympy.Float(1.0))
    model, x = mlp(), torch.randn(3, 128)
    with torch.no_grad():
        report = lqcompile.explain(model, x)
        assert [d.reason for d in report.decisions] == [Reason.SLOWER] * 2
        assert "faster than leaving it to Inductor" in report.text()
        assert close(compiled(model)(x), model(x))


@pytest.fixture
def seen(monkeypatch):
    """(rows, layout) of each launch of ours from now on; kernels take `few_or_many`."""
    launches = []
    taking(monkeypatch, few_or_many)
    for name, kernel in registry.discover().items():

        def run(x, parts, bias, call, out, *rest, own=kernel.run):
            launches.append((x.shape[0], call.layout))
            own(x, parts, bias, call, out, *rest)

        monkeypatch.setitem(registry.KERNELS, name, dataclasses.replace(kernel, run=run))
    ops.parse_route.cache_clear()
    ops.copies.cache_clear()
    yield launches
    ops.parse_route.cache_clear()
    ops.copies.cache_clear()


@torch.no_grad()
def test_two_copies_serve_few_rows_and_many(seen):
    model = mlp()
    with backend.recording() as reports:
        f = torch.compile(model, backend="lq", dynamic=True, options={"strict": True, **BOTH})
        for m, layout in ((2, "lut"), (50, "lut"), (51, "quick"), (300, "quick")):
            x = torch.randn(m, 128)
            seen.clear()
            assert close(f(x), model(x))
            assert set(seen) == {(m, layout)}
        # What changes is packed again in both.
        model[0].q.copy_(model[0].q.flip(0))
        assert close(f(x), model(x)) and close(f(x[:2]), model(x[:2]))
    (report,) = reports
    few, many = report.decisions[0].pieces
    assert (few.high, few.layout, many.layout) == (50, "lut", "quick")
    assert report.decisions[0].layout == "lut+quick" and "(quick copy) for M >= 51" in report.text()
    assert [p["copy"] for p in report.document()["decisions"][0]["pieces"]] == ["lut", "quick"]


@torch.no_grad()
def test_one_copy_unless_asked_for_two(seen):
    with backend.recording() as reports:
        f = torch.compile(mlp(), backend="lq", dynamic=True, options={"strict": True})
        for m in (2, 300):
            f(torch.randn(m, 128))
    one = reports[0].decisions[0]
    assert {layout for _, layout in seen} == {one.layout} <= set(LAYOUTS)
    planner = Planner({}, config.WORKLOAD, Device.of("cpu"), copies=2)
    weight = Format("affine", 4, 32, "int", "float32")
    size = Problem(M, (1, 1 << 31), 64, 128, weight, torch.float32, torch.device("cpu"))
    assert planner._choose(size, [weight], (1, None), Device.of("cpu"), "").layout == "lut+quick"
    # A number of rows that is known needs one kernel, and gains that are worth no memory none.
    assert planner._choose(size, [weight], (51, 51), Device.of("cpu"), "").layout == "quick"
    rare = Planner({}, {1: 1e6, 4096: 1.0}, Device.of("cpu"), copies=2)
    assert rare._choose(size, [weight], (1, None), Device.of("cpu"), "").layout == "lut"


def test_memory_is_told_of_both_copies(seen):
    model, x = mlp(), torch.randn(3, 128)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        one, two = (lqcompile.explain(model, x, options=given).bytes_after for given in ({}, BOTH))
    assert one < two < 2.5 * one


@pytest.mark.parametrize("form", ["affine", "table"])
def test_the_op_reads_the_copy_that_its_route_names(form):
    weight = random_weight(Format(form, 4, 32, "int" if form == "affine" else "none", "float32"), 64, 128, CPU)
    lut, quick = (LAYOUTS[name].pack(weight) for name in ("lut", "quick"))
    args = (None, None, 64, 128, weight.format.spec, "")
    route = "dense@4,dense/quick"
    for m, other in ((3, quick), (5, lut)):
        x = torch.randn(m, 128, requires_grad=True)
        # The other copy is not looked at.
        codes = other[0].clone()
        with torch.no_grad():
            other[0].zero_()
            y = ops.GEMMS["lut"](x, [*lut, *quick], *args, route)
            other[0].copy_(codes)
        assert torch.allclose(y, x @ dequantize(weight).float().T, rtol=1e-4, atol=1e-4)
        ops.GEMMS["lut"](x, [*lut, *quick], *args, route).sum().backward()
        assert torch.allclose(x.grad, dequantize(weight).float().sum(0).expand(m, -1), rtol=1e-4, atol=1e-4)
    for parts in (lut, [*lut, *quick[:-1]], [*lut, *quick, quick[-1]]):
        with pytest.raises(ArgumentError, match="parts"):
            ops.GEMMS["lut"](x, parts, *args, route)
    with pytest.raises(ArgumentError, match="layouts of"):
        ops.GEMMS["lut"](x, [*lut, *quick], *args, "dense@4,dense/other")


@pytest.mark.parametrize("copies", [0, 3, True, "2", 1.0])
def test_a_number_of_copies_that_is_none_is_named(copies):
    with pytest.raises(ArgumentError, match="copies"):
        config.make(None, {"copies": copies})
