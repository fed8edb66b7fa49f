"""Rows of x that stand expert by expert, each row by the weight of its own expert: mixtures of experts.

    y[r] = x[r] @ w[e].T    for rows r from ends[e-1] (0 for the first) to ends[e]; w [experts, n, k]

The weights are packed as one of [experts * n, k]: n is a multiple of a tile's rows, so that each expert's parts stand
together and are parts themselves. Rows from ends[-1] on belong to nobody: what becomes of them is not said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sympy
import torch
from torch import Tensor

from ..device import Device
from ..types import Problem
from .registry import Call, Kernel

# Rows of an expert's weight are a multiple of it: the height of the highest tile.
MULTIPLE = 32


def refusal(kernel: Kernel, call: Call, x_dtype: torch.dtype, device: str) -> str | None:
    """What of the weights of experts, `call` being one of them, a kernel does not take."""
    if call.n % MULTIPLE:
        return f"experts with a multiple of {MULTIPLE} outputs"
    if call.layout not in kernel.layouts or device not in kernel.devices:
        return f"{' | '.join(kernel.layouts)} on {' | '.join(kernel.devices)}"
    if device != "cpu" and kernel.grouped is None:
        return "one weight at a time"
    own = kernel.grouped.accepts(call, x_dtype) if device != "cpu" and kernel.grouped is not None else None
    return own or kernel.accepts(call, x_dtype, device)


def seconds(kernel: Kernel, problem: Problem, experts: int, layout: str, device: Device) -> sympy.Expr:
    """Predicted time of problem.m rows spread evenly, in all; n and k are of one expert."""
    if device.kind != "cpu" and kernel.grouped is not None:
        return kernel.grouped.seconds(problem, experts, layout, device)
    each = sympy.sympify(kernel.seconds(problem, layout, device)).subs(problem.m, sympy.ceiling(problem.m / experts))
    return device.launch + sympy.Min(experts, problem.m) * (each - device.launch)


def of_expert(parts: Sequence[Tensor], expert: int, experts: int) -> list[Tensor]:
    """The parts of one expert's weight, as views; a table of one dimension is everybody's."""
    return [p if p.ndim == 1 else p.view(experts, -1, *p.shape[1:])[expert] for p in parts]


def one_by_one(
    run: Callable[..., None], x: Tensor, parts: Sequence[Tensor], ends: Tensor, call: Call, out: Tensor
) -> None:  # fmt: skip
    """Each expert that has rows by `run`, which takes (x, parts, bias, call, out). On a CPU, where ends can be read."""
    begin, experts = 0, len(ends)
    for expert, end in enumerate(ends.tolist()):
        end = min(end, len(x))
        if end > begin:
            run(x[begin:end], of_expert(parts, expert, experts), None, call, out[begin:end])
            begin = end
