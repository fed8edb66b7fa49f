"""`lq calibrate`: measures what the cost model needs to know of this machine."""

from __future__ import annotations

import dataclasses
import time
from functools import partial

import torch

from . import profile, timing
from .cli import Exit
from .device import Device, fitted

# Bytes that are read, and rows and columns of the square matrices that are multiplied, by kind of device.
READS = {
    "cuda": (2 << 20, 8 << 20, 32 << 20, 128 << 20, 256 << 20),
    "cpu": (64 << 10, 1 << 20, 8 << 20, 64 << 20),
}
SQUARE = {"cuda": 8192, "cpu": 1024}
DTYPES = {"rate": torch.float32, "half": torch.bfloat16}
REPEATS = 7
UNITS = (("bandwidth", "GB/s", 1e-9), ("rate", "Gop/s", 1e-9), ("half", "Gop/s", 1e-9), ("launch", "us", 1e6))


def measure(device: torch.device) -> Device:
    """Bandwidth and launch from reads of several sizes, rates from a matmul."""
    timer, derived = timing.timer(device), Device.of(device)
    bandwidth, launch = fitted({size: _median(timer, timer.light(size)[0]) for size in READS[device.type]})
    n, rates = SQUARE[device.type], {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn((n, n), device=device).to(dtype) for _ in range(2))
        rates[name] = 2.0 * n**3 / _median(timer, [partial(torch.mm, a, b, out=torch.empty_like(a))])
    # Small reads that a cache serves may seem to need no time to begin with; on a CPU it is Python's, which they lack.
    launch = max(launch, derived.launch / (10 if device.type == "cuda" else 1))
    return dataclasses.replace(derived, bandwidth=bandwidth, launch=launch, rate=rates["rate"], half=rates["half"])


def _median(timer: timing.Timer, runs: list[timing.Run]) -> float:
    return timing.interleaved([timer.sampler(runs)], REPEATS)[0].median


def calibrate(device: torch.device) -> int:
    """Measures, keeps and prints the facts of `device`."""
    start, derived = time.perf_counter(), Device.of(device)
    found = measure(device)
    profile.keep(found)
    print(f"{found.name}, measured in {time.perf_counter() - start:.0f} s and kept for later plans")
    for name, unit, scale in UNITS:
        now, before = getattr(found, name) * scale, getattr(derived, name) * scale
        print(f"  {name:<10}{now:>12,.1f} {unit:<6} without: {before:,.1f}")
    return Exit.FINE
