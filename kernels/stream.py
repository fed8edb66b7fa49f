"""The host's side of stream.cuh: which specialisation runs a call, how its work is cut, and its launches."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import sympy
import torch
from torch import Tensor

from ..device import Device
from ..errors import ArgumentError
from ..types import SCALE_DTYPES, Format, Problem
from . import build, dense, epilogues
from .layout import LAYOUTS
from .registry import Call

FORMS = {"affine": 0, "binary": 1, "table": 2}
ZEROS = {"none": 0, "int": 1, "float": 2}
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SIGNATURE, DENSE = "PPPPPPPPiiiiiiii", "PPPPPiiiiiii"
# Tiles of 32 x 128 of a thread block: up to so many stream.cuh divides right in float32.
MOST_UNITS = 1 << 15
# Thread blocks that share k, the share of the multiprocessors that clusters of so many reach, and what sums cost.
CLUSTERS = ((1, 1.0, 0), (2, 1.0, 10_000), (4, 0.9, 80_000), (8, 0.85, 120_000))


@dataclass(frozen=True)
class Specialisation:
    """What a kernel is compiled for. `rows` of x; `groups` that share 128 inputs, 0 where a group spans more."""

    format: Format
    x_dtype: torch.dtype
    rows: int
    groups: int
    warps: int
    stages: int
    epilogue: str = field(default="", kw_only=True)

    @property
    def defines(self) -> build.Defines:
        f = self.format
        return (
            ("LQ_BITS", f.bits),
            ("LQ_ZERO", ZEROS[f.zero]),
            ("LQ_SCALE", TYPES[SCALE_DTYPES[f.scale_dtype]]),
            ("LQ_X", TYPES[self.x_dtype]),
            ("LQ_ROWS", self.rows),
            ("LQ_SUB", self.groups),
            ("LQ_WARPS", self.warps),
            ("LQ_STAGES", self.stages),
            ("LQ_EPILOGUE", epilogues.EPILOGUES[self.epilogue]),
        )

    @property
    def stage(self) -> int:
        """Bytes of a tile with its groups' factors."""
        f, factor = self.format, SCALE_DTYPES[self.format.scale_dtype].itemsize
        zero = {"none": 0, "int": 2, "float": factor if f.form == "binary" else 4}[f.zero]
        factors = factor * (f.bits if f.form == "binary" else 1) + zero
        return 512 * (4 if f.form == "table" else f.bits) + max(self.groups, 1) * 32 * factors


class Shape(Specialisation, abc.ABC):
    """One specialisation of a kernel that includes stream.cuh: its source and entry, and what the way costs it."""

    SOURCE: ClassVar[str]
    ENTRY: ClassVar[str]

    @staticmethod
    @abc.abstractmethod
    def warps_of(format: Format, rows: int, groups: int) -> int:
        """Warps of a thread block: 16 where their registers allow it without spilling (ptxas -v over all variants)."""

    @property
    @abc.abstractmethod
    def columns(self) -> int:
        """Rows of x whose sums are kept apart."""

    @property
    @abc.abstractmethod
    def block(self) -> int:
        """Bytes of x, and of facts about it, for each row and 128 inputs."""

    @property
    @abc.abstractmethod
    def limit(self) -> float:
        """Time in which one multiprocessor alone takes a tile, over that in which memory delivers one to each."""

    @property
    def extra(self) -> int:
        """Bytes of shared memory besides what all need."""
        return 0

    @property
    def effort(self) -> int:
        """Bytes that memory could deliver to a multiprocessor while it prepares a row of 128 inputs."""
        return 0

    def shared(self, tiles: int, blocks: int, split: int) -> int:
        """Bytes of shared memory for `tiles` row tiles and `blocks` blocks of 128 inputs."""
        slots = (tiles + self.warps - 1 + split * tiles) * 32 * self.columns * 4
        return self.warps * self.stages * self.stage + self.extra + slots + tiles * 64 + blocks * self.rows * self.block


@dataclass(frozen=True)
class Cut:
    """How one call is spread: `tiles` row tiles a thread block, k cut over `split` blocks of a cluster."""

    shape: Shape
    tiles: int
    split: int
    range: int
    shared: int


def groups_of(format: Format, k: int) -> int | None:
    """Groups that share a block of 128 inputs, 0 where a group spans more; None where there is no way."""
    if format.group in (32, 64, 128):
        return 128 // format.group
    return 0 if format.group % 128 == 0 or format.group == k else None


def stored_groups(call: Call) -> int:
    """Groups of a row tile as they are stored, those that only pad the last tile included."""
    group = call.format.group
    return LAYOUTS[call.layout].order("cuda").grouped_shape(call.n, call.k // group, group, ())[1]


def span_of(call: Call) -> int:
    """By what a kernel multiplies a block of 128 inputs to get its group, as an int32; 0 where groups share blocks."""
    if groups_of(call.format, call.k):
        return 0
    span = -(-(1 << 32) // max(-(-call.format.group // 128), 2))
    return span - (span >> 31 << 32)


def at_once(split: int, sms: int) -> int:
    """How many clusters of `split` thread blocks run at once."""
    return int(sms * next(usable for size, usable, _ in CLUSTERS if size == split)) // split


@functools.lru_cache(maxsize=4096)
def cut(kind: type[Shape], call: Call, x_dtype: torch.dtype, rows: int, gpu: tuple[int, int, bool]) -> Cut | None:
    """The best way to spread a call on a GPU of so many multiprocessors, bytes of shared memory, and with clusters.

    None where x does not fit. Times are in bytes at the rate at which memory delivers them to one of all
    multiprocessors, measured on an H200. Of clusters of four or more, which must lie within a part of the chip, not as
    many as the multiprocessors would hold run at once.
    """
    sms, shared, clusters = gpu
    groups = groups_of(call.format, call.k)
    assert groups is not None
    all_tiles, blocks, warps = -(-call.n // 32), -(-call.k // 128), kind.warps_of(call.format, rows, groups)
    best: tuple[float, Cut] | None = None
    for stages, count in ((3, warps), (2, warps), (2, warps // 2), (2, warps // 4)):
        shape = kind(call.format, x_dtype, rows, groups, count, stages, epilogue=call.epilogue)
        ring = shape.stage * count * (stages - 1)
        for split, usable, sums in CLUSTERS if clusters else CLUSTERS[:1]:
            if split > blocks:
                break
            slots = int(sms * usable)
            span, tiles = -(-blocks // split), -(-all_tiles * split // slots)
            # An empty last range would have nothing to add.
            if span * (split - 1) >= blocks:
                continue
            while tiles > 1 and (tiles * span > MOST_UNITS or shape.shared(tiles, span, split) > shared):
                tiles = -(-tiles // 2)
            need = shape.shared(tiles, span, split)
            if need > shared:
                continue
            waves = -(-(-(-all_tiles // tiles) * split) // slots)
            flow = max(all_tiles * blocks / sms, shape.limit * waves * tiles * span) * shape.stage
            # While x is prepared the rings fill; what it takes beyond that is lost.
            lost = waves * max(shape.effort * rows * span - ring, 0)
            if best is None or flow + lost + sums < best[0]:
                best = (flow + lost + sums, Cut(shape, tiles, split, span, need))
        if best is not None:
            return best[1]
    return None


class Launcher:
    """One call's launches on one device, for one number of rows."""

    def __init__(self, call: Call, plan: Cut, device_index: int, pdl: bool) -> None:
        shape = plan.shape
        self.function = build.load_cuda(shape.SOURCE, shape.ENTRY, SIGNATURE, shape.defines, device_index, plan.shared)
        row_tiles = -(-call.n // 32)
        self.grid = (plan.split, -(-row_tiles // plan.tiles), 1)
        self.cluster = (plan.split, 1, 1)
        self.threads, self.shared, self.pdl = 32 * shape.warps, plan.shared, pdl
        self.values = (call.n, call.k, plan.tiles, plan.range, stored_groups(call), span_of(call))
        self.wide = call.k % 8 == 0

    def __call__(self, x: Tensor, parts: Sequence[int], bias: int, other: int, out: Tensor, stream: int) -> None:
        at = x.data_ptr()
        wide = int(self.wide and not (at | bias) & 15)
        values = (at, *parts, bias, other, out.data_ptr(), x.shape[0], *self.values, wide)
        self.function.launch(self.grid, self.threads, self.shared, self.cluster, stream, values, self.pdl)


@functools.lru_cache(maxsize=4096)
def launcher(kind: type[Shape], call: Call, x_dtype: torch.dtype, rows: int, device_index: int) -> Launcher | None:
    """What runs `rows` rows of a call; None where x does not fit in shared memory."""
    p = torch.cuda.get_device_properties(device_index)
    modern = p.major >= 9
    plan = cut(kind, call, x_dtype, rows, (p.multi_processor_count, p.shared_memory_per_block_optin, modern))
    return None if plan is None else Launcher(call, plan, device_index, modern)


def pointers(parts: Sequence[Tensor], call: Call) -> tuple[int, int, int, int]:
    """Addresses of the planes, the scale or alpha, the zero or offset, and the table; 0 for what there is not."""
    f = call.format
    at = [part.data_ptr() for part in parts]
    for i, address in enumerate(at):
        if address & 15 or not parts[i].is_cuda:
            name = LAYOUTS[call.layout].names(f, "cuda")[i]
            raise ArgumentError(f"parts.{name}", hex(address), "a CUDA tensor at a multiple of 16 bytes")
    return at[0], at[1], at[2] if f.zero != "none" else 0, at[-1] if f.form == "table" else 0


def run(
    kind: type[Shape], sizes: Sequence[int], least: int, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None,
    call: Call, out: Tensor, other: Tensor | None,
) -> None:  # fmt: skip
    """Runs a call, as many rows of x in a launch as fit.

    `sizes[m]` is the specialisation for m rows, up to the most that one takes; `least` the smallest there is. What
    even that does not hold goes by the dense weight.
    """
    index = x.device.index
    addresses, queue = pointers(parts, call), torch._C._cuda_getCurrentRawStream(index)
    at, m, b = 0, x.shape[0], 0 if bias is None else bias.data_ptr()
    while at < m:
        left = min(m - at, len(sizes) - 1)
        rows = sizes[left]
        launch = launcher(kind, call, x.dtype, rows, index)
        while launch is None and rows > least:
            rows //= 2
            launch = launcher(kind, call, x.dtype, rows, index)
        if launch is None:
            return dense.run(x[at:], parts, bias, call, out[at:], None if other is None else other[at:])
        end = at + min(left, rows)
        whole = at == 0 and end == m
        added = 0 if other is None else other.data_ptr() + at * other.stride(0) * other.element_size()
        launch(x if whole else x[at:end], addresses, b, added, out if whole else out[at:end], queue)
        at = end


def sizes_of(rows: Sequence[int]) -> list[int]:
    """By a number of rows the specialisation, of `rows` in ascending order, that takes so many."""
    return [next(r for r in rows if r >= m) for m in range(rows[-1] + 1)]


def refusal(call: Call, x_dtype: torch.dtype) -> str | None:
    """What of x, of the groups or of the machine no kernel here takes."""
    if x_dtype not in (torch.float16, torch.bfloat16):
        return "x of float16 | bfloat16"
    if groups_of(call.format, call.k) is None:
        return "groups of 32, 64, a multiple of 128, or all of k"
    return None if build.has_nvrtc() else "a machine with NVRTC"


@dataclass(frozen=True)
class Cost:
    """What a launch for up to `m` rows of x takes.

    start  seconds beyond an empty launch
    times  how many times a pure read of the packed weight
    tile   seconds of a tile of 32 x 128 weights on one multiprocessor, besides
    plane  the same for each bit of a code and each further group that shares those 128 inputs
    """

    m: int
    start: float
    times: float
    tile: float = 0.0
    plane: float = 0.0

    def work(self, problem: Problem, layout: str, device: Device) -> float:
        """Seconds of all but the start."""
        f = problem.format
        read = LAYOUTS[layout].packed_bytes(f, problem.n, problem.k, "cuda") / device.bandwidth
        tiles = -(-problem.n // 32) * -(-problem.k // 128) / device.processors
        planes = tiles * f.bits * ((groups_of(f, problem.k) or 1) - 1)
        return read * self.times + tiles * self.tile + planes * self.plane


def seconds(costs: Sequence[Cost], problem: Problem, layout: str, device: Device) -> sympy.Expr:
    """The time of a launch as one of `costs` has it; beyond the last, of several such launches."""
    m = problem.m
    pieces = [(device.launch + c.start + c.work(problem, layout, device), m <= c.m) for c in costs]
    return sympy.Piecewise(*pieces, (sympy.ceiling(m / costs[-1].m) * pieces[-1][0], True))


def dense_defines(f: Format, dtype: torch.dtype) -> build.Defines:
    """What both kernels that make a dense weight of `dtype` are told of a format."""
    return (
        ("LQ_FORM", FORMS[f.form]),
        ("LQ_BITS", f.bits),
        ("LQ_ZERO", ZEROS[f.zero]),
        ("LQ_SCALE", TYPES[SCALE_DTYPES[f.scale_dtype]]),
        ("LQ_OUT", TYPES[dtype]),
    )


def dense_weight(
    parts: Sequence[Tensor], call: Call, dtype: torch.dtype, entry: str, warps: int, defines: build.Defines
) -> Tensor | None:
    """The dense weight [n, k] by `entry`.cu, a tile for each of `warps`; None for what it does not take."""
    f = call.format
    if refusal(call, dtype) is not None:
        return None
    out = parts[0].new_empty((call.n, call.k), dtype=dtype)
    if out.numel() == 0:
        return out
    function = build.load_cuda(f"{entry}.cu", entry, DENSE, defines, out.device.index)
    tiles = -(-call.n // 32) * -(-call.k // 128)
    table = parts[-1] if f.form == "table" else None
    row, group = (0, 0) if table is None or table.ndim == 1 else (table.stride(0), table.stride(1) * (table.ndim == 3))
    sizes = (call.n, call.k, f.group, call.k // f.group, stored_groups(call), row, group)
    queue = torch._C._cuda_getCurrentRawStream(out.device.index)
    values = (*pointers(parts, call), out.data_ptr(), *sizes)
    function.launch((-(-tiles // warps), 1, 1), 32 * warps, 0, (1, 1, 1), queue, values)
    return out
