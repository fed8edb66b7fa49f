"""Equal operations of a functional graph are done once: what every layer of a model spells anew, such as its mask.

AOTAutograd does so where it trains, by torch's fx_graph_cse, which makes another graph; a pass of Inductor must change
the one that it is given. Without it a mask is computed for each attention, by a kernel of its own.
"""

from __future__ import annotations

import torch
from torch import fx

from .constants import storage_of

PURE = ("aten", "prims")


def once(graph: fx.Graph) -> int:
    """Puts the first of equal operations in place of the others, and returns of how many. Never across a write."""
    first: dict[str, fx.Node] = {}
    gone = 0
    # Tensors that are handed out may be written to, each by itself.
    handed_out = {storage_of(node) for node in graph.output_node().all_input_nodes} - {None}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
            # Calls of Python are numbers and items of tuples, but for higher-order operations.
            if isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
                first.clear()
            continue
        if (
            storage_of(node) in handed_out
            or target.namespace not in PURE
            or torch.Tag.nondeterministic_seeded in target.tags
            or node.is_impure()
        ):
            continue
        # By their text numbers differ where they are equal and yet not the same: 0.0 and -0.0, 1 and True.
        same = first.setdefault(f"{target} {node.args} {node.kwargs}", node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            gone += 1
    return gone
