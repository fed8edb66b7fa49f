"""How a block of an operation's result is computed from blocks of its operands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .rules import RESHAPE, Operation

CASTS = {"_to_copy", "clone", "detach", "alias", "lift_fresh_copy", "lift_fresh", "lift", "contiguous"}
VIEWS = {"t", "transpose", "permute", "slice", "select", "expand"}
_ELEMENTWISE = {*CASTS, "copy", "__and__", "__or__", "__xor__", "__rshift__", "__lshift__", "floor_divide"}
_OTHERS = {"cat", "stack", "index", "view_dtype", "sum"}
# Over the whole of a tensor, although they may be marked as elementwise.
WHOLE = {"equal", "all", "any", "min", "max", "amin", "amax", "aminmax"}


# What has a form that writes its result over the first operand; new memory costs more than the arithmetic.
_OVER = {"add", "sub", "mul", "div"}
# What makes a tensor of its own, whatever it is given.
FRESH = {*_OVER, "_to_copy"}


class Block(Protocol):
    """What gives parts of the operands while a block is computed."""

    def part(self, t: Tensor, low: int, high: int, axis: int = 0) -> Tensor:
        """The places of an axis from `low` to `high`."""

    def whole(self, t: Tensor) -> Tensor:
        """All of an operand."""

    def spare(self, t: Tensor) -> bool:
        """Whether a part that was just given is read by nobody else, and may be written to."""


# What computes the places from low to high.
Maker = Callable[[int, int, Block], Tensor]


def maker(op: Operation, out: Tensor, axis: int) -> Maker | None:
    """What computes places of one axis of a result that is shaped as `out`; None where that cannot be cut there."""
    return _RULES[kind(op)](op, out, axis)


def kind(op: Operation) -> str:
    """Which of the rules is for an operation, "" for none."""
    if op.name in _ELEMENTWISE or (torch.Tag.pointwise in op.func.tags and op.name not in WHOLE):
        return "elementwise"
    if op.name in RESHAPE or op.name in ("squeeze", "unsqueeze"):
        return "reshape"
    if op.name in VIEWS:
        return "view"
    return op.name if op.name in _OTHERS else ""


def _elementwise(op: Operation, t: Tensor, axis: int) -> Maker:
    """Each operand is cut where it is not broadcast."""
    kwargs = {name: value for name, value in op.kwargs.items() if name != "memory_format"}

    def where(x: Any) -> int:
        at = axis - t.ndim + x.ndim if isinstance(x, Tensor) else -1
        return at if at >= 0 and x.shape[at] != 1 else -1

    places = [where(x) for x in op.args]

    def cut(i: int, low: int, high: int, block: Block) -> Any:
        x = op.args[i]
        return block.part(x, low, high, places[i]) if places[i] >= 0 else block.whole(x) if isinstance(x, Tensor) else x

    def copied(low: int, high: int, block: Block) -> Tensor:
        return cut(1, low, high, block).to(t.dtype).expand(*t.shape[:axis], high - low, *t.shape[axis + 1 :])

    first = op.args[0]
    over = op.name in _OVER and op.func._overloadname == "Tensor" and (first.dtype, first.shape) == (t.dtype, t.shape)

    def make(low: int, high: int, block: Block) -> Tensor:
        operands = [cut(i, low, high, block) for i in range(len(places))]
        if over and block.spare(first):
            return getattr(operands[0], op.name + "_")(*operands[1:], **kwargs)
        return op.func(*operands, **kwargs)

    return copied if op.name == "copy" else make


def _reshape(op: Operation, t: Tensor, axis: int) -> Maker | None:
    """A run of the axis is a run of that axis of the source before which there are as many elements."""
    source, size = op.args[0], tuple(t.shape)
    before, after = math.prod(size[:axis]), math.prod(size[axis + 1 :])
    shape = source.shape
    at = next((i for i in range(len(shape)) if math.prod(shape[:i]) == before and shape[i] > 1), None)
    if at is None:
        return None
    grain = math.prod(shape[at + 1 :])

    def make(low: int, high: int, block: Block) -> Tensor:
        first, last = low * after // grain, -(-high * after // grain)
        piece = block.part(source, first, last, at)
        if (first * grain, last * grain) != (low * after, high * after):
            piece = piece.reshape(before, -1).narrow(1, low * after - first * grain, (high - low) * after)
        return piece.reshape(*size[:axis], high - low, *size[axis + 1 :])

    return make


def _view(op: Operation, t: Tensor, axis: int) -> Maker | None:
    """Where the axis is one of the source, whole, the same is done to a part of it."""
    source = op.args[0]
    # Strides tell the axes apart.
    marks = [1 << (3 * i + 1) for i in range(source.ndim)]
    seen = torch.empty(0, dtype=torch.uint8, device="meta").as_strided(source.shape, marks)
    moved = op.func(seen, *op.args[1:], **op.kwargs)
    mark, size = moved.stride(axis), t.shape[axis]
    if op.name == "expand" and mark == 0:
        return lambda low, high, block: block.whole(source).expand(*t.shape[:axis], high - low, *t.shape[axis + 1 :])
    if mark not in marks or source.shape[marks.index(mark)] != size:
        return None
    at, args = marks.index(mark), op.args[1:]
    if op.name == "slice" and (op.args[1] if len(op.args) > 1 else 0) % source.ndim == at:
        # All of it: the step is 1, and the places are those of the whole.
        return lambda low, high, block: block.part(source, low, high, at)

    def make(low: int, high: int, block: Block) -> Tensor:
        piece = block.part(source, low, high, at)
        if op.name == "expand":
            return piece.expand(*t.shape[:axis], high - low, *t.shape[axis + 1 :])
        return op.func(piece, *args, **op.kwargs)

    return make


def _cat(op: Operation, t: Tensor, axis: int) -> Maker | None:
    pieces, dim = op.args[0], op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    if dim % t.ndim == axis or any(p.ndim != t.ndim for p in pieces):
        return None
    return lambda low, high, block: torch.cat([block.part(p, low, high, axis) for p in pieces], dim)


def _stack(op: Operation, t: Tensor, axis: int) -> Maker | None:
    pieces, dim = op.args[0], op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    dim %= t.ndim
    if dim == axis:
        return None
    at = axis - (axis > dim)
    return lambda low, high, block: torch.stack([block.part(p, low, high, at) for p in pieces], dim)


def _index(op: Operation, t: Tensor, axis: int) -> Maker:
    """A look-up by one tensor of indices: they are cut, or the axes beside the one that they replace."""
    source, indices = op.args
    dim, index = next((i, x) for i, x in enumerate(indices) if x is not None)
    if dim <= axis < dim + index.ndim:
        return lambda low, high, block: block.whole(source)[
            (slice(None),) * dim + (block.part(index, low, high, axis - dim),)
        ]
    at = axis if axis < dim else axis - index.ndim + 1
    return lambda low, high, block: block.part(source, low, high, at)[(slice(None),) * dim + (block.whole(index),)]


def _view_dtype(op: Operation, t: Tensor, axis: int) -> Maker | None:
    source, dtype = op.args
    if axis == t.ndim - 1 and source.dtype.itemsize != dtype.itemsize:
        return None

    def make(low: int, high: int, block: Block) -> Tensor:
        piece = block.part(source, low, high, axis)
        return (piece if source.dtype.itemsize == dtype.itemsize else piece.contiguous()).view(dtype)

    return make


def _sum(op: Operation, t: Tensor, axis: int) -> Maker | None:
    source, dims = op.args[0], op.args[1] if len(op.args) > 1 else None
    keep = t.ndim == source.ndim
    if not dims or (keep and any(d % source.ndim == axis for d in dims)):
        return None
    places = [i for i in range(source.ndim) if keep or i not in [d % source.ndim for d in dims]]
    at = places[axis]
    return lambda low, high, block: op.func(block.part(source, low, high, at), *op.args[1:], **op.kwargs)


_RULES: dict[str, Callable[[Operation, Tensor, int], Maker | None]] = {
    "elementwise": _elementwise,
    "reshape": _reshape,
    "view": _view,
    "cat": _cat,
    "stack": _stack,
    "index": _index,
    "view_dtype": _view_dtype,
    "sum": _sum,
}
