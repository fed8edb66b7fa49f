"""How `lq bench` takes time: rotated copies, a timer for GPUs and one for CPUs, and the pure read that is the floor."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from .errors import Refused
from .kernels import native, pages
from .kernels.build import load_cuda

Run = Callable[[], object]
Sampler = Callable[[], float]
# Copies of a weight must exceed this many caches together, so that none is still cached when its turn comes again.
CACHES = 4
MOST_COPIES = 4096
CPU_CACHE = 64 << 20
LIGHT_UNROLLS, LIGHT_BLOCKS, LIGHT_WAVES = (1, 2, 4, 8), (256, 512), (1, 2, 4, 8)


@dataclass(frozen=True)
class Samples:
    """Seconds of one launch over `count` repeats."""

    median: float
    least: float
    most: float
    count: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Samples:
        return Samples(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


@dataclass(frozen=True, order=True)
class Grid:
    """How kernels/light.cu is launched: loads in flight of a thread, threads of a block, blocks.

    pdl: as programmatic dependent launch, which hides a part of the launch behind the end of the kernel before.
    """

    unroll: int
    block: int
    blocks: int
    pdl: bool = False

    def __str__(self) -> str:
        return f"{self.blocks} x {self.block} x {self.unroll} loads{', pdl' if self.pdl else ''}"


class Timer(Protocol):
    """What a device needs for one bench: how much to rotate over, how to time, and its fastest plain read.

    rotation  bytes that the copies of one weight must exceed
    dense     the name of the dense matmul on this device
    """

    device: torch.device
    rotation: int
    dense: str

    def sampler(self, runs: Sequence[Run]) -> Sampler:
        """Warms `runs` up, one for each copy; the function returned measures them and gives seconds a launch."""

    def light(self, size: int) -> tuple[list[Run], str]:
        """Reads of `size` bytes, one for each copy, as fast as is known, and how. Raises where there is none."""

    def light_name(self) -> str:
        """What the read is, for the reader of the table."""


def timer(device: torch.device) -> Timer:
    """The timer of a device."""
    return GpuTimer(device) if device.type == "cuda" else CpuTimer(device)


def cache_bytes(device: torch.device) -> int:
    """The largest cache of a device: L2 of a GPU, the last level of a CPU (64 MiB where it cannot be read)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [CPU_CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdecimal() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)


def copies(size: int, rotation: int) -> int:
    """The least number of copies of `size` bytes that exceeds `rotation` bytes together, at most MOST_COPIES."""
    return min(rotation // max(size, 1) + 1, MOST_COPIES)


def launches(count: int, seconds: float) -> int:
    """How many launches of about `seconds` one graph holds: a multiple of `count` copies, at least 40 and 2 ms.

    Above a millisecond fewer than 40 will do, since no gap between graphs shows in 40 ms.
    """
    seconds = max(seconds, 1e-7)
    wanted = max(math.ceil(2e-3 / seconds), min(40, math.ceil(40e-3 / seconds)))
    return -(-wanted // count) * count


def interleaved(samplers: Sequence[Sampler], repeats: int) -> list[Samples]:
    """`repeats` samples of each; all take turns, so that a change of clocks or load meets every one of them."""
    found: list[list[float]] = [[] for _ in samplers]
    for _ in range(repeats):
        for seconds, sampler in zip(found, samplers, strict=True):
            seconds.append(sampler())
    return [Samples.of(seconds) for seconds in found]


class CpuTimer:
    """A clock around at least 20 ms of launches; copies keep their turn from one sample to the next.

    The clock of one thread is the time that this process has had a core: what others take of it is not the kernel's.
    """

    dense = "torch.mm"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Several candidates hold copies at a time: all of them together must stay in memory.
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.rotation = min(CACHES * cache_bytes(device), free // 8)
        self._pool = torch.empty(0, dtype=torch.uint8)
        self._clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    @functools.cached_property
    def _read(self) -> Callable[[int, int, int], int] | None:
        return _native_light()

    def sampler(self, runs: Sequence[Run]) -> Sampler:
        turn, clock = itertools.cycle(runs), self._clock
        next(turn)()
        start = clock()
        next(turn)()
        count = math.ceil(0.02 / max(clock() - start, 1e-6))

        def sample() -> float:
            start = clock()
            for _ in range(count):
                next(turn)()
            return (clock() - start) / count

        return sample

    def light(self, size: int) -> tuple[list[Run], str]:
        each = -(-size // 256) * 256
        count = copies(size, self.rotation)
        if self._pool.numel() < count * each:
            self._pool = pages.empty(count * each).random_()
        parts = self._pool[: count * each].view(count, each).unbind()
        read, threads = self._read, torch.get_num_threads()
        if read is None:
            return [partial(torch.sum, part.view(torch.int64)) for part in parts], ""

        # Held: a read of more bytes takes another pool.
        def run(part: torch.Tensor) -> None:
            read(part.data_ptr(), each, threads)

        return [partial(run, part) for part in parts], ""

    def light_name(self) -> str:
        how = "torch.sum of int64" if self._read is None else "kernels/light.cpp: four streams a thread, huge pages"
        return f"{how}; {torch.get_num_threads()} threads"


def _native_light() -> Callable[[int, int, int], int] | None:
    """kernels/light.cpp: address and bytes (a multiple of 256), threads; None where it cannot be compiled."""
    try:
        function = native.load("light.cpp", native.isas()[0]).lq_light
    except (Refused, IndexError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int), ctypes.c_int64
    return function


class GpuTimer:
    """Replays of a CUDA graph between two events, seconds a launch."""

    dense = "cublas"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rotation = CACHES * cache_bytes(device)
        self._memory = torch.cuda.get_device_properties(device).total_memory
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.empty(0, dtype=torch.uint8, device=device)
        self._sink = torch.empty(1, dtype=torch.int32, device=device)
        self._best: dict[int, Grid] = {}
        self._warm_up(0.2)

    def sampler(self, runs: Sequence[Run]) -> Sampler:
        if torch.cuda.memory_reserved(self.device) > self._memory // 2:
            # The memory of dropped graphs is kept for no one until this.
            torch.cuda.empty_cache()
        count = launches(len(runs), self._estimate(runs))
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph: it empties the allocator's cache, and gigabytes would be mapped anew for every graph.
        with torch.cuda.stream(self._stream):
            # Relaxed: what Python happens to collect meanwhile, an older graph say, must not break this capture.
            graph.capture_begin(capture_error_mode="relaxed")
            try:
                for i in range(count):
                    runs[i % len(runs)]()
            finally:
                graph.capture_end()
        torch.cuda.synchronize(self.device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        # Held: a graph knows the addresses that it reads and writes, and nobody else may own them.
        def sample(held: Sequence[Run] = runs) -> float:
            # The device is busy with the first replay while the timed one is queued, so no launch gap is measured.
            graph.replay()
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / 1e3 / count

        sample()
        return sample

    def _warm_up(self, seconds: float) -> None:
        """Work for a while: an idle GPU runs at a fraction of its clocks."""
        square = torch.randn((2048, 2048), device=self.device, dtype=torch.float16)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            square @ square
            torch.cuda.synchronize(self.device)

    def _estimate(self, runs: Sequence[Run]) -> float:
        """Seconds of one launch, or of the host's part of it where that is longer. Builds and loads what is lazy."""
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            for run in runs[:3]:
                run()
            self._stream.synchronize()
            start = time.perf_counter()
            for i in range(5):
                runs[i % len(runs)]()
            self._stream.synchronize()
        return (time.perf_counter() - start) / 5

    def light(self, size: int) -> tuple[list[Run], str]:
        vectors = -(-size // 16)
        if vectors not in self._best:
            # The floor must be the best read there is: which grid that is depends on the number of bytes.
            best = min(self._grids(vectors), key=partial(self._tried, vectors))
            self._best[vectors] = min(best, replace(best, pdl=True), key=partial(self._tried, vectors))
        grid = self._best[vectors]
        return self._reads(vectors, grid), str(grid)

    def light_name(self) -> str:
        return "kernels/light.cu, the best of its grids for each size"

    def _grids(self, vectors: int) -> list[Grid]:
        """Grids worth trying: a few blocks for each SM, or one for each tile."""
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count
        found = set()
        for unroll, block in itertools.product(LIGHT_UNROLLS, LIGHT_BLOCKS):
            tiles = -(-vectors // (unroll * block))
            waves = (min(tiles, wave * processors) for wave in LIGHT_WAVES)
            found |= {Grid(unroll, block, blocks) for blocks in (*waves, tiles)}
        return sorted(found)

    def _tried(self, vectors: int, grid: Grid) -> float:
        """Seconds of one read; inf for a launch that this device does not know."""
        if grid.pdl and torch.cuda.get_device_capability(self.device) < (9, 0):
            return math.inf
        sampler = self.sampler(self._reads(vectors, grid))
        return statistics.median(sampler() for _ in range(3))

    def _reads(self, vectors: int, grid: Grid) -> list[Run]:
        defines, index = (("UNROLL", grid.unroll),), self.device.index or 0
        function = load_cuda("light.cu", "light", "PPi", defines=defines, device_index=index)
        # Copies start on lines of the cache, as tensors do.
        stride = -(-vectors * 16 // 256) * 256
        count = copies(16 * vectors, self.rotation)
        if self._pool.numel() < count * stride:
            self._pool = torch.empty(count * stride, dtype=torch.uint8, device=self.device).random_()

        def run(part: torch.Tensor) -> None:
            stream = torch.cuda.current_stream(self.device).cuda_stream
            values = (part.data_ptr(), self._sink.data_ptr(), vectors)
            function.launch((grid.blocks, 1, 1), grid.block, 0, (1, 1, 1), stream, values, pdl=grid.pdl)

        return [partial(run, part) for part in self._pool[: count * stride].view(count, stride).unbind()]
