"""Tensors with what is known of them: beside eager's own value the exact float64 `shadow` and the algebraic `Form`.

Every operation on a `Traced` tensor computes the real result, and what is known of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ..errors import Reason, Refused
from ..formats import UNIT_ROUNDOFF
from . import algebra, meanings, rules
from .algebra import Form
from .constants import Trail, plain
from .deferred import Origin, defer
from .rules import Operation

FP8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)


# Values that one code picks at most, as in vector quantization.
WIDEST = 16
# Rows of the identity by which the meaning of a fused operation is checked.
ROWS = 16


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


class Watch(TorchDispatchMode):
    """Sees every operation, those without an operand too: randomness is not constant."""

    def __init__(self, trail: Trail) -> None:
        super().__init__()
        self.trail = trail

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refused(Reason.UNSUPPORTED_OP, f"{self.trail.node}: {func}")
        if any(is_traceable_wrapper_subclass(t) for t in Operation.of(func, args, kwargs or {}).tensors):
            # Not ours to see through: the subclass turns it into operations that are.
            return NotImplemented
        return func(*args, **(kwargs or {}))


class Traced(Tensor):
    """A tensor with what is known of it. Functionalization stands above: only functional operations come here."""

    held: Tensor
    known: Value
    run: Evaluation

    @staticmethod
    def __new__(cls, held: Tensor, value: Value, run: Evaluation) -> Traced:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=held.device,
        )  # fmt: skip
        made.held, made.known, made.run = held, value, run
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        op = Operation.of(func, args, kwargs or {})
        if any(is_traceable_wrapper_subclass(t) for t in op.tensors):
            return NotImplemented
        # Inside a meaning nothing has taken compositions apart yet.
        simpler = func.decompose(*args, **(kwargs or {}))
        if simpler is not NotImplemented:
            return simpler
        run = next(t.run for t in op.tensors if isinstance(t, Traced))
        return run.operation(op)


class Evaluation:
    """Computes on `Traced` tensors: the real result, and what is known of it.

    `read` tells whether the traced code asked for a number that was computed.
    """

    def __init__(self, trail: Trail) -> None:
        self.trail, self.origin, self.read = trail, Origin(), False

    def leaf(self, t: Tensor, large: bool = False) -> Traced:
        """A tensor of the model; `large`: what is made of it is to be deferred."""
        t = defer(given(t), self.origin) if large else given(t)
        low = not t.is_floating_point() or t.dtype in FP8
        return Traced(t, Value(*leaf_facts(t), low), self)

    def probe(self, t: Tensor) -> Traced:
        """The identity matrix."""
        return Traced(t, Value(None, None, False, eye=True), self)

    def form(self, x: Any) -> Form:
        """The form of an operand, tensor or number."""
        if not isinstance(x, Tensor):
            return algebra.constant(float(x))
        form = known(x).form
        return form if form is not None else algebra.integer(real(x))

    def exact(self, x: Any) -> Tensor:
        """The float64 value of an operand, tensor or number."""
        return rules.as_float(self._shadow(x)) if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)

    def real(self, x: Any) -> Any:
        """An operand as eager has it."""
        return real(x)

    def _shadow(self, x: Any) -> Any:
        shadow = known(x).shadow if isinstance(x, Tensor) else None
        return real(x) if shadow is None else shadow

    def operation(self, op: Operation) -> Any:
        """The result of an operation of which at least one operand is Traced. Raises Refused."""
        if op.func._schema.is_mutable:
            raise Refused(Reason.MUTATED, f"{self.trail.node}: {op.func}")
        if any(known(t).eye for t in op.tensors):
            return self._through(op)
        concrete = Operation(op.func, op.name, *op.map(real))
        out = op.func(*concrete.args, **concrete.kwargs)
        meaning = meanings.dequantize(op.func)
        if meaning is not None and isinstance(out, Tensor):
            meant = meaning(*op.args, **op.kwargs)
            if meant.shape == out.shape and meant.dtype == out.dtype:
                # What the operation itself gave is what eager has.
                return Traced(out, known(meant), self)
        if isinstance(out, Tensor):
            return self._noted(op, concrete, [out], False)[0]
        if isinstance(out, (list, tuple)) and all(isinstance(t, Tensor) for t in out):
            return type(out)(self._noted(op, concrete, list(out), True))
        self.read = True
        return out

    def _weighed(self, op: Operation, meaning: meanings.Meaning) -> Tensor:
        """The weight of a fused operation, transposed; checked against what that makes of rows of the identity."""
        weight = meaning(*op.args, **op.kwargs)
        k = weight.shape[1]
        rows = torch.arange(0, k, max(1, k // ROWS), device=weight.device)
        x = torch.zeros((rows.numel(), k), dtype=op.args[0].dtype, device=weight.device)
        x[torch.arange(rows.numel()), rows] = 1
        bias = (meanings.operands(op.func._schema.name) or ("", "", ""))[2]
        names = [a.name for a in op.func._schema.arguments]
        given = {**dict(zip(names, op.args, strict=False)), **op.kwargs, names[0]: x}
        given = {name: real(value) for name, value in given.items() if name != bias}
        got, native = op.func(**given).to(torch.float64), real(weight)[:, rows].t().to(torch.float64)
        # The operation computes in the coarsest dtype of what it takes.
        coarsest = max(UNIT_ROUNDOFF.get(t.dtype, 0.0) for t in (x, *op.tensors))
        allowed = 12 * coarsest * native.abs().amax(1, keepdim=True) + 2.0**-24
        if got.shape != native.shape or not bool(((got - native).abs() <= allowed).all()):
            raise Refused(Reason.PROOF_FAILED, f"{self.trail.node}: {op.name} means something else")
        self.trail.fused = op.func._schema.name
        return torch.ops.aten.t.default(weight)

    def _through(self, op: Operation) -> Tensor:
        """What an operation makes of the identity matrix that stands for the activation."""
        first = op.args[0]
        if op.name in rules.LAYOUT and isinstance(first, Tensor):
            moved = op.func(*op.map(real)[0], **op.kwargs)
            if isinstance(moved, Tensor) and moved.shape == first.shape:
                return self.probe(moved)
        if op.name == "mm" and known(first).eye and not known(op.args[1]).eye:
            return torch.ops.aten.alias.default(op.args[1])
        if op.name == "addmm" and known(op.args[1]).eye and not op.kwargs:
            return torch.ops.aten.add.Tensor(op.args[2], first)
        meaning = meanings.fused(op.func._schema.name)
        if meaning is not None and isinstance(first, Traced) and first.known.eye:
            return self._weighed(op, meaning)
        raise Refused(Reason.UNSUPPORTED_OP, str(op.func))

    def _noted(self, op: Operation, concrete: Operation, outs: list[Tensor], many: bool) -> list[Tensor]:
        """The results of an operation with what is known of them; `many`: it returns a list of them."""
        low = any(known(t).lowbit for t in op.tensors)
        # Integers that were stored under a floating dtype, and floats that are rounded to codes in forward.
        low |= op.name == "round" or (op.name == "view_dtype" and not outs[0].is_floating_point())
        coarsest = max((known(t).roundoff for t in op.tensors), default=0.0)
        moves = op.name not in ("_to_copy", "to") and op.name in rules.LAYOUT | rules.GATHER | rules.JOIN
        table = None
        if op.name in rules.GATHER:
            low, table = self._gathered(op, outs[0])
        shadows: list[Tensor | None] = [None] * len(outs)
        if any(o.is_floating_point() for o in outs):
            shadows = self._shadows(op, outs, many)
        noted: list[Tensor] = []
        for i, (out, shadow) in enumerate(zip(outs, shadows, strict=True)):
            form = None
            if shadow is not None:
                form = self._combine(op, concrete, out, i if many else None, table)
                if form is None or len(form.terms) > algebra.MAX_TERMS:
                    form = algebra.levelled(shadow) if low and self._makes(op) else None
                if form is None:
                    form = algebra.constant(shadow)
                    self._lose(op)
            own = 0.0 if moves else UNIT_ROUNDOFF.get(out.dtype, 0.0)
            noted.append(Traced(out, Value(shadow, form, low, max(coarsest, own)), self))
        return noted

    def _makes(self, op: Operation) -> bool:
        """Whether an operation makes values that were not there before; those of its operands are known already."""
        return op.name not in rules.LAYOUT | rules.JOIN or any(self.form(t).terms for t in op.tensors)

    def _lose(self, op: Operation) -> None:
        """Notes where the algebra ends, for whoever asks why."""
        terms = [term for t in op.tensors for term in self.form(t).terms]
        if terms and not self.trail.lost:
            self.trail.lost = self.trail.node
            self.trail.form = "table" if any(term.levels is not None for term in terms) else "affine"

    def _gathered(self, op: Operation, out: Tensor) -> tuple[bool, tuple[Tensor, Tensor] | None]:
        """Whether a gather yields low-bit data, and its source as a table if it is one.

        An index makes no value, but codes that pick from far fewer values are codes; what picks whole rows is not.
        """
        source = op.tensors[0]
        value, coded = known(source), any(known(t).lowbit and out.numel() <= WIDEST * t.numel() for t in op.tensors[1:])
        table = None
        if value.shadow is not None and (not self.form(source).terms or (coded and not value.lowbit)):
            table = algebra.levels_of(value.shadow)
        fewer = 2 * source.numel() <= out.numel()
        return value.lowbit or (coded and (table is not None or fewer)), table

    def _shadows(self, op: Operation, outs: list[Tensor], many: bool) -> list[Tensor | None]:
        """The exact float64 results, by the same operation on the exact operands where it is smooth."""
        if op.name not in rules.SMOOTH or any(o.dtype in FP8 for o in outs):
            return [o.to(torch.float64) if o.is_floating_point() else None for o in outs]
        args, kwargs = op.map(self._shadow)
        if op.name in rules.ARITHMETIC:
            args = tuple(rules.as_float(x) for x in args)
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
        self, op: Operation, concrete: Operation, out: Tensor, item: int | None, table: tuple[Tensor, Tensor] | None
    ) -> Form | None:
        """The form of one result, or None where it is not understood."""
        shape = tuple(out.shape)
        if op.name == "view_dtype" or (out.dtype in FP8 and op.name not in rules.LAYOUT):
            form = leaf_facts(out)[1]
            return form if form is None or form.terms else None
        if op.name in rules.GATHER and table is not None:
            return algebra.lookup(table[0], op.func(table[1], *concrete.args[1:], **concrete.kwargs).to(torch.uint8))
        if op.name in rules.ROUNDING:
            return rules.rounded(out)
        if op.name in rules.LAYOUT | rules.GATHER:
            return self._moved(op, concrete, shape, item)
        rule = rules.RULES.get(op.name)
        return rule(self, op, shape) if rule else None

    def _moved(self, op: Operation, concrete: Operation, shape: tuple[int, ...], item: int | None) -> Form | None:
        form = self.form(op.args[0])
        if op.name in rules.SAME:
            return form

        def move(piece: Tensor) -> Tensor:
            if op.name in rules.RESHAPE:
                return piece.reshape(shape)
            result = op.func(piece, *concrete.args[1:], **concrete.kwargs)
            return result if item is None else result[item]

        return algebra.moved(form, shape, move) if form.terms else None


def given(t: Tensor) -> Tensor:
    """A tensor of the model as an alias: what is computed must not be seen on the user's own object."""
    return plain(t).detach()


def real(x: Any) -> Any:
    """An operand as eager has it."""
    return x.held if isinstance(x, Traced) else x


def known(t: Tensor) -> Value:
    """What is known of a tensor. What was made from nothing, such as an arange, is a plain one."""
    return t.known if isinstance(t, Traced) else Value(*leaf_facts(t), False)


def leaf_facts(t: Tensor) -> tuple[Tensor | None, Form | None]:
    """The shadow and the form of a tensor that is given; None for integers, which are what they are."""
    if not t.is_floating_point():
        return None, None
    # Of what is expanded, one copy.
    once = t[tuple(slice(0, 1) if step == 0 else slice(None) for step in t.stride())]
    shadow = once.to(torch.float64).expand(t.shape)
    if t.dtype in FP8 and t.dtype != torch.float8_e8m0fnu:
        every = torch.arange(256, dtype=torch.uint8, device=t.device).view(t.dtype).to(torch.float64)
        # Codes for NaN are legal where no weight uses them; the final check refuses a weight that does.
        return shadow, algebra.lookup(every.nan_to_num(0.0, 0.0, 0.0), t.view(torch.uint8))
    return shadow, algebra.constant(shadow)
