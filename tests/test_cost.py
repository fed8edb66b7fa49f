"""Predicted time as it decides: which kernel for which rows, and which layout for a workload."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from lqcompile import config, cost
from lqcompile.device import Device
from lqcompile.errors import ArgumentError
from lqcompile.kernels import quick, quick_batch
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
        name: Planner(workload, device)._choose(problem, [f], (1, None), device, "").layout
        for name, workload in {"decode": {1: 1.0}, "prefill": {4096: 1.0}, "both": config.WORKLOAD}.items()
    }
    # Bit planes are the faster read, by little; their batches go by way of a dense weight.
    assert chosen == {"decode": "lut", "prefill": "quick", "both": "quick"}


@pytest.mark.skipif(not has_nvrtc(), reason="without NVRTC kernels for GPUs accept nothing")
def test_the_shapes_of_a_model_are_planned_for_every_number_of_rows():
    device, f = Device.null("sm_90"), Format("affine", 4, 128, "int", "float16")
    planner = Planner(config.WORKLOAD, device)
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)):
        problem = Problem(M, (1, 1 << 31), n, k, f, torch.float16, torch.device("cuda", 0))
        pieces = planner._choose(problem, [f], (1, None), device, "").pieces
        assert pieces[0].low == 1 and pieces[-1].high is None


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (14336, 4096), (28672, 8192)])
def test_many_rows_are_predicted_as_they_are_planned(n, k):
    """One expression for all numbers of rows; plans of two launches may be better than it, by what those save."""
    device, f = Device.null("sm_90"), Format("affine", 4, 128, "int", "float16")
    problem = Problem(M, (1, 1 << 31), n, k, f, torch.float16, torch.device("cuda", 0))
    ms = [16, 64, 256, 512, 768, 1024, 4096, 16384]
    for m, seconds in zip(ms, cost.sample(quick._seconds(problem, "quick", device), ms), strict=True):
        call = Call("quick", f, n, k)
        plan = quick_batch.plan(call, torch.float16, m, device.processors, quick.HOPPER_SHARED)
        assert plan is not None
        assert 0.99 < (seconds - device.launch) / plan.seconds < (1.2 if len(plan.parts) > 1 else 1.35)


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
