"""The CPU kernel for many rows of bfloat16: bound, the weight it rounds, equal bits, memory, and who may run it."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch

from lqcompile import cost
from lqcompile.device import Device
from lqcompile.errors import ArgumentError
from lqcompile.kernels import dense, native, registry
from lqcompile.kernels.layout import LAYOUTS
from lqcompile.types import Candidate, Format, Problem

from .test_cpu import BFLOAT, CASES, FLOAT, HALF, Case, N, drawn, faked, run, weight
from .test_ops import within_bound

ISA = native.AMX_BF16
KERNELS = {layout: registry.discover()[f"{layout}_bf16"] for layout in ("quick", "lut")}
KERNEL = KERNELS["quick"]
can_run = pytest.mark.skipif(not native.has(ISA) or not native.has_compiler(), reason="no AMX for bf16, or no compiler")
# Several panels of columns, the last one short, and a tail of an odd number of columns.
LONG = [Case("affine", "int", 4, 128, "float16", BFLOAT, 1152), Case("affine", "float", 3, 333, "float32", BFLOAT, 333)]
LONG += [Case("binary", "float", 3, 128, "float16", BFLOAT, 1152), Case("table", "none", 4, 32, "float16", BFLOAT, 800)]
ALL = [dataclasses.replace(case, x_dtype=BFLOAT) for case in CASES] + LONG
each_case = pytest.mark.parametrize("case", ALL, ids=str)
# One block of rows of w and less, and more than one.
NS = (N, 1, 16, 17, 300)


@can_run
@each_case
def test_every_element_is_within_the_bound(case):
    for seed, n in enumerate(NS):
        w = weight(case, n, seed)
        for m in (1, 5, 33, 130):
            x, bias = drawn(case, m, seed * 1000 + m), torch.randn(n).to(BFLOAT) if seed % 2 == 0 else None
            y = run(ISA, case, w, x, bias)
            assert within_bound(y, x, w, bias, KERNELS[case.layout].rounding(case.call(n), BFLOAT)), (n, m)


@can_run
@each_case
def test_one_hot_rows_read_every_weight_back_rounded_once(case):
    for seed, n in enumerate(NS):
        w = weight(case, n, seed)
        # Sums of planes that float32 holds.
        coarse = {name: getattr(w, name) for name in ("alpha", "offset") if getattr(w, name) is not None}
        w = dataclasses.replace(
            w, **{name: t.float().mul(64).round().div(64).to(t.dtype) for name, t in coarse.items()}
        )
        eye, parts = torch.eye(case.k, dtype=BFLOAT), LAYOUTS[case.layout].pack(w)
        wanted = dense._by_torch(parts, case.call(n), BFLOAT).T
        assert torch.equal(run(ISA, case, w, eye, parts=parts), wanted), n


@can_run
@each_case
def test_any_number_of_rows_and_threads_gives_the_same_bits(case):
    w, x = weight(case, 300), drawn(case, 600, 7)
    wanted = run(ISA, case, w, x)
    assert all(torch.equal(run(ISA, case, w, x, threads=threads), wanted) for threads in (1, 2, 3, 16))
    for m in (1, 16, 31, 64, 511, 513):
        assert torch.equal(run(ISA, case, w, x[:m].contiguous()), wanted[:m]), m


@can_run
@each_case
def test_nan_and_inf_stay_in_their_row(case):
    w = weight(case)
    x = torch.randn(600, case.k, generator=torch.Generator().manual_seed(1)).to(BFLOAT)
    clean = run(ISA, case, w, x)
    x[0, case.k - 1], x[1, 0], x[599, 0] = float("nan"), float("-inf"), float("nan")
    y = run(ISA, case, w, x)
    assert bool(y[0].isnan().all()) and not bool(y[1].isfinite().any()) and bool(y[599].isnan().all())
    assert torch.equal(y[2:599], clean[2:599])


@can_run
def test_infinite_weights_are_not_made_of_columns_beyond_k():
    case = LONG[1]
    w = weight(case)
    # Finite numbers alone are packed, whose products overflow.
    w.scale[3] = 3e38
    w.codes.fill_(7)
    w.zero.fill_(3)
    y = run(ISA, case, w, torch.ones(2, case.k, dtype=BFLOAT))
    assert bool((y[:, 3] == float("inf")).all()) and bool(y[:, 4:].isfinite().all())


@can_run
def test_another_librarys_tiles_are_put_back():
    x, w = torch.randn(64, 256).bfloat16(), torch.randn(512, 256).bfloat16()
    wanted = torch.nn.functional.linear(x, w)
    run(ISA, ALL[0], weight(ALL[0]), drawn(ALL[0], 40, 0))
    assert torch.equal(torch.nn.functional.linear(x, w), wanted)


def test_only_a_cpu_with_its_instructions_runs_it(monkeypatch):
    case = ALL[0]
    monkeypatch.setattr(native, "has_compiler", lambda: True)
    monkeypatch.setattr(native, "_may_use_amx", lambda: True)
    everything = {need for isa in (*native.ISAS, ISA) for need in isa.needs}
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset(everything))
    assert KERNEL.accepts(case.call(N), BFLOAT, "cpu") is None
    for dtype in (HALF, FLOAT):
        assert "bfloat16" in KERNEL.accepts(case.call(N), dtype, "cpu")
    # The exact kernels' tiles are not enough, nor are tiles that the operating system keeps to itself.
    faked(monkeypatch, "amx")
    assert "AMX" in KERNEL.accepts(case.call(N), BFLOAT, "cpu")
    with pytest.raises(ArgumentError, match="amx"):
        native.load("quick_bf16.cpp", ISA, (("NEVER_SEEN", 1),))
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset(everything))
    monkeypatch.setattr(native, "_may_use_amx", lambda: False)
    assert "AMX" in KERNEL.accepts(case.call(N), BFLOAT, "cpu")


@can_run
@pytest.mark.parametrize("size", [(4096, 4096), (11008, 4096), (4096, 11008)])
@pytest.mark.parametrize(
    ("spec", "few", "least", "most"),
    [
        ("affine:4:128:int:bfloat16", "quick_cpu", 48, 127),
        ("affine:4:32:int:bfloat16", "quick_cpu", 16, 47),
        ("binary:3:128:float:bfloat16", "lut_cpu", 8, 23),
        ("table:4:64:none:bfloat16", "table_cpu", 4, 12),
    ],
)
def test_few_rows_are_another_kernels_and_many_are_its_own(size, spec, few, least, most):
    m, device = sympy.Symbol("m", positive=True, integer=True), Device.of("cpu")
    problem = Problem(m, (1, 4096), *size, Format.parse(spec), BFLOAT, torch.device("cpu"))
    layout = "lut" if few == "lut_cpu" else "quick"
    kernels = [registry.discover()[name] for name in (few, f"{layout}_bf16", "dense")]
    found = [Candidate(kernel.name, layout, kernel.seconds(problem, layout, device)) for kernel in kernels]
    first, second = cost.pieces(found, 1, 4096)
    assert (first.kernel, second.kernel) == (few, f"{layout}_bf16") and least <= first.high <= most
