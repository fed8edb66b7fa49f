"""Every kernel x every format it accepts x drawn shapes: the bound, argument checks, gradients, opcheck, lowering."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lqcompile.errors import ArgumentError
from lqcompile.formats import bound, code_range, dequantize
from lqcompile.kernels import ops, registry
from lqcompile.kernels.epilogues import EPILOGUES, by_turns
from lqcompile.kernels.layout import LAYOUTS
from lqcompile.kernels.registry import X_DTYPES, Call
from lqcompile.types import SCALE_DTYPES, Format, QWeight, Rounding

FORMS = [
    ("affine", "none"),
    ("affine", "int"),
    ("affine", "float"),
    ("table", "none"),
    ("binary", "none"),
    ("binary", "float"),
]
KERNELS = [(kernel.name, layout) for kernel in registry.discover().values() for layout in kernel.layouts]


def random_weight(
    random: Random, n: int, k: int, group: int, form: str, zero: str, bits: int, device: torch.device | str
) -> QWeight:
    """A weight with every code of its format present where it is large enough."""
    scale_dtype = random.choice(tuple(SCALE_DTYPES))
    format = Format(form, bits, group, zero, scale_dtype)
    low, high = code_range(format)
    g = torch.Generator().manual_seed(random.getrandbits(31))
    codes = torch.randint(low, high + 1, (n, k), generator=g)
    flat = codes.view(-1)
    present = min(flat.numel(), high - low + 1)
    flat[torch.randperm(flat.numel(), generator=g)[:present]] = torch.arange(low, low + present)
    groups = k // group
    parts: dict[str, torch.Tensor] = {}
    real = lambda *shape: torch.randn(shape, generator=g).to(SCALE_DTYPES[scale_dtype])  # noqa: E731
    if form == "binary":
        parts["alpha"] = real(n, groups, bits)
        if zero == "float":
            parts["offset"] = real(n, groups)
    else:
        parts["scale"] = real(n, groups)
        if zero == "int":
            parts["zero"] = torch.randint(-3, high + 3, (n, groups), generator=g).to(torch.int16)
        if zero == "float":
            parts["zero"] = torch.rand((n, groups), generator=g).mul(high).float()
    if form == "table":
        shape = random.choice(((1 << bits,), (n, 1 << bits), (n, groups, 1 << bits)))
        parts["table"] = torch.randn(shape, generator=g)
    codes = codes.to(torch.int8 if low < 0 else torch.uint8)
    return QWeight(format, n, k, codes.to(device), **{name: t.to(device) for name, t in parts.items()})


def random_x(random: Random, m: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal, lognormal, one-hot, large, tiny or zero rows."""
    g = torch.Generator().manual_seed(random.getrandbits(31))
    x = torch.randn((m, k), generator=g)
    kind = random.choice(("normal", "lognormal", "one_hot", "large", "tiny", "zeros"))
    if kind == "lognormal":
        # Signs of their own: were x of one sign, the roundings of a group's few levels would add up, not by chance.
        x = x.exp() * torch.randn((m, k), generator=g).sign()
    if kind == "one_hot" and m and k:
        x = torch.nn.functional.one_hot(torch.randint(0, k, (m,), generator=g), k).float()
    x = x * {"large": 100.0, "tiny": 1e-6, "zeros": 0.0}.get(kind, 1.0)
    return x.to(device, dtype)


def within_bound(
    y: torch.Tensor, x: torch.Tensor, w: QWeight, bias: torch.Tensor | None, rounding: Rounding,
    epilogue: str = "", other: torch.Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether every element of `y` is, but for those that its dtype cannot hold."""
    x64, w64 = x.double(), dequantize(w)
    y64 = x64 @ w64.T + (0 if bias is None else bias.double())
    allowed = bound(y64, x64, w64, rounding)
    if bias is not None:
        # A sum may start from the bias: then each step rounds what contains it.
        allowed += (rounding.out + 8 * x.shape[1] ** 0.5 * rounding.accumulate) * bias.double().abs()
    overflow = y64.abs() > torch.finfo(y.dtype).max * 0.99
    if epilogue == "add":
        y64 = y64 + other.double()
        allowed += rounding.out * (y64.abs() + allowed)
    if epilogue == "silu_mul":
        (gate, up), (off_gate, off_up), over = (t.unflatten(1, (-1, 2, 8)).unbind(2) for t in (y64, allowed, overflow))
        # Of what it is given, silu makes at most 1.1 times the difference.
        opened = torch.nn.functional.silu(gate)
        y64 = (opened * up).flatten(1)
        allowed = (1.1 * off_gate * (up.abs() + off_up) + opened.abs() * off_up).flatten(1)
        allowed += (rounding.out + 2.0**-20) * y64.abs() + 2.0**-24
        overflow = (over[0] | over[1]).flatten(1)
    overflow |= y64.abs() > torch.finfo(y.dtype).max * 0.99
    return bool((((y.double() - y64).abs() <= allowed) | overflow).all())


def op_of(layout: str):
    return ops.GEMMS[layout]


def arguments(
    w: QWeight, layout: str, kernel: str, epilogue: str = "", other: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, int, int, str, str, str]:
    return other, w.n, w.k, w.format.spec, epilogue, kernel


shapes = st.tuples(
    st.sampled_from([1, 2, 7, 8, 15, 16, 17, 33, 64, 65]),
    st.sampled_from([1, 2, 5, 8, 31, 32, 48]),
    st.sampled_from(
        [(4, 4), (12, 4), (24, 8), (32, 32), (96, 32), (128, 64), (130, 130), (7, 7), (64, 32), (256, 128), (1024, 256)]
    ),
)


@pytest.mark.parametrize(("kernel", "layout"), KERNELS)
@pytest.mark.parametrize(("form", "zero"), FORMS)
@given(seed=st.integers(0, 2**31 - 1), shape=shapes, bits=st.integers(1, 8), dtype=st.sampled_from(X_DTYPES))
def test_every_element_is_within_the_bound(kernel, layout, form, zero, device, seed, shape, bits, dtype):
    (m, n, (k, group)), random = shape, Random(seed)
    if form not in LAYOUTS[layout].forms:
        return
    w = random_weight(random, n, k, group, form, zero, bits, device)
    call, spec = Call(layout, w.format, n, k), registry.discover()[kernel]
    if device.type not in spec.devices or spec.accepts(call, dtype, device.type) is not None:
        return
    parts = LAYOUTS[layout].pack(w)
    x = random_x(random, m, k, dtype, device)
    bias = torch.randn(n).to(device, dtype) if random.random() < 0.5 else None
    epilogue = random.choice([e for e in EPILOGUES if n % 16 == 0 or e != "silu_mul"])
    other = random_x(random, m, n, dtype, device) if epilogue == "add" else None
    rest = arguments(w, layout, kernel, epilogue, other)
    y = op_of(layout)(x, parts, bias, *rest)
    assert within_bound(y, x, w, bias, spec.rounding(call, dtype), epilogue, other)
    assert torch.equal(y, op_of(layout)(x, parts, bias, *rest)) or not spec.deterministic


@pytest.mark.parametrize(("kernel", "layout"), KERNELS)
@pytest.mark.parametrize(("form", "zero"), FORMS)
@given(
    seed=st.integers(0, 2**31 - 1),
    bits=st.integers(1, 8),
    size=st.sampled_from([(5, 24, 8), (16, 64, 32), (3, 12, 12)]),
)
def test_one_hot_rows_read_every_weight_back(kernel, layout, form, zero, device, seed, bits, size):
    (n, k, group), spec = size, registry.discover()[kernel]
    if form not in LAYOUTS[layout].forms or device.type not in spec.devices:
        return
    w = random_weight(Random(seed), n, k, group, form, zero, bits, device)
    if spec.accepts(Call(layout, w.format, n, k), torch.float32, device.type) is not None:
        return
    if form == "binary" and kernel != "dense":
        # Planes are added one by one: numbers of few bits, whose sums are exact.
        coarse = {name: getattr(w, name) for name in ("alpha", "offset") if getattr(w, name) is not None}
        w = dataclasses.replace(w, **{name: t.mul(64).round().div(64) for name, t in coarse.items()})
    y = op_of(layout)(torch.eye(k, device=device), LAYOUTS[layout].pack(w), None, *arguments(w, layout, kernel))
    wanted = ops.DEQUANTIZE(LAYOUTS[layout].pack(w), layout, n, k, w.format.spec, torch.float32)
    assert torch.equal(y.T, wanted)
    exact = dequantize(w)
    scale = exact.abs().amax(-1, keepdim=True) + (dequantize_spread(w))
    assert bool(((wanted.double() - exact).abs() <= 2.0**-21 * scale).all())


def dequantize_spread(w: QWeight) -> torch.Tensor:
    """The magnitude of what is added up in a weight, [n, 1]: float32 rounds relative to it."""
    if w.format.form == "binary":
        assert w.alpha is not None
        total = w.alpha.double().abs().sum(-1) + (0 if w.offset is None else w.offset.double().abs())
        return total.amax(-1, keepdim=True)
    assert w.scale is not None
    size = w.scale.double().abs() * (256 + (0 if w.zero is None else w.zero.double().abs()))
    return size.amax(-1, keepdim=True) if w.format.form == "affine" else torch.zeros((w.n, 1), device=w.codes.device)


def simple(device: torch.device | str = "cpu", n: int = 6, k: int = 24) -> tuple[QWeight, list[torch.Tensor]]:
    w = random_weight(Random(1), n, k, 8, "affine", "int", 4, device)
    return w, LAYOUTS["quick"].pack(w)


def test_nan_and_inf_stay_in_their_row(device):
    w, parts = simple(device)
    x = torch.randn(5, 24, device=device)
    clean = op_of("quick")(x, parts, None, *arguments(w, "quick", "dense"))
    x[2, 3], x[4, 0] = float("nan"), float("inf")
    y = op_of("quick")(x, parts, None, *arguments(w, "quick", "dense"))
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])
    assert bool(y[2].isnan().all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_problems(layout, device):
    w, _ = simple(device)
    parts = LAYOUTS[layout].pack(w)
    for shape in ((0, 24), (3, 0, 24)):
        assert op_of(layout)(torch.randn(shape, device=device), parts, None, *arguments(w, layout, "dense")).shape == (
            *shape[:-1],
            6,
        )
    f = Format("affine", 4, 1, "none", "float32")
    none = QWeight(
        f, 6, 0, torch.zeros((6, 0), dtype=torch.int8, device=device), scale=torch.zeros((6, 0), device=device)
    )
    bias = torch.randn(6, device=device)
    parts = LAYOUTS[layout].pack(none)
    assert torch.equal(
        op_of(layout)(torch.randn(2, 0, device=device), parts, bias, *arguments(none, layout, "dense")),
        bias.expand(2, 6),
    )
    x, more = torch.randn(2, 0, device=device), torch.randn(2, 6, device=device)
    assert not op_of(layout)(x, parts, None, *arguments(none, layout, "dense")).any()
    assert torch.equal(op_of(layout)(x, parts, bias, *arguments(none, layout, "dense", "add", more)), bias + more)


def test_strides_offsets_and_alignment(device):
    w, parts = simple(device)
    base = torch.randn(4, 7, 49, device=device)
    for x in (
        base[..., 1:25],
        base[..., ::2][..., :24],
        base[:, 0, :24].expand(3, 4, 24),
        base.transpose(0, 1)[..., 3:27],
    ):
        y = op_of("quick")(x, parts, None, *arguments(w, "quick", "dense"))
        assert torch.equal(y, op_of("quick")(x.contiguous(), parts, None, *arguments(w, "quick", "dense")))
    odd = torch.randn(1 + 3 * 24, device=device)[1:].view(3, 24)
    assert op_of("quick")(odd, parts, None, *arguments(w, "quick", "dense")).shape == (3, 6)


def broken_calls():
    w, parts = simple()
    x, bias, rest = torch.randn(3, 24), torch.randn(6), arguments(w, "quick", "dense")
    short = [parts[0][:, :-1].contiguous(), *parts[1:]]
    yield "x.dtype", (x.double(), parts, bias, *rest)
    yield "x.dtype", (x.long(), parts, bias, *rest)
    yield "x.shape", (torch.randn(3, 25), parts, bias, *rest)
    yield "x.shape", (torch.tensor(1.0), parts, bias, *rest)
    yield "bias", (x, parts, torch.randn(5), *rest)
    yield "bias", (x, parts, torch.randn(1, 6), *rest)
    yield "bias", (x, parts, bias.half(), *rest)
    yield "planes", (x, short, bias, *rest)
    yield "planes", (x, [parts[0].to(torch.int32), *parts[1:]], bias, *rest)
    yield "scale", (x, [parts[0], parts[1][:, :-1].contiguous(), parts[2]], bias, *rest)
    yield "zero", (x, [*parts[:2], parts[2].float()], bias, *rest)
    yield "planes.stride", (x, [torch.stack([parts[0]] * 2, -1)[..., 0], *parts[1:]], bias, *rest)
    yield "parts", (x, parts[:2], bias, *rest)
    yield "parts", (x, [], bias, *rest)
    yield "planes", (x, parts, bias, None, 17, *rest[2:])
    yield "group", (x, parts, bias, None, 6, 25, *rest[3:])
    yield "format", (x, parts, bias, None, 6, 24, "affine:4", "", "dense")
    yield "bits", (x, parts, bias, None, 6, 24, "affine:9:8:int:float16", "", "dense")
    yield "route", (x, parts, bias, *rest[:5], "fastest")
    yield "route", (x, parts, bias, *rest[:5], "dense@8")
    yield "epilogue", (x, parts, bias, *rest[:4], "relu", "dense")
    yield "other", (x, parts, bias, *rest[:4], "add", "dense")
    yield "other", (x, parts, bias, torch.randn(3, 6), *rest[1:])
    yield "other", (x, parts, bias, torch.randn(1, 6), *rest[1:4], "add", "dense")
    yield "other", (x, parts, bias, torch.randn(3, 6).half(), *rest[1:4], "add", "dense")
    yield "multiple of 16", (x, parts, bias, *rest[:4], "silu_mul", "dense")
    yield "device", (x.to("meta"), parts, bias, *rest)


@pytest.mark.parametrize("case", range(len(list(broken_calls()))))
def test_unusable_arguments_are_named(case):
    name, given_ = list(broken_calls())[case]
    with pytest.raises((ArgumentError, RuntimeError)) as caught:
        op_of("quick")(*given_)
    assert name in str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 24), (2, 3, 24), (0, 24), (24,), (2, 1, 24)])
def test_opcheck(layout, shape, device):
    w, _ = simple(device)
    parts = LAYOUTS[layout].pack(w)
    for x in (
        torch.randn(shape, device=device),
        torch.randn((*shape[:-1], 48), device=device)[..., ::2].requires_grad_(),
    ):
        bias = torch.randn(6, device=device)
        torch.library.opcheck(op_of(layout), (x, parts, bias, *arguments(w, layout, "dense")))
        other = torch.randn((*shape[:-1], 6), device=device)
        torch.library.opcheck(op_of(layout), (x, parts, bias, *arguments(w, layout, "dense", "add", other)))
    torch.library.opcheck(ops.DEQUANTIZE, (parts, layout, 6, 24, w.format.spec, torch.float16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_are_those_of_the_dense_weight(layout, epilogue, biased, device):
    w, _ = simple(device, n=48)
    parts, dense = LAYOUTS[layout].pack(w), dequantize(w, torch.float32)
    x = torch.randn(2, 3, 24, device=device, requires_grad=True)
    bias = torch.randn(48, device=device, requires_grad=True) if biased else None
    other = torch.randn(2, 3, 48, device=device, requires_grad=True) if epilogue == "add" else None
    y = op_of(layout)(x, parts, bias, *arguments(w, layout, "dense", epilogue, other))
    plain = torch.nn.functional.linear(x, dense, bias)
    if epilogue == "add":
        plain = plain + other
    if epilogue == "silu_mul":
        gate, up = plain.unflatten(-1, (-1, 2, 8)).unbind(-2)
        plain = (torch.nn.functional.silu(gate) * up).flatten(-2)
    assert torch.allclose(y, plain, rtol=1e-4, atol=1e-4)
    given_ = [t for t in (x, bias, other) if t is not None]
    grad = torch.randn_like(plain)
    found, wanted = (torch.autograd.grad(result, given_, grad) for result in (y, plain))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(found, wanted, strict=True))


@given(n=st.integers(1, 20).map(lambda i: 16 * i))
def test_gate_and_up_come_by_turns(n):
    rows = by_turns(n)
    assert torch.equal(rows.sort().values, torch.arange(n))
    gate, up = rows.view(-1, 2, 8).unbind(1)
    assert torch.equal(gate.flatten(), torch.arange(n // 2)) and torch.equal(up, gate + n // 2)


def test_inductor_calls_the_launcher_directly():
    from torch._inductor.utils import run_and_get_code

    ops.register_lowerings()
    w, parts = simple()

    op, rest = op_of("quick"), arguments(w, "quick", "dense")

    @torch.compile(dynamic=True, fullgraph=True)
    def f(x: torch.Tensor) -> torch.Tensor:
        return op(x.relu(), parts, None, *rest) + 1

    x = torch.randn(5, 24)
    with torch.no_grad():
        y, codes = run_and_get_code(f, x)
    called = [line for code in codes for line in code.splitlines() if "lq" in line]
    assert any(f"extern_kernels.lq_gemm_{ops.VERSION}(" in line for line in called), called
    assert not any("torch.ops.lq" in line for line in called)
    assert torch.allclose(y, op(x.relu(), parts, None, *rest) + 1)


def test_a_registered_name_cannot_be_taken_twice():
    with pytest.raises(ArgumentError, match="dense"):
        registry.register(registry.discover()["dense"])
