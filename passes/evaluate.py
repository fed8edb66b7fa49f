"""Evaluates a constant slice on the real tensors, three ways at once, without ever writing to them.

Every tensor on the way carries a `Value`: besides what eager computes in its own low precision, the exact float64
`shadow` and the algebraic `Form`. Views, writes and subclasses are resolved by functionalization, so that only aten
operations are seen here. The activation may stand in as the identity matrix: what a linear function makes of it is
its weight, scales applied after the matmul included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_any, tree_flatten, tree_map, tree_unflatten

from ..errors import Reason, Refused
from ..formats import UNIT_ROUNDOFF
from . import algebra
from .algebra import Form

FP8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)

_SAME = {"clone", "detach", "alias", "contiguous", "lift_fresh_copy", "lift_fresh", "lift", "_to_copy", "to"}
_RESHAPE = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
_LAYOUT = {
    *_SAME, *_RESHAPE, "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "split",
    "split_with_sizes", "unbind", "chunk", "narrow", "flip", "roll", "repeat", "unfold", "flatten", "movedim", "tile",
    "unsafe_split", "unsafe_chunk", "diagonal", "rot90",
}  # fmt: skip
_GATHER = {"index", "embedding", "gather", "index_select", "take"}
_WRITES = {"index_put": 2, "_unsafe_index_put": 2, "index_copy": 3, "scatter": 3}
_JOIN = {"cat", "stack", "slice_scatter", "select_scatter", *_WRITES}
_ARITHMETIC = {
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "neg",
    "addcmul",
    "reciprocal",
    "sum",
    "mm",
    "bmm",
    "mv",
    "addmm",
}
_SMOOTH = {
    *_LAYOUT, *_GATHER, *_JOIN, *_ARITHMETIC, "copy", "constant_pad_nd", "where", "masked_fill", "exp2", "pow", "exp", "sqrt", "rsqrt",
    "ldexp", "mean", "dot", "baddbmm", "linalg_vector_norm",
}  # fmt: skip
_ROUNDING = {
    "round",
    "floor",
    "ceil",
    "trunc",
    "clamp",
    "clamp_min",
    "clamp_max",
    "floor_divide",
    "remainder",
    "fmod",
}


@dataclass
class Value:
    """What is known of one tensor.

    lowbit    its values derive from integer, boolean or 8-bit float data of the model
    roundoff  the coarsest unit roundoff of the arithmetic behind it, in eager's precision
    """

    shadow: Tensor | None
    form: Form | None
    lowbit: bool
    roundoff: float = 0.0
    eye: bool = False


@dataclass(frozen=True)
class Weight:
    """A weight [n, k] evaluated: in eager's precision, exactly, and as algebra."""

    native: Tensor
    shadow: Tensor
    form: Form
    lowbit: bool
    roundoff: float


def evaluate(compute: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor]) -> list[Weight]:
    """Runs `compute` on real `leaves` and returns what it returns, evaluated. Raises Refused."""
    flat, rebuild = _flatten(leaves)
    # Aliases: what we note on a tensor must not be seen on the user's own object.
    flat = [t.detach() for t in flat]
    mode = _Evaluation(flat)

    def functional(*inner: Tensor) -> list[Tensor]:
        return list(compute(*rebuild(inner)))

    with undisturbed(), mode:
        try:
            results = torch.func.functionalize(functional, remove="mutations")(*flat)
        except RuntimeError as error:
            raise Refused(Reason.UNSUPPORTED_OP, str(error)[:200]) from error
    return [mode.weight(t) for t in results]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Real tensors, no gradients, no autocast, no fake or tracing mode: whatever the compiler is in the midst of."""
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.amp.autocast("cpu", enabled=False),
        torch.amp.autocast("cuda", enabled=False),
    ):
        yield


def _flatten(leaves: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], list[Tensor]]]:
    """The plain tensors inside `leaves`, and the function that rebuilds subclasses of one or more levels from them."""
    flat: list[Tensor] = []

    def plan(t: Tensor) -> Callable[[Sequence[Tensor]], Tensor]:
        if not is_traceable_wrapper_subclass(t):
            place = len(flat)
            flat.append(t)
            return lambda inner: inner[place]
        names, context = t.__tensor_flatten__()
        plans = {name: plan(getattr(t, name)) for name in names}
        kind, size, stride = type(t), t.size(), t.stride()
        return lambda inner: kind.__tensor_unflatten__(
            {name: make(inner) for name, make in plans.items()}, context, size, stride
        )

    plans = [plan(t) for t in leaves]
    return flat, lambda inner: [make(inner) for make in plans]


def identity(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Stands for the identity matrix [k, k] while evaluating; it takes no memory."""
    eye = torch.zeros((), dtype=dtype, device=device).expand(k, k)
    eye._lq_value = Value(None, None, False, eye=True)
    return eye


class _Evaluation(TorchDispatchMode):
    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        for leaf in leaves:
            low = not leaf.is_floating_point() or leaf.dtype in FP8
            leaf._lq_value = Value(*self._leaf(leaf), low)

    def _leaf(self, t: Tensor) -> tuple[Tensor | None, Form | None]:
        if not t.is_floating_point():
            return None, None
        shadow = t.to(torch.float64)
        if t.dtype in FP8 and t.dtype != torch.float8_e8m0fnu:
            every = torch.arange(256, dtype=torch.uint8, device=t.device).view(t.dtype).to(torch.float64)
            # Codes for NaN are legal where no weight uses them; the final check refuses a weight that does.
            return shadow, algebra.lookup(every.nan_to_num(0.0, 0.0, 0.0), t.view(torch.uint8))
        return shadow, algebra.constant(shadow)

    def weight(self, t: Tensor) -> Weight:
        value = self._value(t)
        shadow = value.shadow if value.shadow is not None else t.to(torch.float64)
        return Weight(t, shadow, self._form(t), value.lowbit, value.roundoff)

    def _value(self, t: Tensor) -> Value:
        value = getattr(t, "_lq_value", None)
        if value is None:
            value = t._lq_value = Value(*self._leaf(t), False)
        return value

    def _form(self, t: Tensor) -> Form:
        value = self._value(t)
        return value.form if value.form is not None else algebra.integer(t)

    def _exact(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shadow = self._value(x).shadow
        return x if shadow is None else shadow

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass(t) for t in tree_flatten((args, kwargs))[0]):
            return NotImplemented
        if func._schema.is_mutable:
            raise Refused(Reason.MUTATED, str(func))
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refused(Reason.UNSUPPORTED_OP, str(func))
        namespace, _, name = func._schema.name.partition("::")
        name = name if namespace == "aten" else func._schema.name
        if tree_any(lambda t: isinstance(t, Tensor) and self._value(t).eye, (args, kwargs)):
            return self._through(func, name, args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            out = self._fresh(out, args)
            self._note(func, name, args, kwargs, [out], False)
        elif isinstance(out, (list, tuple)) and all(isinstance(t, Tensor) for t in out):
            self._note(func, name, args, kwargs, list(out), True)
        return out

    def _fresh(self, out: Tensor, args: tuple[Any, ...]) -> Tensor:
        # An operation that returns its own argument must not overwrite what is known of it.
        return out.view_as(out) if any(out is a for a in tree_flatten(args)[0]) else out

    def _through(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What an operation makes of the identity matrix that stands for the activation."""
        first = args[0]
        if name in _LAYOUT and isinstance(first, Tensor):
            out = func(*args, **kwargs)
            if isinstance(out, Tensor) and out.shape == first.shape:
                out._lq_value = Value(None, None, False, eye=True)
                return out
        if name == "mm" and self._value(first).eye and not self._value(args[1]).eye:
            return self.__torch_dispatch__(torch.ops.aten.alias.default, (), (args[1],))
        if name == "addmm" and self._value(args[1]).eye and not kwargs:
            return self.__torch_dispatch__(torch.ops.aten.add.Tensor, (), (args[2], args[0]))
        raise Refused(Reason.UNSUPPORTED_OP, str(func))

    def _note(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outs: list[Tensor],
        many: bool,
    ) -> None:
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        low = any(self._value(t).lowbit for t in tensors)
        coarsest = max((self._value(t).roundoff for t in tensors), default=0.0)
        table = None
        if name in _GATHER:
            low, table = self._gathered(name, args)
        shadows: list[Tensor | None] = [None] * len(outs)
        if any(o.is_floating_point() for o in outs):
            shadows = self._shadows(func, name, args, kwargs, outs, many)
        for i, (out, shadow) in enumerate(zip(outs, shadows, strict=True)):
            form = None
            if shadow is not None:
                form = self._combine(func, name, args, kwargs, out, shadow, i if many else None, table)
                if form is None or len(form.terms) > algebra.MAX_TERMS:
                    form = algebra.constant(shadow)
            moves = name in _LAYOUT or name in _GATHER or name in _JOIN
            own = 0.0 if moves and name not in ("_to_copy", "to") else UNIT_ROUNDOFF.get(out.dtype, 0.0)
            out._lq_value = Value(shadow, form, low, max(coarsest, own))

    def _gathered(self, name: str, args: tuple[Any, ...]) -> tuple[bool, tuple[Tensor, Tensor] | None]:
        """Whether a gather yields low-bit data, and its source as a table if it is one. An index moves, it makes no value."""
        source, rest = args[0], [t for t in tree_flatten(args[1:])[0] if isinstance(t, Tensor)]
        value = self._value(source)
        table = None
        if value.shadow is not None and not self._form(source).terms:
            table = algebra.levels_of(value.shadow)
        return value.lowbit or (table is not None and any(self._value(t).lowbit for t in rest)), table

    def _shadows(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outs: list[Tensor],
        many: bool,
    ) -> list[Tensor | None]:
        smooth = name in _SMOOTH and not (name == "view" and func._overloadname == "dtype")
        if smooth and not any(o.dtype in FP8 for o in outs):
            exact_args, exact_kwargs = tree_map(self._exact, (args, kwargs))
            if name in _ARITHMETIC or name in ("pow", "exp2", "ldexp"):
                exact_args = tree_map(_float, exact_args)
            if name in ("copy", "_to_copy"):
                exact = _float(exact_args[1 if name == "copy" else 0]).expand(outs[0].shape)
                return [exact]
            if isinstance(exact_kwargs.get("dtype"), torch.dtype):
                exact_kwargs["dtype"] = torch.float64
            if name in _RESHAPE:
                return [exact_args[0].reshape(outs[0].shape)]
            exact = func(*exact_args, **exact_kwargs)
            found = list(exact) if many else [exact]
            return [
                s.to(torch.float64) if o.is_floating_point() else None
                for s, o in zip(found, outs, strict=True)
            ]
        return [o.to(torch.float64) if o.is_floating_point() else None for o in outs]

    def _combine(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor, shadow: Tensor,
        item: int | None, table: tuple[Tensor, Tensor] | None,
    ) -> Form | None:  # fmt: skip
        shape = tuple(out.shape)
        if name == "view" and func._overloadname == "dtype":
            return self._leaf(out)[1]
        if out.dtype in FP8:
            return (
                self._leaf(out)[1]
                if name not in _LAYOUT
                else self._moved(func, name, args, kwargs, shape, item)
            )
        if name in _LAYOUT:
            return self._moved(func, name, args, kwargs, shape, item)
        if name in _GATHER:
            return self._gather(func, args, kwargs, shape, table)
        if name in _ROUNDING:
            return _rounded(out)
        rule = _RULES.get(name)
        return rule(self, func, args, kwargs, shape) if rule else None

    def _moved(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        shape: tuple[int, ...],
        item: int | None,
    ) -> Form | None:
        form = self._form(args[0])
        if name in _SAME:
            return form

        def move(piece: Tensor) -> Tensor:
            if name in _RESHAPE:
                return piece.reshape(shape)
            result = func(piece, *args[1:], **kwargs)
            return result if item is None else result[item]

        return algebra.moved(form, shape, move) if form.terms else None

    def _gather(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, ...],
        table: tuple[Tensor, Tensor] | None,
    ) -> Form | None:  # fmt: skip
        form = self._form(args[0])
        if form.terms:
            return algebra.moved(form, shape, lambda piece: func(piece, *args[1:], **kwargs))
        if table is None:
            return None
        return algebra.lookup(table[0], func(table[1], *args[1:], **kwargs).to(torch.uint8))

    def constant_or_form(self, x: Any) -> Form:
        """The form of an operand, tensor or number."""
        return self._form(x) if isinstance(x, Tensor) else algebra.constant(float(x))

    def exact_value(self, x: Any) -> Tensor:
        """The float64 value of an operand, tensor or number."""
        return (
            _float(self._exact(x)) if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)
        )


def _float(x: Any) -> Any:
    return x.to(torch.float64) if isinstance(x, Tensor) else x


def _rounded(out: Tensor) -> Form | None:
    """The result of a rounding operation is an integer code in float clothing."""
    whole = out.to(torch.float64)
    if not bool(((whole == whole.round()) & (whole.abs() <= 2**15)).all()):
        return None
    return algebra.integer(whole.to(torch.int32))


Rule = Callable[[_Evaluation, Any, tuple[Any, ...], dict[str, Any], tuple[int, ...]], Form | None]


def _add(e: _Evaluation, func: Any, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Form | None:
    name = func._schema.name.partition("::")[2]
    a, b = (e.constant_or_form(x) for x in args[:2])
    alpha = float(kwargs.get("alpha", args[2] if len(args) > 2 else 1))
    first, second = (-alpha, 1.0) if name == "rsub" else (1.0, -alpha if name == "sub" else alpha)
    times = [
        algebra.scaled(f, torch.tensor(c, dtype=torch.float64), f.shape) if c != 1 else f
        for f, c in ((a, first), (b, second))
    ]
    return algebra.added(*times, shape)


def _mul(e: _Evaluation, func: Any, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Form | None:
    a, b = (e.constant_or_form(x) for x in args[:2])
    if not a.terms and not b.terms:
        return None
    return algebra.product(a, b, e.exact_value(args[0]), e.exact_value(args[1]), shape)


def _div(e: _Evaluation, func: Any, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Form | None:
    a = e.constant_or_form(args[0])
    if kwargs.get("rounding_mode") or len(args) > 2 or not a.terms:
        return None
    return algebra.divided(a, e.exact_value(args[1]), shape)


def _neg(e: _Evaluation, func: Any, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Form | None:
    form = e.constant_or_form(args[0])
    return algebra.scaled(form, torch.tensor(-1.0, dtype=torch.float64), shape) if form.terms else None


def _addcmul(e: _Evaluation, func: Any, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Form | None:
    a, b = e.constant_or_form(args[1]), e.constant_or_form(args[2])
    if kwargs.get("value", 1) != 1 or not (a.terms or b.terms):
        return None
    together = torch.broadcast_shapes(a.shape, b.shape)
    return algebra.added(
        e.constant_or_form(args[0]),
        algebra.product(a, b, e.exact_value(args[1]), e.exact_value(args[2]), together),
        shape,
    )


def _join(e: _Evaluation, func: Any, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Form | None:
    leaves, spec = tree_flatten((args, kwargs))
    name = func._schema.name.partition("::")[2]
    if name in _WRITES:
        source = args[_WRITES[name]] if len(args) > _WRITES[name] else None
        accumulates = any(args[_WRITES[name] + 1 :]) or any(kwargs.values())
        if not isinstance(source, Tensor) or accumulates:
            return None
        operands = [args[0], source]
    else:
        operands = [t for t in leaves if isinstance(t, Tensor)]
    places = [next(i for i, leaf in enumerate(leaves) if leaf is t) for t in operands]
    if len(set(places)) != len(places):
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def join(pieces: list[Tensor]) -> Tensor:
        given = list(leaves)
        for place, piece in zip(places, pieces, strict=True):
            given[place] = piece
        new_args, new_kwargs = tree_unflatten(given, spec)
        return func(*new_args, **new_kwargs)

    return algebra.joined([e.constant_or_form(t) for t in operands], shape, join)


def _copy(e: _Evaluation, func: Any, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Form | None:
    form = e.constant_or_form(args[1])
    return algebra.moved(form, shape, lambda piece: piece.expand(shape)) if form.terms else None


def _pad(e: _Evaluation, func: Any, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Form | None:
    form = e.constant_or_form(args[0])
    value = float(args[2] if len(args) > 2 else kwargs.get("value", 0))
    return (
        algebra.padded(form, shape, lambda piece, fill: func(piece, args[1], fill), value)
        if form.terms
        else None
    )


def _where(e: _Evaluation, func: Any, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Form | None:
    if func._schema.name == "aten::masked_fill":
        condition, a, b = args[1], args[2], args[0]
    else:
        condition, a, b = args
    forms = [e.constant_or_form(a), e.constant_or_form(b)]
    if not any(f.terms for f in forms):
        return algebra.masked(condition, e.exact_value(a), e.exact_value(b), shape)
    wide = [algebra.moved(f, shape, lambda piece: piece.expand(shape)) for f in forms]
    return algebra.joined(wide, shape, lambda pieces: torch.where(condition, *pieces))


def _sum(e: _Evaluation, func: Any, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Form | None:
    form = e.constant_or_form(args[0])
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if dims is None or len(dims) != 1:
        return None
    keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    return algebra.summed(form, dims[0] % len(form.shape), keepdim)


def _matrix_product(e: _Evaluation, func: Any, args: Any, kwargs: Any, shape: tuple[int, ...]) -> Form | None:
    left, right = args[:2]
    if right.ndim < 2:
        return None
    return algebra.multiplied(
        e.constant_or_form(left), e.constant_or_form(right), e.exact_value(left), e.exact_value(right)
    )


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "rsub"), _add),
    **dict.fromkeys(_JOIN, _join),
    **dict.fromkeys(("where", "masked_fill"), _where),
    **dict.fromkeys(("mm", "bmm"), _matrix_product),
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "addcmul": _addcmul,
    "copy": _copy,
    "constant_pad_nd": _pad,
    "sum": _sum,
}
