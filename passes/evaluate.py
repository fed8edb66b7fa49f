"""Evaluates a constant slice on the real tensors, three ways at once, without ever writing to them.

Every tensor on the way carries what is known of it (see trace.py): what eager computes in its own low precision, the
exact float64 value, and the algebraic form. Views, writes and subclasses are resolved by functionalization, so that
only functional operations are seen. The activation may stand in as the identity matrix: what a linear function makes
of it is its weight, scales applied after the matmul included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from ..errors import Reason, Refused
from . import deferred
from .algebra import Form
from .constants import Trail
from .deferred import held, settled
from .tape import Tape
from .trace import FP8, Evaluation, Watch, given, known, real

__all__ = ["FP8", "Weight", "evaluate", "identity", "played", "recorded", "undisturbed"]


@dataclass(frozen=True)
class Weight:
    """A weight [n, k] evaluated: in eager's precision, exactly, and as algebra. What is large is deferred.

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
    return recorded(compute, leaves, probe, trail)[0]


def recorded(
    compute: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], probe: Tensor | None = None,
    trail: Trail | None = None,
) -> tuple[list[Weight], Tape[list[Weight]] | None]:  # fmt: skip
    """As `evaluate`, with what does the same for other leaves; None where that may not be what eager does with them."""
    trail = trail or Trail()
    flat, rebuild = _flatten(leaves)
    with undisturbed():
        run = Evaluation(trail)
        large = any(8 * t.nbytes >= deferred.LEAST for t in flat)
        inner = [run.leaf(t, large) for t in flat] + ([] if probe is None else [run.probe(probe)])
        try:
            with Watch(trail), FunctionalTensorMode():
                lifted = [FunctionalTensor.to_functional(t) for t in inner]
                results = list(compute(*rebuild(lifted), *lifted[len(flat) :]))
                results = [_plain(t) for t in results]
        except RuntimeError as error:
            raise Refused(Reason.UNSUPPORTED_OP, f"{trail.node}: {error}"[:200]) from error
        weights = [_weight(run, t) for t in results]
        # Code that read a number may do something else with another; of a library's tensor more counts than what it
        # holds.
        same = large and probe is None and not (run.read or run.origin.lost)
        same = same and not any(is_traceable_wrapper_subclass(t) for t in leaves)
        tape = Tape([real(t) for t in inner], [p for w in weights for p in _pieces(w)], weights.copy) if same else None
        return [_settled(w) for w in weights], tape


def played(tape: Tape[list[Weight]], leaves: Sequence[Tensor]) -> list[Weight]:
    """The weights that a tape makes of other leaves. Raises Refused."""
    with undisturbed():
        return [_settled(w) for w in tape.play([given(t) for t in leaves])]


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


def _weight(run: Evaluation, t: Tensor) -> Weight:
    """What is known of a result."""
    value, native, trail = known(t), real(t), run.trail
    shadow = value.shadow if value.shadow is not None else native.to(torch.float64)
    return Weight(
        native, shadow, run.form(t), value.lowbit, value.roundoff, trail.lost, trail.form, trail.fused
    )  # fmt: skip


def _pieces(weight: Weight) -> list[Tensor]:
    """Every tensor of a weight."""
    form = weight.form
    terms = [p for term in form.terms for p in (term.coef, term.codes, term.levels) if p is not None]
    return [weight.native, weight.shadow, form.offset, *terms]


def _settled(weight: Weight) -> Weight:
    """With plain tensors for what is computed already, or is small."""
    form = weight.form
    terms = [
        replace(term, coef=settled(term.coef), codes=settled(term.codes),
                levels=None if term.levels is None else held(term.levels))
        for term in form.terms
    ]  # fmt: skip
    form = replace(form, terms=tuple(terms), offset=settled(form.offset))
    return replace(weight, native=settled(weight.native), shadow=settled(weight.shadow), form=form)
