"""Which nodes of a Dynamo graph are constant, and the slice of the graph that computes one of them.

A parameter or buffer of the model is constant; so is what is computed from constants alone. In-place writes count:
a tensor that is written with something that depends on the input is not constant, nor is a parameter that is written.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import Reason, Refused

_IN_PLACE = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.ipow, operator.imatmul,
}  # fmt: skip


def fake_value(node: fx.Node) -> Any:
    """The fake result that tracing left on a node."""
    return node.meta.get("example_value", node.meta.get("val"))


def plain(t: torch.Tensor) -> torch.Tensor:
    """A tensor without the behaviour of a class that only overrides functions: tracing has written that out."""
    overrides = type(t) not in (torch.Tensor, torch.nn.Parameter) and not is_traceable_wrapper_subclass(t)
    if not overrides:
        return t
    with torch._C.DisableTorchFunctionSubclass():
        return t.detach().as_subclass(torch.Tensor)


def target_name(node: fx.Node) -> str:
    """The name of the function or method that a node calls, "" if it has none."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def storage_of(node: fx.Node) -> int | None:
    """Identifies the memory behind a node's tensor: views of one another share it."""
    value = fake_value(node)
    if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
        return None
    while is_functorch_wrapped_tensor(value):
        value = get_unwrapped(value)
    return value.untyped_storage()._cdata


def written(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that a node writes to in place."""
    out = _nodes(node.kwargs.get("out"))
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        names = [a.name for a in target._schema.arguments]
        for i, argument in enumerate(target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = node.args[i] if i < len(node.args) else node.kwargs.get(names[i])
                out += _nodes(value)
        return out
    name = target_name(node)
    in_place = node.op == "call_function" and target in _IN_PLACE
    # operator.and_ and its like only dodge a keyword.
    trailing = name.endswith("_") and not name.endswith("__")
    in_place = in_place or (trailing and getattr(target, "__module__", None) != "_operator")
    if in_place or node.kwargs.get("inplace") is True:
        out += _nodes(first)
    return out


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


@dataclass(frozen=True)
class Slice:
    """The nodes that compute `result` from constants alone, in program order, writes in place included."""

    nodes: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]
    result: fx.Node

    @functools.cached_property
    def key(self) -> str:
        """Equal for slices of equal structure: the same operations on leaves of the same shape, stride and dtype."""
        number = {node: i for i, node in enumerate(self.nodes)}
        rows = []
        for node in self.nodes:
            if node in self.leaves:
                value = fake_value(node)
                extra = value.__tensor_flatten__()[1] if is_traceable_wrapper_subclass(value) else None
                rows.append(
                    f"{type(value).__name__} {value.dtype} {tuple(value.shape)} {value.stride()} {extra} {value.device}"
                )
            else:
                args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{number[n]}")
                rows.append(f"{node.op} {node.target} {args}")
        return "\n".join([*rows, str(number[self.result])])

    @functools.cached_property
    def only_torch(self) -> bool:
        """Whether nothing but PyTorch's own operations on plain tensors is in it: no code of a library is run."""
        operations = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
        own = all(
            not isinstance(n.target, operations) or str(n.target).partition(".")[0] in ("aten", "prims")
            for n in self.nodes
        )
        return own and not any(is_traceable_wrapper_subclass(fake_value(n)) for n in self.leaves)


class Constants:
    """The constant nodes of one graph. `values` maps its static placeholders and attributes to real tensors."""

    def __init__(self, graph: fx.Graph, values: Mapping[fx.Node, torch.Tensor]) -> None:
        self.values = values
        self._nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self._nodes)}
        self._writers: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self._nodes:
            if node.op in ("call_function", "call_method"):
                for target in written(node):
                    storage = storage_of(target)
                    if storage is not None:
                        self._writers[storage].append(node)
        self._tainted: set[int] = {s for s in map(storage_of, values) if s is not None and s in self._writers}
        self._constant = self._mark()

    def __contains__(self, node: object) -> bool:
        return node in self._constant

    def _mark(self) -> set[fx.Node]:
        while True:
            constant: set[fx.Node] = set()
            for node in self._nodes:
                if self._is_constant(node, constant):
                    constant.add(node)
            spoiled = {
                storage
                for storage, writers in self._writers.items()
                if storage not in self._tainted
                and any(i not in constant for w in writers for i in w.all_input_nodes if storage_of(i) != storage)
            }
            if not spoiled:
                return constant
            self._tainted |= spoiled

    def _is_constant(self, node: fx.Node, constant: set[fx.Node]) -> bool:
        if storage_of(node) in self._tainted:
            return False
        if node.op in ("placeholder", "get_attr"):
            return node in self.values
        if node.op not in ("call_function", "call_method"):
            return False
        return all(i in constant for i in node.all_input_nodes)

    def writers(self, node: fx.Node) -> Sequence[fx.Node]:
        """The nodes that write in place to the memory of a node."""
        storage = storage_of(node)
        return self._writers.get(storage, ()) if storage is not None else ()

    def mutated(self, node: fx.Node) -> bool:
        """Whether a node is a parameter or buffer that the graph writes to."""
        return node in self.values and storage_of(node) in self._tainted

    def computed_from(self, node: fx.Node, stop: Callable[[fx.Node], bool]) -> list[fx.Node]:
        """A node and all that it is computed from, writes included, but nothing beyond the nodes at which to `stop`."""
        seen, stack = {node: None}, [node]
        while stack:
            current = stack.pop()
            if not stop(current):
                storage = storage_of(current)
                writers = self._writers.get(storage, ()) if storage is not None else ()
                fresh = [n for n in (*current.all_input_nodes, *writers) if n not in seen]
                seen.update(dict.fromkeys(fresh))
                stack.extend(fresh)
        return list(seen)

    def slice(self, result: fx.Node, before: fx.Node, given: Sequence[fx.Node] = ()) -> Slice:
        """The slice that computes `result` as node `before` reads it; `given` nodes are its last leaves."""
        limit, wanted, stack = self.order[before], {result}, [result]
        while stack:
            node = stack.pop()
            if node in given:
                continue
            storage = storage_of(node)
            writers = self._writers.get(storage, ()) if storage is not None else ()
            for source in (*node.all_input_nodes, *(w for w in writers if self.order[w] < limit)):
                if source not in wanted:
                    wanted.add(source)
                    stack.append(source)
        nodes = tuple(sorted(wanted, key=self.order.__getitem__))
        leaves = [n for n in nodes if n in self.values and n not in given]
        return Slice(nodes, (*leaves, *given), result)

    def check_versions(self, cut: Slice) -> None:
        """Raises Refused where a tensor of the slice was written more often, while tracing, than we know of.

        Tracing counts every write in the fake tensor's version: a write that `written` does not know shows there.
        """
        roots: dict[int, fx.Node] = {}
        for node in cut.nodes:
            storage, value = storage_of(node), fake_value(node)
            if storage is None or value.is_inference():
                continue
            root = roots.setdefault(storage, node)
            unknown = value._version - len(self._writers.get(storage, ()))
            if unknown > 0 and unknown > _version_at_birth(root):
                raise Refused(Reason.MUTATED, node.name)


def _version_at_birth(node: fx.Node) -> int:
    """The version of a fresh result of a node: some operations write to their own output (torch.stack does)."""
    if node.op not in ("call_function", "call_method"):
        return 0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), fake_value)
    target: Any = node.target
    fresh = getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
    return fresh._version if isinstance(fresh, torch.Tensor) else 0


@dataclass
class Trail:
    """Which node of a slice is being evaluated, the first at which its algebra was `lost`, and the form it had then.

    form   of `types.FORMS`: "table" where codes were looked up, else "affine"
    fused  the operation on a packed weight that the slice ends in, "" for none
    """

    node: str = ""
    lost: str = ""
    form: str = ""
    fused: str = ""


def run(cut: Slice, leaves: Sequence[torch.Tensor | None], module: torch.nn.Module, trail: Trail) -> torch.Tensor:
    """Evaluates a slice on tensors for its leaves. Raises Refused where an operation fails on them."""
    env: dict[fx.Node, Any] = dict(zip(cut.leaves, leaves, strict=True))
    interpreter = fx.Interpreter(module, garbage_collect_values=False, graph=cut.result.graph)
    last = {source: node for node in cut.nodes for source in node.all_input_nodes}
    for node in cut.nodes:
        if node in env:
            continue
        trail.node = node.name
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        try:
            env[node] = getattr(interpreter, node.op)(node.target, args, kwargs)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise Refused(Reason.UNSUPPORTED_OP, f"{node.name}: {error}"[:200]) from error
        for source in node.all_input_nodes:
            if last.get(source) is node and source is not cut.result:
                del env[source]
    return env[cut.result]
