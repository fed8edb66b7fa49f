"""Matmuls of converted layers, on weights that are packed already, as what merge.py and the planner take: matches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..errors import Reason
from ..kernels.layout import LAYOUTS, Tiles
from ..types import Format, QWeight
from .canonicalize import Contraction, qualified_name, roles
from .constants import Constants, fake_value
from .prove import Recovered
from .recognise import Kept, Match


def ready(found: Sequence[Match | Kept], constants: Constants) -> list[Match]:
    """Those that may be run together with others, in the order of the graph."""
    packed = (_match(kept, constants) for kept in found if isinstance(kept, Kept) and kept.reason is Reason.PACKED)
    return [match for match in packed if match is not None]


def _match(kept: Kept, constants: Constants) -> Match | None:
    node = kept.node
    if len(node.args) != 9 or node.kwargs:
        return None
    x, given, bias, other, n, k, spec, epilogue, route = node.args
    if not isinstance(x, fx.Node) or not isinstance(given, (list, tuple)) or other is not None or epilogue:
        return None
    nodes = [part for part in given if isinstance(part, fx.Node)]
    values = [constants.values.get(part) for part in nodes]
    parts = [t for t in values if t is not None and type(t) in (Tensor, torch.nn.Parameter)]
    mutated = any(constants.mutated(part) for part in nodes)
    # A whole number of tiles: what follows them stands where it would in one weight of all rows.
    layout, format = qualified_name(node).partition("::")[2].removesuffix("_gemm"), Format.parse(str(spec))
    order = LAYOUTS[layout].order(fake_value(x).device.type)
    height = order.height if isinstance(order, Tiles) else 1
    if len(parts) != len(given) or mutated or not isinstance(n, int) or n % height or "/" in str(route):
        return None
    lead = tuple(f"m{i}" for i in range(fake_value(x).ndim - 1))
    c = Contraction(
        node, x, nodes[0], (*lead, "K"), ("N", "K"), (*lead, "N"), bias if isinstance(bias, fx.Node) else None,
        bias_along_n=True,
    )  # fmt: skip
    weight = _weight(layout, format, n, int(str(k)), tuple(parts))
    return Match(kept.where, c, roles(c, nodes[0]), node, node, x, c.bias, weight, tuple(nodes))


def _weight(layout: str, format: Format, n: int, k: int, parts: tuple[Tensor, ...]) -> Recovered:
    """Known by its shape alone; `again` unpacks it."""

    def unpacked(now: Sequence[Tensor]) -> Recovered:
        weight = LAYOUTS[layout].unpack(now, format, n, k)
        return Recovered((weight,), "", "", tuple(now), unpacked, key, layout=layout)

    key = f"packed {layout} {format.spec} {n} {k}"
    shape = QWeight(format, n, k, torch.empty((n, k), dtype=torch.uint8, device="meta"),
                    table=parts[-1] if format.form == "table" else None)  # fmt: skip
    return Recovered((shape,), "", "", parts, unpacked, key, layout=layout)
