"""Batches of rows of x on Hopper: the host's side of quick_sm90.cu."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor

from ..types import SCALE_DTYPES
from . import build, epilogues, stream
from .registry import Call
from .stream import groups_of, stored_groups
from .tensor_map import tensor_map

SIGNATURE = "TTTTPPPiiiiiiii"
# By rows of x in a tile and (warps that multiply, ways): seconds of a launch without blocks, and of a block of 128
# inputs of one thread block. Least squares over six shapes of int4 g128 on an H200, most within 10 %.
TILES = {
    16: {(16, 2): (1.35e-6, 0.327e-6), (8, 2): (0.47e-6, 0.269e-6)},
    32: {(16, 2): (1.66e-6, 0.357e-6), (8, 2): (0.55e-6, 0.287e-6), (8, 1): (1.04e-6, 0.393e-6)},
    64: {(8, 1): (1.54e-6, 0.48e-6), (8, 2): (1.29e-6, 0.305e-6)},
    128: {(8, 1): (1.5e-6, 0.81e-6), (8, 2): (2.2e-6, 0.42e-6)},
    256: {(8, 1): (1.5e-6, 1.45e-6)},
}
# Where the tensor cores are the limit, what a block takes more in the long run, when the clocks have come down.
HEAT = 0.2
# Thread blocks that cut k: the share of the multiprocessors that clusters of so many reach, and what they take longer.
SPLITS = {1: (1.0, 0.0), 2: (1.0, 1e-6), 4: (0.88, 4e-6)}
MOST_STAGES = 12
# Bytes/s of packed weights that memory delivers to one of all multiprocessors of an H200.
READ = 3.2e10


@dataclass(frozen=True)
class Batch(stream.Specialisation):
    """One specialisation; `rows` of x in a tile, `warps` that multiply.

    `ways` warpgroups take a tile's blocks of 128 inputs in turn, `split` thread blocks of a cluster cut k.
    """

    ways: int
    split: int

    @property
    def defines(self) -> build.Defines:
        return (*super().defines, ("LQ_WAYS", self.ways), ("LQ_SPLIT", self.split))

    @property
    def alone(self) -> bool:
        """Whether one thread block does a tile, and then others; those that share sums take one each."""
        return self.ways * self.split == 1

    @property
    def row_tiles(self) -> int:
        """Tiles of 32 rows of w of a thread block."""
        return self.warps // 2 // self.ways

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the rings with their barriers, and what waits to be stored."""
        ring = self.stages * (self.rows * 256 + self.row_tiles * self.stage + 16)
        # Counted from a multiple of 1024 bytes, where a swizzle begins.
        return 1024 + ring + self.warps // 4 * min(-(-self.rows // (8 * self.ways * self.split)) * 8, 32) * 128

    def tiles(self, n: int, m: Any) -> Any:
        """How many tiles y [m, n] has; m a number or an expression."""
        return -(-n // (32 * self.row_tiles)) * -(-m // self.rows)

    def span(self, k: int) -> int:
        """How many blocks of 128 inputs a thread block takes of each of its tiles."""
        blocks = -(-k // 128)
        return -(-blocks // self.split)

    def seconds(self, tiles: Any, k: int, sms: int) -> Any:
        """How long `tiles`, a number or an expression, take on so many multiprocessors: whole rounds of all blocks."""
        fixed, each = TILES[self.rows][self.warps, self.ways]
        # Of more bits than four, memory may be the limit.
        each = max(each, self.row_tiles * self.stage / READ)
        share, longer = SPLITS[self.split]
        rounds = -(-tiles * self.split // int(sms * share))
        # A thread block that takes several tiles fetches the next while it stores one.
        starts = 1 if self.alone else rounds
        heat = HEAT * (rounds - 1) if self.rows >= 128 else 0.0
        return longer + starts * fixed + (rounds + heat) * self.span(k) * each


@dataclass(frozen=True)
class Part:
    """One launch: `count` tiles, rows of w first, of what is left of y from row tile `tile` of w and row `row` of x."""

    batch: Batch
    count: int
    tile: int
    row: int


@dataclass(frozen=True)
class Plan:
    parts: tuple[Part, ...]
    seconds: float


def whole_tiles(m: int) -> int:
    """m, up to whole tiles: what is planned for it depends on no more."""
    rows = next((c for c in TILES if c >= m), max(TILES))
    return -(-m // rows) * rows


def batches(call: Call, x_dtype: torch.dtype, rows: int, shared: int) -> Iterator[Batch]:
    """The specialisations for tiles of `rows` rows of x, each with as many stages as fit."""
    groups, blocks = groups_of(call.format, call.k), -(-call.k // 128)
    assert groups is not None
    for (warps, ways), split in itertools.product(TILES[rows], SPLITS if rows < 256 else (1,)):
        # Their registers would spill (ptxas -v over all variants).
        if (warps, rows) == (16, 32) and call.format.bits > 4:
            continue
        depths, epilogue = range(MOST_STAGES, 1, -1), call.epilogue
        made = (Batch(call.format, x_dtype, rows, groups, warps, n, ways, split, epilogue=epilogue) for n in depths)
        fits = next((batch for batch in made if batch.shared <= shared and batch.stages > ways), None)
        # An empty last range would have nothing to add.
        if fits is not None and -(-blocks // split) * (split - 1) < blocks:
            yield fits


def _whole(call: Call, x_dtype: torch.dtype, m: int, sms: int, shared: int, most: int) -> Plan | None:
    """The fastest plan of one launch with tiles of at most `most` rows of x."""
    found: Plan | None = None
    # Tiles of twice the rows only waste; of a quarter of them, small ones are many.
    for rows in (r for r in TILES if r <= most and r < max(2 * m, 17) and (r >= 128 or r * 4 >= m)):
        for batch in batches(call, x_dtype, rows, shared):
            tiles = batch.tiles(call.n, m)
            seconds = batch.seconds(tiles, call.k, sms)
            # Clusters wait for a place where all their thread blocks fit: no second round of them.
            if (batch.split > 1 and tiles * batch.split > sms) or (not batch.alone and tiles >= 1 << 16):
                continue
            if found is None or seconds < found.seconds:
                found = Plan((Part(batch, tiles, 0, 0),), seconds)
    return found


@functools.lru_cache(maxsize=4096)
def plan(call: Call, x_dtype: torch.dtype, m: int, sms: int, shared: int) -> Plan | None:
    """How m rows are spread over a GPU of so many multiprocessors and bytes of shared memory; None where none fits.

    Large tiles are the fastest, but a last round of a few of them leaves most multiprocessors idle: where they are
    fewer than one row of tiles, smaller ones take their place.
    """
    found = _whole(call, x_dtype, m, sms, shared, max(TILES))
    for batch in batches(call, x_dtype, max(TILES), shared):
        tiles, row = batch.tiles(call.n, m), (m - 1) // batch.rows * batch.rows
        rounds, left = divmod(tiles, sms)
        if found is None or not rounds or not 0 < left <= batch.tiles(call.n, 1):
            continue
        tile = (batch.tiles(call.n, 1) - left) * batch.row_tiles
        rest = _whole(replace(call, n=call.n - 32 * tile), x_dtype, m - row, sms, shared, 128)
        if rest is None:
            continue
        seconds = batch.seconds(tiles - left, call.k, sms) + rest.seconds
        # A second launch must be worth more than what is wrong with these figures.
        if seconds < 0.96 * found.seconds:
            last = replace(rest.parts[0], tile=tile, row=row)
            found = Plan((Part(batch, tiles - left, 0, 0), last), seconds)
    return found


def seconds_beyond(call: Call, x_dtype: torch.dtype, m: sympy.Expr, sms: int, shared: int) -> sympy.Expr:
    """What `plan` takes for more rows than one tile has: whichever tiles fit y best, the last round of large ones too.

    Not simplified: sympy takes long to compare expressions.
    """
    large = max(TILES)
    m = -(-m // large) * large
    small, whole = [[*batches(call, x_dtype, rows, shared)] for rows in (large // 2, large)]

    def once(batch: Batch, tiles: sympy.Expr) -> sympy.Expr:
        seconds = batch.seconds(tiles, call.k, sms)
        # Of clusters there is one round.
        fits = sympy.Piecewise((seconds, tiles * batch.split <= sms), (sympy.oo, True), evaluate=False)
        return seconds if batch.split == 1 else fits

    times = [once(batch, batch.tiles(call.n, m)) for batch in (*small, *whole)]
    for batch in whole:
        row, tiles = batch.tiles(call.n, 1), batch.tiles(call.n, m)
        left = tiles - tiles // sms * sms
        rest = [once(b, -(-left * batch.row_tiles // b.row_tiles) * (large // b.rows)) for b in small]
        both = batch.seconds(tiles - left, call.k, sms) + sympy.Min(*rest, evaluate=False)
        two = sympy.And(tiles > sms, left > 0, left <= row)
        times.append(sympy.Piecewise((both, two), (sympy.oo, True), evaluate=False))
    return sympy.Min(*times, evaluate=False)


class Launcher:
    """The launch of one part of a plan on one device."""

    def __init__(self, call: Call, part: Part, device_index: int) -> None:
        batch = part.batch
        self.part, self.n, self.shared = part, call.n - 32 * part.tile, batch.shared
        self.function = build.load_cuda(
            "quick_sm90.cu", "quick_batch", SIGNATURE, batch.defines, device_index, batch.shared
        )
        self.threads = 32 * batch.warps + 128
        processors = torch.cuda.get_device_properties(device_index).multi_processor_count
        self.most = processors if batch.alone else part.count
        self.values = (self.n, call.k, batch.span(call.k), stream.span_of(call))
        # Of y: the length of a row, and what of it comes from a tile of 32 rows of w.
        self.pitch, self.each = (epilogues.outputs(call.epilogue, n) for n in (call.n, 32))
        self.maps = functools.partial(weight_maps, call, max(batch.groups, 1), batch.row_tiles)

    def __call__(self, x: Tensor, parts: Sequence[int], bias: int, other: int, out: int, queue: int) -> None:
        part, batch = self.part, self.part.batch
        m, k, size = x.shape[0] - part.row, x.shape[1], x.element_size()
        # What lies beyond x costs as much as x, and nobody looks at it.
        rows = min(batch.rows, -(-m // 8) * 8)
        map = tensor_map(x.data_ptr() + part.row * k * size, x.dtype, (m, k), (rows, 64), True)
        bias, place = bias and bias + 32 * part.tile * size, (part.row * self.pitch + self.each * part.tile) * size
        count = min(part.count, batch.tiles(self.n, m))
        grid = (batch.split, min(count, self.most), 1)
        pointers = (bias, other + place, out + place)
        sizes = (m, *self.values, count, self.pitch, rows * 256)
        values: tuple[int | bytes, ...] = (map, *self.maps(part.tile, *parts[:3]), *pointers, *sizes)
        self.function.launch(grid, self.threads, self.shared, (batch.split, 1, 1), queue, values, True)


@functools.lru_cache(maxsize=4096)
def weight_maps(
    call: Call, groups: int, height: int, tile: int, planes: int, scale: int, zero: int
) -> tuple[bytes, bytes, bytes]:
    """How the parts of a packed weight lie in memory from row tile `tile` on, for boxes of `height` row tiles.

    A box is a block of 128 inputs with its `groups` groups.
    """
    f, tiles, stored = call.format, -(-call.n // 32) - tile, stored_groups(call)

    def map(at: int, rows: int, size: int, each: int) -> bytes:
        sizes = (tiles, rows, size // 2)
        return tensor_map(at + tile * rows * size, torch.int16, sizes, (height, each, size // 2), False)

    codes = map(planes, -(-call.k // 128) * f.bits, 512, f.bits)
    scales = map(scale, stored, 32 * SCALE_DTYPES[f.scale_dtype].itemsize, groups)
    return codes, scales, map(zero, stored, 64 if f.zero == "int" else 128, groups) if zero else scales


@functools.lru_cache(maxsize=4096)
def _launchers(call: Call, x_dtype: torch.dtype, m: int, device_index: int) -> tuple[Launcher, ...]:
    p = torch.cuda.get_device_properties(device_index)
    if (p.major, p.minor) != (9, 0) or call.k % 8:
        return ()
    found = plan(call, x_dtype, m, p.multi_processor_count, p.shared_memory_per_block_optin)
    return () if found is None else tuple(Launcher(call, part, device_index) for part in found.parts)


def run(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor, other: Tensor | None) -> bool:
    """Runs a call; False, and nothing done, where this GPU, this k or this place of x is not for quick_sm90.cu."""
    index = x.device.index
    launchers = _launchers(call, x.dtype, whole_tiles(x.shape[0]), index)
    if not launchers or x.data_ptr() & 15:
        return False
    addresses, queue = stream.pointers(parts, call), torch._C._cuda_getCurrentRawStream(index)
    b, added = (0 if t is None else t.data_ptr() for t in (bias, other))
    for launch in launchers:
        launch(x, addresses, b, added, out.data_ptr(), queue)
    return True
