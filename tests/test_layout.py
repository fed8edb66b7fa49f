"""The tiles in which layouts are stored for CUDA: each code and factor where the kernels read it."""

from __future__ import annotations

import dataclasses
import math
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lqcompile.errors import ArgumentError
from lqcompile.formats import GROUPED, code_range, parts_of
from lqcompile.kernels.layout import LAYOUTS, LUT, PLAIN, QUICK, Tiles, check_parts
from lqcompile.types import SCALE_DTYPES, Format, QWeight

from .test_formats import SEEDS, make, same
from .test_ops import FORMS

# (k, group): groups that share a tile, that fill one, that span some, that straddle tiles; k with and without a tail.
SIZES = [(8, 8), (40, 8), (48, 16), (128, 16), (32, 32), (160, 32), (384, 32), (64, 64), (192, 64), (128, 128)]
SIZES += [(384, 128), (256, 256), (768, 384), (7, 7), (100, 100), (130, 130), (192, 96), (384, 24), (1000, 1000)]
ROWS = [1, 7, 8, 31, 32, 33, 64, 70]
WIDTHS = {
    (form, bits): (4,) if form == "table" and bits <= 4 else (1,) * bits for form, _ in FORMS for bits in range(9)
}


@st.composite
def weights(draw, form, zero, sizes=SIZES):
    k, group = draw(st.sampled_from(sizes))
    format = Format(form, draw(st.integers(1, 8)), group, zero, draw(st.sampled_from(sorted(SCALE_DTYPES))))
    return make(format, draw(st.sampled_from(ROWS)), k, draw(SEEDS), draw(st.integers(1, 3)))


def each_form(test):
    return pytest.mark.parametrize(("form", "zero"), FORMS)(test)


def packed(w):
    """The parts by name, as a GPU would hold them."""
    return dict(zip(LUT.names(w.format, "cuda"), LUT.pack(w, "cuda"), strict=True))


def grouped_of(w):
    return {name: getattr(w, name) for name in parts_of(w.format)}


def places(w, random, count=40):
    """Rows and columns of some weights: the corners, and others anywhere."""
    yield from ((row, column) for row in {0, w.n - 1} for column in {0, w.k - 1})
    yield from ((random.randrange(w.n), random.randrange(w.k)) for _ in range(count))


def set_bits(t):
    return sum(int((t.to(torch.int16) >> i & 1).sum()) for i in range(8))


@each_form
@given(st.data())
def test_unpack_inverts_pack(form, zero, data):
    w = data.draw(weights(form, zero))
    parts = LUT.pack(w, "cuda")
    check_parts(LUT, parts, w.format, w.n, w.k, "cuda")
    same(LUT.unpack(parts, w.format, w.n, w.k, "cuda"), w)
    codes, grouped, table = LUT.read(parts, w.format, w.n, w.k, torch.float32, "cuda")
    assert torch.equal(codes, w.codes.float() - code_range(w.format)[0])
    assert all(torch.equal(grouped[name], value) for name, value in grouped_of(w).items())
    assert w.table is None or torch.equal(table, w.table)


@pytest.mark.parametrize(("n", "k"), [(0, 128), (0, 0), (5, 0)])
@each_form
def test_empty_weights(form, zero, n, k):
    format = Format(form, 3, 32, zero, "float16")
    w = make(format, n, k)
    same(LUT.unpack(LUT.pack(w, "cuda"), format, n, k, "cuda"), w)


@each_form
@given(st.data(), SEEDS)
def test_codes_are_where_the_kernel_reads_them(form, zero, data, seed):
    w = data.draw(weights(form, zero))
    planes = packed(w)["planes"]
    words = planes.view(torch.int32)
    for row, column in places(w, Random(seed)):
        tile, in_tile = planes[row // 32, column // 128], words[row // 32, column // 128]
        code = int(w.codes[row, column]) - code_range(w.format)[0]
        o, g = divmod(row % 32, 8)
        u, h, r, t = column % 128 // 32, column % 32 // 16, column % 16 // 4, column % 4
        if WIDTHS[form, w.format.bits] == (4,):
            # Octet by octet, lane by lane, word u of 16 bytes: byte r, low nibble first.
            byte = 512 * o + 16 * (4 * g + t) + 4 * u + r
            assert int(tile[byte]) >> 4 * h & 15 == code
            continue
        for plane in range(w.format.bits):
            # Plane by plane, lane by lane, word o of 16 bytes.
            word = 128 * plane + 4 * (4 * g + t) + o
            assert int(in_tile[word]) >> (16 * h + 4 * u + r) & 1 == code >> plane & 1
    # All else is padding, and zero.
    assert set_bits(planes) == set_bits(w.codes.to(torch.int16) - code_range(w.format)[0])


@each_form
@given(st.data(), SEEDS)
def test_factors_are_where_the_kernel_reads_them(form, zero, data, seed):
    w = data.draw(weights(form, zero))
    parts, group = packed(w), w.format.group
    for name, value in grouped_of(w).items():
        stored = parts[name]
        for row, column in places(w, Random(seed)):
            o, g = divmod(row % 32, 8)
            found = stored[row // 32, column // group, ..., 4 * g + o]
            assert torch.equal(found, value[row, column // group]), name
        tiles = -(-w.k // 128)
        # The factors of tile i of a row of tiles start at i times those of one.
        assert stored.shape[:2] == (-(-w.n // 32), tiles * 128 // group if 128 % group == 0 else w.k // group)
        assert stored.count_nonzero() == value.count_nonzero(), f"padding of {name}"


@pytest.mark.parametrize("zero", ["none", "int", "float"])
@given(st.data(), SEEDS)
def test_quick_codes_are_where_the_kernel_reads_them(zero, data, seed):
    w = data.draw(weights("affine", zero))
    parts = QUICK.pack(w, "cuda")
    same(QUICK.unpack(parts, w.format, w.n, w.k, "cuda"), w)
    for row, column in places(w, Random(seed)):
        tile = parts[0][row // 32, column // 128].numpy().tobytes()
        code = int(w.codes[row, column]) - code_range(w.format)[0]
        half, octet, g = row % 32 // 16, row % 16 // 8, row % 8
        u, p, q, t, h = column % 128 // 32, column % 32 // 16, column % 16 // 8, column % 8 // 2, column % 2
        lane, at, low = 4 * g + t, 0, 0
        for width in QUICK.widths(w.format, "cuda"):
            # Pieces of 512 bytes, 16 for each lane; the place of a 32-bit word in them, and of a bit in the word.
            piece, word, bit = {
                8: (2 * (2 * half + octet) + u // 2, 2 * (u % 2) + p, 16 * h + 8 * q),
                4: (2 * half + octet, u, 16 * h + 8 * p + 4 * q),
                2: (half, 2 * octet + u // 2, 16 * h + 8 * p + 4 * q + 2 * (u % 2)),
                1: (0, 2 * half + octet, 16 * h + 8 * p + 4 * q + u),
            }[width]
            start = at + 512 * piece + 16 * lane + 4 * word
            found = int.from_bytes(tile[start : start + 4], "little") >> bit & (1 << width) - 1
            assert found == code >> low & (1 << width) - 1
            at, low = at + 512 * width, low + width


@given(
    st.permutations("OwgUvhpqt"), st.permutations("Uvhpqt"), st.sampled_from([1, 2, 4, 8]), st.sampled_from(ROWS),
    st.sampled_from([5, 128, 300]), SEEDS,
)  # fmt: skip
def test_any_order_is_an_index_map(order, columns, width, n, k, seed):
    tiles = Tiles(" ".join(columns), {width: " ".join(order)})
    codes = torch.randint(0, 1 << width, (n, k), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    (planes,) = tiles.pack(codes, (width,))
    assert [tuple(planes.shape)] == tiles.plane_shapes((width,), n, k)
    assert torch.equal(tiles.unpack([planes], (width,), n, k, torch.uint8), codes)
    random = Random(seed)
    for row, column in ((random.randrange(n), random.randrange(k)) for _ in range(20)):
        digits, rest = {"O": row % 32 // 16, "w": row % 16 // 8, "g": row % 8}, column % 128
        for digit in reversed(columns):
            rest, digits[digit] = divmod(rest, Tiles.SIZES[digit])
        index = 0
        for digit in order:
            index = index * Tiles.SIZES[digit] + digits[digit]
        byte, field = divmod(index, 8 // width)
        assert int(planes[row // 32, column // 128, byte]) >> field * width & (1 << width) - 1 == codes[row, column]


@each_form
@given(st.data())
def test_names_and_shapes_are_those_of_the_parts(form, zero, data):
    w = data.draw(weights(form, zero))
    f, parts = w.format, LUT.pack(w, "cuda")
    names, shapes = LUT.names(f, "cuda"), LUT.shapes(f, w.n, w.k, "cuda")
    assert names == ("planes", *parts_of(f), *(("table",) if form == "table" else ()))
    assert len(parts) == len(names) and len(shapes) == len(names) - (form == "table")
    assert [(tuple(part.shape), part.dtype) for part in parts[: len(shapes)]] == shapes
    assert LUT.widths(f, "cuda") == WIDTHS[form, f.bits]
    # A lane copies 16 bytes: every tile and every group's row of factors must be made of whole ones.
    assert all(part.is_contiguous() and part.shape[-1] * part.element_size() % 16 == 0 for part in parts[: len(shapes)])
    assert all(torch.equal(part, again) for part, again in zip(parts, LUT.pack(w, "cuda"), strict=True))


def broken(parts, rows, i):
    """What part `i` must not be: another dtype, size, order of memory or device, or what other devices store."""
    part = parts[i]
    yield "", part.to(torch.float64)
    yield "", torch.cat([part, part], -1)
    yield "", part[..., :-1].contiguous()
    yield "", part[:-1].contiguous()
    yield "", part.unsqueeze(0)
    yield ".stride", torch.stack([part, part], -1)[..., 0]
    if i > 0:
        yield ".device", part.to("meta")
    if tuple(rows[i].shape) != tuple(part.shape):
        yield "", rows[i]


@each_form
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_check_parts_rejects_each_broken_part(form, zero, bits):
    w = make(Format(form, bits, 64, zero, "float16"), 70, 320)
    f, parts = w.format, LUT.pack(w, "cuda")
    rows = LUT.pack(w, PLAIN)
    rows = [rows[0], *rows[len(LUT.widths(f, PLAIN)) :]]
    for i, name in enumerate(LUT.names(f, "cuda")):
        for suffix, bad in broken(parts, rows, i):
            with pytest.raises(ArgumentError) as error:
                check_parts(LUT, [*parts[:i], bad, *parts[i + 1 :]], f, w.n, w.k, "cuda")
            assert error.value.name == f"parts.{name}{suffix}"
    for wrong in (parts[:-1], [*parts, parts[0]], []):
        with pytest.raises(ArgumentError) as error:
            check_parts(LUT, wrong, f, w.n, w.k, "cuda")
        assert error.value.name == "parts"
    for n, k, name in ((w.n + 32, w.k, "parts.planes"), (w.n, w.k + 128, "parts.planes"), (w.n, 321, "format.group")):
        with pytest.raises(ArgumentError) as error:
            check_parts(LUT, parts, f, n, k, "cuda")
        assert error.value.name == name


def cut_out(w, rows, columns):
    """The weight of some rows and columns, whole groups of them."""
    groups = slice(columns.start // w.format.group, columns.stop // w.format.group)
    held = {name: getattr(w, name) for name in GROUPED if getattr(w, name) is not None}
    held = {name: value[rows, groups].contiguous() for name, value in held.items()}
    if w.table is not None:
        held["table"] = w.table[(rows, groups)[: w.table.ndim - 1]].contiguous()
    n, k = rows.stop - rows.start, columns.stop - columns.start
    return QWeight(w.format, n, k, w.codes[rows, columns].contiguous(), **held)


@each_form
@given(st.data())
def test_whole_tiles_of_a_packed_weight_are_the_packed_slice(form, zero, data):
    w = data.draw(weights(form, zero, [(640, 32), (576, 64), (384, 128), (768, 256), (1152, 384), (768, 96), (264, 8)]))
    group, parts = w.format.group, packed(w)
    step = math.lcm(128, group)

    def piece(size, step):
        ends = sorted({*range(0, size, step), size})
        start = data.draw(st.sampled_from(ends[:-1]))
        return slice(start, data.draw(st.sampled_from([end for end in ends if end > start])))

    rows, columns = piece(w.n, 32), piece(w.k, step)
    wanted = packed(cut_out(w, rows, columns))
    tiles = slice(rows.start // 32, -(-rows.stop // 32)), slice(columns.start // 128, -(-columns.stop // 128))
    stop = tiles[1].stop * (128 // group) if 128 % group == 0 else columns.stop // group
    for name, part in parts.items():
        if name == "planes":
            assert torch.equal(part[tiles], wanted[name])
        elif name != "table":
            assert torch.equal(part[tiles[0], columns.start // group : stop], wanted[name]), name


def test_only_declared_devices_have_tiles():
    format = Format("affine", 4, 32, "int", "float16")
    w = make(format, 5, 64)
    assert LUT.names(format, "cuda")[0] == LUT.names(format, "cpu")[0] == "planes"
    for layout in LAYOUTS.values():
        assert [tuple(part.shape) for part in layout.pack(w)] == [tuple(part.shape) for part in layout.pack(w, "cpu")]
        same(layout.unpack(layout.pack(w, PLAIN), format, 5, 64, PLAIN), w)
        with pytest.raises(ArgumentError, match="parts"):
            layout.unpack(layout.pack(w, PLAIN), format, 6, 64, PLAIN)
    assert dataclasses.replace(LUT, tiles={}).names(format, "cuda") == LUT.names(format, PLAIN)
