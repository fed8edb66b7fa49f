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
from torch.utils._pytree import tree_map

from ..errors import Reason, Refused
from ..formats import UNIT_ROUNDOFF
from . import algebra, rules
from .algebra import Form
from .constants import Trail
from .rules import Operation

FP8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)


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
    """A weight [n, k] evaluated: in eager's precision, exactly, and as algebra.

    lost, near  the node that ended the algebra, and the form that it had before; "" where nothing did
    """

    native: Tensor
    shadow: Tensor
    form: Form
    lowbit: bool
    roundoff: float
    lost: str = ""
    near: str = ""


def evaluate(
    compute: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], probe: Tensor | None = None,
    trail: Trail | None = None,
) -> list[Weight]:  # fmt: skip
    """Runs `compute` on real `leaves`, and on `probe` (see `identity`) if there is one. Raises Refused.

    `trail` is what `compute` notes its way on.
    """
    flat, rebuild = _flatten(leaves)
    # Aliases: what we note on a tensor must not be seen on the user's own object.
    flat = [t.detach() for t in flat]
    mode, extra = _Evaluation(flat, trail or Trail()), [] if probe is None else [probe]

    def functional(*inner: Tensor) -> list[Tensor]:
        return list(compute(*rebuild(inner), *inner[len(flat) :]))

    with undisturbed(), mode:
        try:
            results = torch.func.functionalize(functional, remove="mutations")(*flat, *extra)
        except RuntimeError as error:
            raise Refused(Reason.UNSUPPORTED_OP, f"{mode.trail.node}: {error}"[:200]) from error
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
    def __init__(self, leaves: Sequence[Tensor], trail: Trail) -> None:
        super().__init__()
        self.trail = trail
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
        """What is known of a result."""
        value = self._value(t)
        shadow = value.shadow if value.shadow is not None else t.to(torch.float64)
        return Weight(t, shadow, self.form(t), value.lowbit, value.roundoff, self.trail.lost, self.trail.form)

    def form(self, x: Any) -> Form:
        """The form of an operand, tensor or number."""
        if not isinstance(x, Tensor):
            return algebra.constant(float(x))
        form = self._value(x).form
        return form if form is not None else algebra.integer(x)

    def exact(self, x: Any) -> Tensor:
        """The float64 value of an operand, tensor or number."""
        return rules.as_float(self._shadow(x)) if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)

    def _value(self, t: Tensor) -> Value:
        value = getattr(t, "_lq_value", None)
        if value is None:
            value = t._lq_value = Value(*self._leaf(t), False)
        return value

    def _shadow(self, x: Any) -> Any:
        shadow = self._value(x).shadow if isinstance(x, Tensor) else None
        return x if shadow is None else shadow

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op = Operation.of(func, args, kwargs or {})
        if any(is_traceable_wrapper_subclass(t) for t in op.tensors):
            return NotImplemented
        if func._schema.is_mutable:
            raise Refused(Reason.MUTATED, f"{self.trail.node}: {func}")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refused(Reason.UNSUPPORTED_OP, f"{self.trail.node}: {func}")
        if any(self._value(t).eye for t in op.tensors):
            return self._through(op)
        out = func(*op.args, **op.kwargs)
        if isinstance(out, Tensor):
            # An operation that returns its own argument must not overwrite what is known of it.
            out = out.view_as(out) if any(out is t for t in op.tensors) else out
            self._note(op, [out], False)
        elif isinstance(out, (list, tuple)) and all(isinstance(t, Tensor) for t in out):
            self._note(op, list(out), True)
        return out

    def _through(self, op: Operation) -> Tensor:
        """What an operation makes of the identity matrix that stands for the activation."""
        first = op.args[0]
        if op.name in rules.LAYOUT and isinstance(first, Tensor):
            out = op.func(*op.args, **op.kwargs)
            if isinstance(out, Tensor) and out.shape == first.shape:
                out._lq_value = Value(None, None, False, eye=True)
                return out
        if op.name == "mm" and self._value(first).eye and not self._value(op.args[1]).eye:
            return self.__torch_dispatch__(torch.ops.aten.alias.default, (), (op.args[1],))
        if op.name == "addmm" and self._value(op.args[1]).eye and not op.kwargs:
            return self.__torch_dispatch__(torch.ops.aten.add.Tensor, (), (op.args[2], first))
        raise Refused(Reason.UNSUPPORTED_OP, str(op.func))

    def _note(self, op: Operation, outs: list[Tensor], many: bool) -> None:
        """Notes what is known of the results of an operation; `many`: it returns a list of them."""
        low = any(self._value(t).lowbit for t in op.tensors)
        coarsest = max((self._value(t).roundoff for t in op.tensors), default=0.0)
        moves = op.name not in ("_to_copy", "to") and op.name in rules.LAYOUT | rules.GATHER | rules.JOIN
        table = None
        if op.name in rules.GATHER:
            low, table = self._gathered(op)
        shadows: list[Tensor | None] = [None] * len(outs)
        if any(o.is_floating_point() for o in outs):
            shadows = self._shadows(op, outs, many)
        for i, (out, shadow) in enumerate(zip(outs, shadows, strict=True)):
            form = None
            if shadow is not None:
                form = self._combine(op, out, i if many else None, table)
                if form is None or len(form.terms) > algebra.MAX_TERMS:
                    form = algebra.constant(shadow)
                    self._lose(op)
            own = 0.0 if moves else UNIT_ROUNDOFF.get(out.dtype, 0.0)
            out._lq_value = Value(shadow, form, low, max(coarsest, own))

    def _lose(self, op: Operation) -> None:
        """Notes where the algebra ends, for whoever asks why."""
        terms = [term for t in op.tensors for term in self.form(t).terms]
        if terms and not self.trail.lost:
            self.trail.lost = self.trail.node
            self.trail.form = "table" if any(term.levels is not None for term in terms) else "affine"

    def _gathered(self, op: Operation) -> tuple[bool, tuple[Tensor, Tensor] | None]:
        """Whether a gather yields low-bit data, and its source as a table if it is one. An index makes no value."""
        source, *rest = op.tensors
        value = self._value(source)
        table = None
        if value.shadow is not None and not self.form(source).terms:
            table = algebra.levels_of(value.shadow)
        return value.lowbit or (table is not None and any(self._value(t).lowbit for t in rest)), table

    def _shadows(self, op: Operation, outs: list[Tensor], many: bool) -> list[Tensor | None]:
        """The exact float64 results, by the same operation on the exact operands where it is smooth."""
        if op.name not in rules.SMOOTH or any(o.dtype in FP8 for o in outs):
            return [o.to(torch.float64) if o.is_floating_point() else None for o in outs]
        args, kwargs = tree_map(self._shadow, (op.args, op.kwargs))
        if op.name in rules.ARITHMETIC:
            args = tree_map(rules.as_float, args)
        if op.name in ("copy", "_to_copy"):
            return [rules.as_float(args[1 if op.name == "copy" else 0]).expand(outs[0].shape)]
        if op.name in rules.RESHAPE:
            return [args[0].reshape(outs[0].shape)]
        if isinstance(kwargs.get("dtype"), torch.dtype):
            kwargs["dtype"] = torch.float64
        exact = op.func(*args, **kwargs)
        found = list(exact) if many else [exact]
        return [s.to(torch.float64) if o.is_floating_point() else None for s, o in zip(found, outs, strict=True)]

    def _combine(
        self, op: Operation, out: Tensor, item: int | None, table: tuple[Tensor, Tensor] | None
    ) -> Form | None:
        """The form of one result, or None where it is not understood."""
        shape = tuple(out.shape)
        if op.name == "view_dtype" or (out.dtype in FP8 and op.name not in rules.LAYOUT):
            return self._leaf(out)[1]
        if op.name in rules.GATHER and table is not None:
            return algebra.lookup(table[0], op.func(table[1], *op.args[1:], **op.kwargs).to(torch.uint8))
        if op.name in rules.ROUNDING:
            return rules.rounded(out)
        if op.name in rules.LAYOUT | rules.GATHER:
            return self._moved(op, shape, item)
        rule = rules.RULES.get(op.name)
        return rule(self, op, shape) if rule else None

    def _moved(self, op: Operation, shape: tuple[int, ...], item: int | None) -> Form | None:
        form = self.form(op.args[0])
        if op.name in rules.SAME:
            return form

        def move(piece: Tensor) -> Tensor:
            if op.name in rules.RESHAPE:
                return piece.reshape(shape)
            result = op.func(piece, *op.args[1:], **op.kwargs)
            return result if item is None else result[item]

        return algebra.moved(form, shape, move) if form.terms else None
