"""Candidates timed on the real shapes, in the place of predictions: options={"autotune": True}. Results are kept."""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import sympy
import torch
from torch import Tensor

from . import cache, cost, profile, timing
from .device import Device
from .formats import random_weight
from .kernels import pages, registry
from .kernels.layout import LAYOUTS
from .types import Candidate, Problem

SCHEMA = 1
# Seconds of one problem after which no further number of rows is begun, and samples of each candidate.
LIMIT, REPEATS = 10.0, 5
# What is predicted to take so many times as long as the fastest is not timed.
HOPELESS = 8.0
# By number of rows, seconds by candidate.
Times = dict[int, dict[str, float]]


def timed(
    problem: Problem, m_range: tuple[int, int | None], candidates: Sequence[Candidate], workload: Mapping[int, float],
    device: Device,
) -> list[Candidate]:  # fmt: skip
    """The candidates, each with its seconds as measured on `problem.device`; where none were, as predicted.

    The candidate without a layout is the vendor's matmul on a dense weight. They are timed at the numbers of rows of
    the workload within `m_range`, the most frequent first, and at its least where there are none.
    """
    low, high = m_range
    inside = [m for m in workload if m >= low and (high is None or m <= high)] or [low]
    ms = sorted(inside, key=lambda m: (-workload.get(m, 0.0), m))
    key = _key(problem, candidates, ms, device)
    found = _read(cache.default().get("autotune", key), candidates, ms)
    if found is None:
        try:
            found = _measure(problem, candidates, ms)
        except Exception as error:  # noqa: BLE001  whatever goes wrong, predictions are still there
            warnings.warn(f"lqcompile predicts what it could not time: {type(error).__name__}: {error}", stacklevel=2)
            return list(candidates)
        data = json.dumps({"schema": SCHEMA, "times": {str(m): times for m, times in found.items()}}).encode()
        cache.default().put("autotune", key, data, device=device.name, n=problem.n, k=problem.k)
    return [
        _with(c, problem, {m: times[_name(c)] for m, times in found.items() if _name(c) in times}) for c in candidates
    ]


def _name(c: Candidate) -> str:
    return f"{c.kernel}/{c.layout}"


def _with(c: Candidate, problem: Problem, measured: Mapping[int, float]) -> Candidate:
    if not measured:
        return c
    assert isinstance(problem.m, sympy.Symbol)
    seconds = cost.corrected(c.seconds, problem.m, measured)
    return Candidate(c.kernel, c.layout, seconds, tuple(sorted(measured.items())))


def _key(problem: Problem, candidates: Sequence[Candidate], ms: Sequence[int], device: Device) -> str:
    versions = (version("lqcompile"), torch.__version__, torch.version.cuda)
    what = (problem.n, problem.k, problem.format.spec, str(problem.x_dtype), sorted(map(_name, candidates)), list(ms))
    return json.dumps([SCHEMA, profile.key(device), versions, what])


def _read(data: bytes | None, candidates: Sequence[Candidate], ms: Sequence[int]) -> Times | None:
    """What an entry holds; None where there is none, or one that is not whole."""
    try:
        found = json.loads(data or b"null")
    except ValueError:
        return None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or not isinstance(found.get("times"), dict):
        return None
    names, times = {_name(c) for c in candidates}, found["times"]
    rows = {str(m): m for m in ms}
    if str(ms[0]) not in times or not all(m in rows and isinstance(row, dict) for m, row in times.items()):
        return None
    if not all(name in names and _plausible(value) for row in times.values() for name, value in row.items()):
        return None
    return {rows[m]: row for m, row in times.items() if row} or None


def _plausible(seconds: Any) -> bool:
    return isinstance(seconds, float) and 0 < seconds < math.inf


def _measure(problem: Problem, candidates: Sequence[Candidate], ms: Sequence[int]) -> Times:
    """Seconds at each of `ms` that is begun within LIMIT; every candidate on the same x, in turns, its weight cold."""
    begun, timer = time.monotonic(), timing.timer(problem.device)
    found: Times = {}
    generator = torch.Generator(problem.device).manual_seed(0)
    copies = _copies(problem, {c.layout for c in candidates}, timer.rotation, generator)
    here = torch.cuda.device(problem.device) if problem.device.type == "cuda" else contextlib.nullcontext()
    with here:
        for m in ms:
            if found and time.monotonic() - begun > LIMIT:
                break
            predicted = {_name(c): cost.sample(c.seconds, [m])[0] for c in candidates}
            most = HOPELESS * min(predicted[_name(c)] for c in candidates if c.layout)
            # The dense weight is what everything is compared with.
            wanted = [c for c in candidates if not c.layout or predicted[_name(c)] <= most]
            x = torch.randn((m, problem.k), device=problem.device, generator=generator).to(problem.x_dtype)
            out = x.new_empty((m, problem.n))
            samplers = [timer.sampler(_runs(c, problem, copies[c.layout], x, out)) for c in wanted]
            samples = timing.interleaved(samplers, REPEATS)
            found[m] = {_name(c): s.median for c, s in zip(wanted, samples, strict=True)}
    return found


def _copies(
    problem: Problem, layouts: set[str], rotation: int, generator: torch.Generator
) -> dict[str, list[list[Tensor]]]:
    """By layout, "" for the dense weight, as many copies of a random weight as no cache holds."""
    n, k = problem.n, problem.k
    weight = random_weight(problem.format, n, k, problem.device, generator)
    found = {}
    for layout in layouts:
        if layout:
            parts = LAYOUTS[layout].pack(weight)
        else:
            parts = [torch.randn((n, k), device=problem.device, generator=generator).to(problem.x_dtype)]
        count = timing.copies(sum(part.nbytes for part in parts), rotation)
        found[layout] = [parts, *(pages.together(parts) for _ in range(count - 1))]
    return found


def _runs(
    c: Candidate, problem: Problem, copies: Sequence[Sequence[Tensor]], x: Tensor, out: Tensor
) -> list[timing.Run]:
    if not c.layout:
        return [partial(torch.mm, x, weight.t(), out=out) for (weight,) in copies]
    run = registry.discover()[c.kernel].run
    call = registry.Call(c.layout, problem.format, problem.n, problem.k)
    return [partial(run, x, parts, None, call, out) for parts in copies]
