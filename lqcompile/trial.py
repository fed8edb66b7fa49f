"""What `lq bench` tries on one problem: random weights, their float64 truth, and candidates that are checked by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .formats import bound, dequantize
from .formats import rows as rows_of
from .kernels.registry import Call, Kernel
from .neighbours import Held, Neighbour
from .timing import Run
from .types import QWeight, Rounding

# A weight of more elements is checked at this many of its rows.
MOST_ELEMENTS, MOST_ROWS, TILE = 64 << 20, 2048, 128
CHUNK = 1 << 24
# Relative error in the norm that a neighbour may show: its own roundings are not known.
LOOSE = {torch.float16: 1e-2, torch.bfloat16: 3e-2, torch.float32: 1e-3}
Outcome = tuple[str, float | None, str]


def chosen_rows(n: int, k: int) -> Tensor:
    """The rows to check: all of a small weight; else the first and the last tile, and rows spread between them."""
    if n * k <= MOST_ELEMENTS or n <= MOST_ROWS:
        return torch.arange(n)
    between = MOST_ROWS - 2 * TILE
    width = (n - 2 * TILE) // between
    # Not at equal steps: those would always meet the same lanes of a tile.
    middle = TILE + torch.arange(between) * (n - 2 * TILE) // between + torch.arange(between) * 7 % width
    return torch.cat([torch.arange(TILE), middle, torch.arange(n - TILE, n)])


class Truth:
    """y[m, n] = x @ w.T + bias in float64, by chunks of the chosen rows of w; `dense(rows)` gives those of w."""

    def __init__(self, dense: Callable[[Tensor], Tensor], n: int, x: Tensor, bias: Tensor | None) -> None:
        self._dense, self._x, self._bias = dense, x.double(), bias
        self._rows = chosen_rows(n, x.shape[1]).to(x.device).split(max(1, CHUNK // x.shape[1]))

    def ratio(self, y: Tensor, rounding: Rounding) -> float:
        """The largest error of `y` over what `rounding` allows there; inf where any element is not finite."""
        if not bool(y.isfinite().all()):
            return float("inf")
        worst = 0.0
        for rows in self._rows:
            w = self._dense(rows)
            exact, extra = self._exact(rows, w)
            allowed = bound(exact, self._x, w, rounding) + rounding.out * extra
            worst = max(worst, float(((y[:, rows].double() - exact).abs() / allowed).max()))
        return worst

    def relative(self, y: Tensor) -> float:
        """The norm of the error over the norm of the truth; inf where any element is not finite."""
        if not bool(y.isfinite().all()):
            return float("inf")
        error = size = 0.0
        for rows in self._rows:
            exact, _ = self._exact(rows, self._dense(rows))
            error += float((y[:, rows].double() - exact).square().sum())
            size += float(exact.square().sum())
        return (error / size) ** 0.5

    def _exact(self, rows: Tensor, w: Tensor) -> tuple[Tensor, Tensor | float]:
        exact = self._x @ w.T
        if self._bias is None:
            return exact, 0.0
        bias = self._bias[rows].double()
        return exact + bias, bias.abs()


def truth_of(weight: QWeight, x: Tensor, bias: Tensor | None) -> Truth:
    """The truth of a quantized weight, by its meaning and not as it was packed."""

    def dense(rows: Tensor) -> Tensor:
        return dequantize(rows_of(weight, rows))

    return Truth(dense, weight.n, x, bias)


@dataclass
class Candidate:
    """One way to do a problem. `runs` has one launch for each copy of the weight, of `bytes` bytes.

    check    before timing, (verdict, error, note); raises whatever the kernel raises
    recheck  after timing: whether what the last launch wrote is still right
    """

    kind: str
    kernel: str
    layout: str
    bytes: int
    runs: Sequence[Run]
    check: Callable[[], Outcome] = field(default=lambda: ("unchecked", None, ""))
    recheck: Callable[[], bool] = field(default=lambda: True)


def ours(
    kernel: Kernel, call: Call, copies: Sequence[Sequence[Tensor]], x: Tensor, bias: Tensor | None, truth: Truth
) -> Candidate:
    """A kernel of the registry: at every element within the bound of its declared rounding, and the same twice."""
    out = x.new_empty((x.shape[0], call.n))
    runs = [partial(kernel.run, x, parts, bias, call, out) for parts in copies]
    rounding = kernel.rounding(call, x.dtype)
    first: list[Tensor] = []

    def check() -> Outcome:
        # An element that is not written stays NaN.
        out.fill_(float("nan"))
        runs[0]()
        first.append(out.clone())
        error = truth.ratio(out, rounding)
        if error == float("inf"):
            return "WRONG", None, "not every element is finite"
        if not error <= 1:
            return "WRONG", error, f"error {error:.3g} times the bound"
        for run in runs[-2:]:
            run()
            if kernel.deterministic and not torch.equal(out, first[0]):
                return "WRONG", error, "declared deterministic, but a second launch differs"
        return "ok", error, ""

    def recheck() -> bool:
        return torch.equal(out, first[0]) if kernel.deterministic else truth.ratio(out, rounding) <= 1

    size = sum(part.numel() * part.element_size() for part in copies[0])
    return Candidate("ours", kernel.name, call.layout, size, runs, check, recheck)


def theirs(neighbour: Neighbour, held: Held, copies: Sequence[object], x: Tensor) -> Candidate:
    """A neighbour's matmul, without bias."""

    def check() -> Outcome:
        y = neighbour.run(held.weight, x)
        if held.dense is None:
            return "unchecked", None, ""
        error = Truth(held.dense, y.shape[1], x, None).relative(y)
        right = error <= LOOSE[x.dtype]
        note = "" if right else f"relative error {error:.3g}, above {LOOSE[x.dtype]:g}"
        return ("ok" if right else "WRONG"), (error if error < float("inf") else None), note

    runs = [partial(neighbour.run, weight, x) for weight in copies]
    return Candidate("neighbour", neighbour.name, "", held.bytes, runs, check)


def dense(name: str, copies: Sequence[Tensor], x: Tensor, bias: Tensor | None) -> Candidate:
    """The vendor's matmul on dense weights [n, k] of x's dtype."""
    out = x.new_empty((x.shape[0], copies[0].shape[0]))

    def run(weight: Tensor) -> None:
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)

    size = copies[0].numel() * copies[0].element_size()
    return Candidate("dense", name, "", size, [partial(run, weight) for weight in copies])
