"""The CPU kernels by every set of instructions that this machine has: bound, equal bits, layout, memory, fallbacks."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import warnings
from random import Random

import pytest
import torch

from lqcompile import cache
from lqcompile.errors import ArgumentError, Reason, Refused
from lqcompile.formats import code_range, dequantize
from lqcompile.kernels import cpu, dense, native, pages, registry
from lqcompile.kernels.layout import LAYOUTS
from lqcompile.kernels.registry import Call
from lqcompile.types import Format, QWeight

from .test_formats import make
from .test_ops import random_x, within_bound

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
SOURCES = {"affine": "quick.cpp", "binary": "lut.cpp", "table": "table.cpp"}
KERNELS = {"affine": "quick_cpu", "binary": "lut_cpu", "table": "table_cpu"}
ISAS = native.isas()
pytestmark = pytest.mark.skipif(not ISAS or not native.has_compiler(), reason="no x86-64 with AVX2, or no compiler")
each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)


@dataclasses.dataclass(frozen=True)
class Case:
    form: str
    zero: str
    bits: int
    group: int
    scale_dtype: str
    x_dtype: torch.dtype
    k: int
    rank: int = 1

    def __str__(self) -> str:
        form = self.form + {1: "", 2: "-of-rows", 3: "-of-groups"}[self.rank]
        return f"{form}{self.bits}-g{self.group}-{self.zero}-{self.scale_dtype}-{str(self.x_dtype)[6:]}-k{self.k}"

    @property
    def format(self) -> Format:
        return Format(self.form, self.bits, self.group, self.zero, self.scale_dtype)

    @property
    def layout(self) -> str:
        return "lut" if self.form == "binary" else "quick"

    def call(self, n: int) -> Call:
        return Call(self.layout, self.format, n, self.k)


# Every number of bits, kind of zero, type of scale and of x, and kind of group, some of k with a tail.
CASES = [
    Case("affine", "int", 4, 128, "float16", BFLOAT, 384),
    Case("affine", "int", 4, 32, "bfloat16", FLOAT, 160),
    Case("affine", "none", 8, 256, "float32", HALF, 512),
    Case("affine", "float", 3, 64, "float16", FLOAT, 192),
    Case("affine", "int", 2, 1000, "bfloat16", HALF, 1000),
    Case("affine", "none", 1, 32, "float16", BFLOAT, 96),
    Case("affine", "float", 5, 384, "float32", FLOAT, 768),
    Case("affine", "int", 6, 7, "float16", HALF, 7),
    Case("affine", "float", 7, 128, "bfloat16", BFLOAT, 128),
    Case("affine", "none", 8, 128, "float16", FLOAT, 256),
    Case("binary", "float", 3, 128, "float16", BFLOAT, 384),
    Case("binary", "none", 2, 32, "float32", FLOAT, 160),
    Case("binary", "float", 1, 130, "bfloat16", HALF, 130),
    Case("binary", "none", 4, 64, "float16", HALF, 192),
    Case("table", "none", 4, 64, "bfloat16", BFLOAT, 320),
    Case("table", "none", 4, 256, "float16", FLOAT, 512, 2),
    Case("table", "none", 3, 32, "float32", HALF, 160, 3),
    Case("table", "none", 2, 130, "float16", BFLOAT, 130, 3),
    Case("table", "none", 1, 128, "float16", FLOAT, 256),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
MS = (1, 2, 3, 4, 5, 16, 33, 130)
N = 70


def source_of(isa: native.Isa, case: Case) -> str:
    return "quick_bf16.cpp" if isa is native.AMX_BF16 else SOURCES[case.form]


def weight(case: Case, n: int = N, seed: int = 0) -> QWeight:
    return make(case.format, n, case.k, seed, case.rank)


def run(
    isa: native.Isa,
    case: Case,
    w: QWeight,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    threads: int = 1,
    parts: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    call = case.call(w.n)
    out = x.new_full((x.shape[0], w.n), float("nan"))
    launcher = cpu.Launcher(source_of(isa, case), call, x.dtype, isa)
    launcher(x, parts or LAYOUTS[case.layout].pack(w), bias, out, threads)
    return out


def drawn(case: Case, m: int, seed: int) -> torch.Tensor:
    random = Random(seed)
    x = random_x(random, m, case.k, case.x_dtype, torch.device("cpu"))
    if random.random() < 0.4:
        x[random.randrange(m), random.randrange(case.k)] *= 1000
    return x.clamp_(-6e4, 6e4)


@each_isa
@each_case
def test_every_element_is_within_the_bound(isa, case):
    kernel = registry.discover()[KERNELS[case.form]]
    for seed, n in enumerate((N, 1, 16, 17, 100)):
        w = weight(case, n, seed)
        for m in MS if n == N else (1, 3, 20):
            x = drawn(case, m, seed * 1000 + m)
            bias = torch.randn(n).to(case.x_dtype) if seed % 2 == 0 else None
            y = run(isa, case, w, x, bias)
            assert within_bound(y, x, w, bias, kernel.rounding(case.call(n), case.x_dtype)), (n, m)


@each_case
def test_every_way_gives_the_same_bits(case):
    w, x = weight(case), drawn(case, 150, 7)
    wanted = run(ISAS[0], case, w, x)
    for isa in ISAS:
        assert all(torch.equal(run(isa, case, w, x, threads=threads), wanted) for threads in (1, 2, 3))
        for m in MS:
            assert torch.equal(run(isa, case, w, x[:m].contiguous()), wanted[:m])


@each_isa
@each_case
def test_one_hot_rows_read_every_weight_back(isa, case):
    w = weight(case)
    coarse = {name: getattr(w, name) for name in ("alpha", "offset") if getattr(w, name) is not None}
    w = dataclasses.replace(w, **{name: t.float().mul(64).round().div(64) for name, t in coarse.items()})
    eye = torch.eye(case.k)
    single = dataclasses.replace(case, x_dtype=FLOAT)
    y = run(isa, single, w, eye)
    kept = LAYOUTS[case.layout]
    wanted = torch.empty_like(y)
    dense.run(eye, kept.pack(w), None, case.call(N), wanted)
    assert torch.equal(y, wanted)
    assert torch.equal(run(isa, single, w, eye[:1]), wanted[:1])


@each_isa
@each_case
def test_nan_and_inf_stay_in_their_row(isa, case):
    w = weight(case)
    for m in (2, 5, 40):
        x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(m)).to(case.x_dtype)
        clean = run(isa, case, w, x)
        x[0, case.k - 1], x[1, 0] = float("nan"), float("-inf")
        y = run(isa, case, w, x)
        assert bool(y[0].isnan().all()) and not bool(y[1].isfinite().any())
        assert torch.equal(y[2:], clean[2:])


@each_isa
@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_may_be_any_numbers(isa, bits):
    # Whole and among the codes, or beyond them, or neither: alike in a block and mixed.
    case = Case("affine", "float", bits, 64, "float16", BFLOAT, 256)
    w = weight(case)
    drawn_zero = torch.randint(0, 1 << bits, w.zero.shape, generator=torch.Generator().manual_seed(1)).float()
    drawn_zero[:16, 1] = 128.0
    drawn_zero[16:32, 1] = -300.0
    drawn_zero[5, 2], drawn_zero[40, 0], drawn_zero[41, 0] = 3.25, 999.0, -0.0
    w = dataclasses.replace(w, zero=drawn_zero)
    x = drawn(case, 40, 3)
    y = run(isa, case, w, x)
    assert within_bound(y, x, w, None, cpu.rounding(case.call(N), BFLOAT))
    assert all(torch.equal(run(other, case, w, x[:m].contiguous()), y[:m]) for other in ISAS for m in (1, 3, 40))


@each_isa
def test_extreme_numbers(isa):
    case = dataclasses.replace(CASES[1], scale_dtype="float32")
    w = weight(case)
    w = dataclasses.replace(w, scale=w.scale.sign() * 2.0**-10)
    x = torch.randn(4, case.k)
    for size in (2.0**-140, 2.0**-126, 2.0**-60, 2.0**100):
        y = run(isa, case, w, x * size)
        truth = (x * size).double() @ dequantize(w).T
        # Digits are no finer than 2**-120.
        assert bool(((y.double() - truth).abs() <= 1e-5 * truth.abs().amax() + 2.0**-115).all()), size
    zero = run(isa, case, w, torch.zeros(2, case.k))
    assert not zero.any()
    all_zero = dataclasses.replace(w, codes=w.zero.repeat_interleave(case.group, 1).clamp(0, 15).to(torch.uint8))
    all_zero = dataclasses.replace(all_zero, zero=w.zero.clamp(0, 15))
    assert not run(isa, case, all_zero, torch.randn(3, case.k).abs()).any()


def test_fixed_point_is_as_fine_as_promised():
    g = torch.Generator().manual_seed(0)
    case = dataclasses.replace(CASES[0], k=4096, x_dtype=HALF)
    w = weight(case, 64)
    w64 = dequantize(w)
    for outliers in (0, 4):
        x = torch.randn(8, 4096, generator=g)
        x[:, torch.randint(0, 4096, (outliers,), generator=g)] *= 30
        for dtype, most in ((HALF, 5e-5), (BFLOAT, 5e-5), (FLOAT, 1e-6)):
            truth = x.to(dtype).double() @ w64.T
            y = run(ISAS[0], dataclasses.replace(case, x_dtype=dtype), w, x.to(dtype)).double()
            # What y's own dtype rounds is not the digits'.
            own = 0.0 if dtype == FLOAT else truth.abs() * {HALF: 2.0**-11, BFLOAT: 2.0**-8}[dtype]
            error = ((y - truth).abs() - own).clamp(min=0)
            assert float(error.norm() / truth.norm()) <= most, (dtype, outliers)


@each_case
def test_codes_and_factors_are_where_the_kernels_read_them(case):
    w, random = weight(case), Random(1)
    layout = LAYOUTS[case.layout]
    parts = dict(zip(layout.names(case.format, "cpu"), layout.pack(w, "cpu"), strict=True))
    same = layout.unpack(list(parts.values()), case.format, N, case.k, "cpu")
    assert torch.equal(same.codes, w.codes)
    for _ in range(60):
        row, column = random.randrange(N), random.randrange(case.k)
        tile, code = parts["planes"][row // 16, column // 128], int(w.codes[row, column]) - code_range(case.format)[0]
        r, c, rest, low = row % 16, column % 128 // 32, column % 32, 0
        for width in layout.widths(case.format, "cpu"):
            if case.layout == "lut":
                # A nibble is a key of four columns; low nibbles of four bytes come before high ones.
                line, byte, bit = c, rest % 16 // 4, 4 * (rest // 16) + rest % 4
            else:
                # Bytes are neighbours; a byte's fields are four columns apart.
                per = 4 * 8 // width
                line, byte, bit = (c * 32 + rest) // per, rest % 4, width * (rest % per // 4)
            found = int(tile[256 * low + 64 * line + 4 * r + byte]) >> bit & (1 << width) - 1
            assert found == code >> low & (1 << width) - 1
            low += width
        for name in ("scale", "zero", "alpha", "offset"):
            if name in parts:
                stored = parts[name][row // 16, column // case.group, ..., row % 16]
                assert torch.equal(stored, getattr(w, name)[row, column // case.group].to(stored.dtype))


@pytest.mark.parametrize("form", ["affine", "table"])
@pytest.mark.parametrize("k, group", [(384, 128), (100, 25), (40, 8), (7, 7)])
def test_the_dense_weight_is_that_of_the_readable_way(form, k, group):
    for bits in (1, 3, 4, 8):
        for rank, zero in enumerate(("none",) * 3 if form == "table" else ("none", "int", "float")):
            w = make(Format(form, bits, group, zero, "bfloat16"), 37, k, bits, rank + 1)
            call, parts = Call("quick", w.format, w.n, w.k), LAYOUTS["quick"].pack(w)
            for dtype in (HALF, BFLOAT, FLOAT):
                assert torch.equal(cpu.dequantize(parts, call, dtype), dense._by_torch(parts, call, dtype))
    assert cpu.dequantize(parts, call, torch.float64) is None


def test_weights_lie_in_huge_pages():
    given = [torch.arange(3 << 20, dtype=torch.int32), torch.arange(7).to(torch.int16)[::2], torch.randn(5, 3)]
    held = pages.together(given)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(held, given, strict=True))
    assert held[0].data_ptr() % pages.HUGE == 0 and not any(t.data_ptr() % pages.ALIGNED for t in held)
    held[1].zero_()
    assert torch.equal(held[0], given[0]) and torch.equal(held[2], given[2])
    f = Format("affine", 4, 128, "none", "float16")
    assert LAYOUTS["quick"].pack(make(f, 2048, 2560))[0].data_ptr() % pages.HUGE == 0


def faked(patch, *names):
    """A CPU that has only the instructions of Isas of these names."""
    wanted = {need for isa in native.ISAS if isa.name in names for need in isa.needs}
    patch.setattr(native, "cpu_flags", lambda: frozenset(wanted))


def test_a_cpu_gets_only_libraries_of_its_own_instructions(monkeypatch, tmp_path):
    store = cache.Cache(tmp_path / "shared")
    monkeypatch.setattr(cache, "default", lambda: store)
    defines = cpu.Launcher("quick.cpp", CASES[0].call(N), BFLOAT, ISAS[0]).defines
    images = []
    monkeypatch.setattr(native, "_open", lambda name, image: images.append(image))
    native.load.cache_clear()
    try:
        for isa in native.ISAS:
            if isa in ISAS:
                native.load("quick.cpp", isa, defines)
        # The same folder, on a lesser machine.
        faked(monkeypatch, "avx2")
        assert [isa.name for isa in native.isas()] == ["avx2"]
        native.load.cache_clear()
        compiled = []
        monkeypatch.setattr(native, "_compile", lambda *given: compiled.append(given))
        native.load("quick.cpp", native.isas()[0], defines)
        assert not compiled and images[-1] == images[len(ISAS) - 1]
        for isa in native.ISAS[:-1]:
            with pytest.raises(ArgumentError, match="avx2"):
                native.load("quick.cpp", isa, defines)
        faked(monkeypatch)
        assert native.isas() == () and cpu.refusal(CASES[0].call(N)) == "x86-64 with AVX2, on Linux"
    finally:
        native.load.cache_clear()
    keys = {repr(native._key("quick.cpp", isa, defines)) for isa in native.ISAS}
    assert len(keys) == len(native.ISAS)
    if shutil.which("objdump"):
        lesser = tmp_path / "lesser.so"
        lesser.write_bytes(images[-1])
        text = subprocess.run(["objdump", "-d", lesser], capture_output=True, text=True, check=True).stdout
        assert "ymm" in text and not any(word in text for word in ("zmm", "tmm", "%k1", "ymm16", "xmm16"))


def test_no_flag_asks_for_what_the_build_machine_has():
    for isa in native.ISAS:
        flags = native._key("quick.cpp", isa, ())[1]
        assert not any("native" in flag for flag in flags) and sum("-march" in flag for flag in flags) == 1


def test_without_a_compiler_it_runs_dense_and_says_why_once(monkeypatch):
    def broken(*given):
        raise Refused(Reason.NO_COMPILER, "no g++ here")

    case = CASES[0]
    w, x = weight(case), drawn(case, 3, 1)
    parts = LAYOUTS["quick"].pack(w)
    y, wanted = (x.new_empty(3, N) for _ in range(2))
    kernels = registry.discover()
    monkeypatch.setattr(native, "load", broken)
    cpu.launcher.cache_clear()
    cpu._warn.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                kernels["quick_cpu"].run(x, parts, None, case.call(N), y)
        kernels["dense"].run(x, parts, None, case.call(N), wanted)
        assert torch.equal(y, wanted)
        assert len(caught) == 1 and Reason.NO_COMPILER.advice in str(caught[0].message)
        monkeypatch.setattr(native, "has_compiler", lambda: False)
        assert "C++ compiler" in kernels["quick_cpu"].accepts(case.call(N), x.dtype, "cpu")
    finally:
        cpu.launcher.cache_clear()
        cpu._warn.cache_clear()


def test_a_source_that_does_not_compile_is_refused_with_the_compilers_words(monkeypatch):
    monkeypatch.setattr(native, "_source", lambda name: "#error on purpose\n")
    with pytest.raises(Refused, match="on purpose") as refused:
        native.load("quick.cpp", ISAS[-1], (("NEVER_SEEN", 1),))
    assert refused.value.reason is Reason.NO_COMPILER
    for bad in ((("x", 1),), (("X", "1"),), (("X", True),)):
        with pytest.raises(ArgumentError, match="defines"):
            native._key("quick.cpp", ISAS[-1], bad)


def test_denormals_are_still_numbers_after_loading():
    run(ISAS[0], CASES[0], weight(CASES[0]), drawn(CASES[0], 1, 0))
    assert float(torch.tensor([2.0**-140]) * 1) == 2.0**-140


def test_another_librarys_tiles_are_put_back():
    if "amx" not in {isa.name for isa in ISAS}:
        pytest.skip("no AMX")
    x, w = torch.randn(64, 256).bfloat16(), torch.randn(512, 256).bfloat16()
    wanted = torch.nn.functional.linear(x, w)
    case = CASES[0]
    for m in (2, 16, 40):
        run(ISAS[0], case, weight(case), drawn(case, m, 0))
        assert torch.equal(torch.nn.functional.linear(x, w), wanted)


def test_a_new_process_loads_what_is_cached_without_compiling():
    code = (
        "import torch\nfrom lqcompile.kernels import cpu, native\nfrom tests.test_cpu import CASES, N, SOURCES\n"
        "def never(*given): raise AssertionError('compiled')\nnative._compile = never\n"
        "cpu.Launcher('quick.cpp', CASES[0].call(N), torch.bfloat16, native.isas()[0])\nprint('loaded')\n"
    )
    cpu.Launcher("quick.cpp", CASES[0].call(N), BFLOAT, ISAS[0])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "loaded" in done.stdout or cache.default().problem() is not None, done.stderr[-2000:]
