"""Writes a new graph in which each planned matmul is one custom op on packed weights.

Dynamo's own graph is never edited: it reads its placeholders again after the backend returns. Packed weights become new
static placeholders, in front of the others, so that no value is baked into the graph and Inductor's caches stay right.
Output shape, strides and dtype are kept.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor

from ..kernels import ops
from .canonicalize import Contraction
from .constants import Constants, fake_value, storage_of, written
from .pack import Packed
from .plan import Plan


@dataclass(frozen=True)
class Lowered:
    """The new graph. It takes the tensors of `packed`, then the arguments of the old graph at `kept`.

    emitted     for each plan its results, one for each output of its bundle, and all its nodes
    stands_for  the new node of each old one that is still there
    """

    module: fx.GraphModule
    packed: tuple[Tensor, ...]
    kept: tuple[int, ...]
    emitted: tuple[tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]], ...]
    stands_for: dict[fx.Node, fx.Node]


def copy_module(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of Dynamo's graph with all that it notes beside it, and the copy of each node."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
    new = fx.GraphModule(module, graph)
    new.meta = dict(module.meta)
    for name in ("_param_name_to_source", "_backend_id"):
        if hasattr(module, name):
            value = getattr(module, name)
            setattr(new, name, dict(value) if isinstance(value, dict) else value)
    return new, copies


def lower(module: fx.GraphModule, constants: Constants, plans: Sequence[Plan]) -> Lowered:
    """The lowered copy of `module`."""
    new, copies = copy_module(module)
    graph = new.graph
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    # Of the graph's own values: Dynamo hands its backends another mode in the tracing context.
    fakes = map(fake_value, module.graph.nodes)
    fake_mode = next(f.fake_mode for f in fakes if isinstance(f, FakeTensor))
    inputs = _Inputs(graph, fake_mode)
    emitted, stands_for = [], dict(copies)
    for plan in plans:
        outputs = plan.bundle.outputs
        emit = _Emitter(graph, copies[min(outputs, key=constants.order.__getitem__)], fake_mode)
        one = len(plan.bundle.matches) == 1 and not plan.bundle.epilogue
        results = (_matmul(plan, emit, inputs, stands_for),) if one else _together(plan, emit, inputs, stands_for)
        for output, result in zip(outputs, results, strict=True):
            copies[output].replace_all_uses_with(result)
            stands_for[output] = result
        emitted.append((results, tuple(emit.nodes)))
    _erase(module, constants, plans, copies)
    kept = []
    for i, node in enumerate(placeholders):
        if not copies[node].users and node in constants.values:
            graph.erase_node(copies[node])
        else:
            kept.append(i)
    graph.lint()
    new.recompile()
    return Lowered(new, tuple(inputs.tensors), tuple(kept), tuple(emitted), stands_for)


class _Inputs:
    """The new placeholders, one for each packed tensor, in front of all others."""

    def __init__(self, graph: fx.Graph, fake_mode: Any) -> None:
        self.graph, self.fake_mode = graph, fake_mode
        self.tensors: list[Tensor] = []
        self._nodes: dict[int, fx.Node] = {}
        self._first = next(iter(graph.nodes))

    def node(self, tensor: Tensor) -> fx.Node:
        """The placeholder of a packed tensor."""
        if id(tensor) not in self._nodes:
            name = f"lq_packed_{len(self.tensors)}"
            with self.graph.inserting_before(self._first):
                node = self.graph.placeholder(name)
            node.type = Tensor
            node._dynamo_source = ConstantSource(name)
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            node.meta["example_value"] = self.fake_mode.from_tensor(tensor, static_shapes=True)
            self._nodes[id(tensor)] = node
            self.tensors.append(tensor)
        return self._nodes[id(tensor)]


class _Emitter:
    """Adds nodes before an anchor, each with the fake value that the rest of the compiler reads."""

    def __init__(self, graph: fx.Graph, anchor: fx.Node, fake_mode: Any) -> None:
        self.graph, self.anchor, self.fake_mode = graph, anchor, fake_mode
        self.nodes: list[fx.Node] = []

    def __call__(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        op = "call_method" if isinstance(target, str) else "call_function"
        with self.graph.inserting_before(self.anchor):
            node = self.graph.create_node(op, target, args, kwargs)
        for name in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if name in self.anchor.meta:
                node.meta[name] = self.anchor.meta[name]
        with self.fake_mode:
            fakes, named = fx.node.map_arg((args, kwargs), fake_value)
            node.meta["example_value"] = (
                getattr(fakes[0], target)(*fakes[1:], **named) if isinstance(target, str) else target(*fakes, **named)
            )
        self.nodes.append(node)
        return node


def _matmul(plan: Plan, emit: _Emitter, inputs: _Inputs, nodes: dict[fx.Node, fx.Node]) -> fx.Node:
    match, r = plan.match, plan.match.roles
    wanted = fake_value(match.output)
    bias = nodes[match.bias] if match.bias is not None else None
    x = _operand(plan, emit, nodes[match.x])
    c, n = match.contraction, match.n
    plain = not r.batch and c.alpha == 1 and c.beta == 1 and len(r.n) <= 1
    fused = None
    if (
        bias is not None
        and plain
        and (c.bias_along_n or r.y_labels[-1:] == r.n)
        and tuple(fake_value(bias).shape) == (n,)
    ):
        fused, bias = _cast(emit, bias, match.dtype), None
    if c.ids is not None:
        y = _of_picked(plan, emit, inputs, nodes, x)
    elif plan.experts:
        y = _of_experts(plan, emit, inputs, nodes, x)
    elif r.batch:
        rows = [_gemm(plan, p, emit, inputs, emit("select", x, 0, i), None) for i, p in enumerate(plan.packed)]
        y = emit(torch.stack, rows, 0)
        if len(r.batch) > 1:
            y = emit("unflatten", y, 0, _sizes(match.roles.x_labels, fake_value(match.x), r.batch))
    else:
        y = _gemm(plan, plan.packed[0], emit, inputs, x, fused)
    if not r.n:
        y = emit("squeeze", y, -1)
    elif len(r.n) > 1:
        w = c.a if match.x is c.b else c.b
        y = emit("unflatten", y, -1, _sizes(r.w_labels, fake_value(w), r.n))
    lead = (*r.batch, *r.m) if c.ids is None else (*c.chosen, *(label for label in r.m if label not in c.chosen))
    order = [(*lead, *r.n).index(label) for label in r.y_labels]
    if order != sorted(order):
        y = emit("permute", y, order)
    if c.alpha != 1:
        y = emit(torch.mul, y, c.alpha)
    # As in eager: beta = 0 means that the bias is not read, NaN or not.
    if bias is not None and c.beta != 0:
        bias = _cast(emit, bias, match.dtype)
        y = emit(torch.add, y, bias if c.beta == 1 else emit(torch.mul, bias, c.beta))
    return _with_strides(emit, _cast(emit, y, wanted.dtype), wanted)


def _together(plan: Plan, emit: _Emitter, inputs: _Inputs, nodes: dict[fx.Node, fx.Node]) -> tuple[fx.Node, ...]:
    """Several matches in one op, or one with what is done to its result; merge.py says which can be."""
    bundle, match = plan.bundle, plan.match
    bias = nodes[match.bias] if match.bias is not None else None
    if plan.bias is not None:
        bias = inputs.node(plan.bias)
    other = None if bundle.other is None else nodes[bundle.other]
    x = _operand(plan, emit, nodes[match.x])
    if plan.experts:
        y = _of_experts(plan, emit, inputs, nodes, x)
    else:
        y = _gemm(plan, plan.packed[0], emit, inputs, x, bias, other)
    if len(bundle.outputs) == 1:
        return (_with_strides(emit, y, fake_value(bundle.outputs[0])),)
    sizes = [m.n for m in bundle.matches]
    pieces = emit("split", y, sizes, -1)
    parts = (emit(operator.getitem, pieces, i) for i in range(len(sizes)))
    return tuple(_with_strides(emit, y, fake_value(out)) for y, out in zip(parts, bundle.outputs, strict=True))


def _operand(plan: Plan, emit: _Emitter, x: fx.Node) -> fx.Node:
    """x as [batch?, m..., k], in the dtype that the match is computed in."""
    r, c = plan.match.roles, plan.match.contraction
    dropped = [i for i, label in enumerate(r.x_labels) if label[-1] == "!"]
    labels = [label for label in r.x_labels if label[-1] != "!"]
    if dropped:
        x = emit("squeeze", x, dropped)
    batch = r.batch if c.routing is None else ()
    # What picks weights first, in its order.
    m = sorted(r.m, key=lambda label: c.chosen.index(label) if label in c.chosen else len(c.chosen))
    order = [labels.index(label) for label in (*batch, *m, *r.k)]
    if order != sorted(order):
        x = emit("permute", x, order)
    if len(r.k) > 1:
        x = emit("flatten", x, -len(r.k), -1)
    if len(batch) > 1:
        x = emit("flatten", x, 0, len(batch) - 1)
    return _cast(emit, x, plan.match.dtype)


def _gemm(
    plan: Plan, packed: Packed, emit: _Emitter, inputs: _Inputs, x: fx.Node, bias: fx.Node | None,
    other: fx.Node | None = None,
) -> fx.Node:  # fmt: skip
    if packed.perm is not None and not packed.across:
        x = emit(torch.index_select, x, fake_value(x).ndim - 1, inputs.node(packed.perm))
    parts = [inputs.node(part) for part in packed.parts]
    if packed.across:
        dense = packed.layout, packed.n, packed.k, packed.format.spec, plan.match.dtype
        w = emit(ops.DEQUANTIZE, parts, *dense)
        # Autocast leaves a product with a vector alone on a CPU, and so must this be.
        y = emit(torch.matmul, x, w) if fake_value(x).ndim > 1 else emit(torch.mv, emit("t", w), x)
        if packed.perm is not None:
            y = emit(torch.index_select, y, fake_value(y).ndim - 1, inputs.node(packed.perm))
        return y if bias is None else emit(torch.add, y, bias)
    op = ops.GEMMS[packed.layouts[0]]
    return emit(op, x, parts, bias, other, packed.n, packed.k, packed.format.spec, plan.bundle.epilogue, plan.route)


def _of_experts(plan: Plan, emit: _Emitter, inputs: _Inputs, nodes: dict[fx.Node, fx.Node], x: fx.Node) -> fx.Node:
    """y of x [m, k] that stands expert by expert; of x [experts, m..., k], as much for each."""
    given = plan.match.contraction.ends
    if given is not None:
        ends = nodes[given]
    else:
        assert plan.turns is not None
        rows = emit("size", x, 1) if fake_value(x).ndim > 2 else 1
        x, ends = emit("flatten", x, 0, -2), emit(torch.mul, inputs.node(plan.turns), rows)
    y = _grouped(plan, emit, inputs, x, ends)
    if given is None:
        y = emit("unflatten", y, 0, (plan.experts, -1) if plan.match.roles.m else (plan.experts,))
        if len(plan.match.roles.batch) > 1:
            r = plan.match.roles
            y = emit("unflatten", y, 0, _sizes(r.x_labels, fake_value(plan.match.x), r.batch))
    return y


def _of_picked(plan: Plan, emit: _Emitter, inputs: _Inputs, nodes: dict[fx.Node, fx.Node], x: fx.Node) -> fx.Node:
    """y [chosen..., 1..., n] of x [some of chosen..., 1..., k], each row by the weight that its id picks."""
    c, r = plan.match.contraction, plan.match.roles
    assert c.ids is not None and plan.turns is not None
    sizes = fake_value(c.ids).shape
    there = [label for label in c.chosen if label in r.m]
    ones = len(r.m) - len(there)
    if ones:
        x = emit("flatten", x, len(there), -1)
    for i, label in enumerate(c.chosen):
        x = x if label in there else emit("unsqueeze", x, i)
    if len(there) < len(c.chosen):
        wide = [-1 if label in there else int(size) for label, size in zip(c.chosen, sizes, strict=True)]
        x = emit("expand", x, (*wide, -1))
    x = emit("flatten", x, 0, -2)
    # As indexing does, ids count from the end where they are negative.
    ids = emit(torch.remainder, emit("flatten", nodes[c.ids]), plan.experts)
    order = emit(torch.argsort, ids, stable=True)
    ended = emit("index_select", emit("to", ids, torch.int32), 0, order)
    ends = emit(torch.searchsorted, ended, inputs.node(plan.turns), out_int32=True)
    y = _grouped(plan, emit, inputs, emit("index_select", x, 0, order), ends)
    y = emit("index_select", y, 0, emit(torch.argsort, order))
    if len(c.chosen) > 1:
        y = emit("unflatten", y, 0, (-1, *map(int, sizes[1:])))
    for _ in range(ones):
        y = emit("unsqueeze", y, -2)
    return y


def _grouped(plan: Plan, emit: _Emitter, inputs: _Inputs, x: fx.Node, ends: fx.Node) -> fx.Node:
    packed = plan.packed[0]
    if packed.perm is not None:
        x = emit(torch.index_select, x, fake_value(x).ndim - 1, inputs.node(packed.perm))
    n, parts = packed.n // plan.experts, [inputs.node(part) for part in packed.parts]
    what = packed.layout, n, packed.k, packed.format.spec, plan.bundle.epilogue, plan.route
    return emit(ops.GROUPED, x, parts, ends, *what)


def _cast(emit: _Emitter, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if fake_value(node).dtype == dtype else emit("to", node, dtype)


def _sizes(labels: Sequence[str], value: Tensor, wanted: Sequence[str]) -> tuple[int, ...]:
    found = dict(zip(labels, value.shape, strict=True))
    return tuple(int(found[label]) for label in wanted)


def _with_strides(emit: _Emitter, y: fx.Node, wanted: Tensor) -> fx.Node:
    """y laid out as eager would: what follows may view it."""
    have = fake_value(y)
    # Symbols are compared as text: comparing their values would add a guard.
    if [str(s) for s in have.stride()] == [str(s) for s in wanted.stride()]:
        return y
    if all(isinstance(s, int) for s in (*wanted.stride(), *wanted.shape)):
        order = sorted(range(wanted.ndim), key=lambda i: wanted.stride(i), reverse=True)
        inverse = [order.index(i) for i in range(wanted.ndim)]
        return emit("permute", emit("contiguous", emit("permute", y, order)), inverse)
    return emit("contiguous", y) if wanted.is_contiguous() else y


def _erase(module: fx.GraphModule, constants: Constants, plans: Sequence[Plan], copies: dict[fx.Node, fx.Node]) -> None:
    """Erases what only the replaced matmuls used. A write stays unless all that it writes to goes."""
    gone: set[fx.Node] = set()
    for plan in plans:
        gone.update(plan.bundle.after)
        for match in plan.bundle.matches:
            node = match.output
            while True:
                gone.add(node)
                if match.contraction.picked is not None:
                    gone |= _picking(match.contraction, constants)
                for operand in node.all_input_nodes:
                    if operand in constants and operand is not match.bias:
                        gone |= {n for n in constants.slice(operand, node).nodes if n not in constants.values}
                if node is match.anchor:
                    break
                node = next(n for n in node.all_input_nodes if n not in constants)
    outputs = {output for plan in plans for output in plan.bundle.outputs}
    by_storage: dict[int, list[fx.Node]] = {}
    for node in module.graph.nodes:
        storage = storage_of(node)
        if storage is not None:
            by_storage.setdefault(storage, []).append(node)
    while True:
        stay = {
            node
            for node in gone
            if any(user not in gone for user in node.users if node not in outputs)
            or any(n not in gone for t in written(node) for n in by_storage.get(storage_of(t) or 0, ()))
        }
        if not stay:
            break
        gone -= stay
    for node in reversed(list(module.graph.nodes)):
        if node in gone:
            copies[node].graph.erase_node(copies[node])


def _picking(c: Contraction, constants: Constants) -> set[fx.Node]:
    """What made the weights that were picked from those of all experts, and those."""
    found = {n for n in constants.slice(c.b, c.node).nodes if n not in constants.values}
    node = c.picked
    while node is not None and node is not c.b:
        found.add(node)
        node = next((n for n in node.all_input_nodes if n is not c.ids), None)
    return found
