"""Weights that are picked by the input from those of many experts: w[ids] of a constant w [experts, ...]."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from .canonicalize import Contraction
from .constants import Constants, fake_value, target_name

# What leaves each picked weight as it is, but for its dtype.
_CASTS = ("to", "float", "half", "bfloat16", "contiguous")


def routed(c: Contraction, constants: Constants) -> Contraction:
    """The contraction with the weights of all experts in place of those that were picked; itself where none were."""
    if c.bias is not None or c.fused or c.ends is not None or c.a in constants or c.b in constants:
        return c
    for w, x in ((c.b, c.a), (c.a, c.b)):
        labels, names = (c.b_labels if w is c.b else c.a_labels), (c.a_labels if w is c.b else c.b_labels)
        found = _picked(w, constants)
        if found is None:
            continue
        base, ids, axes = found
        labels = tuple(labels[i] for i in axes)
        chosen, own = labels[: fake_value(ids).ndim], labels[fake_value(ids).ndim :]
        sizes = dict(zip(chosen, fake_value(ids).shape, strict=True))
        # Only the first may be a symbol; what else x has rows of would be rows of every picked weight.
        plain = all(isinstance(size, int) for size in [*sizes.values()][1:])
        spread = [label for label in chosen if label not in names and not isinstance(sizes[label], int)]
        more = [
            label
            for label, size in zip(names, fake_value(x).shape, strict=True)
            if label not in (*chosen, *own) and not (isinstance(size, int) and size == 1)
        ]
        if plain and not spread and not more and chosen and all(label in c.y_labels for label in chosen):
            return replace(c, a=x, b=base, a_labels=names, b_labels=("E", *own), ids=ids, chosen=chosen, picked=w)
    return c


def _picked(w: fx.Node, constants: Constants) -> tuple[fx.Node, fx.Node, list[int]] | None:
    """The constant that `w` is picked from along its first dimension, by what, and where each dimension is in `w`."""
    axes = list(range(fake_value(w).ndim))
    while w.op in ("call_function", "call_method") and w not in constants:
        name, args = target_name(w), w.args
        if name in _CASTS and len(w.all_input_nodes) == 1:
            w = w.all_input_nodes[0]
        elif name in ("transpose", "swapaxes") and len(args) == 3 and all(isinstance(a, int) for a in args[1:]):
            i, j = (int(a) % len(axes) for a in args[1:])  # type: ignore[arg-type]
            axes[i], axes[j], w = axes[j], axes[i], w.all_input_nodes[0]
        elif (w.target is getattr and args[1] == "mT") or name == "mT":
            axes[-1], axes[-2], w = axes[-2], axes[-1], w.all_input_nodes[0]
        else:
            break
    base, ids = _index(w)
    if base is None or ids is None or base not in constants or ids in constants:
        return None
    t = fake_value(ids)
    whole = isinstance(t, torch.Tensor) and t.dtype in (torch.int64, torch.int32) and t.ndim > 0
    # The dimensions that pick stay in front, in their order.
    return (base, ids, axes) if whole and axes[: t.ndim] == list(range(t.ndim)) else None


def _index(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """What a node indexes along the first dimension, and by what."""
    if node.target is operator.getitem:
        base, index = node.args
        if isinstance(index, tuple) and len(index) > 0 and all(i == slice(None) for i in index[1:]):
            index = index[0]
    elif target_name(node) == "index_select" and len(node.args) == 3 and node.args[1] == 0:
        base, _, index = node.args
    else:
        return None, None
    nodes = isinstance(base, fx.Node) and isinstance(index, fx.Node) and isinstance(fake_value(base), torch.Tensor)
    return (base, index) if nodes else (None, None)  # type: ignore[return-value]
