"""The operations around each matmul, in the user's graph and in the lowered one, and where recognition stopped.

Made only for a report: nothing that is compiled depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import Reason, Refused
from ..kernels.layout import LAYOUTS
from ..types import Decision, Step
from . import advice
from .canonicalize import contraction, qualified_name
from .constants import Constants, fake_value, storage_of, target_name, written
from .lower import Lowered
from .pipeline import Outcome
from .plan import Plan
from .recognise import ACTIVATION, LOW_BIT, Kept, Match, is_ours
from .whereabouts import where

MOST = 48
BEYOND = 3
LONGEST = 160
ARITHMETIC = re.compile(r"^(i?add|i?sub|rsub|i?mul|i?(true)?div|truediv|addcmul|addcdiv|lerp|normalize)")
WRITE = re.compile(r"^(setitem|where|index_(put|copy|fill|add)|scatter|masked_(fill|scatter)|copy_)")
# What only moves or renames a tensor does not stop anything.
_QUIET = {"placeholder", "get_attr", "output"}


def described(outcome: Outcome) -> list[Decision]:
    """The decisions of an outcome, each with the steps before and after, and the advice that fits where it stopped."""
    constants = outcome.constants
    if constants is None:
        return outcome.decisions
    plans = {m.anchor: (i, plan) for i, plan in enumerate(outcome.plans) for m in plan.bundle.matches}
    out = []
    for item, decision in zip(outcome.found, outcome.decisions, strict=True):
        if isinstance(item, Match):
            place, plan = plans.get(item.anchor, (0, None))
            nodes = _around(constants, item.anchor, item.output, item.x)
            stop = None if plan else item.anchor
            before = _steps(nodes, constants, item.anchor, stop)
            if plan and outcome.lowered:
                gone = _gone(nodes, item, outcome.lowered)
                before = tuple(replace(s, gone=n in gone) for n, s in zip(nodes, before, strict=True))
                decision = replace(decision, after=_after(outcome.lowered, place, plan))
            out.append(replace(decision, before=before))
        else:
            out.append(_kept(item, decision, constants))
    return out


def _kept(item: Kept, decision: Decision, constants: Constants) -> Decision:
    if item.reason is Reason.HIGHER_ORDER:
        return replace(decision, before=_steps([item.node], constants, item.node, item.node))
    nodes = _around(constants, item.node, item.node, None)
    stop = _stop(item, nodes, constants)
    # At the matmul itself nothing is wrong with an operation before it.
    op = _op(stop) if stop is not item.node or item.reason is Reason.UNSUPPORTED_SPELLING else ""
    found = _special(item, stop, nodes, constants) or advice.advise(item.reason, op)
    return replace(decision, before=_steps(nodes, constants, item.node, stop), advice=found)


def _around(constants: Constants, anchor: fx.Node, output: fx.Node, x: fx.Node | None) -> list[fx.Node]:
    """The matmul, what its weight is computed from, the nearest first if that is much, and who reads the result."""
    expand = {output, anchor}
    reach: dict[fx.Node, int] = {}
    node = output
    while node is not anchor:
        node = next((n for n in node.all_input_nodes if n not in constants), anchor)
        expand.add(node)
    operands = _operands(anchor)
    dynamic = [n for n in operands if n is not x and _dequantized(n, constants)]
    if not any(n in constants for n in operands):
        for operand in dynamic:
            expand |= _made_of_codes(constants.computed_from(operand, _activation), constants)
    found, queue = {output: None}, [output]
    while queue and len(found) < MOST:
        node = queue.pop(0)
        # Of an activation only the nearest operations are shown.
        reach[node] = BEYOND if node in expand or node in constants else reach.get(node, 0)
        if (
            reach[node] > 0
            and node not in constants.values
            and (node in expand or node in constants or not _activation(node))
        ):
            for source in (*node.all_input_nodes, *constants.writers(node)):
                if source not in found and len(found) < MOST:
                    found[source] = None
                    reach[source] = 0 if node is anchor or node is output else reach[node] - 1
                    queue.append(source)
    found |= {w: None for n in list(found) if constants.mutated(n) for w in constants.writers(n)}
    readers = [n for n in output.users if n.op != "output"][:3]
    order = constants.order
    return sorted({*found, *readers}, key=lambda n: order.get(n, len(order)))


def _made_of_codes(nodes: Sequence[fx.Node], constants: Constants) -> set[fx.Node]:
    """Those of `nodes` that low-bit data goes into."""
    found: set[fx.Node] = set()
    for node in sorted(nodes, key=constants.order.__getitem__):
        leaf = node.op in ("placeholder", "get_attr")
        if (leaf and (_low(node) or constants.mutated(node))) or (
            not _activation(node) and any(i in found for i in (*node.all_input_nodes, *constants.writers(node)))
        ):
            found.add(node)
    return found


def _operands(anchor: fx.Node) -> list[fx.Node]:
    try:
        c = contraction(anchor)
    except Refused:
        c = None
    return [c.a, c.b] if c is not None else list(anchor.all_input_nodes)


def _activation(node: fx.Node) -> bool:
    return ACTIVATION.search(str(node.target)) is not None


def _dequantized(operand: fx.Node, constants: Constants) -> bool:
    """Whether low-bit data, constant or not, goes into an operand."""
    for node in constants.computed_from(operand, _activation):
        t = fake_value(node)
        if node.op in ("placeholder", "get_attr") and isinstance(t, Tensor) and t.dtype in LOW_BIT:
            return True
        if constants.mutated(node):
            return True
    return False


def _stop(item: Kept, nodes: Sequence[fx.Node], constants: Constants) -> fx.Node:
    """The operation at which recognition stopped; the matmul where it is the matmul itself."""
    reason, anchor = item.reason, item.node
    before = nodes[: nodes.index(anchor)]
    named = {n.name: n for n in before}
    at = item.near_misses[0].at.split(":")[0] if item.near_misses else ""
    if reason is Reason.MUTATED:
        tainted = {storage_of(n) for n in before if constants.mutated(n)}
        writes = (n for n in nodes if any(storage_of(t) in tainted for t in written(n)))
        return next(writes, named.get(at, anchor))
    if reason is Reason.SCALE_FROM_INPUT:
        mixed = (n for n in before if n not in constants and any(i in constants for i in n.all_input_nodes))
        return next((n for n in mixed if not _activation(n)), named.get(at, anchor))
    if reason is Reason.NEEDS_GRAD:
        trained = (n for n in before if n in constants.values and constants.values[n].requires_grad)
        return next(trained, anchor)
    sums = [n for n in before if n in constants and (ARITHMETIC.match(_op(n)) or WRITE.match(_op(n)))]
    if reason is Reason.GROUPS:
        return _uneven(sums, constants) or anchor
    if reason is Reason.NON_FINITE:
        bad = (n for n in before if n in constants.values and not _finite(constants.values[n]))
        return next(bad, sums[-1] if sums else anchor)
    if reason is Reason.EAGER_DIFFERS:
        coarse = (n for n in before if n in constants and _halved(n) and n.op not in _QUIET)
        return next(coarse, anchor)
    if at in named:
        return named[at]
    if reason is Reason.TOO_MANY_LEVELS:
        if "two code" in at and sums:
            return sums[-1]
        return next((n for n in before if n in constants.values and _low(n)), anchor)
    return anchor


def _uneven(sums: Sequence[fx.Node], constants: Constants) -> fx.Node | None:
    """The last sum or product with an operand whose numbers do not come in groups: as many as the weight itself has.

    Or the last write of what is not dequantized.
    """
    for node in reversed(sums):
        floats = [i for i in node.all_input_nodes if _floating(i) and not _dequantized(i, constants)]
        if WRITE.match(_op(node)):
            # The value may be a plain number.
            if floats or "fill" in _op(node):
                return node
            continue
        if _op(node) == "normalize":
            return node
        size = fake_value(node).numel()
        if any(fake_value(i).numel() in (size, fake_value(node).shape[-1]) for i in floats):
            return node
    return next((n for n in reversed(sums) if "mul" in _op(n) or "div" in _op(n)), sums[-1] if sums else None)


def _special(item: Kept, stop: fx.Node, nodes: Sequence[fx.Node], constants: Constants) -> str:
    """Advice that takes a look at the values."""
    before = nodes[: nodes.index(item.node)]
    leaves = [(n, constants.values[n]) for n in before if n in constants.values]
    if item.reason is Reason.TOO_MANY_LEVELS and not any(item.near_misses and m.at in {n.name for n in nodes}
                                                         for m in item.near_misses):  # fmt: skip
        wide = (t for _, t in leaves if t.dtype in (torch.int16, torch.int32, torch.int64) and t.numel())
        return next((advice.WIDE_CODES for t in wide if int(t.max()) - int(t.min()) > 255), "")
    coded = sum(_dequantized(i, constants) for i in stop.all_input_nodes)
    if item.reason is Reason.GROUPS and "mul" in _op(stop) and coded > 1:
        return advice.FOLD
    if item.reason is Reason.NOT_QUANTIZED:
        for _, t in leaves:
            if not t.is_floating_point() or t.ndim < 2 or t.numel() == 0 or type(t) not in (Tensor, torch.nn.Parameter):
                continue
            row = t.detach()[(0,) * (t.ndim - 1)][:128].float()
            levels = row.unique().numel()
            if row.numel() >= 16 and levels <= 16 and levels > 1:
                whole = bool((row == row.round()).all())
                return advice.FLOAT_CODES if whole else advice.DENSE_LEVELS
    return ""


def _finite(t: Tensor) -> bool:
    return not t.is_floating_point() or bool(torch.isfinite(t.detach().float()).all())


def _floating(node: fx.Node) -> bool:
    t = fake_value(node)
    return isinstance(t, Tensor) and t.is_floating_point()


def _halved(node: fx.Node) -> bool:
    t = fake_value(node)
    return isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16)


def _low(node: fx.Node) -> bool:
    t = fake_value(node)
    return isinstance(t, Tensor) and t.dtype in LOW_BIT


def _op(node: fx.Node) -> str:
    return target_name(node) if node.op not in _QUIET else ""


def _steps(
    nodes: Sequence[fx.Node], constants: Constants, anchor: fx.Node, stop: fx.Node | None, understood: bool = True
) -> tuple[Step, ...]:
    place = {node: i for i, node in enumerate(nodes)}
    past = set() if stop is None else {n for n in _descendants(stop, nodes) if n in place}
    out = []
    for node in nodes:
        role = _role(node, constants, anchor)
        state = "stopped" if node is stop else "understood" if role != "input" and node not in past else ""
        inputs = tuple(place[i] for i in node.all_input_nodes if i in place)
        if role == "activation" and node not in past and anchor in node.all_input_nodes:
            state = ""
        out.append(_step(node, place, inputs, role, state))
    return tuple(out)


def _descendants(node: fx.Node, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found = {node}
    for other in nodes:
        if any(i in found for i in other.all_input_nodes):
            found.add(other)
    return found


def _role(node: fx.Node, constants: Constants, anchor: fx.Node) -> str:
    if node is anchor:
        return "matmul"
    if node in constants.values:
        return "weight"
    if node in constants:
        return "constant"
    return "input" if node.op in ("placeholder", "get_attr") else "activation"


def _step(
    node: fx.Node, place: dict[fx.Node, int], inputs: tuple[int, ...], role: str, state: str, text: str = ""
) -> Step:
    w = where(node)
    source = f"{w.file}:{w.line}" if w.file and node.op not in ("placeholder", "get_attr") else ""
    return Step(
        cut(text or _text(node, place)), cut(_value(fake_value(node))), inputs, role, state,
        source[-LONGEST:], cut(w.code) if source else "",
    )  # fmt: skip


class _Ref:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _text(node: fx.Node, place: dict[fx.Node, int]) -> str:
    if node.op in ("placeholder", "get_attr"):
        return label(node)

    def reference(n: fx.Node) -> Any:
        return _Ref(f"%{place[n]}" if n in place else "_")

    shown: Any = fx.node.map_arg((node.args, dict(node.kwargs)), reference)
    args, kwargs = shown
    name = target_name(node) or str(node.target)
    return f"{name}({', '.join([*map(repr, args), *(f'{k}={v!r}' for k, v in kwargs.items())])})"


def label(node: fx.Node) -> str:
    """A leaf by the last part of its name: "scale" of "L['self']._modules['3']._buffers['scale']"."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "") if source is not None else ""
    name = name() if callable(name) else name
    found = re.findall(r"\['((?:[^'\\]|\\.)*)'\]|\.(\w+)", str(name))
    return next((a or b for a, b in reversed(found)), "") or node.name


def _value(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(map(str, value.shape))}]"


def cut(text: str) -> str:
    """Text of a length that a page can hold."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _after(lowered: Lowered, place: int, plan: Plan) -> tuple[Step, ...]:
    """What stands there now: packed tensors, the new operations, and who reads their result."""
    results, emitted = lowered.emitted[place]
    names: dict[int, str] = {}
    placeholders = [n for n in lowered.module.graph.nodes if n.op == "placeholder"]
    for packed in plan.packed:
        kind = packed.parts[0].device.type
        shown = [name for layout in packed.layouts for name in LAYOUTS[layout].names(packed.format, kind)]
        parts = [*zip(packed.parts, shown, strict=True), (packed.perm, "perm")]
        names |= {id(t): f"packed {name}" for t, name in parts if t is not None}
    names |= {id(plan.bias): "packed bias"}
    packed_of = {n: names.get(id(t)) for n, t in zip(placeholders, lowered.packed, strict=False)}
    inside = set(emitted)
    inputs = [i for n in emitted for i in n.all_input_nodes if i not in inside]
    readers = [n for result in results for n in result.users if n.op != "output"][:3]
    wanted = {*inputs, *emitted, *readers}
    nodes = [n for n in lowered.module.graph.nodes if n in wanted][:MOST]
    at = {node: i for i, node in enumerate(nodes)}
    out = []
    for node in nodes:
        name = packed_of.get(node)
        role = "packed" if name else "input" if node in inputs else _made_by(node, node in inside)
        text = name or ("x" if node in inputs and node.op != "placeholder" else "")
        found = tuple(at[i] for i in node.all_input_nodes if i in at) if node not in inputs else ()
        out.append(_step(node, at, found, role, "understood" if name or node in inside else "", text))
    return tuple(out)


def _gone(nodes: Sequence[fx.Node], match: Match, lowered: Lowered) -> set[fx.Node]:
    """Those of `nodes` that the lowered graph does without."""
    alive = set(lowered.module.graph.nodes)
    return {n for n in nodes if n in (match.anchor, match.output) or lowered.stands_for.get(n) not in alive}


def _made_by(node: fx.Node, emitted: bool) -> str:
    """The role of a new node: our own op multiplies by a packed weight, or makes the dense one for torch's to do so."""
    if qualified_name(node) == "lq::dequantize":
        return "constant"
    return "matmul" if is_ours(node) or (emitted and target_name(node) in ("matmul", "mv")) else "activation"
