"""Facts of the machine that the cost model reads."""

from __future__ import annotations

import functools
import json
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy
import torch

from .errors import ArgumentError

# Measured on one core with AMX, multiply-adds*2/s of torch.mm in bfloat16; float16 is no slower.
HALF = 1.2e12


@dataclass(frozen=True)
class Device:
    """`bandwidth` in bytes/s of a long read, `launch` in seconds, `arch` of a GPU like "sm_90".

    rate, half  multiply-adds*2/s of a dense matmul in float32, and in types of 16 bits
    processors  a GPU's multiprocessors, or a CPU's threads
    """

    kind: str
    name: str
    bandwidth: float
    rate: float
    half: float
    launch: float
    arch: str
    processors: int

    def rate_of(self, dtype: torch.dtype) -> float:
        """Multiply-adds*2/s of a dense matmul in `dtype`."""
        return self.half if dtype.itemsize == 2 else self.rate

    @staticmethod
    def null(arch: str) -> Device:
        """The facts of a GPU that is not here, from committed results of `lq bench` on one; `arch` like "sm_90".

        Raises ArgumentError for an architecture that nobody has measured.
        """
        known = {f"sm_{found['device']['capability'].replace('.', '')}": found["device"] for found in _gpus()}
        if arch not in known:
            raise ArgumentError("arch", arch, " | ".join(sorted(known)))
        name = known[arch]["name"]
        facts = _measured(name)
        assert facts is not None
        bandwidth, launch, half = facts
        processors = known[arch]["processors"]
        rate, expected = _rates(processors)
        return Device("cuda", name, bandwidth, rate, half or expected, launch, arch, processors)

    @staticmethod
    def of(device: torch.device | str) -> Device:
        """The facts of a real device."""
        device = torch.device(device)
        if device.type == "cuda":
            p = torch.cuda.get_device_properties(device)
            # A datasheet's view: two transfers a memory clock.
            bandwidth = 2 * getattr(p, "memory_clock_rate", 1.5e6) * 1e3 * getattr(p, "memory_bus_width", 256) / 8
            bandwidth, launch, half = _measured(p.name) or (bandwidth, 3e-6, None)
            processors, arch = p.multi_processor_count, f"sm_{p.major}{p.minor}"
            rate, expected = _rates(processors)
            return Device("cuda", p.name, bandwidth, rate, half or expected, launch, arch, processors)
        # Measured (CPU.md): one Sapphire Rapids core reads 17 GB/s and does 216 Gop/s of float32 FMA.
        threads = torch.get_num_threads()
        half = HALF if "amx_bf16" in _cpuinfo("flags").split() else 216e9
        name = f"{processor()}, {threads} threads"
        return Device("cpu", name, 17e9 * threads, 216e9 * threads, half * threads, 5e-6, "cpu", threads)


@functools.cache
def processor() -> str:
    """What this machine's CPU calls itself."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def _cpuinfo(name: str) -> str:
    """What the system says of the first CPU under `name`; "" where it does not."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _rates(processors: int) -> tuple[float, float]:
    # A datasheet's view: 128 FMAs of float32 a clock on each SM, and 1,024 in half precision.
    return 256.0 * processors * 1.5e9, 2048.0 * processors * 1.5e9


def _gpus() -> list[dict[str, Any]]:
    return [found for found in measured().values() if found.get("device", {}).get("type") == "cuda"]


def measured() -> dict[str, dict[str, Any]]:
    """The results files of `lq bench` in lqcompile/measured, parsed, by name and in the order of names."""
    room = resources.files(__package__).joinpath("measured")
    files = sorted(room.iterdir(), key=lambda file: file.name) if room.is_dir() else []
    return {file.name: json.loads(file.read_text()) for file in files if file.name.endswith(".json")}


@functools.cache
def _measured(name: str) -> tuple[float, float, float | None] | None:
    """Bandwidth (bytes/s) and launch (s) of a GPU, from the reads in its committed `lq bench` results; or None.

    And the rate of its dense matmuls of many rows in types of 16 bits, None where none was timed.
    """
    files = [found["rows"] for found in measured().values() if found.get("device", {}).get("name") == name]
    rates = [2.0 * r["m"] * r["n"] * r["k"] / r["median"] for rows in files for r in rows if _many(r)]
    for rows in files:
        reads = {row["bytes"]: row["median"] for row in rows if row["kind"] == "light" and row["median"]}
        if reads:
            return (*fitted(reads), statistics.median(rates) if rates else None)
    return None


def _many(row: Mapping[str, Any]) -> bool:
    """Whether a row of results is a dense matmul whose arithmetic takes longer than its reads, by far."""
    return row["kind"] == "dense" and bool(row["median"]) and row["m"] >= 512 and row["x_dtype"] != "float32"


def fitted(reads: Mapping[int, float]) -> tuple[float, float]:
    """Bandwidth (bytes/s) and launch (s) from seconds by bytes read: least squares of the relative error."""
    sizes, seconds = numpy.array(list(reads), dtype=float), numpy.array(list(reads.values()))
    terms = numpy.stack([1 / seconds, sizes / seconds], 1)
    (launch, each), *_ = numpy.linalg.lstsq(terms, numpy.ones(len(seconds)), rcond=None)
    return float(1 / each), float(launch)
