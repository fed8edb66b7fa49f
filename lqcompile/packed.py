"""PackedLinear: a linear layer that owns its weight packed, and nothing else of it. `convert` makes them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import WORKLOAD
from .errors import ArgumentError
from .kernels import ops, pages
from .kernels.layout import LAYOUTS
from .kernels.registry import X_DTYPES
from .passes.pack import Packed
from .passes.plan import Choice, Planner
from .types import SCALE_DTYPES, Format, QWeight

DEVICES = ("cpu", "cuda")
META = "meta"
EXTRA = "_extra_state"


class PackedLinear(nn.Module):
    """y[..., n] = x[..., k] @ w[n, k].T + bias[n]; x float16 | bfloat16 | float32, y of x's dtype.

    The parts of w are buffers, named as its layout names them, beside `perm` (int64 [k]) for a weight in act-order.
    They are proved values: `.half()` and `.to(dtype)` change the bias alone, never a scale. On a device of another type
    the kernels read another order, so that `.to(device)` packs w anew; `load_state_dict` does where a state comes from
    there. Any number of rows is served; which kernel serves how many is decided for `workload`. Compiled for "lq", the
    parts of layers that run as one op become views of one tensor, unless something else may read their memory: a CUDA
    graph that was captured by hand before that must be captured again.

    layout, order     how the parts are packed, and for the kernels of which type of device
    x_dtype           the dtype of x that the layout was chosen for
    compute, result   the dtypes to multiply in and to return, None for x's
    path              the name that the layer had in the model that was converted or loaded, to be told by
    """

    def __init__(
        self, packed: Packed, bias: Tensor | None = None, *, x_dtype: torch.dtype | None = None,
        compute: torch.dtype | None = None, result: torch.dtype | None = None,
        workload: Mapping[int, float] = WORKLOAD, order: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        # Inductor may find code in its cache that calls the launcher, and must know it then.
        ops.register_lowerings()
        self.in_features, self.out_features, self.format = packed.k, packed.n, packed.format
        self.x_dtype = x_dtype or compute or SCALE_DTYPES[packed.format.scale_dtype]
        self.compute, self.result, self.workload = compute, result, dict(workload)
        self.names: tuple[str, ...] = ()
        self.path = ""
        self._hold(packed.layout, order or packed.parts[0].device.type, packed.parts)
        if packed.perm is not None:
            self.register_buffer("perm", packed.perm)
        if bias is not None and tuple(bias.shape) != (packed.n,):
            raise ArgumentError("bias.shape", tuple(bias.shape), f"({packed.n},)")
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_weight(
        cls, weight: QWeight, bias: Tensor | None = None, *, x_dtype: torch.dtype | None = None,
        compute: torch.dtype | None = None, result: torch.dtype | None = None,
        workload: Mapping[int, float] = WORKLOAD,
    ) -> PackedLinear:  # fmt: skip
        """Packs `weight` for the device that it is on, in the layout that takes the least time over `workload`.

        Raises ArgumentError for a weight that is not well formed, and for a device that has no kernels.
        """
        dtype = compute or x_dtype or SCALE_DTYPES[weight.format.scale_dtype]
        layout = plan(weight.format, weight.n, weight.k, dtype, weight.codes.device, workload).layout
        parts = pages.apart(LAYOUTS[layout].pack(weight))
        packed = Packed(layout, weight.format, weight.n, weight.k, parts, weight.perm)
        return cls(packed, bias, x_dtype=x_dtype, compute=compute, result=result, workload=workload)

    def _hold(self, layout: str, order: str, parts: Sequence[Tensor]) -> None:
        """Takes `parts` in place of those it has."""
        for name in self.names:
            del self._buffers[name]
        self.layout, self.order, self.names = layout, order, LAYOUTS[layout].names(self.format, order)
        for name, part in zip(self.names, parts, strict=True):
            self.register_buffer(name, part)
        # By x's dtype: a kernel may take one and not another.
        self.routes = {}
        if order in DEVICES and parts[0].device.type == order:
            args = (self.format, self.out_features, self.in_features)
            for dtype in X_DTYPES:
                self.routes[dtype] = plan(*args, dtype, parts[0].device, self.workload, layout).route

    @property
    def parts(self) -> list[Tensor]:
        """The packed weight, in the order in which the custom op takes it."""
        return [self._buffers[name] for name in self.names]  # type: ignore[misc]

    @property
    def packed(self) -> Packed:
        """The packed weight with what its parts mean."""
        perm = self._buffers.get("perm")
        return Packed(self.layout, self.format, self.out_features, self.in_features, self.parts, perm)

    def qweight(self) -> QWeight:
        """The weight that was packed, exactly."""
        return unpacked(self.packed, self.order)

    @property
    def weight(self) -> Tensor:
        """The dense weight [n, k], anew, for whoever reads a layer's: rounded once, to `x_dtype`."""
        parts, args = self.parts, (self.layout, self.out_features, self.in_features, self.format.spec)
        dense = ops.DEQUANTIZE(parts, *args, self.x_dtype)
        perm = self._buffers.get("perm")
        return dense if perm is None else torch.empty_like(dense).index_copy_(1, perm, dense)

    def forward(self, x: Tensor) -> Tensor:
        if self.compute is None and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        given = x.dtype
        x = _cast(x, self.compute or given)
        bias = self._parameters["bias"]
        return _cast(self._gemm(x, None if bias is None else _cast(bias, x.dtype)), self.result or given)

    def _gemm(self, x: Tensor, bias: Tensor | None) -> Tensor:
        perm = self._buffers.get("perm")
        if perm is not None:
            x = x.index_select(-1, perm)
        route = self.routes.get(x.dtype, "dense")
        gemm = ops.GEMMS[self.layout]
        return gemm(x, self.parts, bias, None, self.out_features, self.in_features, self.format.spec, "", route)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        here = self.parts[0].device
        there = fn(torch.empty(0, dtype=torch.uint8, device=here)).device
        moved = there.type != self.order
        if moved:
            self._repack(there)
        held, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers = held
        # As bytes: a cast leaves integers alone.
        for name, t in held.items():
            if t is not None:
                given = fn(t.view(torch.uint8))
                same = given.device == t.device and given.data_ptr() == t.data_ptr()
                held[name] = t if same else pages.tensor_of(given.contiguous(), t)
        if moved or there.type != here.type:
            # Kernels are chosen where the parts are.
            self._hold(self.layout, self.order, self.parts)
        return self

    def _repack(self, there: torch.device) -> None:
        """Packs anew for devices of the type of `there`, where it is."""
        shape = (self.format, self.out_features, self.in_features)
        here = self.parts[0].device
        if META in (here.type, there.type):
            # No values, only shapes. A table has the same one everywhere.
            parts = [
                torch.empty(size, dtype=dtype, device=here)
                for size, dtype in LAYOUTS[self.layout].shapes(*shape, there.type)
            ]
            self._hold(self.layout, there.type, parts + (self.parts[-1:] if self.format.form == "table" else []))
            return
        layout = plan(*shape, self.compute or self.x_dtype, there, self.workload).layout
        self._hold(layout, there.type, pages.apart(LAYOUTS[layout].pack(self.qweight(), there.type)))

    def get_extra_state(self) -> Tensor:
        """What the parts of a state_dict mean, as text: uint8 [bytes]."""
        return torch.frombuffer(bytearray(json.dumps(self.facts()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Was read before the parts were loaded."""

    def facts(self) -> dict[str, Any]:
        """What the parts mean, as values of JSON."""
        return {
            "format": self.format.spec, "n": self.out_features, "k": self.in_features,
            "layout": self.layout, "order": self.order,
        }  # fmt: skip

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        if prefix + EXTRA in state_dict:
            try:
                self._adapt(state_dict, prefix)
            except ArgumentError as error:
                errors.append(f"{prefix}{error}")
                return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _adapt(self, state: dict[str, Any], prefix: str) -> None:
        """Brings a state from another layout or order into that of this module. Raises ArgumentError."""
        own = self.facts()
        try:
            found = json.loads(bytes(state[prefix + EXTRA].tolist()))
            given, layout, order = {n: found[n] for n in own}, found["layout"], found["order"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArgumentError(EXTRA, state[prefix + EXTRA], "what PackedLinear.get_extra_state gives") from error
        if any(given[name] != own[name] for name in ("format", "n", "k")) or layout not in LAYOUTS:
            raise ArgumentError("weight", given, str(own))
        if (layout, order) == (self.layout, self.order) or META in (order, self.order):
            return
        names = [prefix + name for name in LAYOUTS[layout].names(self.format, order)]
        parts = [state.pop(name, None) for name in names]
        if any(part is None for part in parts):
            raise ArgumentError("parts", [name for name in names if name not in state], "all of them")
        packed = Packed(layout, self.format, self.out_features, self.in_features, parts, None)  # type: ignore[arg-type]
        fresh = pages.apart(LAYOUTS[self.layout].pack(unpacked(packed, order), self.order))
        state.update((prefix + name, part) for name, part in zip(self.names, fresh, strict=True))

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bias={self._parameters['bias'] is not None}, format={self.format}, layout={self.layout}"


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast to its own dtype would stand between the operations of a graph."""
    return t if t.dtype == dtype else t.to(dtype)


def unpacked(packed: Packed, order: str) -> QWeight:
    """The weight in parts that stand in the order of some type of device. Raises ArgumentError."""
    weight = LAYOUTS[packed.layout].unpack(packed.parts, packed.format, packed.n, packed.k, order)
    return dataclasses.replace(weight, perm=packed.perm)


def plan(
    format: Format, n: int, k: int, x_dtype: torch.dtype, device: torch.device, workload: Mapping[int, float],
    layout: str | None = None, fused: str = "",
) -> Choice:  # fmt: skip
    """What runs a packed weight, in one layout or the fastest one, for any number of rows that `workload` holds.

    `fused` is the library's operation that it replaces. Raises ArgumentError for a device without kernels, Refused
    where the library's own is as fast.
    """
    if device.type not in DEVICES:
        raise ArgumentError("device", str(device), " | ".join(DEVICES))
    planner = _planner(tuple(sorted(workload.items())))
    return planner.choice(format, n, k, x_dtype, device, (layout,) if layout else (), fused)


@functools.lru_cache(maxsize=8)
def _planner(workload: tuple[tuple[int, float], ...]) -> Planner:
    return Planner({}, dict(workload))
