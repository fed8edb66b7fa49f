"""Facts of the machine that the cost model reads."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy
import torch

from .errors import ArgumentError


@dataclass(frozen=True)
class Device:
    """`bandwidth` in bytes/s of a long read, `rate` in multiply-adds*2/s of a dense matmul, `launch` in seconds.

    `arch` of a GPU like "sm_90"; `processors` are a GPU's multiprocessors, or a CPU's threads.
    """

    kind: str
    name: str
    bandwidth: float
    rate: float
    launch: float
    arch: str
    processors: int

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
        bandwidth, launch = facts
        processors = known[arch]["processors"]
        return Device("cuda", name, bandwidth, _rate(processors), launch, arch, processors)

    @staticmethod
    def of(device: torch.device | str) -> Device:
        """The facts of a real device."""
        device = torch.device(device)
        if device.type == "cuda":
            p = torch.cuda.get_device_properties(device)
            # A datasheet's view: two transfers a memory clock.
            bandwidth = 2 * getattr(p, "memory_clock_rate", 1.5e6) * 1e3 * getattr(p, "memory_bus_width", 256) / 8
            bandwidth, launch = _measured(p.name) or (bandwidth, 3e-6)
            processors, arch = p.multi_processor_count, f"sm_{p.major}{p.minor}"
            return Device("cuda", p.name, bandwidth, _rate(processors), launch, arch, processors)
        # Measured (CPU.md): one Sapphire Rapids core reads 17 GB/s and does 216 Gop/s of float32 FMA.
        threads = torch.get_num_threads()
        return Device("cpu", f"{processor()}, {threads} threads", 17e9 * threads, 216e9 * threads, 5e-6, "cpu", threads)


@functools.cache
def processor() -> str:
    """What this machine's CPU calls itself."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _rate(processors: int) -> float:
    # A datasheet's view: 1,024 half-precision FMAs a clock on each SM.
    return 2048.0 * processors * 1.5e9


def _gpus() -> list[dict[str, Any]]:
    return [found for found in measured().values() if found.get("device", {}).get("type") == "cuda"]


def measured() -> dict[str, dict[str, Any]]:
    """The results files of `lq bench` in lqcompile/measured, parsed, by name and in the order of names."""
    room = resources.files(__package__).joinpath("measured")
    files = sorted(room.iterdir(), key=lambda file: file.name) if room.is_dir() else []
    return {file.name: json.loads(file.read_text()) for file in files if file.name.endswith(".json")}


@functools.cache
def _measured(name: str) -> tuple[float, float] | None:
    """Bandwidth (bytes/s) and launch (s) of a GPU, from the reads in its committed `lq bench` results; or None."""
    for found in measured().values():
        if found.get("device", {}).get("name") == name:
            reads = {row["bytes"]: row["median"] for row in found["rows"] if row["kind"] == "light" and row["median"]}
            return fitted(reads)
    return None


def fitted(reads: Mapping[int, float]) -> tuple[float, float]:
    """Bandwidth (bytes/s) and launch (s) from seconds by bytes read: least squares of the relative error."""
    sizes, seconds = numpy.array(list(reads), dtype=float), numpy.array(list(reads.values()))
    terms = numpy.stack([1 / seconds, sizes / seconds], 1)
    (launch, each), *_ = numpy.linalg.lstsq(terms, numpy.ones(len(seconds)), rcond=None)
    return float(1 / each), float(launch)
