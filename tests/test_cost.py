"""Predicted time as it decides: which kernel for which rows, and which layout for a workload."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from lqcompile import config, cost
from lqcompile import device as machine
from lqcompile.device import Device
from lqcompile.errors import ArgumentError
from lqcompile.kernels import quick, quick_batch, registry
from lqcompile.kernels.build import has_nvrtc
from lqcompile.kernels.registry import Call
from lqcompile.passes.plan import Planner
from lqcompile.types import Candidate, Format, Problem

M = sympy.Symbol("m", positive=True, integer=True)
FEW = Candidate("few", "a", 1.0 + 1.0 * M)
MANY = Candidate("many", "a", sympy.Piecewise((20.0, M <= 64), (20.0 + sympy.ceiling(M / 64), True)))


@given(low=st.integers(1, 100), length=st.integers(0, 1000))
def test_pieces_follow_each_other_and_name_the_fastest(low, length):
    high = low + length
    found = cost.pieces([FEW, MANY], low, high)
    assert (found[0].low, found[-1].high) == (low, high)
    assert [p.low for p in found[1:]] == [p.high + 1 for p in found[:-1]]
    for m in cost.grid(low, high):
        piece = next(p for p in found if m <= p.high)
        times = {c.kernel: cost.sample(c.seconds, [m])[0] for c in (FEW, MANY)}
        assert times[piece.kernel] == min(times.values())


def test_a_workload_weighs_what_lies_inside_the_range():
    found = cost.pieces([FEW, MANY], 1, None)
    assert cost.total(found, [FEW, MANY], 1, None, {1: 10.0, 128: 1.0}) == 10 * 2.0 + 22.0
    assert cost.total(found, [FEW, MANY], 2, 200, {1: 10.0, 128: 1.0}) == 22.0
    # Where nothing of it lies inside, by the least number of rows.
    assert cost.total(found, [FEW, MANY], 2, 9, {1: 10.0, 128: 1.0}) == 3.0


@pytest.mark.skipif(not has_nvrtc(), reason="without NVRTC kernels for GPUs accept nothing")
def test_the_workload_chooses_the_layout_of_an_unknown_number_of_rows():
    device, f = Device.null("sm_90"), Format("affine", 4, 128, "int", "float16")
    problem = Problem(M, (1, 1 << 31), 8192, 8192, f, torch.float16, torch.device("cuda", 0))
    chosen = {
        name: Planner({}, workload, device)._choose(problem, [f], (1, None), device, "").layout
        for name, workload in {"decode": {1: 1.0}, "prefill": {4096: 1.0}, "both": config.WORKLOAD}.items()
    }
    # Bit planes are the faster read, by little; their batches go by way of a dense weight.
    assert chosen == {"decode": "lut", "prefill": "quick", "both": "quick"}


@pytest.mark.skipif(not has_nvrtc(), reason="without NVRTC kernels for GPUs accept nothing")
def test_the_shapes_of_a_model_are_planned_for_every_number_of_rows():
    device, f = Device.null("sm_90"), Format("affine", 4, 128, "int", "float16")
    planner = Planner({}, config.WORKLOAD, device)
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)):
        problem = Problem(M, (1, 1 << 31), n, k, f, torch.float16, torch.device("cuda", 0))
        pieces = planner._choose(problem, [f], (1, None), device, "").pieces
        assert pieces[0].low == 1 and pieces[-1].high is None


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (14336, 4096), (28672, 8192), (4608, 3584)])
def test_many_rows_are_predicted_as_they_are_planned(n, k):
    """One expression for all numbers of rows."""
    device, f = Device.null("sm_90"), Format("affine", 4, 128, "int", "float16")
    problem = Problem(M, (1, 1 << 31), n, k, f, torch.float16, torch.device("cuda", 0))
    ms = [16, 64, 256, 257, 300, 512, 768, 1000, 1024, 1536, 4096, 16384]
    for m, seconds in zip(ms, cost.sample(quick._seconds(problem, "quick", device), ms), strict=True):
        call = Call("quick", f, n, k)
        rows = quick_batch.whole_tiles(m)
        plan = quick_batch.plan(call, torch.float16, rows, device.processors, quick.HOPPER_SHARED)
        assert plan is not None
        assert 0.95 < (seconds - device.launch) / plan.seconds < 1.06


@pytest.mark.parametrize(
    "workload", [{}, [1, 2], "decode", {0: 1.0}, {1: 0.0}, {1: -1.0}, {1: float("nan")}, {1: float("inf")}, {1.5: 1.0}]
)
def test_a_workload_that_is_none_is_named(workload):
    with pytest.raises(ArgumentError, match="workload"):
        config.make(None, {"workload": workload})


def test_a_workload_is_part_of_what_code_is_cached_under():
    ours, theirs = config.make(None, {"workload": {1: 1}}), config.make(None, {})
    assert ours.workload == {1: 1.0} and theirs.workload == config.WORKLOAD
    assert ours.fingerprint != theirs.fingerprint


def test_dense_matmuls_are_predicted_as_they_were_measured():
    device = Device.null("sm_90")
    rows = [r for d in machine.measured().values() if d["device"]["name"] == device.name for r in d["rows"]]
    off = []
    for row in (r for r in rows if r["kind"] == "dense"):
        f, dtype = Format.parse(row["format"]), getattr(torch, row["x_dtype"])
        problem = Problem(M, (1, 1 << 31), row["n"], row["k"], f, dtype, torch.device("cuda", 0))
        off.append(abs(cost.sample(cost.dense(problem, device), [row["m"]])[0] / row["median"] - 1))
    assert len(off) > 50 and max(off) < 0.2 and sorted(off)[len(off) // 2] < 0.05


@given(st.dictionaries(st.integers(1, 5000), st.floats(1e-7, 1e-2), min_size=1, max_size=6), st.integers(1, 1 << 16))
def test_what_was_measured_is_met_and_between_it_predictions_are_scaled(measured, m):
    predicted = 1e-5 + 1e-8 * M
    found = cost.corrected(predicted, M, measured)
    assert cost.sample(found, list(measured)) == pytest.approx(list(measured.values()))
    factors = [s / cost.sample(predicted, [at])[0] for at, s in measured.items()]
    factor = cost.sample(found, [m])[0] / cost.sample(predicted, [m])[0]
    assert 0.999 * min(factors) <= factor <= 1.001 * max(factors)


def test_a_cpu_multiplies_types_of_16_bits_at_a_rate_of_their_own():
    device = Device("cpu", "any", 1e10, 1e11, 1e12, 5e-6, "cpu", 1)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = Problem(
            M, (1, 1 << 31), 4096, 4096, Format("affine", 4, 128, "int", "float32"), dtype, torch.device("cpu")
        )
        seconds[dtype] = cost.sample(cost.dense(problem, device), [1024])[0]
    assert seconds[torch.float32] > 5 * seconds[torch.bfloat16] == 5 * seconds[torch.float16]


@pytest.mark.parametrize(("n", "k"), [(0, 128), (64, 0)])
@pytest.mark.parametrize("arch", ["sm_90", "cpu"])
def test_an_empty_weight_has_a_price(n, k, arch):
    device, int4 = Device.of("cpu") if arch == "cpu" else Device.null(arch), Format("affine", 4, 64, "int", "float16")
    for kernel in registry.discover().values():
        for layout in kernel.layouts if device.kind in kernel.devices else ():
            empty = Problem(M, (1, 1), n, k, int4, torch.float16, torch.device(device.kind))
            assert 0 < cost.sample(kernel.seconds(empty, layout, device), [1])[0] < 1e-3
