"""Predicted time as a function of m, and what follows from it: which kernel serves which range of m."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import sympy

from .device import Device
from .types import Candidate, Piece, Problem

# cuBLAS in half precision on an H200: seconds beyond a launch and times a pure read, by six shapes at m = 1 to 4096.
CUBLAS = (3.6e-6, 1.1)
# torch.mm on one core with AMX, for one row and for more: times a pure read; arithmetic comes on top.
MM = {2: (1.5, 1.5), 4: (1.0, 2.0)}
# Operations of a dense float32 matmul in the time that Inductor's code for one core with AVX-512 takes to dequantize a
# weight to float32 (of binary ones each plane); whole bytes are read off as they are. To 16 bits takes more.
DEQUANTIZED, WHOLE, HALVED = {"affine": 230.0, "table": 450.0, "binary": 510.0}, 115.0, 130.0


def dense(problem: Problem, device: Device, experts: int = 1) -> sympy.Expr:
    """Seconds of the vendor's matmul on the dense weight: it is read, and multiplied; a GPU does both at a time.

    Of several `experts`, n and k being those of one, as many weights are read as there may be rows for.
    """
    if experts > 1:
        share = dataclasses.replace(problem, m=sympy.ceiling(problem.m / experts))
        once = device.launch + CUBLAS[0] if device.kind == "cuda" else device.launch
        return once + sympy.Min(experts, problem.m) * (dense(share, device) - once)
    size, bytes = problem.n * problem.k, problem.x_dtype.itemsize
    read, work = size * bytes / device.bandwidth, 2.0 * problem.m * size / device.rate_of(problem.x_dtype)
    if device.kind == "cpu":
        one, more = MM[bytes]
        return device.launch + sympy.Piecewise((one, problem.m <= 1), (more, True)) * read + work
    start, times = CUBLAS
    # Not simplified: sympy takes long to compare expressions.
    return device.launch + sympy.Max(start + times * read, work, evaluate=False)


def inductor(matmul: sympy.Expr, problem: Problem, device: Device, apart: bool = False) -> sympy.Expr:
    """Seconds, at the least, of what Inductor makes of a dequantization and then of `matmul`, the vendor's.

    Inductor fuses nothing into a vendor's matmul: a launch of its own reads the codes, at best as many bits as they
    have, or bytes where they were stored `apart`, and writes the dense weight. Where it does fuse, into its own sum for
    one row, that takes longer than this:
    38 us for 4096 x 4096 on an H100.
    """
    f, size = problem.format, problem.n * problem.k
    if device.kind == "cpu":
        work = WHOLE if f.form == "affine" and (apart or f.bits == 8) else DEQUANTIZED[f.form]
        work = work * (f.bits if f.form == "binary" else 1) + HALVED * (problem.x_dtype.itemsize == 2)
        return device.launch + work * size / device.rate + matmul
    code = 1 if apart else f.bits / 8
    return device.launch + (code + problem.x_dtype.itemsize) * size / device.bandwidth + matmul


def sample(expression: sympy.Expr, ms: Sequence[int]) -> list[float]:
    """`expression` in the one symbol it has, at each m."""
    function = _function(expression)
    return [float(function(m)) for m in ms]


@functools.lru_cache(maxsize=1024)
def _function(expression: sympy.Expr) -> Callable[[int], float]:
    symbols = sorted(expression.free_symbols, key=str)
    if not symbols:
        constant = float(expression.doit())
        return lambda m: constant
    return sympy.lambdify(symbols, expression, modules=[{"Max": max, "Min": min}, "math"])


def grid(low: int, high: int | None) -> list[int]:
    """Every m up to 64, then steps of about 1.6 %, from low to high (or 65,536), both included."""
    top = max(low, high if high is not None else 1 << 16)
    out, m = [], low
    while m < top:
        out.append(m)
        m = max(m + 1, m + m // 64)
    return [*out, top]


def pieces(candidates: Sequence[Candidate], low: int, high: int | None) -> tuple[Piece, ...]:
    """The fastest candidate for each range of m, by scanning: thresholds are where the winner changes."""
    ms = grid(low, high)
    times = [sample(c.seconds, ms) for c in candidates]
    winners = [min(range(len(candidates)), key=lambda i: times[i][j]) for j in range(len(ms))]
    out: list[Piece] = []
    start = 0
    for j in range(1, len(ms) + 1):
        if j == len(ms) or winners[j] != winners[start]:
            last = (high if j == len(ms) else ms[j] - 1) if j < len(ms) or high is not None else None
            best = candidates[winners[start]]
            out.append(Piece(ms[start], last, best.kernel, times[winners[start]][start], best.layout))
            start = j
    return tuple(out)


def total(
    found: Sequence[Piece], candidates: Sequence[Candidate], low: int, high: int | None, workload: Mapping[int, float]
) -> float:
    """Seconds over the part of the workload (a share for each m) that lies inside [low, high], or at low."""
    inside = {m: share for m, share in workload.items() if m >= low and (high is None or m <= high)} or {low: 1.0}
    by_name = {(c.kernel, c.layout): c.seconds for c in candidates}
    seconds = 0.0
    for m, share in inside.items():
        piece = next(p for p in found if p.high is None or m <= p.high)
        seconds += share * sample(by_name[piece.kernel, piece.layout], [m])[0]
    return seconds


def corrected(predicted: sympy.Expr, m: sympy.Symbol, measured: Mapping[int, float]) -> sympy.Expr:
    """`predicted`, an expression in `m`, times what is needed to go through the seconds measured at some m.

    That factor is straight in log m between them, and the nearest one beyond.
    """
    ms = sorted(measured)
    factors = [measured[at] / seconds for at, seconds in zip(ms, sample(predicted, ms), strict=True)]
    pieces = [(factors[0], m <= ms[0])]
    for (a, b), (f, g) in zip(itertools.pairwise(ms), itertools.pairwise(factors), strict=True):
        pieces.append((f + (g - f) * sympy.log(m / a) / math.log(b / a), m <= b))
    return predicted * sympy.Piecewise(*pieces, (factors[-1], True))
