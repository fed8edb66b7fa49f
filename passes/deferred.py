"""Large tensors that are not computed until they are asked for, and then by blocks that stay in a cache.

What a slice of the graph makes on the way to a weight [n, k] is elementwise, or moves elements about. A `Deferred`
keeps the operation instead of its result; `part` computes a block of it alone, through all the operations behind it.
What cannot be computed by blocks is computed whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


from .rules import RESHAPE, Operation

# Elements of the smallest tensor that is deferred, and of a block: few enough to stay in a cache, in float64; on a GPU
# enough to keep it busy.
LEAST = 1 << 17
BLOCK = {"cpu": 1 << 17}
BLOCK_ELSEWHERE = 1 << 22

_CASTS = {"_to_copy", "clone", "detach", "alias", "lift_fresh_copy", "lift_fresh", "lift", "contiguous"}
_ELEMENTWISE = {*_CASTS, "copy", "__and__", "__or__", "__xor__", "__rshift__", "__lshift__", "floor_divide"}
_VIEWS = {"t", "transpose", "permute", "slice", "select", "expand"}
_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}

# By operation, axis, low and high.
Memo = dict[tuple[int, int, int, int], Tensor]
# What computes a block from low and high; None where an operation cannot be cut there.
Maker = Callable[[int, int, Memo], Tensor]


@dataclass(eq=False)
class Late:
    """An operation that was not run yet, or (op is None) its result `value`. What it knows of its shape is `stand_in`.

    readers  how many others are made of it; makers: by axis, what computes a block
    """

    op: Operation | None
    stand_in: Tensor
    value: Tensor | None = None
    readers: int = 0
    makers: dict[int, Maker | None] = field(default_factory=dict)


class Deferred(Tensor):
    """A tensor that may not be computed yet."""

    late: Late

    @staticmethod
    def __new__(cls, late: Late, device: torch.device) -> Deferred:
        like = late.stand_in
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), storage_offset=like.storage_offset(), dtype=like.dtype,
            device=device,
        )  # fmt: skip
        made.late = late
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op = Operation.of(func, args, kwargs or {})
        reduce = _REDUCTIONS.get(op.name) if func._overloadname in ("", "default") and not kwargs else None
        if reduce is not None and len(op.tensors) == len(args) and args[0].numel() >= LEAST:
            return reduce(*args)
        if op.name in _LIKE:
            like = torch.empty((), dtype=args[0].dtype, device=args[0].device).expand(args[0].shape)
            return func(like, *args[1:], **op.kwargs)
        postponed = _postpone(op)
        if postponed is not None:
            return postponed
        # Not all that arrives here was taken apart before.
        simpler = func.decompose(*args, **op.kwargs)
        return _whole(op) if simpler is NotImplemented else simpler


def defer(t: Tensor) -> Tensor:
    """A tensor that is given: what is made of it is deferred."""
    return Deferred(Late(None, _stand_in(t), t), t.device)


def held(t: Tensor) -> Tensor:
    """The whole of a tensor, deferred or not."""
    if not isinstance(t, Deferred):
        return t
    late = t.late
    if late.op is not None:
        axis = next((i for i, size in enumerate(t.shape) if size > 1 and _maker(t, i)), None)
        if axis is None or t.numel() <= block_size(t):
            late.value = _whole(late.op)
        else:
            # As strided as eager has it, for what asks for that.
            reach = 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
            dense = reach == t.numel() and 0 not in t.stride()
            value = torch.empty_strided(t.shape, t.stride() if dense else _contiguous(t.shape), dtype=t.dtype,
                                        device=t.device)  # fmt: skip
            for low, high in spans(t, axis):
                value.narrow(axis, low, high - low).copy_(part(t, low, high, {}, axis))
            late.value = value
        # The operands are not needed any more.
        late.op, late.makers = None, {}
    assert late.value is not None
    return late.value


def settled(t: Tensor) -> Tensor:
    """A plain tensor for one that is computed already, or is small."""
    return held(t) if isinstance(t, Deferred) and (t.late.op is None or t.numel() < LEAST) else t


def unrepeated(t: Tensor) -> tuple[Tensor, int]:
    """A matrix as another [n, k/r] of which every element is repeated r times in its row, and r: 1 if none is known."""
    wide = t
    while isinstance(wide, Deferred) and wide.late.op is not None:
        op, source = wide.late.op, wide.late.op.args[0]
        if op.name == "expand" and wide.ndim > 1 and source.ndim and source.shape[-1] == 1 < wide.shape[-1]:
            repeat, rows = wide.shape[-1], source.expand(*wide.shape[:-1], 1)
            if t.shape[1] % repeat == 0 and rows.numel() < LEAST:
                return held(rows).reshape(t.shape[0], t.shape[1] // repeat), repeat
        if op.name not in {*RESHAPE, "squeeze", "unsqueeze", "select", "expand"} or source.numel() != t.numel():
            break
        wide = source
    return t, 1


def codes_of(t: Tensor, shape: Sequence[int]) -> tuple[Tensor, int, int]:
    """Integers broadcast to `shape`, whole, in the narrowest of int8, uint8 and int16 that holds them, and their range.

    Where none does, int16 holds them cut off; the range tells.
    """
    t = t.expand(shape)
    if t.numel() == 0:
        return held(t).to(torch.uint8), 0, 0
    narrow = t.dtype in (torch.int8, torch.uint8, torch.int16)
    out = torch.empty(t.shape, dtype=t.dtype if narrow else torch.int16, device=t.device)
    extremes = []
    for low, high in spans(t):
        block = out[low:high].copy_(some := part(t, low, high, {}))
        extremes += torch.aminmax(block if narrow else some)
    least, most = (int(extreme) for extreme in torch.aminmax(torch.stack(extremes).to(torch.int64)))
    tight = torch.int8 if -128 <= least and most <= 127 else torch.uint8 if 0 <= least and most <= 255 else out.dtype
    return out if narrow else out.to(tight), least, most


def block_size(t: Tensor) -> int:
    """Elements of a block."""
    return BLOCK.get(t.device.type, BLOCK_ELSEWHERE)


def spans(t: Tensor, axis: int = 0) -> Iterator[tuple[int, int]]:
    """The blocks of a tensor along an axis: (low, high)."""
    size = t.shape[axis]
    step = max(1, block_size(t) * size // max(t.numel(), 1))
    for low in range(0, size, step):
        yield low, min(low + step, size)


def part(t: Tensor, low: int, high: int, memo: Memo, axis: int = 0) -> Tensor:
    """The places from `low` to `high` of an axis. `memo` keeps what several parts of one block have in common."""
    if not isinstance(t, Deferred) or t.late.op is None:
        return held(t).narrow(axis, low, high - low)
    key = (id(t.late), axis, low, high)
    found = memo.get(key)
    if found is None:
        make = _maker(t, axis)
        if make is None:
            return held(t).narrow(axis, low, high - low)
        found = make(low, high, memo)
        if t.late.readers > 1:
            memo[key] = found
    return found


def _maker(t: Deferred, axis: int) -> Maker | None:
    late = t.late
    if axis not in late.makers:
        assert late.op is not None
        late.makers[axis] = _RULES[_kind(late.op)](late.op, late.stand_in, axis)
    return late.makers[axis]


def _kind(op: Operation) -> str:
    """Which of the rules is for an operation, "" for none."""
    if op.name in _ELEMENTWISE or (torch.Tag.pointwise in op.func.tags and op.name not in _REDUCTIONS):
        return "elementwise"
    if op.name in RESHAPE or op.name in ("squeeze", "unsqueeze"):
        return "reshape"
    if op.name in _VIEWS:
        return "view"
    if op.name in ("cat", "stack", "index", "view_dtype", "sum"):
        return op.name
    return ""


def _postpone(op: Operation) -> Tensor | None:
    """The result of an operation, not computed if it is large; None where there is no rule for it."""
    if not _kind(op):
        return None
    first = next(t for t in op.tensors if isinstance(t, Deferred))
    device = op.kwargs.get("device")
    if device is not None and torch.device(device) != first.device:
        return None
    if any(t.device != first.device and t.ndim for t in op.tensors):
        return None
    if op.name == "index" and not (len(op.args) == 2 and sum(i is not None for i in op.args[1]) == 1):
        return None
    if op.name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in op.args[1]):
        return None
    stand_in = _result(op)
    if stand_in is None:
        return None
    same = (stand_in.dtype, stand_in.shape, stand_in.stride()) == (first.dtype, first.shape, first.stride())
    if same and op.name in {*_CASTS, *RESHAPE, *_VIEWS}:
        return Deferred(first.late, first.device)
    made = Deferred(Late(op, stand_in), first.device)
    if stand_in.numel() < LEAST:
        held(made)
    else:
        for t in op.tensors:
            if isinstance(t, Deferred):
                t.late.readers += 1
    return made


def _result(op: Operation) -> Tensor | None:
    """A tensor without data, shaped as the result of an operation; None where that is not one tensor."""

    def told(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return tuple(told(item) for item in x)
        return (x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else (type(x), x)

    key = (op.func, told(op.args), *((name, told(value)) for name, value in op.kwargs.items()))
    if key not in _RESULTS:
        args, kwargs = op.map(lambda x: _stand_in(x) if isinstance(x, Tensor) else x)
        found = op.func(*args, **({**kwargs, "device": "meta"} if kwargs.get("device") is not None else kwargs))
        if len(_RESULTS) > 4096:
            _RESULTS.clear()
        _RESULTS[key] = found if isinstance(found, Tensor) else None
    return _RESULTS[key]


# To find it takes as long as a small operation does, and equal layers ask for the same.
_RESULTS: dict[Any, Tensor | None] = {}


def _whole(op: Operation) -> Any:
    """The result of an operation, computed at once."""
    args, kwargs = op.map(lambda x: held(x) if isinstance(x, Tensor) else x)
    return op.func(*args, **kwargs)


def _stand_in(t: Tensor) -> Tensor:
    if isinstance(t, Deferred):
        return t.late.stand_in
    if not t.ndim:
        # A number has its own rules of promotion.
        return torch.empty((), dtype=t.dtype, device="meta")
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _contiguous(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _elementwise(op: Operation, t: Tensor, axis: int) -> Maker:
    """Each operand is cut where it is not broadcast."""
    kwargs = {name: value for name, value in op.kwargs.items() if name != "memory_format"}

    def where(x: Any) -> int:
        at = axis - t.ndim + x.ndim if isinstance(x, Tensor) else -1
        return at if at >= 0 and x.shape[at] != 1 else -1

    places = [where(x) for x in op.args]

    def cut(i: int, low: int, high: int, memo: Memo) -> Any:
        x = op.args[i]
        return part(x, low, high, memo, places[i]) if places[i] >= 0 else held(x) if isinstance(x, Tensor) else x

    def copied(low: int, high: int, memo: Memo) -> Tensor:
        return cut(1, low, high, memo).to(t.dtype).expand(*t.shape[:axis], high - low, *t.shape[axis + 1 :])

    def make(low: int, high: int, memo: Memo) -> Tensor:
        return op.func(*(cut(i, low, high, memo) for i in range(len(places))), **kwargs)

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

    def make(low: int, high: int, memo: Memo) -> Tensor:
        first, last = low * after // grain, -(-high * after // grain)
        piece = part(source, first, last, memo, at)
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
    if mark not in marks or source.shape[marks.index(mark)] != size:
        return None
    at, args = marks.index(mark), op.args[1:]
    if op.name == "slice" and (op.args[1] if len(op.args) > 1 else 0) % source.ndim == at:
        # All of it: the step is 1, and the places are those of the whole.
        return lambda low, high, memo: part(source, low, high, memo, at)

    def make(low: int, high: int, memo: Memo) -> Tensor:
        piece = part(source, low, high, memo, at)
        if op.name == "expand":
            return piece.expand(*t.shape[:axis], high - low, *t.shape[axis + 1 :])
        return op.func(piece, *args, **op.kwargs)

    return make


def _cat(op: Operation, t: Tensor, axis: int) -> Maker | None:
    pieces, dim = op.args[0], op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    if dim % t.ndim == axis or any(p.ndim != t.ndim for p in pieces):
        return None
    return lambda low, high, memo: torch.cat([part(p, low, high, memo, axis) for p in pieces], dim)


def _stack(op: Operation, t: Tensor, axis: int) -> Maker | None:
    pieces, dim = op.args[0], op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    dim %= t.ndim
    if dim == axis:
        return None
    at = axis - (axis > dim)
    return lambda low, high, memo: torch.stack([part(p, low, high, memo, at) for p in pieces], dim)


def _index(op: Operation, t: Tensor, axis: int) -> Maker:
    """A look-up by one tensor of indices: they are cut, or the axes beside the one that they replace."""
    source, indices = op.args
    dim, index = next((i, x) for i, x in enumerate(indices) if x is not None)
    if dim <= axis < dim + index.ndim:
        return lambda low, high, memo: held(source)[(slice(None),) * dim + (part(index, low, high, memo, axis - dim),)]
    at = axis if axis < dim else axis - index.ndim + 1
    return lambda low, high, memo: part(source, low, high, memo, at)[(slice(None),) * dim + (held(index),)]


def _view_dtype(op: Operation, t: Tensor, axis: int) -> Maker | None:
    source, dtype = op.args
    if axis == t.ndim - 1 and source.dtype.itemsize != dtype.itemsize:
        return None

    def make(low: int, high: int, memo: Memo) -> Tensor:
        piece = part(source, low, high, memo, axis)
        return (piece if source.dtype.itemsize == dtype.itemsize else piece.contiguous()).view(dtype)

    return make


def _sum(op: Operation, t: Tensor, axis: int) -> Maker | None:
    source, dims = op.args[0], op.args[1] if len(op.args) > 1 else None
    keep = t.ndim == source.ndim
    if not dims or (keep and any(d % source.ndim == axis for d in dims)):
        return None
    places = [i for i in range(source.ndim) if keep or i not in [d % source.ndim for d in dims]]
    at = places[axis]
    return lambda low, high, memo: op.func(part(source, low, high, memo, at), *op.args[1:], **op.kwargs)


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


def _axis(t: Tensor) -> int:
    """The axis to cut a whole tensor along: the first that is worth it."""
    return next((i for i, size in enumerate(t.shape) if size > 1), 0)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    axis = _axis(a)
    for low, high in spans(a, axis):
        memo: Memo = {}
        if not torch.equal(part(a, low, high, memo, axis), part(b, low, high, memo, axis)):
            return False
    return True


def _over_blocks(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A reduction of a whole tensor to a number, by blocks."""

    def reduced(t: Tensor) -> Tensor:
        axis = _axis(t)
        return reduce(torch.stack([reduce(part(t, low, high, {}, axis)) for low, high in spans(t, axis)]))

    return reduced


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "equal": _equal,
    **{name: _over_blocks(getattr(torch, name)) for name in ("all", "any", "min", "max", "amin", "amax")},
    "aminmax": lambda t: torch.return_types.aminmax((_REDUCTIONS["amin"](t), _REDUCTIONS["amax"](t))),
}
