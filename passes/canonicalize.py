"""Every spelling of a matmul as one thing: two operands and the labels of their dimensions, as einsum writes them.

F.linear(x, w) is "mk,nk->mn", x @ w is "mk,kn->mn", a 1x1 convolution is "bkhw,nk->bnhw". A new spelling is one
function in `SPELLINGS`; nothing after this file knows how a matmul was written.
"""

from __future__ import annotations

import operator
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import Reason, Refused
from . import meanings
from .constants import fake_value

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Contraction:
    """y = alpha * (sum of a * b over the labels that y lacks) + beta * bias. A label has one size wherever it stands.

    The bias broadcasts against y, or, with `bias_along_n`, is one number for each output feature. `fused`: the
    operation reads a packed weight in `b`, whose shape says nothing. `ends`: `b` holds a weight for each expert, along
    its label "E", and each row of a is multiplied by one of them: expert e's rows end at ends[e]. Or, in place of
    `ends`, `ids` along the labels `chosen` say whose weight it is, as `picked` was picked from b.
    """

    node: fx.Node
    a: fx.Node
    b: fx.Node
    a_labels: Labels
    b_labels: Labels
    y_labels: Labels
    bias: fx.Node | None = None
    alpha: float = 1.0
    beta: float = 1.0
    bias_along_n: bool = False
    fused: bool = False
    ends: fx.Node | None = None
    ids: fx.Node | None = None
    chosen: Labels = ()
    picked: fx.Node | None = None

    @property
    def routing(self) -> fx.Node | None:
        """What says whose weight each row is multiplied by, None where there is one weight or one for each place."""
        return self.ids if self.ends is None else self.ends

    def sizes(self, operand: fx.Node) -> dict[str, Any]:
        """The size of each label of an operand."""
        if self.fused and operand is self.b:
            return {"N": fake_value(self.node).shape[-1], "K": fake_value(self.a).shape[-1]}
        labels = self.a_labels if operand is self.a else self.b_labels
        return dict(zip(labels, fake_value(operand).shape, strict=True))


@dataclass(frozen=True)
class Roles:
    """A contraction once it is known which operand is the weight: the labels by who has them.

    batch: all three, or experts; m: x and y; n: w and y; k: x and w. A label that ends in "!" has size 1, belongs to
    one operand alone, and is dropped from it.
    """

    x_labels: Labels
    w_labels: Labels
    y_labels: Labels
    batch: Labels
    m: Labels
    n: Labels
    k: Labels


def roles(c: Contraction, weight: fx.Node) -> Roles:
    """Sorts the labels by who has them. Raises Refused for a contraction that is no matmul."""
    x, w = (c.a_labels, c.b_labels) if weight is c.b else (c.b_labels, c.a_labels)
    y = c.y_labels
    if len(set(x)) != len(x) or len(set(w)) != len(w):
        raise Refused(Reason.UNSUPPORTED_SPELLING, c.node.name)
    batch = ("E",) if c.routing is not None else tuple(label for label in w if label in x and label in y)
    m = tuple(label for label in x if label not in w and label[-1] != "!")
    n = tuple(label for label in w if label not in (*x, *batch) and label[-1] != "!")
    k = tuple(label for label in w if label in x and label not in y)
    if not k or any(label not in y for label in (*m, *n)):
        raise Refused(Reason.UNSUPPORTED_SPELLING, c.node.name)
    return Roles(x, w, y, batch, m, n, k)


def contraction(node: fx.Node) -> Contraction | None:
    """The contraction that a node computes, None if it is no matmul. Raises Refused for one beyond description."""
    name = _name(node)
    spelling = SPELLINGS.get(name) if name else None
    if not isinstance(fake_value(node), torch.Tensor):
        return None
    return spelling(node, _Arguments(node)) if spelling else _fused(node)


def qualified_name(node: fx.Node) -> str:
    """ "namespace::operation" of what a node calls; PyTorch's own functions are taken for operations of aten."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return getattr(packet, "_qualified_op_name", f"aten::{name}") if node.op == "call_function" else ""


def _fused(node: fx.Node) -> Contraction | None:
    """A matmul by a library's operation on a packed weight, where it is known what that means."""
    names = meanings.operands(qualified_name(node))
    if names is None:
        return None
    args = _Arguments(node)
    packet: Any = operator.attrgetter(qualified_name(node).replace("::", "."))(torch.ops)
    order = [argument.name for argument in packet.default._schema.arguments]
    x, w = (args.tensor(order.index(name), name)[0] for name in names[:2])
    bias = args.get(order.index(names[2]), (names[2],)) if names[2] else None
    lead = _letters(fake_value(x).ndim - 1)
    return Contraction(node, x, w, (*lead, "K"), ("N", "K"), (*lead, "N"), bias, bias_along_n=True, fused=True)


def _name(node: fx.Node) -> str | None:
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return None
    if qualified_name(node) in SPELLINGS:
        return qualified_name(node)
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        return name if namespace == "aten" else None
    module = getattr(node.target, "__module__", None) or "torch"
    if module.split(".")[0] not in ("torch", "_operator"):
        return None
    return getattr(node.target, "__name__", None)


class _Arguments:
    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def get(self, index: int, names: Sequence[str], default: Any = None) -> Any:
        if index < len(self.node.args):
            return self.node.args[index]
        return next((self.node.kwargs[name] for name in names if name in self.node.kwargs), default)

    def tensor(self, index: int, *names: str) -> tuple[fx.Node, torch.Tensor]:
        value = self.get(index, names)
        if not isinstance(value, fx.Node) or not isinstance(fake_value(value), torch.Tensor):
            raise Refused(Reason.UNSUPPORTED_SPELLING, self.node.name)
        return value, fake_value(value)


def _letters(count: int, start: int = 0) -> Labels:
    return tuple(string.ascii_letters[start : start + count])


def _product(node: fx.Node, a: fx.Node, b: fx.Node, **more: Any) -> Contraction:
    """numpy.matmul's rule: leading dimensions broadcast; one of size 1 is a label of its own."""
    a_shape, b_shape = fake_value(a).shape, fake_value(b).shape
    lead = max(len(a_shape), len(b_shape), 2) - 2
    shared = _letters(lead)
    a_lead, b_lead, y_lead = [], [], []
    for i, label in enumerate(shared):
        i_a, i_b = len(a_shape) - 2 - lead + i, len(b_shape) - 2 - lead + i
        one_a, one_b = i_a >= 0 and _is_one(a_shape[i_a]), i_b >= 0 and _is_one(b_shape[i_b])
        both = i_a >= 0 and i_b >= 0
        # Where one operand broadcasts, its dimension of size 1 is dropped and the other's stands alone.
        if i_a >= 0:
            a_lead.append(label + "!" if both and one_a and not one_b else label)
        if i_b >= 0:
            b_lead.append(label + "!" if both and one_b and not one_a else label)
        y_lead.append(label)
    a_labels = (*a_lead, *(("M", "K") if len(a_shape) > 1 else ("K",)))
    b_labels = (*b_lead, *(("K", "N") if len(b_shape) > 1 else ("K",)))
    y_labels = (*y_lead, *(("M",) if len(a_shape) > 1 else ()), *(("N",) if len(b_shape) > 1 else ()))
    return Contraction(node, a, b, a_labels, b_labels, y_labels, **more)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _matmul(node: fx.Node, args: _Arguments) -> Contraction:
    a, b = args.tensor(0, "input", "self")[0], args.tensor(1, "other", "mat2", "vec", "tensor")[0]
    return _product(node, a, b)


def _linear(node: fx.Node, args: _Arguments) -> Contraction:
    (x, x_value), (w, w_value) = args.tensor(0, "input"), args.tensor(1, "weight")
    bias = args.get(2, ("bias",))
    lead = _letters(x_value.ndim - 1)
    n = ("N",) if w_value.ndim == 2 else ()
    return Contraction(node, x, w, (*lead, "K"), (*n, "K"), (*lead, *n), bias, bias_along_n=True)


def _experts(node: fx.Node, args: _Arguments) -> Contraction:
    """torch's grouped matmul of x [m, k] and weights [experts, k, n], or of two batches as bmm has them."""
    (x, x_value), (w, w_value) = args.tensor(0, "input", "self", "mat_a"), args.tensor(1, "weight", "mat2", "mat_b")
    ends = args.get(2, ("offs",))
    if ends is None and x_value.ndim == w_value.ndim == 3:
        return _product(node, x, w)
    if (x_value.ndim, w_value.ndim) != (2, 3) or args.get(3, ("bias",)) is not None or not isinstance(ends, fx.Node):
        raise Refused(Reason.UNSUPPORTED_SPELLING, node.name)
    return Contraction(node, x, w, ("M", "K"), ("E", "K", "N"), ("M", "N"), ends=ends)


def _inner(node: fx.Node, args: _Arguments) -> Contraction:
    (a, a_value), (b, b_value) = args.tensor(0, "input", "self"), args.tensor(1, "other")
    m, n = _letters(a_value.ndim - 1), _letters(b_value.ndim - 1, 26)
    return Contraction(node, a, b, (*m, "K."), (*n, "K."), (*m, *n))


def _added(node: fx.Node, args: _Arguments) -> Contraction:
    bias = args.tensor(0, "input", "self")[0]
    a, b = args.tensor(1, "mat1", "mat", "batch1")[0], args.tensor(2, "mat2", "vec", "batch2")[0]
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if len(node.args) > 3 or not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
        raise Refused(Reason.UNSUPPORTED_SPELLING, node.name)
    return _product(node, a, b, bias=bias, alpha=float(alpha), beta=float(beta))


def _einsum(node: fx.Node, args: _Arguments) -> Contraction:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    tensors = [o for o in operands if isinstance(o, fx.Node) and isinstance(fake_value(o), torch.Tensor)]
    if not isinstance(equation, str) or len(tensors) != 2 or len(operands) != 2:
        raise Refused(Reason.UNSUPPORTED_SPELLING, node.name)
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2:
        raise Refused(Reason.UNSUPPORTED_SPELLING, node.name)
    widths = [fake_value(t).ndim - len(term.replace("...", "")) for t, term in zip(tensors, terms, strict=True)]
    dots = [widths[i] if "..." in term else 0 for i, term in enumerate(terms)]
    most = max(dots)

    def labels(term: str, count: int) -> Labels:
        head, dotted, tail = term.partition("...")
        hidden = tuple(f"{i}." for i in range(most - count, most)) if dotted else ()
        return (*head, *hidden, *tail)

    a_labels, b_labels = (labels(term, count) for term, count in zip(terms, dots, strict=True))
    if arrow:
        y_labels = labels(right, most)
    else:
        once = sorted(c for c in left if c.isalpha() and left.count(c) == 1)
        y_labels = (*(f"{i}." for i in range(most)), *once)
    sizes: dict[str, Any] = {}
    for tensor, names in zip(tensors, (a_labels, b_labels), strict=True):
        for label, size in zip(names, fake_value(tensor).shape, strict=True):
            known = sizes.setdefault(label, size)
            # Only plain sizes are compared: comparing symbols would add a guard.
            if isinstance(size, int) and isinstance(known, int) and size != known:
                raise Refused(Reason.UNSUPPORTED_SPELLING, node.name)
    return Contraction(node, tensors[0], tensors[1], a_labels, b_labels, y_labels)


def _tensordot(node: fx.Node, args: _Arguments) -> Contraction:
    (a, a_value), (b, b_value) = args.tensor(0, "a", "input", "self"), args.tensor(1, "b", "other")
    dims = args.get(2, ("dims",), 2)
    if isinstance(dims, int):
        dims = (list(range(a_value.ndim - dims, a_value.ndim)), list(range(dims)))
    if not isinstance(dims, (list, tuple)) or len(dims) != 2 or any(isinstance(d, int) for d in dims):
        raise Refused(Reason.UNSUPPORTED_SPELLING, node.name)
    a_dims, b_dims = [d % a_value.ndim for d in dims[0]], [d % b_value.ndim for d in dims[1]]
    a_labels, b_labels = list(_letters(a_value.ndim)), list(_letters(b_value.ndim, 26))
    for i, j in zip(a_dims, b_dims, strict=True):
        b_labels[j] = a_labels[i]
    y = [label for i, label in enumerate(a_labels) if i not in a_dims]
    y += [label for j, label in enumerate(b_labels) if j not in b_dims]
    return Contraction(node, a, b, tuple(a_labels), tuple(b_labels), tuple(y))


def _convolution(node: fx.Node, args: _Arguments) -> Contraction:
    (x, x_value), (w, w_value) = args.tensor(0, "input"), args.tensor(1, "weight")
    space = w_value.ndim - 2
    ones = (1,) * space
    stride, padding = args.get(3, ("stride",), 1), args.get(4, ("padding",), 0)
    stride, padding = ((v,) * space if isinstance(v, int) else v for v in (stride, padding))
    plain = tuple(w_value.shape[2:]) == ones and tuple(stride) == ones and args.get(6, ("groups",), 1) == 1
    if not plain or padding not in ((0,) * space, [0] * space, "valid", "same"):
        raise Refused(Reason.UNSUPPORTED_SPELLING, node.name)
    batch = ("b",) if x_value.ndim == space + 2 else ()
    where = _letters(space, 2)
    # The kernel's own sizes of one are labels that the weight alone has; they are dropped.
    w_labels = ("N", "K", *(f"{label}!" for label in where))
    return Contraction(
        node,
        x,
        w,
        (*batch, "K", *where),
        w_labels,
        (*batch, "N", *where),
        args.get(2, ("bias",)),
        bias_along_n=True,
    )


Spelling = Callable[[fx.Node, _Arguments], Contraction]
SPELLINGS: dict[str, Spelling] = {
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "imatmul", "__matmul__"), _matmul),
    **dict.fromkeys(("addmm", "addmv", "baddbmm"), _added),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "transformers::grouped_mm_fallback"), _experts),
    "linear": _linear,
    "inner": _inner,
    "einsum": _einsum,
    "tensordot": _tensordot,
}
