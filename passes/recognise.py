"""For every matmul of a graph: is its weight a dequantized constant, what does it mean, and is that proved?"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import Reason, Refused
from ..kernels.registry import X_DTYPES
from ..types import NearMiss, Where
from .canonicalize import Contraction, Roles, contraction, qualified_name, roles
from .constants import Constants, Slice, Trail, fake_value, run, target_name
from .evaluate import FP8, evaluate, identity, undisturbed
from .prove import Reader, Recovered
from .routed import routed
from .whereabouts import where

LOW_BIT = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, *FP8,
)  # fmt: skip
_ROUNDERS = {"round", "floor", "trunc", "ceil", "clamp", "quantize", "sign"}
_EYE_FORMS = {"linear", "matmul", "mm"}
# Bytes of codes from which on a weight takes a thread more work in PyTorch than in Python, and how many threads that
# leaves room for.
READ_AHEAD = 1 << 19
MOST_THREADS = 4


@dataclass(frozen=True)
class Match:
    """A matmul to rewrite. `output` is the node to replace: `anchor`, or the scaling that follows it."""

    where: Where
    contraction: Contraction
    roles: Roles
    anchor: fx.Node
    output: fx.Node
    x: fx.Node
    bias: fx.Node | None
    recovered: Recovered
    source_nodes: tuple[fx.Node, ...]

    @property
    def n(self) -> int:
        """Outputs of each weight."""
        return self.recovered.n

    @property
    def places(self) -> int:
        """How many weights there are: one, or one for each place of a batch, or for each expert."""
        return len(self.recovered.formats)

    @property
    def dtype(self) -> torch.dtype:
        """What to compute in: a scaling after the matmul may be wider than it, or narrower."""
        return torch.promote_types(fake_value(self.anchor).dtype, fake_value(self.output).dtype)


@dataclass(frozen=True)
class Kept:
    """A matmul to leave as it is."""

    where: Where
    node: fx.Node
    reason: Reason
    near_misses: tuple[NearMiss, ...]


@dataclass
class Recogniser:
    """Recognises the matmuls of one graph. In strict mode a failure of ours is raised, else it keeps that matmul.

    Large weights are read by several `threads`.
    """

    module: fx.GraphModule
    constants: Constants
    strict: bool = False
    reader: Reader = field(default_factory=Reader)
    threads: int = 1
    _seen: dict[Any, tuple[Recovered | Refused, list[NearMiss]]] = field(default_factory=dict)
    _ahead: dict[Any, Callable[[], None]] | None = None

    def run(self) -> list[Match | Kept]:
        """A verdict for every matmul between an activation and something, in program order."""
        out: list[Match | Kept] = []
        nodes = list(self.module.graph.nodes)
        if self.threads > 1:
            self._read_ahead(nodes)
        for node in nodes:
            found = self._verdict(node)
            if found is not None:
                out.append(found)
            out.extend(_inside(self.module, node))
        return out

    def _read_ahead(self, nodes: Sequence[fx.Node]) -> None:
        """Reads the large weights, so that what comes after finds them read."""
        self._ahead = {}
        for node in nodes:
            self._verdict(node)
        ahead, self._ahead = self._ahead, None
        # The first of each structure says how the others are read.
        first = {known[0]: known for known in reversed(ahead)}.values()
        with ThreadPoolExecutor(min(self.threads, MOST_THREADS)) as pool:
            for some in (first, [known for known in ahead if known not in first]):
                list(pool.map(lambda known: ahead[known](), some))

    def _verdict(self, node: fx.Node) -> Match | Kept | None:
        misses: list[NearMiss] = []
        try:
            c = contraction(node)
            if c is None and is_ours(node):
                return Kept(where(node), node, Reason.PACKED, ())
            if c is None:
                return Kept(where(node), node, Reason.FUSED, ()) if self._fused(node) else None
            if c.a in self.constants and c.b in self.constants:
                return None
            return self._match(routed(c, self.constants), misses)
        except Refused as refusal:
            # Of what nobody quantized there is no near miss to tell.
            plain = refusal.reason in (Reason.NOT_QUANTIZED, Reason.INPUT_WEIGHT)
            near = tuple(misses) or (() if plain else (NearMiss("", refusal.reason, refusal.at),))
            return Kept(where(node), node, refusal.reason, near)
        except Exception as error:
            if self.strict:
                raise
            what = f"{type(error).__name__}: {error}"[:200]
            return Kept(where(node), node, Reason.PASS_FAILED, (NearMiss("", Reason.PASS_FAILED, what),))

    def _fused(self, node: fx.Node) -> bool:
        """Whether an operation that only its library understands makes an activation of one and a packed weight."""
        if node.op != "call_function" or not _floating(node):
            return False
        namespace, _, name = qualified_name(node).partition("::")
        if namespace in ("lq", "prim", "prims") or (namespace == "aten" and not _PACKED_MM.match(name)):
            return False
        weights = [n for n in node.all_input_nodes if n in self.constants and _is_packed(fake_value(n))]
        return bool(weights) and any(_floating(n) for n in node.all_input_nodes if n not in self.constants)

    def _match(self, c: Contraction, misses: list[NearMiss]) -> Match:
        w = c.a if c.a in self.constants and not c.fused and c.routing is None else c.b
        if w not in self.constants:
            raise Refused(Reason.FUSED, c.node.name) if c.fused else self._dynamic(c)
        given = [n for n in (c.a, c.bias) if n is not None] if c.fused else []
        cut = self.constants.slice(c.node if c.fused else w, c.node, given)
        if c.fused and any(n not in self.constants and n not in (*given, c.node) for n in cut.nodes):
            raise Refused(Reason.SCALE_FROM_INPUT, c.node.name)
        values = [self.constants.values[leaf] for leaf in cut.leaves if leaf not in given]
        if not _may_be_low_bit(cut, values):
            raise Refused(Reason.NOT_QUANTIZED, w.name)
        r = roles(c, w)
        y, x = fake_value(c.node), c.b if w is c.a else c.a
        if is_functorch_wrapped_tensor(y):
            raise Refused(Reason.HIGHER_ORDER, c.node.name)
        if y.dtype not in X_DTYPES or not fake_value(x).is_floating_point():
            raise Refused(Reason.DTYPE, f"{c.node.name}: {y.dtype}")
        if y.requires_grad and fake_value(w).requires_grad:
            raise Refused(Reason.NEEDS_GRAD, w.name)
        if y.requires_grad and c.routing is not None:
            raise Refused(Reason.NO_KERNEL, "gradients through experts")
        self.constants.check_versions(cut)
        output, scalings = self._scalings(c, r, cut, values)
        recovered = self._recover(c, r, w, x, cut, scalings, misses)
        nodes = (*(leaf for s in (cut, *(s for s, _ in scalings)) for leaf in s.leaves if leaf not in given),)
        return Match(where(c.node), c, r, c.node, output, x, c.bias, recovered, nodes)

    def _dynamic(self, c: Contraction) -> Refused:
        """Why neither operand is constant."""
        verdict = Refused(Reason.INPUT_WEIGHT, c.node.name)
        for operand in (c.a, c.b):
            near = self.constants.computed_from(operand, lambda n: ACTIVATION.search(str(n.target)) is not None)
            if any(self.constants.mutated(n) for n in near):
                return Refused(Reason.MUTATED, operand.name)
            size = fake_value(operand).numel()
            for leaf in near:
                t = fake_value(leaf)
                if leaf.op not in ("placeholder", "get_attr") or not isinstance(t, Tensor) or t.dtype not in LOW_BIT:
                    continue
                bits = t.numel() * t.element_size() * 8
                if leaf in self.constants and isinstance(size, int) and isinstance(bits, int) and bits >= size:
                    return Refused(Reason.SCALE_FROM_INPUT, operand.name)
                if leaf not in self.constants and t.dtype != torch.int64:
                    verdict = Refused(Reason.FREE_TENSOR, leaf.name)
        broken = _BREAK.search(c.node.meta.get("stack_trace") or "")
        coded = verdict.reason is Reason.FREE_TENSOR
        if broken and (coded or (verdict.reason is Reason.INPUT_WEIGHT and any(_resumed(n, c) for n in (c.a, c.b)))):
            verdict = Refused(Reason.GRAPH_BREAK, f"{c.node.name}, after line {broken[2]} of {broken[1]}")
        return verdict

    def _scalings(
        self, c: Contraction, r: Roles, cut: Slice, values: Sequence[Tensor]
    ) -> tuple[fx.Node, list[tuple[Slice, bool]]]:
        """The constant scales that multiply (or, True, divide) the output of a matmul with bare codes."""
        output, found = c.node, []
        bare = all(not v.is_floating_point() or v.dtype in FP8 for v in values) and not c.fused
        if not bare or r.batch or len(r.n) != 1 or c.bias is not None or c.alpha != 1:
            return output, []
        from_right = len(r.y_labels) - r.y_labels.index(r.n[0])
        while len(output.users) == 1:
            user = next(iter(output.users))
            name = target_name(user)
            if name in ("to", "float", "half", "bfloat16", "type_as") and user.args[0] is output:
                ahead = next(iter(user.users), None)
                if len(user.users) != 1 or ahead is None or self._scale_of(ahead, user, from_right) is None:
                    break
                output, user = user, ahead
            scale = self._scale_of(user, output, from_right)
            if scale is None or fake_value(user).dtype not in X_DTYPES:
                break
            found.append((self.constants.slice(scale[0], user), scale[1]))
            output = user
        return output, found

    def _scale_of(self, user: fx.Node, y: fx.Node, from_right: int) -> tuple[fx.Node, bool] | None:
        name = target_name(user)
        if name not in ("mul", "div", "truediv", "multiply", "divide", "true_divide") or len(user.args) != 2:
            return None
        divides = name not in ("mul", "multiply")
        other = user.args[1] if user.args[0] is y else None if divides else user.args[0]
        if not isinstance(other, fx.Node) or other not in self.constants or user.kwargs:
            return None
        t = fake_value(other)
        if not isinstance(t, Tensor) or t.requires_grad or not t.is_floating_point():
            return None
        plain = all(size == 1 for i, size in enumerate(reversed(t.shape), 1) if i != from_right)
        return (other, divides) if plain and t.ndim <= fake_value(y).ndim else None

    def _recover(
        self, c: Contraction, r: Roles, w: fx.Node, x: fx.Node, cut: Slice, scalings: list[tuple[Slice, bool]],
        misses: list[NearMiss],
    ) -> Recovered:  # fmt: skip
        cuts = [cut, *(s for s, _ in scalings)]
        key = "\n".join([*(s.key for s in cuts), str((r.w_labels, r.batch, r.n, r.k, [d for _, d in scalings]))])
        nodes = tuple(leaf for s in cuts for leaf in s.leaves if not (c.fused and leaf in (c.a, c.bias)))
        through = is_traceable_wrapper_subclass(fake_value(w)) or c.fused
        known = (key, nodes, (c.node.target, fake_value(x).dtype) if through else None)
        if known not in self._seen:
            trail, passed = Trail(), list[NearMiss]()
            compute, reader = self._computation(c, r, w, cut, scalings, trail), self.reader
            width, x_dtype = _size(c.sizes(w), r.k), fake_value(x).dtype
            given = [self.constants.values[n] for n in nodes]

            def recover(sources: Sequence[Tensor]) -> Recovered:
                probe = identity(width, x_dtype, sources[0].device) if through else None
                trail.lost = trail.form = trail.fused = ""
                with undisturbed():
                    return reader.read(evaluate(compute, sources, probe, trail), sources, key, passed, recover)

            def read() -> None:
                try:
                    self._seen[known] = recover(given), passed
                except Refused as refusal:
                    # What it was raised from holds what was tried, as large as the weight.
                    self._seen[known] = refusal.with_traceback(None), passed

            if self._ahead is not None:
                # A library's code may compile something, which waits for the compilation that this is part of.
                ours = all(s.only_torch for s in cuts) and not c.fused
                if ours and max((t.nbytes for t in given if t.device.type == "cpu"), default=0) >= READ_AHEAD:
                    self._ahead[known] = read
                raise Refused(Reason.PASS_FAILED, "not read yet")
            read()
        seen, passed = self._seen[known]
        misses.extend(passed)
        if isinstance(seen, Refused):
            raise seen
        return seen

    def _computation(
        self, c: Contraction, r: Roles, w: fx.Node, cut: Slice, scalings: list[tuple[Slice, bool]],
        trail: Trail,
    ) -> Callable[..., list[Tensor]]:  # fmt: skip
        """What gives the weights [n, k], one for each place of the batch, from the leaves (and the identity)."""
        module, through = self.module, is_traceable_wrapper_subclass(fake_value(w)) and not c.fused
        name = target_name(c.node)
        if through and (name not in _EYE_FORMS or w is not c.b or len(r.w_labels) != 2):
            raise Refused(Reason.UNSUPPORTED_SPELLING, f"{name} with a {type(fake_value(w)).__name__}")
        dropped = [i for i, label in enumerate(r.w_labels) if label[-1] == "!"]
        kept = [label for label in r.w_labels if label[-1] != "!"]
        order = [kept.index(label) for label in (*r.batch, *r.n, *r.k)]
        sizes = c.sizes(w)
        shape = [_size(sizes, labels) for labels in (r.batch, r.n, r.k)]

        def compute(*leaves: Tensor) -> list[Tensor]:
            taken = len(cut.leaves) - (0 if not c.fused else 1 + (c.bias is not None))
            if c.fused:
                # In place of x the identity, without a bias: what it gives is the weight, transposed.
                given = (leaves[-1],) if c.bias is None else (leaves[-1], None)
                weight = run(cut, (*leaves[:taken], *given), module, trail).t()
            else:
                weight = run(cut, leaves[:taken], module, trail)
            if through:
                # A subclass multiplies as it likes: what it makes of the identity matrix is its weight, transposed.
                weight = (F.linear(leaves[-1], weight) if name == "linear" else torch.matmul(leaves[-1], weight)).t()
            elif not c.fused:
                weight = weight.squeeze(dropped) if dropped else weight
                weight = weight.permute(order)
            weight = weight.reshape(shape)
            for scaling, divides in scalings:
                factor = run(scaling, leaves[taken : taken + len(scaling.leaves)], module, trail).reshape(-1, 1)
                taken += len(scaling.leaves)
                weight = weight / factor if divides else weight * factor
            return [weight.select(0, i) for i in range(shape[0])]

        return compute


# The name that Dynamo gives to what follows a graph break.
_BREAK = re.compile(r"torch_dynamo_resume_in_(\w+?)_at_(\d+)")


# torch's own operations on packed weights.
_PACKED_MM = re.compile(r"_weight_int[48]pack_mm|_scaled_mm|_int_mm|_dyn_quant_matmul")


def is_ours(node: fx.Node) -> bool:
    """Whether a node is our own matmul on a packed weight: one that was lowered, or that of a converted layer."""
    namespace, _, name = qualified_name(node).partition("::")
    return namespace == "lq" and name.endswith("_gemm")


def _floating(node: fx.Node) -> bool:
    t = fake_value(node)
    return isinstance(t, Tensor) and t.is_floating_point()


def _is_packed(t: Any) -> bool:
    """Whether a constant may be a low-bit weight: not lengths, offsets or indices, which have one dimension."""
    return isinstance(t, Tensor) and t.ndim >= 2 and t.dtype in LOW_BIT and t.dtype not in (torch.int64, torch.bool)


def _resumed(operand: fx.Node, c: Contraction) -> bool:
    """Whether a matmul reads a matrix that was handed over as it is, in the place of a weight."""
    if target_name(c.node) == "linear" and operand is not c.b:
        return False
    while operand.op == "call_method" and operand.target in ("t", "transpose", "to", "contiguous", "float", "half"):
        operand = operand.all_input_nodes[0]
    t = fake_value(operand)
    return operand.op == "placeholder" and isinstance(t, Tensor) and t.ndim == 2 and t.is_floating_point()


def _size(sizes: dict[str, Any], labels: Sequence[str]) -> int:
    total = 1
    for label in labels:
        total *= int(sizes[label])
    return total


def _may_be_low_bit(cut: Slice, values: Sequence[Tensor]) -> bool:
    if any(v.dtype in LOW_BIT or is_traceable_wrapper_subclass(v) for v in values):
        return True
    for node in cut.nodes:
        name = target_name(node)
        if any(word in name for word in _ROUNDERS) or (name == "view" and torch.uint8 in node.args):
            return True
    return False


# What makes an activation rather than a weight: nothing is dequantized across it.
ACTIVATION = re.compile(r"linear|matmul|mm\b|einsum|conv|attention")


def _inside(module: fx.GraphModule, node: fx.Node) -> list[Kept]:
    """The matmuls in the bodies of a higher-order operation: they are not rewritten, and say so."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    found = []
    for argument in node.all_input_nodes:
        body = getattr(module, str(argument.target), None) if argument.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            for inner in body.graph.nodes:
                try:
                    spelled = contraction(inner) is not None
                except Refused:
                    spelled = True
                if spelled:
                    found.append(Kept(where(inner), inner, Reason.HIGHER_ORDER, ()))
    return found
