"""What operations of libraries compute, where the dispatcher shows no inside of them. One small file for each library.

A file has, by the qualified name of the operation and with its arguments,
    DEQUANTIZE   a function that computes the same from plain operations of PyTorch
    FUSED        for an operation op(x, ...) = x @ w.T + bias, a function that gives w [n, k], and
    OPERANDS     the names of its arguments for x, the packed weight and the bias ("" for none)
    COST         by kind of device, as measured: bytes that it moves for each weight, and what share of the rate of a
                 dense matmul it computes at; where one is not known, it is taken over
None is believed: the weight that follows is compared with what the operation itself makes of real numbers.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import sympy
from torch import Tensor

from ...device import Device
from ...types import Problem

Meaning = Callable[..., Tensor]


@functools.cache
def _all(table: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{entry.name}"), table, {})
    return found


def dequantize(func: Any) -> Meaning | None:
    """What computes the same as an operation on constants; None where that is not known."""
    known = _all("DEQUANTIZE").get(func._schema.name)
    if known is None and func.namespace not in ("aten", "prim", "prims"):
        from torch._inductor.decomposition import decompositions

        known = decompositions.get(func)
    return known


def fused(name: str) -> Meaning | None:
    """What gives the weight of an operation that multiplies by a packed one; None where that is not known."""
    return _all("FUSED").get(name)


def seconds(name: str, problem: Problem, device: Device) -> sympy.Expr | None:
    """The predicted time of a fused operation; None where it is not known."""
    known = _all("COST").get(name)
    found = known(device.kind, problem) if known else None
    if found is None:
        return None
    moved, share = found
    size = problem.n * problem.k
    return device.launch + moved * size / device.bandwidth + 2.0 * problem.m * size / (share * device.rate)


def operands(name: str) -> tuple[str, str, str] | None:
    """The names of the arguments of a fused operation for x, the packed weight and the bias."""
    return _all("OPERANDS").get(name)
