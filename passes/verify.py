"""Checks a lowered graph before it is handed on: well-formed, the same outputs, and each new structure wired right."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import LqError
from ..formats import dequantize
from .constants import Constants, fake_value, plain
from .evaluate import undisturbed
from .lower import Lowered
from .plan import Plan

ROWS = 2


class Broken(LqError):
    """One lowered matmul is not what it must be: our bug. The user's own matmul is used."""

    def __init__(self, plan: Plan, what: str) -> None:
        super().__init__(f"{plan.match.where.path}: {what}")
        self.plan = plan


def verify(module: fx.GraphModule, constants: Constants, plans: Sequence[Plan], lowered: Lowered) -> None:
    """Raises Broken unless each new node stands for its old one; one numeric probe for each distinct structure."""
    probed = set()
    for plan, (result, nodes) in zip(plans, lowered.emitted, strict=True):
        old, new = fake_value(plan.match.output), fake_value(result)
        if old.dtype != new.dtype or [str(s) for s in old.shape] != [str(s) for s in new.shape]:
            raise Broken(plan, f"{new.dtype} {tuple(new.shape)}, not {old.dtype} {tuple(old.shape)}")
        structure = (plan.match.recovered.key, plan.match.contraction.node.target, str(plan.match.roles))
        if structure not in probed:
            probed.add(structure)
            _probe(module, constants, plan, lowered, result, nodes)


def _probe(
    module: fx.GraphModule,
    constants: Constants,
    plan: Plan,
    lowered: Lowered,
    result: fx.Node,
    nodes: Sequence[fx.Node],
) -> None:
    """Runs the old nodes and the new ones on the same random rows. The weight is proved; this proves the wiring."""
    match, nodes_now = plan.match, lowered.stands_for
    packed = (n for n in lowered.module.graph.nodes if n.op == "placeholder")
    with undisturbed():
        x = _random_x(plan)
        old = {match.x: x, **{n: plain(t) for n, t in constants.values.items()}}
        new: dict[fx.Node, Any] = {nodes_now[match.x]: x, **dict(zip(packed, lowered.packed, strict=False))}
        if match.bias is not None:
            bias, shape = constants.values.get(match.bias), _bias_shape(plan)
            if bias is None:
                bias = _random(shape, fake_value(match.bias))
            # One for each row of the real x is more than the probe has rows.
            bias = bias[tuple(slice(size) for size in shape)]
            old[match.bias], new[nodes_now[match.bias]] = bias, bias
        between = _between(match.x, match.bias, match.output, constants)
        with _autocast_of(plan):
            wanted = _run(module, between, old)[match.output]
        got = _run(lowered.module, nodes, new)[result]
        if got.shape != wanted.shape:
            raise Broken(plan, f"the lowered matmul gives {tuple(got.shape)}, not {tuple(wanted.shape)}")
        # Half precision may overflow, in either: that is no matter of wiring.
        finite = got.isfinite() & wanted.isfinite()
        difference = (got.double() - wanted.double())[finite].norm()
        # Miswired, they differ by about the size of either; rounded, by 1 % of what is added up to give them.
        added_up = x.double().norm() * sum(dequantize(w).square().mean(1).sum() for w in match.recovered.weights) ** 0.5
        if not bool(difference <= 0.05 * wanted.double()[finite].norm() + 0.02 * added_up + 1e-6):
            raise Broken(plan, f"the lowered matmul differs from the original by {float(difference):.3g}")


def _random_x(plan: Plan) -> Tensor:
    r, fake = plan.match.roles, fake_value(plan.match.x)
    # Rows may be few: nothing that is emitted depends on how many there are.
    shape = [
        (size if isinstance(size, int) and size < ROWS else ROWS) if label in r.m else int(size)
        for label, size in zip(r.x_labels, fake.shape, strict=True)
    ]
    return _random(shape, fake)


def _random(shape: Sequence[int], like: Tensor) -> Tensor:
    # A generator of its own: the user's random numbers are not ours to draw.
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _bias_shape(plan: Plan) -> list[int]:
    """The shape of a bias for a probe of few rows: full along the weight's dimensions, 1 along the rows."""
    match, r = plan.match, plan.match.roles
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


def _between(x: fx.Node, bias: fx.Node | None, output: fx.Node, constants: Constants) -> list[fx.Node]:
    """The nodes that compute `output` from x, the bias and constants, in program order."""
    wanted, stack = {output}, [output]
    while stack:
        node = stack.pop()
        for operand in node.all_input_nodes:
            # As this node reads it: what is written into a constant before, too.
            for source in constants.slice(operand, node).nodes if operand in constants else (operand,):
                if source not in wanted and source not in (x, bias) and source not in constants.values:
                    wanted.add(source)
                    stack.extend([] if operand in constants else [source])
    return [n for n in output.graph.nodes if n in wanted]


def _run(module: fx.GraphModule, nodes: Sequence[fx.Node], env: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    found = dict(env)
    interpreter = fx.Interpreter(module, garbage_collect_values=False, graph=module.graph)
    for node in nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
        found[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
    return found
