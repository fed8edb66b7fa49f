"""Weights of many experts in one op: every element within the bound, experts that are not read, launches, captures."""

from __future__ import annotations

import dataclasses
import math
from random import Random

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from lqcompile import cost, formats, profile
from lqcompile.errors import ArgumentError
from lqcompile.kernels import grouped, ops, registry
from lqcompile.kernels.layout import LAYOUTS
from lqcompile.kernels.registry import X_DTYPES, Call
from lqcompile.types import Format, Problem, QWeight

from .conftest import NO_CUDA
from .test_formats import SEEDS
from .test_ops import FORMS, KERNELS, random_weight, random_x, within_bound

each_kernel = pytest.mark.parametrize(("kernel", "layout"), KERNELS)
sizes = st.tuples(
    st.sampled_from([1, 2, 3, 8, 33]),
    st.sampled_from([32, 64, 96]),
    st.sampled_from([(128, 64), (32, 32), (96, 32), (256, 128), (1024, 256), (136, 136)]),
)


def random_ends(random: Random, m: int, experts: int, device: torch.device) -> torch.Tensor:
    """Where the rows of experts end: anyhow, all of one expert, or some rows of nobody."""
    kind = random.choice(("any", "one", "fewer"))
    ends = sorted(random.randint(0, m) for _ in range(experts))
    if kind == "one":
        whose = random.randrange(experts)
        ends = [0] * whose + [m] * (experts - whose)
    ends[-1] = ends[-1] if kind == "fewer" else m
    return torch.tensor(ends, dtype=torch.int32, device=device)


def one_of(w: QWeight, expert: int, n: int) -> QWeight:
    """The weight of one expert, of `n` outputs."""
    rows = slice(expert * n, (expert + 1) * n)
    each = {name: getattr(w, name) for name in ("codes", "scale", "zero", "alpha", "offset", "table")}
    shared = {"table"} if w.table is not None and w.table.ndim == 1 else set()
    cut = {name: t if name in shared else t[rows] for name, t in each.items() if t is not None}
    return dataclasses.replace(w, n=n, **cut)


def run(x, parts, ends, call, kernel, epilogue=""):
    return ops.GROUPED(x, parts, ends, call.layout, call.n, call.k, call.format.spec, epilogue, kernel)


def all_within_bound(y, x, w, ends, call, kernel, epilogue) -> bool:
    begin, right = 0, True
    for expert, end in enumerate(ends.tolist()):
        rows = slice(begin, end)
        own, rounding = one_of(w, expert, call.n), registry.discover()[kernel].rounding(call, x.dtype)
        right &= end <= begin or within_bound(y[rows], x[rows], own, None, rounding, epilogue)
        begin = max(begin, end)
    return right


@each_kernel
@pytest.mark.parametrize(("form", "zero"), FORMS)
@given(
    seed=SEEDS, size=sizes, m=st.sampled_from([0, 1, 2, 5, 17, 40, 130]), bits=st.integers(1, 8),
    dtype=st.sampled_from(X_DTYPES), epilogue=st.sampled_from(["", "silu_mul"]),
)  # fmt: skip
def test_every_element_is_within_the_bound(kernel, layout, form, zero, device, seed, size, m, bits, dtype, epilogue):
    (experts, n, (k, group)), random = size, Random(seed)
    if form not in LAYOUTS[layout].forms:
        return
    w = random_weight(random, experts * n, k, group, form, zero, bits, device)
    call = Call(layout, w.format, n, k)
    if grouped.refusal(registry.discover()[kernel], call, dtype, device.type) is not None:
        return
    parts, x = LAYOUTS[layout].pack(w), random_x(random, m, k, dtype, device)
    ends = random_ends(random, m, experts, device)
    y = run(x, parts, ends, call, kernel, epilogue)
    assert y.shape == (m, n // 2 if epilogue else n) and y.dtype == dtype
    assert all_within_bound(y, x, w, ends, call, kernel, epilogue)
    last = int(ends[-1])
    assert torch.equal(run(x, parts, ends, call, kernel, epilogue)[:last], y[:last])


def simple(device, experts=4, n=64, k=128, seed=0):
    w = random_weight(Random(seed), experts * n, k, 64, "affine", "int", 4, device)
    return w, LAYOUTS["quick"].pack(w), Call("quick", w.format, n, k)


def kernel_of(device) -> str:
    """The one that reads experts in one launch, or one expert after the other."""
    return "quick" if device.type == "cuda" else "quick_cpu"


def test_an_expert_without_rows_is_not_read(device):
    """Poison in its scales would show."""
    _, parts, call = simple(device)
    x = torch.randn(7, call.k, device=device).bfloat16()
    ends = torch.tensor([0, 3, 3, 7], dtype=torch.int32, device=device)
    wanted = run(x, parts, ends, call, kernel_of(device))
    scale = grouped.of_expert([parts[1]], 0, 4)[0], grouped.of_expert([parts[1]], 2, 4)[0]
    for part in scale:
        part.fill_(float("nan"))
    assert torch.equal(run(x, parts, ends, call, kernel_of(device)), wanted)


@pytest.mark.parametrize("ends", [[-5, 2, 1, 99], [9, 3, 3, 3], [0, 0, 0, 0], [2**31 - 1, -(2**31), 4, 6]])
def test_ends_that_make_no_sense_touch_nothing_else(ends, device):
    _, parts, call = simple(device)
    x = torch.full((20, call.k), float("nan"), device=device).bfloat16()
    x[8:14] = 1.0
    y = run(x[8:14], parts, torch.tensor(ends, dtype=torch.int32, device=device), call, kernel_of(device))
    assert y.shape == (6, call.n)


def broken_calls():
    _, parts, call = simple("cpu")
    x, ends = torch.randn(6, 128), torch.tensor([1, 2, 4, 6], dtype=torch.int32)
    rest = ("quick", 64, 128, call.format.spec, "", "dense")
    yield "ends", (x, parts, ends.long(), *rest)
    yield "ends", (x, parts, ends[None], *rest)
    yield "ends", (x, parts, ends[:0], *rest)
    yield "parts.planes", (x, parts, ends[:3], *rest)
    yield "x.shape", (x[None], parts, ends, *rest)
    yield "x.shape", (x[:, :64], parts, ends, *rest)
    yield "x.dtype", (x.double(), parts, ends, *rest)
    yield "multiple of 32", (x, parts, torch.arange(8, dtype=torch.int32), "quick", 48, *rest[2:])
    yield "layout", (x, parts, ends, "rows", *rest[1:])
    yield "epilogue", (x, parts, ends, *rest[:4], "add", "dense")
    yield "epilogue", (x, parts, ends, *rest[:4], "relu", "dense")
    yield "route", (x, parts, ends, *rest[:5], "fastest")
    yield "route", (x, parts, ends, *rest[:5], "dense@4,dense/lut")
    yield "route", (x, parts, ends, *rest[:5], "lut")
    yield "device", (x, parts, ends.to("meta"), *rest)


@pytest.mark.parametrize("case", range(len(list(broken_calls()))))
def test_unusable_arguments_are_named(case):
    name, given_ = list(broken_calls())[case]
    with pytest.raises((ArgumentError, RuntimeError)) as caught:
        ops.GROUPED(*given_)
    assert name in str(caught.value)


@pytest.mark.parametrize("m", [0, 6])
@pytest.mark.parametrize("epilogue", ["", "silu_mul"])
def test_opcheck(m, epilogue, device):
    _, parts, call = simple(device)
    x = torch.randn(m, 2 * call.k, device=device)[:, ::2].bfloat16()
    ends = torch.tensor([0, 2, 2, 6], dtype=torch.int32, device=device).clamp(max=m)
    how = (call.layout, call.n, call.k, call.format.spec, epilogue, kernel_of(device))
    torch.library.opcheck(ops.GROUPED, (x, parts, ends, *how))


def test_a_gradient_is_refused_by_name():
    _, parts, call = simple("cpu")
    x = torch.randn(6, 128, requires_grad=True)
    y = run(x, parts, torch.tensor([1, 2, 4, 6], dtype=torch.int32), call, "dense")
    with pytest.raises(NotImplementedError, match="grouped_gemm has no gradient"):
        y.sum().backward()


# More shares than thread blocks, rows beyond one reading, k cut over clusters; and few experts of many.
LARGE = [(8, 4096, 4096, 32), (8, 4096, 14336, 32), (2, 28672, 1024, 2), (64, 1024, 2048, 300), (8, 14336, 4096, 100)]


@NO_CUDA
@pytest.mark.parametrize(("experts", "n", "k", "m"), LARGE)
@pytest.mark.parametrize("epilogue", ["", "silu_mul"])
def test_large_experts_are_within_the_bound(experts, n, k, m, epilogue):
    device = torch.device("cuda")
    w = formats.random_weight(Format("affine", 4, 128, "int", "float16"), experts * n, k, device)
    call, parts = Call("quick", w.format, n, k), LAYOUTS["quick"].pack(w)
    x = torch.randn(m, k, device=device).bfloat16()
    for seed in range(3):
        ends = random_ends(Random(seed), m, experts, device)
        for kernel in ("quick", "dense"):
            y = run(x, parts, ends, call, kernel, epilogue)
            assert all_within_bound(y, x, w, ends, call, kernel, epilogue)


@NO_CUDA
def test_a_captured_call_is_replayed_with_other_rows_and_neither_waits_nor_allocates():
    device = torch.device("cuda")
    w, parts, call = simple(device, experts=8, n=256, k=512)
    x, ends = torch.randn(40, call.k, device=device).bfloat16(), torch.zeros(8, dtype=torch.int32, device=device)
    for kernel in ("quick", "dense"):
        run(x, parts, ends, call, kernel)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, parts, ends, call, "quick")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1, "more than y"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        outs = {kernel: run(x, parts, ends, call, kernel) for kernel in ("quick", "dense")}
    for seed in range(6):
        x.copy_(torch.randn(40, call.k, device=device))
        ends.copy_(random_ends(Random(seed), 40, 8, device))
        graph.replay()
        torch.cuda.synchronize()
        assert all(all_within_bound(y, x, w, ends, call, kernel, "") for kernel, y in outs.items())


@NO_CUDA
def test_each_launch_sees_what_the_one_before_it_wrote():
    """Ends too: a launch may start before the one before it ends."""
    device = torch.device("cuda")
    _, parts, call = simple(device, experts=8, n=256, k=256)
    start, ends = torch.randn(24, 256, device=device).bfloat16(), torch.arange(3, 27, 3, device=device).int()

    def chain(wait: bool) -> torch.Tensor:
        x, own = start, ends
        for _ in range(40):
            x = run(x, parts, own, call, "quick").mul(2**-4).clamp(-4, 4)
            own = torch.cat([((own[:-1] + 5) % 24).sort().values, own[-1:]])
            if wait:
                torch.cuda.synchronize()
        return x

    slow = chain(wait=True)
    assert all(torch.equal(chain(wait=False), slow) for _ in range(3))


def test_costs_grow_with_rows_and_with_experts(device):
    m, found = sympy.Symbol("m", positive=True, integer=True), profile.of(device)
    problem = Problem(m, (1, 4096), 4096, 4096, Format("affine", 4, 128, "int", "bfloat16"), torch.bfloat16, device)
    for kernel in registry.discover().values():
        if grouped.refusal(kernel, Call("quick", problem.format, 4096, 4096), problem.x_dtype, device.type) is None:
            few, many = (grouped.seconds(kernel, problem, e, "quick", found) for e in (4, 8))
            times = cost.sample(few, [1, 2, 4, 64, 4096])
            assert times == sorted(times) and all(math.isfinite(t) for t in times)
            assert cost.sample(many, [8]) > cost.sample(few, [4])
