"""Large tensors that are not computed until they are asked for, and then by blocks that stay in a cache.

What a slice of the graph makes on the way to a weight [n, k] is elementwise, or moves elements about. A `Deferred`
keeps the operation instead of its result; `Block.part` computes a part of it alone, through all the operations behind
it. What cannot be cut is computed whole. A `Tape` does all of it again for other tensors of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import Reason, Refused
from . import cuts
from .rules import RESHAPE, Operation

# Elements of the smallest tensor that is deferred, and of a block: few enough to stay in a cache, in float64; on a GPU
# enough to keep it busy, and of a large tensor so many that a handful of blocks in float64 are as large as it is in
# half precision.
LEAST = 1 << 17
# Elements of the largest tensor, computed whole, of which it is kept what made it.
FEW = 1 << 12
BLOCK = {"cpu": 1 << 17}
BLOCK_ELSEWHERE, SHARE = 1 << 20, 20

_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}


@dataclass(eq=False)
class Origin:
    """Where deferred tensors come from. `lost`: something large was made of them of which it is not kept how."""

    lost: bool = False


@dataclass(eq=False)
class Late:
    """An operation and, once it was run, its result `value`. What it knows of its shape is `stand_in`.

    op       None for a tensor of the model, laid out as that is
    whole    no rule cuts it; item: its place, where the operation gives several
    readers  how many others are made of it; makers: by axis, what computes a block
    """

    op: Operation | None
    stand_in: Tensor
    origin: Origin
    value: Tensor | None = None
    whole: bool = False
    item: int | None = None
    readers: int = 0
    makers: dict[int, cuts.Maker | None] = field(default_factory=dict)


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

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op = Operation.of(func, args, kwargs or {})
        if func._schema.is_mutable:
            raise NotImplementedError(f"{op.name} of what is deferred")
        if op.name.startswith("as_strided") and any(isinstance(t, Deferred) and t.late.op for t in op.tensors):
            # It looks beyond the elements of its operand, at memory that was never laid out.
            raise NotImplementedError(f"{op.name} of what is computed")
        if op.name in _LIKE:
            like = torch.empty((), dtype=args[0].dtype, device=args[0].device).expand(args[0].shape)
            return func(like, *args[1:], **op.kwargs)
        postponed = _postpone(op)
        if postponed is not None:
            return postponed
        # Not all that arrives here was taken apart before.
        simpler = func.decompose(*args, **op.kwargs)
        return _kept(op, _whole(op)) if simpler is NotImplemented else simpler


def defer(t: Tensor, origin: Origin | None = None) -> Tensor:
    """A tensor that is given: what is made of it is deferred."""
    return Deferred(Late(None, _stand_in(t), origin or Origin(), t), t.device)


def held(t: Tensor) -> Tensor:
    """The whole of a tensor, deferred or not."""
    if not isinstance(t, Deferred):
        return t
    late = t.late
    if late.value is None:
        late.value = _computed(t, late)
    return late.value


def _computed(t: Deferred, late: Late) -> Tensor:
    assert late.op is not None
    axis = None
    if t.numel() > block_size(t):
        axis = next((i for i, size in enumerate(t.shape) if size > 1 and _maker(t, i)), None)
    if axis is None:
        made = _whole(late.op)
        value: Tensor = made if late.item is None else made[late.item]
        if (value.dtype, value.shape) != (t.dtype, t.shape):
            raise Refused(Reason.UNSUPPORTED_OP, f"{late.op.name}: {tuple(value.shape)}, not {tuple(t.shape)}")
    else:
        # As strided as eager has it, for what asks for that.
        reach = 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
        dense = reach == t.numel() and 0 not in t.stride()
        value = torch.empty_strided(t.shape, t.stride() if dense else _contiguous(t.shape), dtype=t.dtype,
                                    device=t.device)  # fmt: skip
        for low, high in spans(t, axis):
            value.narrow(axis, low, high - low).copy_(Block().part(t, low, high, axis))
    for source in late.op.tensors:
        # A large operand that nothing else is made of is not needed any more.
        large = isinstance(source, Deferred) and min(t.numel(), source.numel()) >= LEAST
        if large and source.late.op is not None and source.late.readers <= 1:
            source.late.value = None
    return value


def settled(t: Tensor) -> Tensor:
    """A plain tensor for one that is computed already, or is small."""
    return held(t) if isinstance(t, Deferred) and (t.late.value is not None or t.numel() < LEAST) else t


def unrepeated(t: Tensor) -> tuple[Tensor, int]:
    """A matrix as another [n, k/r] of which every element is repeated r times in its row, and r: 1 if none is known."""
    wide = t
    while isinstance(wide, Deferred) and wide.late.op is not None and wide.late.value is None:
        op, source = wide.late.op, wide.late.op.args[0]
        if op.name == "expand" and wide.ndim > 1 and source.ndim and source.shape[-1] == 1 < wide.shape[-1]:
            repeat, rows = wide.shape[-1], source.expand(*wide.shape[:-1], 1)
            if t.shape[1] % repeat == 0:
                return held(rows).reshape(t.shape[0], t.shape[1] // repeat), repeat
        if op.name not in {*RESHAPE, "squeeze", "unsqueeze", "select", "expand"} or source.numel() != t.numel():
            break
        wide = source
    return t, 1


def codes_of(t: Tensor, shape: Sequence[int]) -> tuple[Tensor, int, int]:
    """Integers broadcast to `shape`, in the narrowest of int8, uint8 and int16 that holds them, and their range.

    A tensor of its own. Where none holds them int16 has them cut off; the range tells.
    """
    t = t.expand(shape)
    if t.numel() == 0:
        return torch.empty(t.shape, dtype=torch.uint8, device=t.device), 0, 0
    # What is cut off of 8 bits does not matter if, read as signed or not, they hold the range.
    out, least, most = _cut_to(t, torch.int8)
    if least >= -128 and most <= 127:
        return out, least, most
    if least >= 0 and most <= 255:
        return out.view(torch.uint8), least, most
    return _cut_to(t, torch.int16)


def _cut_to(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, int, int]:
    """Integers cut to so many bits, and the range that they had."""
    out = torch.empty(t.shape, dtype=dtype, device=t.device)
    extremes: list[Tensor] = []
    for low, high in spans(t):
        some = Block().part(t, low, high)
        out[low:high] = some
        extremes += torch.aminmax(some)
    least, most = torch.stack(torch.aminmax(torch.stack(extremes))).tolist()
    return out, least, most


def block_size(t: Tensor) -> int:
    """Elements of a block."""
    return BLOCK.get(t.device.type) or max(BLOCK_ELSEWHERE, t.numel() // SHARE)


def spans(t: Tensor, axis: int = 0) -> Iterator[tuple[int, int]]:
    """The blocks of a tensor along an axis: (low, high)."""
    size = t.shape[axis]
    step = max(1, block_size(t) * size // max(t.numel(), 1))
    for low in range(0, size, step):
        yield low, min(low + step, size)


class Block:
    """One block of several tensors; what they have in common is computed once."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int, int, int], Tensor] = {}

    def part(self, t: Tensor, low: int, high: int, axis: int = 0) -> Tensor:
        """The places of an axis from `low` to `high`."""
        if not isinstance(t, Deferred) or t.late.value is not None:
            return held(t).narrow(axis, low, high - low)
        key = (id(t.late), axis, low, high)
        found = self._made.get(key)
        if found is None:
            make = _maker(t, axis)
            if make is None:
                return held(t).narrow(axis, low, high - low)
            found = make(low, high, self)
            if t.late.readers > 1:
                self._made[key] = found
        return found

    def whole(self, t: Tensor) -> Tensor:
        """All of a tensor."""
        return held(t)

    def spare(self, t: Tensor) -> bool:
        """Whether a part that was just given is read by nobody else, and may be written to."""
        if not isinstance(t, Deferred) or t.late.value is not None or t.late.op is None:
            return False
        return t.late.readers <= 1 and t.late.op.name in cuts.FRESH


def _maker(t: Deferred, axis: int) -> cuts.Maker | None:
    late = t.late
    if axis not in late.makers:
        assert late.op is not None
        late.makers[axis] = None if late.whole else cuts.maker(late.op, late.stand_in, axis)
    return late.makers[axis]


def _postpone(op: Operation) -> Tensor | None:
    """The result of an operation, not computed if it is large; None where there is no rule for it."""
    if not cuts.kind(op):
        return None
    first = next(t for t in op.tensors if isinstance(t, Deferred))
    device = torch.device(op.kwargs.get("device") or first.device)
    if device.type != first.device.type or device.index not in (None, first.device.index):
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
    if same and op.name in {*cuts.CASTS, *RESHAPE, *cuts.VIEWS}:
        return Deferred(first.late, first.device)
    made = Deferred(Late(op, stand_in, first.late.origin), first.device)
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
    found = _RESULTS.get(key, _UNKNOWN)
    if found is _UNKNOWN:
        args, kwargs = op.map(lambda x: _stand_in(x) if isinstance(x, Tensor) else x)
        try:
            out = op.func(*args, **({**kwargs, "device": "meta"} if kwargs.get("device") is not None else kwargs))
        except NotImplementedError:
            out = None
        found = out if isinstance(out, Tensor) else None
        if len(_RESULTS) > 4096:
            _RESULTS.clear()
        _RESULTS[key] = found
    return found


# To find it takes as long as a small operation does, and equal layers ask for the same.
_RESULTS: dict[Any, Tensor | None] = {}
_UNKNOWN = torch.empty(0, device="meta")


def _whole(op: Operation) -> Any:
    """The result of an operation, computed at once, of a large tensor by blocks if it can be."""
    reduce = _REDUCTIONS.get(op.name) if op.func._overloadname in ("", "default") and not op.kwargs else None
    if reduce is not None and len(op.tensors) == len(op.args) and op.args[0].numel() >= LEAST:
        return reduce(*op.args)
    args, kwargs = op.map(lambda x: held(x) if isinstance(x, Tensor) else x)
    return op.func(*args, **kwargs)


def _kept(op: Operation, made: Any) -> Any:
    """Results that were computed at once, with what made them if they are small."""
    origin = next(t.late.origin for t in op.tensors if isinstance(t, Deferred))

    def kept(t: Any, item: int | None) -> Any:
        if isinstance(t, Tensor) and t.numel() <= FEW:
            return Deferred(Late(op, _stand_in(t), origin, t, whole=True, item=item), t.device)
        origin.lost |= isinstance(t, (Tensor, list, tuple))
        return t

    if isinstance(made, (list, tuple)):
        return [kept(t, i) for i, t in enumerate(made)]
    return kept(made, None)


def _stand_in(t: Tensor) -> Tensor:
    if isinstance(t, Deferred):
        return t.late.stand_in
    if not t.ndim:
        # A number has its own rules of promotion.
        return torch.empty((), dtype=t.dtype, device="meta")
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _contiguous(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def _axis(t: Tensor) -> int:
    """The axis to cut a whole tensor along: the first that is worth it."""
    return next((i for i, size in enumerate(t.shape) if size > 1), 0)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    axis = _axis(a)
    for low, high in spans(a, axis):
        block = Block()
        if not torch.equal(block.part(a, low, high, axis), block.part(b, low, high, axis)):
            return False
    return True


def _over_blocks(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A reduction of a whole tensor to a number, by blocks."""

    def reduced(t: Tensor) -> Tensor:
        axis = _axis(t)
        return reduce(torch.stack([reduce(Block().part(t, low, high, axis)) for low, high in spans(t, axis)]))

    return reduced


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "equal": _equal,
    **{name: _over_blocks(getattr(torch, name)) for name in ("all", "any", "min", "max", "amin", "amax")},
    "aminmax": lambda t: torch.return_types.aminmax((_REDUCTIONS["amin"](t), _REDUCTIONS["amax"](t))),
}
