"""What a case means, in float64, and whether a result is within the roundings that program and kernel may make."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lqcompile.formats import UNIT_ROUNDOFF

from .corpus import Case
from .mutations import BETWEEN

LOW = (torch.float16, torch.bfloat16, torch.float32)


class Exact(TorchFunctionMode):
    """Makes every floating dtype that a program names float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("half", "bfloat16", "float"):
            return args[0].double()
        wide = lambda a: torch.float64 if isinstance(a, torch.dtype) and a in LOW else a  # noqa: E731
        return func(*tree_map(wide, args), **tree_map(wide, kwargs or {}))


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Float64 throughout."""
    torch.set_default_dtype(torch.float64)
    try:
        with Exact():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.dtype in LOW else t.clone()


def _flat(result: Any) -> list[Tensor]:
    return [t.double() for t in tree_leaves(result)]


def _strides(t: Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def wrong_elements(case: Case, got: Any, eager: Any, rewritten: bool) -> str:
    """What is wrong with a result, or "". What was not rewritten must be eager's own, bit for bit."""
    for a, b in zip(tree_leaves(got), tree_leaves(eager), strict=True):
        if (a.shape, a.dtype, _strides(a)) != (b.shape, b.dtype, _strides(b)):
            return f"{a.dtype} {tuple(a.shape)} strides {a.stride()}, eager {b.dtype} {tuple(b.shape)} {b.stride()}"
        if not rewritten and not torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)):
            return "a kept matmul changed its result"
    if not rewritten:
        return ""
    t, x = {name: _double(v) for name, v in (case.tensors | case.extra).items()}, case.x.double()
    native = case.weight({name: v.clone() for name, v in (case.tensors | case.extra).items()}, case.x).double()
    u = max(UNIT_ROUNDOFF[case.x.dtype], UNIT_ROUNDOFF.get(case.autocast, 0.0))
    coarse = max([u, *(UNIT_ROUNDOFF.get(v.dtype, 0.0) for v in case.tensors.values())])
    with exactly():
        w = case.weight(t, x)
        truths = [_flat(case.apply(x, v, t)) for v in (w, native)]
        subnormal = 2.0**-25 if u == 2.0**-11 else 0.0
        largest = w.abs().amax(1, keepdim=True).expand(w.shape)
        # The kernel holds scales in float32: a few of its roundings beside the one of the weight itself.
        off = (1.01 * u + 2.0**-20) * w.abs() + 2.0**-18 * largest + subnormal
        if case.expect == "either":
            # Where no algebra follows, some roundings of eager are kept and others are not.
            off = off + 2 * (native - w).abs()
            off = off + 4 * coarse * w.abs() if case.breaking in BETWEEN else off
        positive = t | {name: v.abs() for name, v in t.items() if name == "bias"}
        none, some, most, all_ = (
            _flat(case.apply(x.abs(), v, positive)) for v in (torch.zeros_like(w), off, largest, w.abs())
        )
    coarse = 2.0**-8 if case.expect == "either" else coarse
    for i, (a, b) in enumerate(zip(_flat(got), _flat(eager), strict=True)):
        scale = case.slack * u + 2 * math.sqrt(case.x.numel()) * 2.0**-24
        allowed = some[i] - none[i] + scale * all_[i] + 2 * subnormal
        error = torch.minimum(*((a - truth[i]).abs() for truth in truths))
        overflow = ~b.isfinite() & ~a.isfinite()
        bad = ~(error <= allowed) & ~overflow
        if bool(bad.any()):
            j = int(bad.flatten().nonzero()[0])
            place = [int(p) for p in torch.unravel_index(torch.tensor(j), a.shape)] if a.ndim else []
            a, b, exact, limit = (v.flatten()[j] for v in (a, b, truths[0][i], allowed))
            values = f"got {a:.9g}, exact {exact:.9g}, eager {b:.9g}, allowed {limit:.3g}"
            return f"{int(bad.sum())} elements off, first {place}: {values}"
        far = ~((a - b).abs() <= 16 * coarse * most[i] + 2 * allowed + 64 * coarse * all_[i]) & ~overflow
        if bool(far.any()):
            return f"{int(far.sum())} elements far from eager"
    return ""
