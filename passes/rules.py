"""What each operation of aten does to a `Form`, and which kind of operation it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import algebra
from .algebra import Form

SAME = {"clone", "detach", "alias", "contiguous", "lift_fresh_copy", "lift_fresh", "lift", "_to_copy", "to"}
RESHAPE = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
LAYOUT = {
    *SAME, *RESHAPE, "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "split",
    "split_with_sizes", "unbind", "chunk", "narrow", "flip", "roll", "repeat", "unfold", "flatten", "movedim", "tile",
    "unsafe_split", "unsafe_chunk", "diagonal", "rot90",
}  # fmt: skip
GATHER = {"index", "embedding", "gather", "index_select", "take"}
WRITES = {"index_put": 2, "_unsafe_index_put": 2, "index_copy": 3, "scatter": 3}
JOIN = {"cat", "stack", "slice_scatter", "select_scatter", *WRITES}
ARITHMETIC = {
    "add", "sub", "rsub", "mul", "div", "neg", "addcmul", "reciprocal", "sum", "mm", "bmm", "mv", "addmm", "pow",
    "exp2", "ldexp",
}  # fmt: skip
SMOOTH = {
    *LAYOUT, *GATHER, *JOIN, *ARITHMETIC, "copy", "constant_pad_nd", "where", "masked_fill", "exp", "sqrt", "rsqrt",
    "mean", "dot", "baddbmm", "linalg_vector_norm",
}  # fmt: skip
ROUNDING = {
    "round", "floor", "ceil", "trunc", "clamp", "clamp_min", "clamp_max", "floor_divide", "remainder", "fmod",
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One call of an operation. Its name is short: "mul" for aten.mul.Tensor, "view_dtype" for a view as a dtype."""

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "aten":
            return Operation(func, func._schema.name, args, kwargs)
        return Operation(func, "view_dtype" if name == "view" and func._overloadname == "dtype" else name, args, kwargs)

    @functools.cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        found: list[Tensor] = []
        self.map(lambda x: found.append(x) if isinstance(x, Tensor) else None)
        return found

    def map(self, change: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with each changed, inside lists too."""

        def changed(x: Any) -> Any:
            return [changed(item) for item in x] if isinstance(x, (list, tuple)) else change(x)

        return tuple([changed(x) for x in self.args]), {name: changed(x) for name, x in self.kwargs.items()}


class Operands(Protocol):
    """What is known of the operands of an operation."""

    def real(self, x: Any) -> Any:
        """An operand as eager has it."""

    def form(self, x: Any) -> Form:
        """The form of an operand, tensor or number."""

    def exact(self, x: Any) -> Tensor:
        """The float64 value of an operand, tensor or number."""


def as_float(x: Any) -> Any:
    return x.to(torch.float64) if isinstance(x, Tensor) else x


def rounded(out: Tensor) -> Form | None:
    """The result of a rounding operation is an integer code in float clothing."""
    whole = out.to(torch.float64)
    if not bool(((whole == whole.round()) & (whole.abs() <= 2**15)).all()):
        return None
    return algebra.integer(whole.to(torch.int32))


Rule = Callable[[Operands, Operation, tuple[int, ...]], Form | None]


def _add(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    a, b = (e.form(x) for x in op.args[:2])
    alpha = float(op.kwargs.get("alpha", op.args[2] if len(op.args) > 2 else 1))
    first, second = (-alpha, 1.0) if op.name == "rsub" else (1.0, -alpha if op.name == "sub" else alpha)
    a, b = (
        algebra.scaled(f, torch.tensor(c, dtype=torch.float64), f.shape) if c != 1 else f
        for f, c in ((a, first), (b, second))
    )
    return algebra.added(a, b, shape)


def _mul(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    a, b = (e.form(x) for x in op.args[:2])
    if not a.terms and not b.terms:
        return None
    left, right = e.exact(op.args[0]), e.exact(op.args[1])
    if a.terms and b.terms and left.shape == right.shape:
        both = algebra.combined(a, b, left, right) or algebra.combined(b, a, right, left)
        if both is not None:
            return both
    return algebra.product(a, b, left, right, shape)


def _div(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    a = e.form(op.args[0])
    if op.kwargs.get("rounding_mode") or len(op.args) > 2 or not a.terms:
        return None
    return algebra.divided(a, e.exact(op.args[1]), shape)


def _ldexp(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    form = e.form(op.args[0])
    return algebra.scaled(form, torch.exp2(e.exact(op.args[1])), shape) if form.terms else None


def _neg(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    form = e.form(op.args[0])
    return algebra.scaled(form, torch.tensor(-1.0, dtype=torch.float64), shape) if form.terms else None


def _addcmul(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    a, b = e.form(op.args[1]), e.form(op.args[2])
    if op.kwargs.get("value", 1) != 1 or not (a.terms or b.terms):
        return None
    together = torch.broadcast_shapes(a.shape, b.shape)
    return algebra.added(
        e.form(op.args[0]),
        algebra.product(a, b, e.exact(op.args[1]), e.exact(op.args[2]), together),
        shape,
    )


def _join(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    leaves, spec = tree_flatten((op.args, op.kwargs))
    if op.name in WRITES:
        source = op.args[WRITES[op.name]] if len(op.args) > WRITES[op.name] else None
        accumulates = any(op.args[WRITES[op.name] + 1 :]) or any(op.kwargs.values())
        if not isinstance(source, Tensor) or accumulates:
            return None
        operands = [op.args[0], source]
    else:
        operands = [t for t in leaves if isinstance(t, Tensor)]
    places = [next(i for i, leaf in enumerate(leaves) if leaf is t) for t in operands]
    if len(set(places)) != len(places):
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def join(pieces: list[Tensor]) -> Tensor:
        given = [e.real(leaf) for leaf in leaves]
        for place, piece in zip(places, pieces, strict=True):
            given[place] = piece
        new_args, new_kwargs = tree_unflatten(given, spec)
        return op.func(*new_args, **new_kwargs)

    return algebra.joined([e.form(t) for t in operands], shape, join)


def _copy(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    form = e.form(op.args[1])
    return algebra.moved(form, shape, lambda piece: piece.expand(shape)) if form.terms else None


def _pad(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    form = e.form(op.args[0])
    value = float(op.args[2] if len(op.args) > 2 else op.kwargs.get("value", 0))
    return (
        algebra.padded(form, shape, lambda piece, fill: op.func(piece, op.args[1], fill), value) if form.terms else None
    )


def _where(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    if op.name == "masked_fill":
        condition, a, b = e.real(op.args[1]), op.args[2], op.args[0]
    else:
        condition, a, b = e.real(op.args[0]), *op.args[1:]
    forms = [e.form(a), e.form(b)]
    if not any(f.terms for f in forms):
        return algebra.masked(condition, e.exact(a), e.exact(b), shape)
    wide = [algebra.moved(f, shape, lambda piece: piece.expand(shape)) for f in forms]
    return algebra.joined(wide, shape, lambda pieces: torch.where(condition, pieces[0], pieces[1]))


def _sum(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    form = e.form(op.args[0])
    dims = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim")
    if dims is None or len(dims) != 1:
        return None
    keepdim = op.args[2] if len(op.args) > 2 else op.kwargs.get("keepdim", False)
    return algebra.summed(form, dims[0] % len(form.shape), keepdim)


def _matrix_product(e: Operands, op: Operation, shape: tuple[int, ...]) -> Form | None:
    left, right = op.args[:2]
    if right.ndim < 2:
        return None
    return algebra.multiplied(e.form(left), e.form(right), e.exact(left), e.exact(right))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    **dict.fromkeys(JOIN, _join),
    **dict.fromkeys(("where", "masked_fill"), _where),
    **dict.fromkeys(("mm", "bmm"), _matrix_product),
    "mul": _mul,
    "div": _div,
    "ldexp": _ldexp,
    "neg": _neg,
    "addcmul": _addcmul,
    "copy": _copy,
    "constant_pad_nd": _pad,
    "sum": _sum,
}
