"""Evaluates a constant slice on the real tensors, three ways at once, without ever writing to them.

Every tensor on the way carries a `Value`: besides what eager computes in its own low precision, the exact float64
`shadow` and the algebraic `Form`. Views, writes and subclasses are resolved by functionalization, so that only functional
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
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import Reason, Refused
from ..formats import UNIT_ROUNDOFF
from . import algebra, meanings, rules
from .algebra import Form
from .constants import Trail, plain
from .rules import Operation

FP8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)


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


@dataclass(frozen=True)
class Weight:
    """A weight [n, k] evaluated: in eager's precision, exactly, and as algebra.

    lost, near  the node that ended the algebra, and the form that it had before; "" where nothing did
    fused       the operation on a packed weight that it was read from, "" for none
    """

    native: Tensor
    shadow: Tensor
    form: Form
    lowbit: bool
    roundoff: float
    lost: str = ""
    near: str = ""
    fused: str = ""


def evaluate(
    compute: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], probe: Tensor | None = None,
    trail: Trail | None = None,
) -> list[Weight]:  # fmt: skip
    """Runs `compute` on real `leaves`, and on `probe` (see `identity`) if there is one. Raises Refused.

    `trail` is what `compute` notes its way on.
    """
    trail = trail or Trail()
    flat, rebuild = _flatten(leaves)
    with undisturbed():
        run = _Evaluation(trail)
        inner = [run.leaf(t) for t in flat] + ([] if probe is None else [run.probe(probe)])
        try:
            with _Watch(trail), FunctionalTensorMode():
                lifted = [FunctionalTensor.to_functional(t) for t in inner]
                results = list(compute(*rebuild(lifted), *lifted[len(flat) :]))
                results = [_plain(t) for t in results]
        except RuntimeError as error:
            raise Refused(Reason.UNSUPPORTED_OP, f"{trail.node}: {error}"[:200]) from error
        return [run.weight(t) for t in results]


def _plain(t: Tensor) -> Tensor:
    """What a functional tensor holds, after the writes to it."""
    if not isinstance(t, FunctionalTensor):
        return t
    torch._sync(t)
    return torch._from_functional_tensor(t.elem)


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
    return torch.zeros((), dtype=dtype, device=device).expand(k, k)


class _Watch(TorchDispatchMode):
    """Sees every operation, those without an operand too: randomness is not constant."""

    def __init__(self, trail: Trail) -> None:
        super().__init__()
        self.trail = trail

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Refused(Reason.UNSUPPORTED_OP, f"{self.trail.node}: {func}")
        if any(is_traceable_wrapper_subclass(t) for t in tree_leaves((args, kwargs))):
            # Not ours to see through: the subclass turns it into operations that are.
            return NotImplemented
        return func(*args, **(kwargs or {}))


class Traced(Tensor):
    """A tensor with what is known of it. Functionalization stands above: only functional operations come here."""

    held: Tensor
    known: Value
    run: _Evaluation

    @staticmethod
    def __new__(cls, real: Tensor, value: Value, run: _Evaluation) -> Traced:
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=real.device,
        )  # fmt: skip
        made.held, made.known, made.run = real, value, run
        return made

    @classmethod
    def __torch_dispatch__(
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


class _Evaluation:
    """Computes on `Traced` tensors: the real result, and what is known of it."""

    def __init__(self, trail: Trail) -> None:
        self.trail = trail

    def leaf(self, t: Tensor) -> Traced:
        """A tensor of the model."""
        # An alias: what is computed must not be seen on the user's own object.
        t = plain(t).detach()
        low = not t.is_floating_point() or t.dtype in FP8
        return Traced(t, Value(*self._leaf(t), low), self)

    def probe(self, t: Tensor) -> Traced:
        """The identity matrix."""
        return Traced(t, Value(None, None, False, eye=True), self)

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
        value, real = self._value(t), _real(t)
        shadow = value.shadow if value.shadow is not None else real.to(torch.float64)
        return Weight(real, shadow, self.form(t), value.lowbit, value.roundoff, self.trail.lost, self.trail.form,
                      self.trail.fused)  # fmt: skip

    def form(self, x: Any) -> Form:
        """The form of an operand, tensor or number."""
        if not isinstance(x, Tensor):
            return algebra.constant(float(x))
        form = self._value(x).form
        return form if form is not None else algebra.integer(_real(x))

    def exact(self, x: Any) -> Tensor:
        """The float64 value of an operand, tensor or number."""
        return rules.as_float(self._shadow(x)) if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64)

    def _value(self, t: Tensor) -> Value:
        # What was made from nothing, such as an arange, is a plain tensor.
        return t.known if isinstance(t, Traced) else Value(*self._leaf(t), False)

    def real(self, x: Any) -> Any:
        """An operand as eager has it."""
        return _real(x)

    def _shadow(self, x: Any) -> Any:
        shadow = self._value(x).shadow if isinstance(x, Tensor) else None
        return _real(x) if shadow is None else shadow

    def operation(self, op: Operation) -> Any:
        """The result of an operation of which at least one operand is Traced. Raises Refused."""
        if op.func._schema.is_mutable:
            raise Refused(Reason.MUTATED, f"{self.trail.node}: {op.func}")
        if any(self._value(t).eye for t in op.tensors):
            return self._through(op)
        real = Operation(op.func, op.name, *tree_map(_real, (op.args, op.kwargs)))
        out = op.func(*real.args, **real.kwargs)
        meaning = meanings.dequantize(op.func)
        if meaning is not None and isinstance(out, Tensor):
            meant = meaning(*op.args, **op.kwargs)
            if meant.shape == out.shape and meant.dtype == out.dtype:
                # What the operation itself gave is what eager has.
                return Traced(out, self._value(meant), self)
        if isinstance(out, Tensor):
            return self._noted(op, real, [out], False)[0]
        if isinstance(out, (list, tuple)) and all(isinstance(t, Tensor) for t in out):
            return type(out)(self._noted(op, real, list(out), True))
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
        given = {name: _real(value) for name, value in given.items() if name != bias}
        got, native = op.func(**given).to(torch.float64), _real(weight)[:, rows].t().to(torch.float64)
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
            real = op.func(*tree_map(_real, op.args), **op.kwargs)
            if isinstance(real, Tensor) and real.shape == first.shape:
                return self.probe(real)
        if op.name == "mm" and self._value(first).eye and not self._value(op.args[1]).eye:
            return torch.ops.aten.alias.default(op.args[1])
        if op.name == "addmm" and self._value(op.args[1]).eye and not op.kwargs:
            return torch.ops.aten.add.Tensor(op.args[2], first)
        meaning = meanings.fused(op.func._schema.name)
        if meaning is not None and isinstance(first, Traced) and first.known.eye:
            return self._weighed(op, meaning)
        raise Refused(Reason.UNSUPPORTED_OP, str(op.func))

    def _noted(self, op: Operation, real: Operation, outs: list[Tensor], many: bool) -> list[Tensor]:
        """The results of an operation with what is known of them; `many`: it returns a list of them."""
        low = any(self._value(t).lowbit for t in op.tensors)
        # Integers that were stored under a floating dtype.
        low |= op.name == "view_dtype" and not outs[0].is_floating_point()
        coarsest = max((self._value(t).roundoff for t in op.tensors), default=0.0)
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
                form = self._combine(op, real, out, i if many else None, table)
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

        An index makes no value, but codes that pick from far fewer values are codes.
        """
        source = op.tensors[0]
        value, coded = self._value(source), any(self._value(t).lowbit for t in op.tensors[1:])
        table = None
        if value.shadow is not None and (not self.form(source).terms or (coded and not value.lowbit)):
            table = algebra.levels_of(value.shadow)
        fewer = 2 * source.numel() <= out.numel()
        return value.lowbit or (coded and (table is not None or fewer)), table

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
        self, op: Operation, real: Operation, out: Tensor, item: int | None, table: tuple[Tensor, Tensor] | None
    ) -> Form | None:
        """The form of one result, or None where it is not understood."""
        shape = tuple(out.shape)
        if op.name == "view_dtype" or (out.dtype in FP8 and op.name not in rules.LAYOUT):
            form = self._leaf(out)[1]
            return form if form is None or form.terms else None
        if op.name in rules.GATHER and table is not None:
            return algebra.lookup(table[0], op.func(table[1], *real.args[1:], **real.kwargs).to(torch.uint8))
        if op.name in rules.ROUNDING:
            return rules.rounded(out)
        if op.name in rules.LAYOUT | rules.GATHER:
            return self._moved(op, real, shape, item)
        rule = rules.RULES.get(op.name)
        return rule(self, op, shape) if rule else None

    def _moved(self, op: Operation, real: Operation, shape: tuple[int, ...], item: int | None) -> Form | None:
        form = self.form(op.args[0])
        if op.name in rules.SAME:
            return form

        def move(piece: Tensor) -> Tensor:
            if op.name in rules.RESHAPE:
                return piece.reshape(shape)
            result = op.func(piece, *real.args[1:], **real.kwargs)
            return result if item is None else result[item]

        return algebra.moved(form, shape, move) if form.terms else None


def _real(x: Any) -> Any:
    return x.held if isinstance(x, Traced) else x
