"""Checks a lowered graph before it is handed on: well-formed, the same outputs, and each new structure wired right."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import LqError
from ..formats import dequantize, rows
from .constants import Constants, fake_value, plain
from .deferred import spans
from .evaluate import undisturbed
from .lower import Lowered
from .merge import bias_of
from .plan import Plan
from .recognise import Match

ROWS = 2


class Broken(LqError):
    """One lowered matmul is not what it must be: our bug. The user's own matmul is used."""

    def __init__(self, plan: Plan, what: str) -> None:
        super().__init__(f"{plan.match.where.path}: {what}")
        self.plan = plan


def verify(module: fx.GraphModule, constants: Constants, plans: Sequence[Plan], lowered: Lowered) -> None:
    """Raises Broken unless each new node stands for its old one; one numeric probe for each distinct structure."""
    probed = set()
    for plan, (results, nodes) in zip(plans, lowered.emitted, strict=True):
        for output, result in zip(plan.bundle.outputs, results, strict=True):
            old, new = fake_value(output), fake_value(result)
            if old.dtype != new.dtype or [str(s) for s in old.shape] != [str(s) for s in new.shape]:
                raise Broken(plan, f"{new.dtype} {tuple(new.shape)}, not {old.dtype} {tuple(old.shape)}")
        of_each = ((m.recovered.key, m.contraction.node.target, str(m.roles)) for m in plan.bundle.matches)
        structure = (*of_each, plan.bundle.epilogue)
        if structure not in probed:
            probed.add(structure)
            _probe(module, constants, plan, lowered, results, nodes)


def _probe(
    module: fx.GraphModule,
    constants: Constants,
    plan: Plan,
    lowered: Lowered,
    results: Sequence[fx.Node],
    nodes: Sequence[fx.Node],
) -> None:
    """Runs the old nodes and the new ones on the same random rows. The weight is proved; this proves the wiring."""
    bundle, nodes_now = plan.bundle, lowered.stands_for
    packed = (n for n in lowered.module.graph.nodes if n.op == "placeholder")
    with undisturbed():
        x = _random_x(plan)
        old = {**{m.x: x for m in bundle.matches}, **{n: plain(t) for n, t in constants.values.items()}}
        new: dict[fx.Node, Any] = {nodes_now[plan.match.x]: x, **dict(zip(packed, lowered.packed, strict=False))}
        for match in bundle.matches:
            if match.bias is not None:
                leaf, shape = bias_of(match), _bias_shape(match)
                bias = None if leaf is None else constants.values.get(leaf)
                if bias is None:
                    bias = _random(shape, fake_value(match.bias))
                # One for each row of the real x is more than the probe has rows.
                bias = bias[tuple(slice(size) for size in shape)]
                old[match.bias], new[nodes_now[match.bias]] = bias, bias
        ends = {*(m.x for m in bundle.matches), *(m.bias for m in bundle.matches), bundle.other} - {None}
        given = plan.match.contraction.routing
        if given is not None:
            old[given] = new[nodes_now[given]] = _routing(plan)
            ends |= {given}
        between = _between(ends, bundle.outputs, constants)
        if bundle.other is not None:
            other = _random([*x.shape[:-1], plan.match.n], fake_value(bundle.other))
            old[bundle.other] = new[nodes_now[bundle.other]] = other
        with _autocast_of(plan):
            before = _run(module, between, old)
        after = _run(lowered.module, nodes, new)
        added_up = x.double().norm() * sum(_squares(m) / max(m.recovered.k, 1) for m in bundle.matches) ** 0.5
        for output, result in zip(bundle.outputs, results, strict=True):
            wrong = miswired(after[result], before[output], added_up)
            if wrong:
                raise Broken(plan, f"the lowered matmul {wrong}")


def miswired(got: Tensor, wanted: Tensor, added_up: Tensor) -> str:
    """How a result is not the one that it stands for, "" where it is; `added_up` is the size of what gives it."""
    if got.shape != wanted.shape:
        return f"gives {tuple(got.shape)}, not {tuple(wanted.shape)}"
    # Half precision may overflow, in either: that is no matter of wiring.
    finite = got.isfinite() & wanted.isfinite()
    difference = (got.double() - wanted.double())[finite].norm()
    # Miswired, they differ by about the size of either; rounded, by 1 % of what is added up to give them.
    right = bool(difference <= 0.05 * wanted.double()[finite].norm() + 0.02 * added_up + 1e-6)
    return "" if right else f"differs from the original by {float(difference):.3g}"


def _squares(match: Match) -> float:
    """The sum of the squares of all weights of a match. They are read again: once they are packed nobody holds them."""
    weights = match.recovered.again(match.recovered.sources).weights
    return sum(float(dequantize(rows(w, slice(*some))).square().sum()) for w in weights for some in spans(w.codes))


def _random_x(plan: Plan) -> Tensor:
    return _random(_probe_shape(plan), fake_value(plan.match.x))


def _probe_shape(plan: Plan) -> list[int]:
    r, fake = plan.match.roles, fake_value(plan.match.x)
    if plan.match.contraction.ends is not None:
        return [plan.experts, plan.match.recovered.k]
    # Rows may be few: nothing that is emitted depends on how many there are.
    few = [label for label in r.m if label not in plan.match.contraction.chosen[1:]]
    return [
        (size if isinstance(size, int) and size < ROWS else ROWS) if label in few else int(size)
        for label, size in zip(r.x_labels, fake.shape, strict=True)
    ]


def _routing(plan: Plan) -> Tensor:
    """A row for each expert; or experts by turns for the rows of `_random_x`."""
    c, fake = plan.match.contraction, fake_value(plan.match.x)
    if c.ids is None:
        return torch.arange(1, 1 + plan.experts, dtype=torch.int32, device=fake.device)
    sizes = dict(zip(plan.match.roles.x_labels, _probe_shape(plan), strict=True))
    ids = fake_value(c.ids)
    shape = [sizes.get(label, size) for label, size in zip(c.chosen, ids.shape, strict=True)]
    # Backwards: a probe in the order of experts would not see that rows were not put back.
    return (-torch.arange(1, 1 + math.prod(shape), device=fake.device) % plan.experts).view(shape).to(ids.dtype)


def _random(shape: Sequence[int], like: Tensor) -> Tensor:
    # A generator of its own: the user's random numbers are not ours to draw.
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _bias_shape(match: Match) -> list[int]:
    """The shape of a bias for a probe of few rows: full along the weight's dimensions, 1 along the rows."""
    r = match.roles
    assert match.bias is not None
    shape = fake_value(match.bias).shape
    labels = r.n if match.contraction.bias_along_n else r.y_labels[len(r.y_labels) - len(shape) :]
    return [int(size) if label in (*r.n, *r.batch) else 1 for label, size in zip(labels, shape, strict=False)]


def _autocast_of(plan: Plan) -> contextlib.AbstractContextManager[Any]:
    """The autocast under which the user's matmul ran: it shows in a result narrower than its operands."""
    c = plan.match.contraction
    y = fake_value(c.node)
    narrower = any(fake_value(operand).dtype != y.dtype for operand in (c.a, c.b))
    if narrower and y.dtype in (torch.float16, torch.bfloat16):
        return torch.autocast(y.device.type, dtype=y.dtype)
    return contextlib.nullcontext()


def _between(ends: Collection[fx.Node | None], outputs: Sequence[fx.Node], constants: Constants) -> list[fx.Node]:
    """The nodes that compute `outputs` from the nodes `ends` and constants, in program order."""
    wanted, stack = set(outputs), list(outputs)
    while stack:
        node = stack.pop()
        for operand in node.all_input_nodes:
            # As this node reads it: what is written into a constant before, too.
            for source in constants.slice(operand, node).nodes if operand in constants else (operand,):
                if source not in wanted and source not in ends and source not in constants.values:
                    wanted.add(source)
                    stack.extend([] if operand in constants else [source])
    return [n for n in outputs[0].graph.nodes if n in wanted]


def _run(module: fx.GraphModule, nodes: Sequence[fx.Node], env: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    found = dict(env)
    interpreter = fx.Interpreter(module, garbage_collect_values=False, graph=module.graph)
    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
        found[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
    return found
