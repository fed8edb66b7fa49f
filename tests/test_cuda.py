"""Every kernel for CUDA on a real GPU: its numbers, what it may touch, streams and captures, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lqcompile.errors import ArgumentError
from lqcompile.formats import dequantize, random_weight
from lqcompile.kernels import build, ops, registry
from lqcompile.kernels.layout import LAYOUTS
from lqcompile.types import Format

from .conftest import NO_CUDA
from .cuda_cases import BFLOAT, CASES, DEVICE, HALF, KERNELS, KS, MAIN, NS, SPREAD, changed, problem, refusal
from .test_formats import SEEDS, make
from .test_ops import FORMS, arguments, within_bound

pytestmark = NO_CUDA
# Kernels of which one launch does it all, up to so many rows of x: nothing else is allocated, and no bit depends on
# where in memory things are. They refuse parts that are not at a multiple of 16 bytes.
ONE_LAUNCH = {"lut": 8, "quick": 8}
GUARD = 4096

each_kernel = pytest.mark.parametrize(("kernel", "layout"), KERNELS)
each_form = pytest.mark.parametrize("case", SPREAD, ids=str)


def bits(t: torch.Tensor) -> torch.Tensor:
    """NaN equals itself here."""
    return t.contiguous().view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def in_one_launch(kernel: str, m: int) -> bool:
    return m <= ONE_LAUNCH.get(kernel, 0)


@each_kernel
def test_no_kernel_is_passed_over(kernel, layout):
    taken = [case for case in CASES if refusal(kernel, layout, case, KS[case.group][-1]) is None]
    forms = {case.form for case in taken}
    assert forms == ({"affine"} if kernel == "quick" else set(LAYOUTS[layout].forms))
    assert {case.x_dtype for case in taken} == {HALF, BFLOAT}
    if kernel == "lut":
        assert [case for case in CASES if case not in taken] == [c for c in CASES if c.form == "table" and c.bits > 4]
    elif kernel == "quick":
        assert taken == [case for case in CASES if case.form == "affine"]


@each_kernel
@pytest.mark.parametrize(("form", "zero"), FORMS)
@given(data=st.data(), n=st.sampled_from(NS), rank=st.integers(1, 3), seed=SEEDS)
def test_every_element_is_within_the_bound(kernel, layout, form, zero, data, n, rank, seed):
    case = data.draw(st.sampled_from([case for case in CASES if (case.form, case.zero) == (form, zero)]))
    m, k = data.draw(st.sampled_from(case.ms)), data.draw(st.sampled_from(KS[case.group]))
    spec, random = registry.discover()[kernel], Random(seed)
    if refusal(kernel, layout, case, k) is not None:
        return
    p = problem(kernel, layout, case, n, k, seed, rank)
    x, bias = p.drawn(random, m), p.normal(n, seed=seed) if random.random() < 0.5 else None
    y = p.run(kernel, x, bias)
    assert within_bound(y, x, p.w, bias, spec.rounding(p.call, x.dtype))
    assert not spec.deterministic or same(y, p.run(kernel, x, bias))


# More tiles than multiprocessors, one row of tiles over the whole GPU, and more of x than shared memory holds.
@each_kernel
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        *[(1, 4300, 1024), (8, 8200, 256), (1, 100, 8192), (8, 33, 28672), (2, 3000, 3200), (8, 40, 131072)],
        *[(16, 4300, 1024), (33, 100, 8192), (100, 8200, 256), (300, 300, 3200), (2000, 3000, 256)],
    ],
)
def test_large_weights_are_within_the_bound(kernel, layout, m, n, k):
    p = problem(kernel, layout, MAIN, n, k, size=0.01)
    x, bias = p.normal(m, k, seed=1), p.normal(n, seed=2)
    y = p.run(kernel, x, bias)
    assert within_bound(y, x, p.w, bias, registry.discover()[kernel].rounding(p.call, x.dtype))
    assert not registry.discover()[kernel].deterministic or same(y, p.run(kernel, x, bias))


@each_kernel
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_hot_rows_read_every_weight_back(kernel, layout, case):
    g = torch.Generator().manual_seed(0)

    def exact(name: str, t: torch.Tensor) -> torch.Tensor:
        """Small integers times powers of two: their products and sums have few bits."""
        if name == "codes" or not t.is_floating_point():
            return t
        if name == "zero":
            return torch.randint(0, 4 << case.bits, t.shape, generator=g).div(4).to(t.dtype)
        if name == "table":
            return torch.randint(-64, 65, t.shape, generator=g).div(16).to(t.dtype)
        power = 2.0 ** torch.randint(-6, 1, t.shape, generator=g)
        return (torch.randint(1, 8, t.shape, generator=g) * power * t.sign()).to(t.dtype)

    for k in {32: (160,), 64: (192,), 128: (384,), 256: (512,), 384: (768,), 0: (16, 1000)}[case.group]:
        p = problem(kernel, layout, case, 70, k, change=exact)
        eye = torch.eye(k, dtype=case.x_dtype, device=DEVICE)
        y = torch.cat([p.run(kernel, rows) for rows in eye.split(max(m for m in case.ms if m <= 8))])
        for got in [y, p.run(kernel, eye)] if 8 in case.ms else [y]:
            if kernel == "quick" and case.zero == "float":
                # Codes less such a zero are rounded before they are scaled.
                assert within_bound(got, eye, p.w, None, registry.discover()[kernel].rounding(p.call, case.x_dtype))
            else:
                assert torch.equal(got.T, dequantize(p.w).to(case.x_dtype))


@pytest.mark.parametrize(
    ("kernel", "layout"), [pair for pair in KERNELS if registry.discover()[pair[0]].batch_invariant]
)
@each_form
def test_a_row_has_the_same_bits_in_every_batch(kernel, layout, case):
    p = problem(kernel, layout, case, 100, KS[case.group][-1])
    x = p.normal(17, p.call.k)
    whole = p.run(kernel, x)
    assert all(same(p.run(kernel, x[:m]), whole[:m]) for m in case.ms)


@each_kernel
@pytest.mark.parametrize("case", [case for case in CASES if max(case.ms) > 1], ids=str)
def test_nan_and_inf_stay_in_their_row(kernel, layout, case):
    random = Random(1)
    k = KS[case.group][-2]
    p = problem(kernel, layout, case, 33, k)
    for m in (m for m in case.ms if m > 1):
        x = p.normal(m, k)
        clean = p.run(kernel, x)
        for column in (0, random.randrange(k), k - 1):
            spoiled = x.clone()
            spoiled[0, column] = float("nan")
            if m > 2:
                spoiled[-1, column] = random.choice((1, -1)) * float("inf")
            y = p.run(kernel, spoiled)
            assert bool(y[0].isnan().all())
            assert m == 2 or not bool(y[-1].isfinite().any())
            others = slice(1, 2 if m == 2 else m - 1)
            assert same(y[others], clean[others])


def guarded(t: torch.Tensor, shift: int) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """A copy of `t`, `shift` bytes from alignment amid bytes of 0xFF (NaN in every float): it, all, and its place."""
    at = slice(GUARD + shift, GUARD + shift + t.nbytes)
    raw = torch.full((2 * GUARD + shift + t.nbytes,), 0xFF, dtype=torch.uint8, device=t.device)
    inner = raw[at].view(t.dtype).view(t.shape)
    inner.copy_(t)
    return inner, raw, at


@each_kernel
@each_form
@given(
    data=st.data(),
    n=st.sampled_from(NS),
    shifts=st.tuples(*[st.sampled_from([0, 1, 3, 8])] * 3),
    part_shift=st.sampled_from([0, 16, 48]),
    seed=SEEDS,
)
def test_nothing_beyond_its_tensors_is_read_or_written(kernel, layout, case, data, n, shifts, part_shift, seed):
    m, k = data.draw(st.sampled_from(case.ms)), data.draw(st.sampled_from(KS[case.group]))
    if refusal(kernel, layout, case, k) is not None:
        return
    p = problem(kernel, layout, case, n, k, seed)
    spec, x, bias = registry.discover()[kernel], p.normal(m, k, seed=seed), p.normal(n, seed=seed + 1)
    plain = p.run(kernel, x, bias)
    given_ = [x, bias, torch.full_like(plain, float("nan")), *p.parts]
    held = [guarded(t, s * 2) for t, s in zip(given_, shifts, strict=False)]
    held += [guarded(t, part_shift) for t in p.parts]
    inner_x, inner_bias, out, *parts = (inner for inner, _, _ in held)
    spec.run(inner_x, parts, inner_bias, p.call, out)
    for i, (t, (inner, raw, at)) in enumerate(zip(given_, held, strict=True)):
        assert bool((raw[: at.start] == 0xFF).all()) and bool((raw[at.stop :] == 0xFF).all())
        assert i == 2 or same(inner, t)
    assert within_bound(out, x, p.w, bias, spec.rounding(p.call, x.dtype))
    # The vendor's matmul may take another way for other addresses.
    assert same(out, plain) or not in_one_launch(kernel, m)


@each_kernel
@pytest.mark.parametrize("case", [case for case in SPREAD if case.zero != "none"], ids=str)
@pytest.mark.parametrize("epilogue", ["silu_mul", "add"])
@given(
    data=st.data(), n=st.sampled_from([16, 48, 272, 1040]), biased=st.booleans(), shift=st.sampled_from([0, 1, 8]),
    seed=SEEDS,
)  # fmt: skip
def test_what_follows_the_product_is_within_its_bound(kernel, layout, case, epilogue, data, n, biased, shift, seed):
    m, k = data.draw(st.sampled_from(case.ms)), data.draw(st.sampled_from(KS[case.group]))
    if refusal(kernel, layout, case, k) is not None:
        return
    p, spec = problem(kernel, layout, case, n, k, seed), registry.discover()[kernel]
    x, bias = p.drawn(Random(seed), m), p.normal(n, seed=seed) if biased else None
    other = p.normal(m, n, seed=seed + 1) if epilogue == "add" else None
    y = p.run(kernel, x, bias, other, epilogue)
    assert within_bound(y, x, p.w, bias, spec.rounding(p.call, x.dtype), epilogue, other)
    held = [guarded(t, 2 * shift) for t in (torch.full_like(y, float("nan")), *([other] if epilogue == "add" else []))]
    call = dataclasses.replace(p.call, epilogue=epilogue)
    spec.run(x, p.parts, bias, call, held[0][0], held[1][0] if epilogue == "add" else None)
    assert all(bool((raw[: at.start] == 0xFF).all()) and bool((raw[at.stop :] == 0xFF).all()) for _, raw, at in held)
    assert same(held[0][0], y) or not in_one_launch(kernel, m)


@each_kernel
@each_form
def test_a_captured_call_is_replayed_with_new_inputs_and_weights(kernel, layout, case):
    m, n, k = max(case.ms), 100, KS[case.group][-1]
    p, other = (problem(kernel, layout, case, n, k, seed) for seed in (0, 1))
    x, bias, out = p.normal(m, k), p.normal(n), p.normal(m, n)
    p.run(kernel, x, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        registry.discover()[kernel].run(x, p.parts, bias, p.call, out)
    for i in range(4):
        x.copy_(p.normal(m, k, seed=10 + i))
        bias.copy_(p.normal(n, seed=20 + i))
        if i == 2:
            for part, new in zip(p.parts, other.parts, strict=True):
                part.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert same(out, p.run(kernel, x, bias)) or not registry.discover()[kernel].deterministic
        weight = p.w if i < 2 else other.w
        assert within_bound(out, x, weight, bias, registry.discover()[kernel].rounding(p.call, x.dtype))


@each_kernel
@each_form
def test_a_call_neither_waits_nor_allocates(kernel, layout, case):
    p = problem(kernel, layout, case, 100, KS[case.group][-1])
    spec = registry.discover()[kernel]
    for m in case.ms:
        x, bias, out = p.normal(m, p.call.k), p.normal(100), p.normal(m, 100)
        spec.run(x, p.parts, bias, p.call, out)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            spec.run(x, p.parts, bias, p.call, out)
            spec.run(x, p.parts, None, p.call, out)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        assert allocated == 0 or not in_one_launch(kernel, m)


@each_kernel
@each_form
def test_two_streams_do_not_disturb_each_other(kernel, layout, case):
    m, n = max(case.ms), 257
    p = problem(kernel, layout, case, n, KS[case.group][-1])
    spec, bias = registry.discover()[kernel], p.normal(n)
    xs = [p.normal(m, p.call.k, seed=i) for i in range(2)]
    alone = [p.run(kernel, x, bias) for x in xs]
    outs = [x.new_full((50, m, n), float("nan")) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for i in range(50):
        for stream, x, out in zip(streams, xs, outs, strict=True):
            with torch.cuda.stream(stream):
                spec.run(x, p.parts, bias, p.call, out[i])
    torch.cuda.synchronize()
    for out, wanted in zip(outs, alone, strict=True):
        assert not spec.deterministic or same(out, wanted.expand(50, m, n))


@each_kernel
@each_form
def test_each_launch_sees_what_the_one_before_it_wrote(kernel, layout, case):
    # A launch may start before the one before it ends: it must still read x, and write y, only after that.
    m, k = max(case.ms), 768 if case.group == 384 else 256
    p = problem(kernel, layout, case, k, k, size=0.01)
    spec, bias, start = registry.discover()[kernel], p.normal(k), p.normal(m, k)

    def chain(wait: bool) -> list[torch.Tensor]:
        buffers = [start.clone(), torch.empty_like(start)]
        for i in range(60):
            here, there = buffers[i % 2], buffers[1 - i % 2]
            spec.run(here, p.parts, bias, p.call, there)
            if i % 5 == 4:
                there.clamp_(-4, 4)
            if wait:
                torch.cuda.synchronize()
        return buffers

    slow = chain(wait=True)
    for _ in range(3):
        assert not spec.deterministic or all(map(same, chain(wait=False), slow))


@each_kernel
def test_the_op_under_cuda_graphs_of_inductor(kernel, layout):
    ops.register_lowerings()
    p = problem(kernel, layout, MAIN, 100, 384)
    op, parts, bias, rest = ops.GEMMS[layout], p.parts, p.normal(100), arguments(p.w, layout, kernel)

    def f(x: torch.Tensor) -> torch.Tensor:
        return op(x.relu(), parts, bias, *rest) + 1

    compiled = torch.compile(f, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for i in range(5):
            x = p.normal(3, 384, seed=i)
            assert same(compiled(x).clone(), f(x))
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@each_kernel
@each_form
def test_parts_elsewhere_or_out_of_line_are_named(kernel, layout, case):
    n, k = 100, KS[case.group][-1]
    p = problem(kernel, layout, case, n, k)
    spec, x = registry.discover()[kernel], p.normal(1, k)
    plain = p.run(kernel, x)
    for i, name in enumerate(LAYOUTS[layout].names(p.w.format, "cuda")):
        away, _, _ = guarded(p.parts[i], p.parts[i].element_size())
        for part in (p.parts[i].cpu(), away):
            parts = [*p.parts[:i], part, *p.parts[i + 1 :]]
            if kernel in ONE_LAUNCH:
                with pytest.raises(ArgumentError, match=f"parts.{name}"):
                    spec.run(x, parts, None, p.call, torch.empty_like(plain))
            try:
                y = ops.GEMMS[layout](x, parts, None, *arguments(p.w, layout, kernel))
            except ArgumentError as error:
                # Where the first part is tells what the others should be.
                assert f"parts.{name}" in str(error) or (i == 0 and part is not away)
            else:
                assert part is away and within_bound(y, x, p.w, None, spec.rounding(p.call, x.dtype))
    assert same(plain, p.run(kernel, x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packing_needs_less_than_a_dense_copy(layout, bits):
    n, k = 8192, 4096
    w = random_weight(Format("affine", bits, 128, "int", "float16"), n, k, DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    parts = LAYOUTS[layout].pack(w)
    assert torch.cuda.max_memory_allocated() - before < 2 * n * k
    assert sum(part.nbytes for part in parts) == LAYOUTS[layout].packed_bytes(w.format, n, k, "cuda")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "k"), [(0, 128), (5, 0), (0, 0)])
def test_empty_weights(layout, n, k):
    format = Format("affine", 4, 32, "int", "float16")
    w = changed(make(format, n, k), lambda name, t: t.to(DEVICE))
    parts = LAYOUTS[layout].pack(w)
    assert ops.DEQUANTIZE(parts, layout, n, k, format.spec, HALF).shape == (n, k)
    for name in (name for name, stored in KERNELS if stored == layout):
        y = ops.GEMMS[layout](torch.ones((3, k), dtype=HALF, device=DEVICE), parts, None, *arguments(w, layout, name))
        assert y.shape == (3, n) and not y.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@each_kernel
def test_another_device_than_the_current_one(kernel, layout):
    p = problem(kernel, layout, MAIN, 100, 384)
    x = p.normal(8, 384)
    there = dataclasses.replace(p, parts=[part.to("cuda:1") for part in p.parts])
    y = there.run(kernel, x.to("cuda:1"))
    assert y.device.index == 1 and same(y.to(DEVICE), p.run(kernel, x))


@each_kernel
def test_no_function_uses_local_memory(kernel, layout):
    spec = registry.discover()[kernel]
    variants = getattr(importlib.import_module(spec.run.__module__), "CUDA_VARIANTS", ())
    if not variants:
        pytest.skip(f"kernel {kernel} has no CUDA source of its own")
    for case in CASES:
        k = KS[case.group][-1]
        for m in case.ms if refusal(kernel, layout, case, k) is None else ():
            p = problem(kernel, layout, case, 100, k)
            p.run(kernel, p.normal(m, k))
    entries = {entry for _, entry, _ in variants}
    loaded = [f for f in build.LOADED if f.name in entries]
    assert loaded
    assert not [f"{f.name}: {f.registers} registers, {f.local_bytes} bytes" for f in loaded if f.local_bytes]
