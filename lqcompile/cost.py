"""Predicted time as a function of m, and what follows from it: which kernel serves which range of m."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from .device import Device
from .types import Candidate, Piece, Problem


def dense(problem: Problem, device: Device) -> sympy.Expr:
    """Seconds of the vendor's matmul on the dense weight: the longer of reading it and of the arithmetic."""
    size = problem.n * problem.k
    read = size * problem.x_dtype.itemsize / device.bandwidth
    return device.launch + sympy.Max(read, 2.0 * problem.m * size / device.rate)


def sample(expression: sympy.Expr, ms: Sequence[int]) -> list[float]:
    """`expression` in the one symbol it has, at each m."""
    symbols = sorted(expression.free_symbols, key=str)
    if not symbols:
        return [float(expression)] * len(ms)
    function = sympy.lambdify(symbols, expression, modules=[{"Max": max, "Min": min}, "math"])
    return [float(function(m)) for m in ms]


def grid(low: int, high: int | None) -> list[int]:
    """Every m up to 64, then steps of about 1.6 %, from low to high (or 65,536), both included."""
    top = max(low, high if high is not None else 1 << 16)
    out, m = [], low
    while m < top:
        out.append(m)
        m = max(m + 1, m + m // 64)
    return [*out, top]


def pieces(candidates: Sequence[Candidate], low: int, high: int | None) -> tuple[Piece, ...]:
    """The fastest kernel of one layout for each range of m, by scanning: thresholds are where the winner changes."""
    ms = grid(low, high)
    times = [sample(c.seconds, ms) for c in candidates]
    winners = [min(range(len(candidates)), key=lambda i: times[i][j]) for j in range(len(ms))]
    out: list[Piece] = []
    start = 0
    for j in range(1, len(ms) + 1):
        if j == len(ms) or winners[j] != winners[start]:
            last = (high if j == len(ms) else ms[j] - 1) if j < len(ms) or high is not None else None
            out.append(Piece(ms[start], last, candidates[winners[start]].kernel, times[winners[start]][start]))
            start = j
    return tuple(out)


def total(
    found: Sequence[Piece], candidates: Sequence[Candidate], low: int, high: int | None, workload: Mapping[int, float]
) -> float:
    """Seconds over the part of the workload (a share for each m) that lies inside [low, high], or at low."""
    inside = {m: share for m, share in workload.items() if m >= low and (high is None or m <= high)} or {low: 1.0}
    by_name = {c.kernel: c.seconds for c in candidates}
    seconds = 0.0
    for m, share in inside.items():
        piece = next(p for p in found if p.high is None or m <= p.high)
        seconds += share * sample(by_name[piece.kernel], [m])[0]
    return seconds
