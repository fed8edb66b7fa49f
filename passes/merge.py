"""Which matmuls are run as one op: those of one x, and with what is done to their results.

silu(gate) * up of two matmuls, and the sum of one with a residual, are an op's epilogue (kernels/epilogues.py). Weights
that are packed already join by their tiles, and so do without silu_mul, whose rows stand by turns.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from ..errors import Reason, Refused
from ..formats import concat, refit, rows
from ..kernels.epilogues import TURN, by_turns
from ..types import ZEROS, Format, QWeight
from .constants import Constants, fake_value, target_name
from .prove import Recovered
from .recognise import Match

# What gives the same x again, where libraries write it once for each matmul.
_SAME = ("to", "view", "reshape", "contiguous", "float", "half", "bfloat16", "flatten", "type_as")


@dataclass(frozen=True)
class Bundle:
    """Matches that one op serves. `outputs` are the nodes it replaces, `after` those that its epilogue does.

    `other` is the residual of epilogue "add".
    """

    matches: tuple[Match, ...]
    outputs: tuple[fx.Node, ...]
    epilogue: str = ""
    after: tuple[fx.Node, ...] = ()
    other: fx.Node | None = None

    @property
    def done(self) -> bool:
        """Whether the graph has it so already: a packed weight by itself."""
        return bool(self.matches[0].recovered.layout) and len(self.matches) == 1 and not self.epilogue

    def simpler(self) -> list[Bundle]:
        """The same with less in one op; nothing less than one matmul alone."""
        if self.epilogue:
            return [Bundle(self.matches, tuple(m.output for m in self.matches))]
        return [alone(m) for m in self.matches] if len(self.matches) > 1 else []


def bias_of(match: Match) -> fx.Node | None:
    """The bias of a match, before casts and the like that change nothing."""
    node = match.bias
    while node is not None and target_name(node) in _SAME and _alike(node, node.all_input_nodes[0]):
        node = node.all_input_nodes[0]
    return node


def join(recovered: Sequence[Recovered], epilogue: str, experts: bool = False) -> tuple[QWeight, ...]:
    """The weights of one match, or those of all the rows of several, as their op takes them. Raises Refused.

    One for each place of a batch; those of `experts` are one below the other.
    """
    joined = tuple(_joined(each, epilogue) for each in zip(*(r.weights for r in recovered), strict=True))
    if not experts:
        return joined
    common = widest([w.format for w in joined])
    fitted = [refit(w, common, None if w.table is None else tuple(w.table.shape)) for w in joined]
    return (_joined([w for w in fitted if w is not None], ""),) if None not in fitted else _apart()


def widest(formats: Sequence[Format]) -> Format:
    """The one that may hold weights of all `formats`."""
    return max(formats, key=lambda f: (f.bits, ZEROS.index(f.zero), -f.group))


def _joined(weights: Sequence[QWeight], epilogue: str) -> QWeight:
    first = weights[0]
    if len({(w.format, w.k) for w in weights}) > 1 or not all(_same(first, w) for w in weights):
        _apart()
    joined = concat(weights) if len(weights) > 1 else first
    return rows(joined, by_turns(joined.n).to(joined.codes.device)) if epilogue == "silu_mul" else joined


def _apart() -> NoReturn:
    raise Refused(Reason.NO_KERNEL, "weights that do not join")


def join_biases(biases: Sequence[Tensor | None], sizes: Sequence[int], epilogue: str) -> Tensor | None:
    """The bias of several matches of so many rows as their op takes it, zero for None; None where none has one."""
    given = next((b for b in biases if b is not None), None)
    if given is None:
        return None
    joined = torch.cat([given.new_zeros(n) if b is None else b.detach() for b, n in zip(biases, sizes, strict=True)])
    return joined[by_turns(len(joined)).to(joined.device)] if epilogue == "silu_mul" else joined


def alone(match: Match) -> Bundle:
    """A match by itself."""
    return Bundle((match,), (match.output,))


def bundles(matches: Sequence[Match], constants: Constants) -> list[Bundle]:
    """All matches, each in one bundle, in the order of the graph."""
    once = Counter(id(m.recovered) for m in matches)
    groups: list[list[Match]] = []
    of_x: dict[Any, list[list[Match]]] = defaultdict(list)
    for match in matches:
        plain = _plain(match, constants) and once[id(match.recovered)] == 1
        r = match.recovered
        of = (_spelled(match.x), match.contraction.routing, match.dtype, r.formats[0], r.k, r.layout)
        alike = of_x[of] if plain else []
        group = next((g for g in alike if _joins(g, match, constants)), None)
        if group is None:
            group = []
            groups.append(group)
            alike.append(group)
        group.append(match)
    out: list[Bundle] = []
    taken: set[fx.Node] = set()
    for group in groups:
        ready = all(_plain(m, constants) and once[id(m.recovered)] == 1 for m in group)
        bundle = (ready and (_silu_mul(group, constants) or _add(group, constants, taken))) or None
        out.append(bundle or Bundle(tuple(group), tuple(m.output for m in group)))
        taken.update(out[-1].after)
    return out


def _plain(match: Match, constants: Constants) -> bool:
    """Whether an op gives the match's output as it is: y[m..., n], no batch, at most a bias that is a parameter."""
    c, r = match.contraction, match.roles
    if (r.batch and c.ends is None) or len(r.n) != 1 or r.y_labels != (*r.m, *r.n) or c.alpha != 1:
        return False
    if match.recovered.fused or match.recovered.across:
        return False
    if fake_value(match.output).dtype != match.dtype or any(label[-1] == "!" for label in (*r.x_labels, *r.w_labels)):
        return False
    leaf = bias_of(match)
    if leaf is None:
        return True
    bias = constants.values.get(leaf)
    if bias is None or constants.mutated(leaf) or c.beta != 1 or fake_value(match.output).requires_grad:
        return False
    return tuple(bias.shape) == (match.n,) and bias.dtype == match.dtype


def _spelled(x: fx.Node) -> str:
    """A name for x, the same where it is computed again in the same way."""
    if target_name(x) not in _SAME:
        return x.name
    args, kwargs = fx.node.map_arg((x.args, dict(x.kwargs)), _spelled)
    return f"{target_name(x)}{args}{kwargs}"


def _joins(group: Sequence[Match], match: Match, constants: Constants) -> bool:
    """Whether one op on the first match's x can serve this one too."""
    same = _same(group[0].recovered.weights[0], match.recovered.weights[0])
    return same and all(_stays(m, match.output, constants) for m in (group[0], match))


def _same(v: QWeight, w: QWeight) -> bool:
    """Whether two weights have the same permutation, and the same table or both one for each row."""
    pairs = [(v.perm, w.perm)]
    apart = v.table is not None and w.table is not None and v.table.ndim == w.table.ndim > 1
    pairs += [] if apart else [(v.table, w.table)]
    return all(a is b if a is None or b is None else a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _stays(match: Match, until: fx.Node, constants: Constants) -> bool:
    """Whether the x of a match is what it was when the match read it, at a later node."""
    first, last, nodes = constants.order[match.anchor], constants.order[until], [match.x]
    for node in nodes:
        if any(first < constants.order[w] < last for w in constants.writers(node)):
            return False
        if target_name(node) in _SAME:
            nodes.extend(node.all_input_nodes)
    return True


def _only_user(node: fx.Node, *names: str) -> fx.Node | None:
    """The one node that reads `node`, if it is a call of such a name with nothing but operands."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and target_name(user) in names and _operands_only(user) else None


def _operands_only(node: fx.Node) -> bool:
    return all(isinstance(a, fx.Node) for a in node.args) and not any(node.kwargs.values())


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two results are tensors of one dtype and shape."""
    s, t = fake_value(a), fake_value(b)
    if not isinstance(s, Tensor) or not isinstance(t, Tensor):
        return False
    # Symbols are compared as text: comparing their values would add a guard.
    return s.dtype == t.dtype and s.device == t.device and [str(n) for n in s.shape] == [str(n) for n in t.shape]


def _silu_mul(group: Sequence[Match], constants: Constants) -> Bundle | None:
    if len(group) != 2 or group[0].n % TURN or group[0].recovered.layout:
        return None
    for gate, up in (group, group[::-1]):
        silu = _only_user(gate.output, "silu")
        mul = silu and _only_user(silu, "mul", "multiply")
        if silu is None or mul is None or _only_user(up.output, "mul", "multiply") is not mul:
            continue
        alike = _alike(gate.output, up.output) and _alike(mul, up.output)
        if alike and set(mul.args) == {silu, up.output} and all(_stays(m, mul, constants) for m in group):
            return Bundle((gate, up), (mul,), "silu_mul", (silu, mul))
    return None


def _add(group: Sequence[Match], constants: Constants, taken: set[fx.Node]) -> Bundle | None:
    if len(group) != 1 or group[0].contraction.routing is not None:
        return None
    match = group[0]
    add = _only_user(match.output, "add")
    if add is None or add in taken or len(add.args) != 2 or not _stays(match, add, constants):
        return None
    other = next((a for a in add.args if a is not match.output), None)
    if not isinstance(other, fx.Node) or not _alike(other, match.output) or not _alike(add, match.output):
        return None
    return Bundle((match,), (add,), "add", (add,), other)
