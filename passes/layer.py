"""Is a graph one linear layer? Then what it is: a proved weight, a bias, and the dtypes on the way; for `convert`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import Reason, Refused
from ..types import NearMiss, QWeight
from .constants import Constants, Trail, fake_value, plain, run, target_name
from .evaluate import undisturbed
from .pipeline import static_values
from .prove import Reader
from .recognise import Kept, Match, Recogniser
from .whereabouts import where

# What neither changes a number, but for the rounding of a cast, nor the order of rows; shapes are checked beside it.
MOVES = {
    "to", "float", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "view", "reshape", "flatten",
    "unflatten", "squeeze", "unsqueeze", "alias",
}  # fmt: skip
ADDS = {"add", "add_", "iadd"}


@dataclass(frozen=True)
class Layer:
    """y[..., n] = x[..., k] @ w.T + bias. `compute` and `result`: the dtypes to multiply in and of y, None for x's."""

    match: Match
    weight: QWeight
    bias: Tensor | None
    x_dtype: torch.dtype
    compute: torch.dtype | None
    result: torch.dtype | None


def read(module: fx.GraphModule, inputs: Sequence[Any], reader: Reader, strict: bool) -> Layer | Kept | None:
    """What the graph of a module called on one tensor is; None where it multiplies by no constant."""
    values = static_values(module, inputs)
    constants = Constants(module.graph, values)
    found = Recogniser(module, constants, strict, reader).run()
    matches = [item for item in found if isinstance(item, Match)]
    if not matches:
        told = [kept for kept in found if isinstance(kept, Kept) and kept.reason is not Reason.INPUT_WEIGHT]
        return told[0] if told else None
    try:
        if len(found) > 1:
            raise Refused(Reason.LAYER, f"{len(found)} matmuls")
        return _layer(module, constants, matches[0])
    except Refused as refusal:
        node = matches[0].anchor
        return Kept(where(node), node, refusal.reason, (NearMiss("", refusal.reason, refusal.at),))


def _layer(module: fx.GraphModule, constants: Constants, match: Match) -> Layer:
    """Raises Refused unless all that the graph does with its one input is this match, casts and a bias."""
    r, c, nodes = match.roles, match.contraction, list(module.graph.nodes)
    if match.recovered.across:
        raise Refused(Reason.LAYER, f"scales shared by {match.recovered.formats[0].group} outputs")
    simple = not r.batch and len(r.n) == len(r.k) == 1 and r.x_labels == (*r.m, *r.k) and r.y_labels == (*r.m, *r.n)
    if not simple or c.alpha != 1 or (c.beta != 1 and match.bias is not None):
        raise Refused(Reason.LAYER, match.anchor.name)
    given = [n for n in nodes if n.op == "placeholder" and n not in constants and isinstance(fake_value(n), Tensor)]
    results = fx.node.map_arg(nodes[-1].args[0], lambda n: n)
    if len(given) != 1 or len(results) != 1 or not isinstance(results[0], fx.Node):
        raise Refused(Reason.LAYER, f"{len(given)} inputs, {len(results)} results")
    written = [n for n in constants.values if constants.mutated(n)]
    if written:
        raise Refused(Reason.MUTATED, written[0].name)
    x, y, weight = given[0], results[0], match.recovered.weights[0]
    before = _path(match.x, x, constants, weight.k)
    scaled = _chain(match.output, match.anchor, constants)
    after = _path(y, match.output, constants, weight.n, ADDS)
    beside = _dependents(nodes, x) - {x, *before, *scaled, *after, match.anchor, nodes[-1]}
    if beside:
        raise Refused(Reason.LAYER, next(n.name for n in nodes if n in beside))
    if tuple(fake_value(y).shape) != (*fake_value(x).shape[:-1], weight.n):
        raise Refused(Reason.LAYER, f"{y.name}: {tuple(fake_value(y).shape)}")
    biases = [(n, match.anchor) for n in (match.bias,) if n is not None]
    biases += [(_addend(n, constants), n) for n in after if target_name(n) in ADDS]
    if len(biases) > 1:
        raise Refused(Reason.LAYER, f"{len(biases)} biases")
    bias = _bias(module, constants, *biases[0], weight.n) if biases else None
    dtypes = [fake_value(n).dtype for n in (x, y)]
    compute = None if match.dtype == dtypes[0] else match.dtype
    return Layer(match, weight, bias, dtypes[0], compute, None if dtypes[1] == dtypes[0] else dtypes[1])


def _path(
    end: fx.Node, start: fx.Node, constants: Constants, width: int, also: frozenset[str] | set[str] = frozenset()
) -> list[fx.Node]:
    """The nodes after `start` up to `end`: MOVES of rows of `width`, with one cast at most. Raises Refused."""
    path = _chain(end, start, constants)
    dtypes = [fake_value(n).dtype for n in (*path, start)]
    casts = sum(a != b for a, b in itertools.pairwise(dtypes))
    for node in (*path, start):
        t = fake_value(node)
        if t.ndim < 1 or t.shape[-1] != width or (node is not start and target_name(node) not in MOVES | also):
            raise Refused(Reason.LAYER, node.name)
    if casts > 1:
        raise Refused(Reason.LAYER, f"{casts} casts before {end.name}")
    return path


def _chain(end: fx.Node, start: fx.Node, constants: Constants) -> list[fx.Node]:
    """From `end` back to the node after `start`, each made of the next and constants alone. Raises Refused."""
    chain = []
    while end is not start:
        sources = [n for n in end.all_input_nodes if n not in constants]
        # `type_as` may name the input beside what it casts.
        if not sources or not isinstance(end.args[0], fx.Node) or (len(sources) > 1 and target_name(end) != "type_as"):
            raise Refused(Reason.LAYER, end.name)
        chain.append(end)
        end = end.args[0] if end.args[0] in sources else sources[0]
    return chain


def _dependents(nodes: Sequence[fx.Node], x: fx.Node) -> set[fx.Node]:
    """What is computed from x, itself included."""
    found = {x}
    for node in nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _addend(node: fx.Node, constants: Constants) -> fx.Node:
    """The constant that a node adds. Raises Refused where it is a number, or multiplied by one."""
    constant = [n for n in node.args if isinstance(n, fx.Node) and n in constants]
    if len(constant) != 1 or node.kwargs:
        raise Refused(Reason.LAYER, node.name)
    return constant[0]


def _bias(module: fx.GraphModule, constants: Constants, node: fx.Node, user: fx.Node, n: int) -> Tensor:
    """The real bias [n] as `user` reads it; the parameter itself where it is only cast. Raises Refused."""
    shape = fake_value(node).shape
    if node not in constants or any(size != 1 for size in shape[:-1]) or shape[-1:] != (n,):
        raise Refused(Reason.LAYER, f"{node.name}: bias {tuple(shape)}")
    cut = constants.slice(node, user)
    leaves = [constants.values[leaf] for leaf in cut.leaves]
    with undisturbed():
        value = run(cut, [plain(leaf) for leaf in leaves], module, Trail()).reshape(n)
        if len(leaves) == 1 and leaves[0].shape == (n,) and torch.equal(leaves[0].to(value.dtype), value):
            return leaves[0]
        return value.detach().clone()
