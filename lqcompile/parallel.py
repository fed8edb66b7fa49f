"""Packed layers on several devices: styles for `parallelize_module` that cut a PackedLinear between ranks.

    plan = {"layers.*.up": ColwisePacked(), "layers.*.down": RowwisePacked()}
    parallelize_module(model, init_device_mesh("cuda", (2,)), plan)

Each rank keeps its own part and copies no other: of a model from `load_packed(model, path, device=None)`, whose layers
are mapped into memory, it copies its part of the file alone. Then `.to(device)`. For inference: there are no gradients.

What can be cut: whole tiles, as many for each rank. Colwise each rank has n / ranks of the outputs, a multiple of the
rows of a tile: 32 in the order of a GPU, 16 in that of a CPU. Rowwise it has k / ranks of the inputs, a multiple of
128, and of the group, or an equal part of one: a row's one scale is then each rank's. There is no tail: what does not
divide so is refused, and so is a weight in act-order rowwise, as its groups are all over the inputs. Results are of x's
dtype; partial ones are rounded to it, and summed in it. The bias is added once, by rank 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from .errors import ArgumentError
from .kernels import pages, peers
from .kernels.layout import LAYOUTS, Tiles
from .packed import PackedLinear

LAST = Shard(-1)
# Columns of a tile; of rows stored in bytes, a multiple of what any field fills.
WIDTH = 128


class ColwisePacked(ParallelStyle):
    """Each rank has some of the outputs of a PackedLinear. x is the same on all ranks.

    output_layouts   Shard(-1), each rank's own outputs, or Replicate(), all of them on each rank
    """

    def __init__(self, *, output_layouts: Placement = LAST) -> None:
        super().__init__()
        self.output = _among("output_layouts", output_layouts, (LAST, Replicate()))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer, rank, ranks = _layer_and_rank(module, device_mesh)
        cut_outputs(layer, rank, ranks)
        group = device_mesh.get_group()

        def whole(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_local(args[0], Replicate()), *args[1:])

        def gather(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            return collectives.wait_tensor(collectives.all_gather_tensor(y, y.ndim - 1, group))

        layer.register_forward_pre_hook(whole)
        if self.output != LAST:
            layer.register_forward_hook(gather)
        return layer


class RowwisePacked(ParallelStyle):
    """Each rank has some of the inputs of a PackedLinear; y, on all ranks, is the sum of theirs.

    input_layouts   Shard(-1), each rank is given its own inputs, or Replicate(), all, of which it takes its own
    one_shot        small sums on GPUs that read each other's memory by one kernel, else by the group's collective;
                    all ranks must then apply the style together
    """

    def __init__(self, *, input_layouts: Placement = LAST, one_shot: bool = False) -> None:
        super().__init__()
        self.input = _among("input_layouts", input_layouts, (LAST, Replicate()))
        self.one_shot = one_shot

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer, rank, ranks = _layer_and_rank(module, device_mesh)
        cut_inputs(layer, rank, ranks)
        group, k = device_mesh.get_group(), layer.in_features
        direct = group.group_name if self.one_shot else ""
        if self.one_shot:
            peers.meet(group, device_mesh.device_type)

        def own(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = _local(args[0], self.input)
            return (x if self.input == LAST else x[..., rank * k : (rank + 1) * k], *args[1:])

        def add(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            if direct:
                return peers.ALL_REDUCE(y, direct)
            return collectives.wait_tensor(collectives.all_reduce(y, "sum", group))

        layer.register_forward_pre_hook(own)
        layer.register_forward_hook(add)
        return layer


def cut_outputs(layer: PackedLinear, rank: int, ranks: int) -> None:
    """Leaves of a layer rank's part of its outputs, in place. Raises ArgumentError."""
    order = LAYOUTS[layer.layout].order(layer.order)
    height = order.height if isinstance(order, Tiles) else 1
    n = _share(layer, "out_features", layer.out_features, ranks, height)
    rows = slice(rank * n, (rank + 1) * n)
    tiles = slice(rank * n // height, (rank + 1) * n // height)
    parts = [part[tiles] for part in layer.parts]
    if layer.format.form == "table":
        table = layer.parts[-1]
        parts[-1] = table if table.ndim == 1 else table[rows]
    bias = layer._parameters["bias"]
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach()[rows].clone(), requires_grad=bias.requires_grad)
    layer.out_features = n
    layer._hold(layer.layout, layer.order, pages.apart(parts))


def cut_inputs(layer: PackedLinear, rank: int, ranks: int) -> None:
    """Leaves of a layer rank's part of its inputs, in place; the bias with rank 0. Raises ArgumentError."""
    if "perm" in layer._buffers:
        accepted = "a weight whose groups are of consecutive inputs, or ColwisePacked"
        raise ArgumentError(_name(layer), "in act-order", accepted)
    layout, f = LAYOUTS[layer.layout], layer.format
    k = _share(layer, "in_features", layer.in_features, ranks, WIDTH)
    if k % f.group and f.group % k:
        accepted = f"a divisor of {k}, the inputs of one of {ranks} ranks, or a multiple of it"
        raise ArgumentError(f"{_name(layer)}.format.group", f.group, accepted)
    first = rank * k // f.group
    groups = slice(first, first + max(1, k // f.group))
    if isinstance(layout.order(layer.order), Tiles):
        columns: Sequence[slice] = [slice(rank * k // WIDTH, (rank + 1) * k // WIDTH)]
    else:
        columns = [slice(rank * k * w // 8, (rank + 1) * k * w // 8) for w in layout.widths(f, layer.order)]
    parts = list(layer.parts)
    table = [parts.pop()] if f.form == "table" else []
    parts = [part[:, columns[i] if i < len(columns) else groups] for i, part in enumerate(parts)]
    parts += [t if t.ndim < 3 else t[:, groups] for t in table]
    layer.in_features, layer.format = k, dataclasses.replace(f, group=min(f.group, k))
    if rank:
        layer._parameters["bias"] = None
    layer._hold(layer.layout, layer.order, pages.apart(parts))


def _share(layer: PackedLinear, what: str, size: int, ranks: int, tile: int) -> int:
    if size % (ranks * tile):
        accepted = f"a multiple of {ranks * tile}: whole tiles of {tile} for each of {ranks} ranks"
        raise ArgumentError(f"{_name(layer)}.{what}", size, accepted)
    return size // ranks


def _name(layer: PackedLinear) -> str:
    return layer.path or "the layer"


def _layer_and_rank(module: nn.Module, mesh: DeviceMesh) -> tuple[PackedLinear, int, int]:
    if not isinstance(module, PackedLinear):
        raise ArgumentError("module", type(module).__name__, "a PackedLinear; lqcompile.convert makes them")
    if mesh.ndim != 1:
        raise ArgumentError("device_mesh.ndim", mesh.ndim, "1; take one dimension of it, such as mesh['tp']")
    return module, mesh.get_local_rank(), mesh.size()


def _local(x: Any, placement: Placement) -> Any:
    """A DTensor's own part under a placement; what is local already is taken for that."""
    if not isinstance(x, DTensor):
        return x
    wanted = Shard(x.ndim - 1) if placement == LAST else placement
    return x.redistribute(placements=[wanted]).to_local()


def _among(name: str, value: Placement, accepted: Sequence[Placement]) -> Placement:
    if value not in accepted:
        raise ArgumentError(name, value, " | ".join(map(str, accepted)))
    return value
