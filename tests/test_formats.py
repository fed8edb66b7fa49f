"""What a quantized weight means: its validator, its float64 truth, its packed layouts and the error bound."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lqcompile.errors import ArgumentError
from lqcompile.formats import (
    UNIT_ROUNDOFF,
    bound,
    code_range,
    dequantize,
    dequantize_grouped,
    narrowest,
    parts_of,
    validate,
)
from lqcompile.kernels.layout import LAYOUTS, LUT, PLAIN, QUICK, check_parts, unpack_plane
from lqcompile.types import SCALE_DTYPES, Format, QWeight, Rounding

KINDS = [("affine", "none"), ("affine", "int"), ("affine", "float"), ("table", "none")]
KINDS += [("binary", "none"), ("binary", "float")]
CASES = [(form, zero, bits) for form, zero in KINDS for bits in range(1, 9)]
SEEDS = st.integers(0, 2**31)


def make(format, n, k, seed=0, table_rank=1, perm=False, x_scale=1.0):
    """A well-formed weight with random contents, whose least and greatest code occur wherever they fit."""
    rng = torch.Generator().manual_seed(seed)
    low, high = code_range(format)
    groups, dtype = k // format.group, SCALE_DTYPES[format.scale_dtype]
    codes = torch.randint(low, high + 1, (n, k), generator=rng)
    codes.view(-1)[:2] = torch.tensor([low, high])[: codes.numel()]

    def drawn(*shape, dtype=dtype):
        return (torch.randn(*shape, generator=rng) * x_scale).to(dtype)

    held = {}
    if format.form == "binary":
        held["alpha"] = drawn(n, groups, format.bits)
        held["offset"] = drawn(n, groups) if format.zero == "float" else None
    else:
        held["scale"] = drawn(n, groups)
    if format.form == "affine" and format.zero == "int":
        held["zero"] = torch.randint(0, high + 1, (n, groups), generator=rng).to(torch.int16)
    elif format.form == "affine" and format.zero == "float":
        held["zero"] = drawn(n, groups, dtype=torch.float32)
    elif format.form == "table":
        held["table"] = drawn(*(n, groups)[: table_rank - 1], 1 << format.bits, dtype=torch.float32)
    held["perm"] = torch.randperm(k, generator=rng) if perm else None
    return QWeight(format, n, k, codes.to(torch.int8 if low < 0 else torch.uint8), **held)


@st.composite
def formats(draw):
    form, zero, bits = draw(st.sampled_from(CASES))
    return Format(form, bits, draw(st.integers(1, 20)), zero, draw(st.sampled_from(sorted(SCALE_DTYPES))))


@st.composite
def weights(draw):
    format = draw(formats())
    n, groups = draw(st.integers(1, 6)), draw(st.integers(0, 5))
    rank = draw(st.integers(1, 3))
    return make(format, n, groups * format.group, draw(SEEDS), rank, draw(st.booleans()))


def same(a, b):
    for field in dataclasses.fields(QWeight):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype and torch.equal(left, right), field.name
        else:
            assert left == right, field.name


@given(formats())
def test_spec_parses_back(format):
    assert Format.parse(format.spec) == format
    assert str(format.bits) in str(format)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("affine:4:128:int", "format"),
        ("affine:four:128:int:float16", "format"),
        ("affine:4:-1:int:float16", "format"),
        ("afine:4:128:int:float16", "format.form"),
        ("affine:0:128:int:float16", "format.bits"),
        ("affine:9:128:int:float16", "format.bits"),
        ("affine:4:0:int:float16", "format.group"),
        ("affine:4:128:half:float16", "format.zero"),
        ("table:4:128:int:float16", "format.zero"),
        ("binary:4:128:int:float16", "format.zero"),
        ("affine:4:128:int:float64", "format.scale_dtype"),
    ],
)
def test_bad_specs_name_the_field(spec, name):
    with pytest.raises(ArgumentError) as error:
        Format.parse(spec)
    assert error.value.name == name and name in str(error.value)


@given(weights())
def test_validate_accepts_what_is_well_formed(w):
    assert validate(w) is w
    assert str(w.format) in str(w)


def broken(w):
    """Every way to break one field of `w`, with the field that the error must name."""
    yield "n, k", {"n": -1}
    yield "n, k", {"k": float(w.k)}
    yield "format.group", {"format": dataclasses.replace(w.format, group=w.format.group + 1)}
    yield "codes.shape", {"codes": w.codes[:, :-1]}
    yield "codes.shape", {"codes": w.codes.flatten()}
    yield "codes.dtype", {"codes": w.codes.to(torch.int32)}
    yield "codes.dtype", {"codes": w.codes.view(torch.int8 if w.codes.dtype == torch.uint8 else torch.uint8)}
    low, high = code_range(w.format)
    for code in (low - 1, high + 1):
        if torch.iinfo(w.codes.dtype).min <= code <= torch.iinfo(w.codes.dtype).max:
            codes = w.codes.clone()
            codes[-1, -1] = code
            yield "codes", {"codes": codes}
    for name in ("scale", "zero", "alpha", "offset"):
        value = getattr(w, name)
        if name not in parts_of(w.format):
            yield name, {name: torch.zeros(w.n, w.k // w.format.group)}
            continue
        yield name, {name: None}
        yield name, {name: value.tolist()}
        yield f"{name}.shape", {name: value[:, :-1]}
        yield f"{name}.shape", {name: value[:-1]}
        yield f"{name}.shape", {name: value.unsqueeze(-1)}
        yield f"{name}.dtype", {name: value.to(torch.int32)}
        yield f"{name}.device", {name: value.to("meta")}
        for bad in (math.nan, math.inf, -math.inf) if value.is_floating_point() else ():
            spoiled = value.clone()
            spoiled.view(-1)[-1] = bad
            yield name, {name: spoiled}
    if w.table is None:
        yield "table", {"table": torch.zeros(1 << w.format.bits)}
    else:
        yield "table", {"table": None}
        yield "table.shape", {"table": w.table[..., :-1]}
        yield "table.shape", {"table": w.table.expand(w.n + 1, -1)}
        yield "table.dtype", {"table": w.table.to(torch.int64)}
        yield "table", {"table": torch.full_like(w.table, math.nan)}
    yield "perm.shape", {"perm": torch.arange(w.k - 1)}
    yield "perm.dtype", {"perm": torch.arange(w.k, dtype=torch.int32)}
    yield "perm", {"perm": torch.zeros(w.k, dtype=torch.int64)}
    yield "perm", {"perm": torch.arange(1, w.k + 1)}


@pytest.mark.parametrize(("form", "zero", "bits"), CASES)
def test_validate_rejects_each_broken_field(form, zero, bits):
    w = make(Format(form, bits, 6, zero, "float16"), 3, 12)
    for name, change in broken(validate(w)):
        with pytest.raises(ArgumentError) as error:
            validate(dataclasses.replace(w, **change))
        assert error.value.name == name, change
        assert error.value.accepted in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@given(w=weights())
def test_unpack_inverts_pack(layout, w):
    if w.format.form not in layout.forms:
        with pytest.raises(ArgumentError, match="form"):
            layout.pack(w)
        return
    parts = layout.pack(w)
    check_parts(layout, parts, w.format, w.n, w.k)
    same(layout.unpack(parts, w.format, w.n, w.k), dataclasses.replace(w, perm=None))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("k", [0, 8, 12])
def test_unpack_inverts_pack_without_rows(layout, k):
    w = make(Format("affine", 3, 4, "int", "float16"), 0, k)
    same(layout.unpack(layout.pack(validate(w)), w.format, 0, k), w)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_are_where_the_docstring_puts_them(layout, bits):
    assert sum(layout.fields[bits]) == bits
    w = make(Format("affine", bits, 11, "int", "float16"), 3, 11)
    shift = 0
    for plane, width in zip(layout.pack(w, PLAIN), layout.fields[bits], strict=False):
        for row in range(w.n):
            for column in range(w.k):
                byte, j = divmod(column, 8 // width)
                field = int(plane[row, byte]) >> (j * width) & ((1 << width) - 1)
                assert field == int(w.codes[row, column]) >> shift & ((1 << width) - 1)
        fields = (w.codes >> shift) & ((1 << width) - 1)
        assert torch.equal(unpack_plane(plane, width, w.k, torch.float32), fields.float())
        shift += width


def test_check_parts_rejects_each_broken_part():
    format = Format("table", 3, 4, "none", "float16")
    w = make(format, 5, 8)
    parts = QUICK.pack(w)
    for layout in (LUT, QUICK):
        names = layout.names(format)
        good = layout.pack(w)
        for i, name in enumerate(names):
            wider = torch.cat([good[i], good[i]], -1)
            for bad in (good[i].to(torch.float64), wider, wider[..., ::2]):
                with pytest.raises(ArgumentError, match=f"parts.{name}"):
                    check_parts(layout, [*good[:i], bad, *good[i + 1 :]], format, w.n, w.k)
    for wrong in (parts[:-1], [*parts, parts[0]], []):
        with pytest.raises(ArgumentError, match="parts"):
            check_parts(QUICK, wrong, format, w.n, w.k)
    with pytest.raises(ArgumentError, match="group"):
        check_parts(QUICK, parts, format, w.n, 9)


def element(w, row, column):
    """One element of the dense weight in Python floats, from the definitions in DESIGN section 5."""
    j = column if w.perm is None else w.perm.tolist().index(column)
    g, code, f = j // w.format.group, int(w.codes[row, j]), w.format
    if f.form == "binary":
        total = sum(float(w.alpha[row, g, i]) * (1 if code & 1 << i else -1) for i in range(f.bits))
        return total + (float(w.offset[row, g]) if f.zero == "float" else 0.0)
    if f.form == "table":
        table = w.table[(row, g)[: w.table.ndim - 1]]
        return float(table[code]) * float(w.scale[row, g])
    return (code - (0.0 if w.zero is None else float(w.zero[row, g]))) * float(w.scale[row, g])


@given(weights())
def test_dequantize_agrees_with_the_definition(w):
    dense = dequantize(w)
    assert dense.shape == (w.n, w.k) and dense.dtype == torch.float64
    for row in range(min(w.n, 2)):
        for column in range(w.k):
            wanted = element(w, row, column)
            assert math.isclose(float(dense[row, column]), wanted, rel_tol=1e-12, abs_tol=1e-12)


@given(weights())
def test_dequantize_in_groups_is_the_same_weight(w):
    plain = dataclasses.replace(w, perm=None)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        dense = dequantize_grouped(w, dtype)
        assert dense.shape == (w.n, w.k // w.format.group, w.format.group) and dense.dtype == dtype
        assert torch.equal(dense.view(w.n, w.k), dequantize(plain, dtype))


@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_is_a_special_case_of_binary(bits):
    w = make(Format("affine", bits, 8, "int", "float32"), 4, 32)
    scale = w.scale.double()
    alpha = torch.stack([scale * 2.0 ** (i - 1) for i in range(bits)], -1)
    offset = scale * ((1 << bits) - 1) / 2 - scale * w.zero
    format = Format("binary", bits, 8, "float", "float32")
    binary = validate(QWeight(format, w.n, w.k, w.codes, alpha=alpha, offset=offset))
    assert torch.allclose(dequantize(binary), dequantize(w), rtol=0, atol=1e-12)


def test_narrowest_holds_every_value():
    assert narrowest(torch.tensor([1.0, 0.5])) == "float16"
    assert narrowest(torch.tensor([1.0, 1e5])) == "float32"
    assert narrowest(torch.tensor([1.0, 2.0**20])) == "bfloat16"
    assert narrowest(torch.tensor([0.1], dtype=torch.float64)) == "float32"


def within(y, x, w64, rounding):
    x64 = x.double()
    y64 = x64 @ w64.T
    return bool(((y.double() - y64).abs() <= bound(y64, x64, w64, rounding)).all())


def rounding_of(dtype):
    return Rounding(UNIT_ROUNDOFF[dtype], UNIT_ROUNDOFF[torch.float32], UNIT_ROUNDOFF[dtype])


@given(
    formats(), st.integers(1, 9), st.integers(1, 40), st.integers(0, 30), SEEDS,
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.booleans(),
)  # fmt: skip
def test_the_bound_accepts_correct_kernels(format, m, n, groups, seed, dtype, lognormal):
    w64 = dequantize(make(format, n, groups * format.group, seed, x_scale=0.02))
    x = torch.randn(m, w64.shape[1], generator=torch.Generator().manual_seed(seed))
    x = (x.exp() if lognormal else x).to(dtype)
    y = (x.float() @ w64.to(dtype).float().T).to(dtype)
    assert within(y, x, w64, rounding_of(dtype))


class Shootout:
    """The shoot-out of ANCHORS.md: 16 rows, group 128, uniform 4-bit codes."""

    m, n, k, group = 16, 256, 4096, 128

    def __init__(self, seed):
        rng = torch.Generator().manual_seed(seed)
        groups = self.k // self.group
        codes = torch.randint(0, 16, (self.n, self.k), generator=rng).to(torch.uint8)
        zero = torch.randint(4, 12, (self.n, groups), generator=rng).to(torch.int16)
        scale = ((torch.rand(self.n, groups, generator=rng) * 0.9 + 0.1) * 0.02).half()
        self.w = QWeight(Format("affine", 4, 128, "int", "float16"), self.n, self.k, codes, scale, zero)
        self.w64 = dequantize(self.w)
        self.x = torch.randn(self.m, self.k, generator=rng).half()

    def run(self, w=None, x=None):
        dense = dequantize(w or self.w, torch.float16)
        return ((self.x if x is None else x).float() @ dense.float().T).half()

    def outputs(self):
        """Name and output of every faulty kernel."""
        for name, rows, columns in (
            ("one element zero", 3, 77),
            ("last column zero", slice(None), -1),
            ("last 8 columns zero", slice(None), slice(-8, None)),
            ("last 32 columns zero", slice(None), slice(-32, None)),
        ):
            y = self.run()
            y[rows, columns] = 0
            yield name, y
        y = self.run()
        y[3, 77] *= -1
        yield "sign of one element", y
        y = self.run()
        y[-1] = y[-2]
        yield "last row repeats the one before", y
        for tail in (1, 16, self.group):
            x = self.x.clone()
            x[:, -tail:] = 0
            yield f"last {tail} of K dropped", self.run(x=x)
        for name, spoil in self.faults():
            w = dataclasses.replace(self.w, codes=self.w.codes.clone(), scale=self.w.scale.clone())
            w = dataclasses.replace(w, zero=self.w.zero.clone())
            spoil(w)
            yield name, self.run(w)
        running, dense = torch.zeros(self.m, self.n).half(), dequantize(self.w, torch.float16).float()
        for k in range(0, self.k, self.group):
            part = self.x[:, k : k + self.group].float() @ dense[:, k : k + self.group].T
            running = (running.float() + part).half()
        yield "float16 running accumulator", running

    def faults(self):
        yield "15 read as 14", lambda w: w.codes.clamp_(max=14)
        yield "zero + 1 in one group", lambda w: w.zero[:, 5].add_(1)
        yield "zero + 1 in one group of one row", lambda w: w.zero[7, 5].add_(1)
        yield "scale of one group of one row", lambda w: w.scale[7, 5].copy_(w.scale[7, 6])
        yield "nibbles swapped in a row", lambda w: w.codes[7].copy_(w.codes[7].view(-1, 2).flip(1).flatten())
        yield "one code wrong by 8", lambda w: w.codes[7, 100].bitwise_xor_(8)


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_catches_all_16_faults_and_no_correct_kernel(seed):
    shootout = Shootout(seed)
    rounding = rounding_of(torch.float16)
    assert within(shootout.run(), shootout.x, shootout.w64, rounding)
    reordered = (shootout.x.float().flip(1) @ dequantize(shootout.w, torch.float16).float().flip(1).T).half()
    assert within(reordered, shootout.x, shootout.w64, rounding)
    missed = [name for name, y in shootout.outputs() if within(y, shootout.x, shootout.w64, rounding)]
    assert not missed
    assert len(list(shootout.outputs())) == 16
