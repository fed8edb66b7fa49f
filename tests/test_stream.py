"""How kernels/stream.py spreads a call, and the arithmetic by which stream.cuh finds its way: all that needs no GPU."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lqcompile.kernels import lut, quick, quick_batch, stream
from lqcompile.kernels.registry import Call
from lqcompile.types import Format

FORMATS = [
    Format("binary", 1, 128, "none", "float16"),
    Format("binary", 3, 128, "float", "float16"),
    Format("binary", 8, 32, "float", "float32"),
    Format("affine", 4, 64, "int", "bfloat16"),
    Format("affine", 8, 256, "float", "float16"),
    Format("table", 4, 32, "none", "float16"),
]
# Multiprocessors, shared memory of a block (bytes), whether there are clusters: A100, RTX 4090, H200, B200, RTX 5090.
GPUS = [(108, 163 << 10, False), (128, 99 << 10, False), (132, 227 << 10, True), (148, 227 << 10, True)]
GPUS += [(170, 99 << 10, True)]


def spread(f: Format, n: int, k: int, rows: int, gpu: tuple[int, int, bool], layout: str = "lut") -> stream.Cut | None:
    kind = {"lut": lut.Shape, "quick": quick.Shape}[layout]
    return stream.cut(kind, Call(layout, f, n, k), torch.float16, rows, gpu)


@given(
    f=st.sampled_from(FORMATS),
    n=st.one_of(st.integers(1, 300), st.sampled_from([1024, 4096, 14336, 49152, 128256, 1 << 20])),
    blocks=st.one_of(st.integers(1, 40), st.sampled_from([112, 224, 416, 1024])),
    rows=st.sampled_from([1, 2, 4, 8, 16]),
    gpu=st.sampled_from(GPUS),
    layout=st.sampled_from(["lut", "quick"]),
)
def test_every_tile_has_one_thread_block_and_everything_fits(f, n, blocks, rows, gpu, layout):
    k = blocks * 256
    if layout == "quick" and f.form != "affine":
        return
    rows = max(min(rows, 8), lut.ROWS[f.form][0]) if layout == "lut" else rows
    found = spread(f, n, k, rows, gpu, layout)
    if found is None:
        return
    all_blocks, row_tiles = k // 128, -(-n // 32)
    assert found.shared <= gpu[1] and found.split in (1, 2, 4, 8) and (gpu[2] or found.split == 1)
    assert found.range * (found.split - 1) < all_blocks <= found.range * found.split
    assert 1 <= found.tiles <= row_tiles + found.tiles
    assert found.tiles * found.range <= max(stream.MOST_UNITS, found.range)
    assert found.shape.stages >= 2 and found.shape.warps >= 2


@given(
    f=st.sampled_from([f for f in FORMATS if f.form == "affine"]),
    n=st.one_of(st.integers(1, 300), st.sampled_from([4096, 14336, 49152, 128256])),
    blocks=st.one_of(st.integers(1, 40), st.sampled_from([112, 416])),
    m=st.integers(1, 5000),
)
def test_a_batch_is_cut_into_what_fits(f, n, blocks, m):
    k = blocks * 256
    plan = quick_batch.plan(Call("quick", f, n, k), torch.float16, m, 132, 227 << 10)
    assert plan is not None
    taken = numpy.zeros((-(-n // 32), m), dtype=int)
    for part in plan.parts:
        batch = part.batch
        assert -(-(k // 128) // batch.split) * (batch.split - 1) < k // 128
        assert batch.shared <= 227 << 10 and batch.stages >= max(2, batch.ways)
        assert batch.rows < 2 * m or batch.rows == 16
        # What all found stands where the ring was.
        sums = batch.ways * batch.row_tiles * batch.rows * 32 * 4
        assert sums <= batch.stages * (batch.rows * 256 + batch.row_tiles * batch.stage)
        height = batch.tiles(n - 32 * part.tile, 1)
        for unit in range(part.count):
            row, tile = part.row + unit // height * batch.rows, part.tile + unit % height * batch.row_tiles
            taken[tile : tile + batch.row_tiles, row : row + batch.rows] += 1
    assert (taken == 1).all()


@given(m=st.integers(1, 1000))
def test_what_is_cut_for_whole_tiles_holds_the_rows(m):
    call, gpu = Call("quick", FORMATS[3], 4096, 4096), (132, 227 << 10)
    whole = quick_batch.whole_tiles(m)
    assert m <= whole < max(2 * m, 17) and quick_batch.whole_tiles(whole) == whole
    plan = quick_batch.plan(call, torch.float16, whole, *gpu)
    assert plan is not None and all(part.row < m for part in plan.parts)


@pytest.mark.parametrize("most", [16, 4, 1, 0])
@pytest.mark.parametrize("m", [1, 3, 8, 16, 17, 40])
def test_rows_are_run_once_each_in_order_with_as_many_as_fit(m, most, monkeypatch):
    """`most` rows fit in shared memory; where not one does, the dense weight takes them all."""
    taken = []

    def launcher(kind, call, x_dtype, rows, device_index):
        def launch(x, parts, bias, other, out, queue):
            assert x.shape[0] <= rows and x.shape[0] == out.shape[0]
            # What is added goes along, row for row.
            assert other == added.data_ptr() + int(x[0, 0]) * added.stride(0) * added.element_size()
            taken.append((rows, x[:, 0].tolist()))

        return launch if rows <= most else None

    monkeypatch.setattr(stream, "launcher", launcher)
    monkeypatch.setattr(stream, "pointers", lambda parts, call: ())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)

    def dense(x, parts, bias, call, out, other):
        assert torch.equal(other, added[int(x[0, 0]) :])
        taken.append((0, x[:, 0].tolist()))

    monkeypatch.setattr(stream.dense, "run", dense)
    added = torch.randn(m, 4)
    x = torch.arange(m, dtype=torch.float32)[:, None].expand(m, 8)
    call = Call("quick", FORMATS[3], 4, 8, "add")
    stream.run(quick.Shape, quick.SIZES, quick.ROWS[0], x, [], None, call, torch.empty(m, 4), added)
    assert [row for _, rows in taken for row in rows] == list(range(m))
    assert {rows for rows, _ in taken} <= {0} if most == 0 else all(0 < rows <= most for rows, _ in taken)
    if most == 16:
        assert [rows for rows, _ in taken] == [16] * (m // 16) + ([quick.SIZES[m % 16]] if m % 16 else [])


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (8192, 8192), (28672, 8192), (49152, 12288)])
def test_usual_shapes_fill_the_gpu_in_one_wave(n, k, rows):
    found = spread(FORMATS[1], n, k, rows, GPUS[2])
    assert found is not None
    blocks = -(-(n // 32) // found.tiles) * found.split
    waves = -(-blocks // 132)
    assert blocks >= 0.85 * 132 * waves


def divided(a: numpy.ndarray, b: int, ulps: int) -> numpy.ndarray:
    """stream.cuh's divide() where the reciprocal and the product are off by `ulps` of 2^-24 each."""
    reciprocal = numpy.float32(numpy.float32(1) / numpy.float32(b) * (1 + ulps * 2.0**-24))
    product = (a.astype(numpy.float32) + numpy.float32(0.5)) * reciprocal
    return numpy.floor((product * (1 + ulps * 2.0**-24)).astype(numpy.float32)).astype(int)


@given(
    height=st.integers(1, 1000),
    count=st.integers(1, stream.MOST_UNITS),
    warps=st.sampled_from([2, 4, 8, 16]),
    ulps=st.sampled_from([-2, 0, 2]),
)
def test_runs_of_warps_partition_the_tiles_and_their_sums_meet(height, count, warps, ulps):
    height = max(1, min(height, stream.MOST_UNITS // count))
    units = height * count
    begin = numpy.arange(warps + 1) * units // warps
    rows = divided(begin[:-1], count, ulps)
    assert (rows == begin[:-1] // count).all()
    r = numpy.arange(height)
    first = divided((r * count + 1) * warps - 1, units, ulps)
    last = divided((r + 1) * count * warps - 1, units, ulps)
    met: set[int] = set()
    for tile in range(height):
        # Those whose run has a part of the row tile; between them, warps without any tile, whose slots hold zeros.
        busy = [w for w in range(warps) if max(begin[w], tile * count) < min(begin[w + 1], (tile + 1) * count)]
        assert (busy[0], busy[-1]) == (first[tile], last[tile])
        for w in range(first[tile], last[tile] + 1):
            if begin[w] == begin[w + 1]:
                # A warp without tiles writes the slot of the row where its empty run stands.
                assert begin[w] // count == tile
            assert tile + w not in met
            met.add(tile + w)
    assert max(met) < height + warps - 1


@pytest.mark.parametrize("per_group", [2, 3, 5, 7, 56, 300])
def test_the_group_of_a_block_by_multiplication(per_group):
    span = -(-(1 << 32) // per_group)
    blocks = numpy.arange(1 << 16, dtype=numpy.uint64)
    assert ((blocks * numpy.uint64(span)) >> numpy.uint64(32) == blocks // numpy.uint64(per_group)).all()
