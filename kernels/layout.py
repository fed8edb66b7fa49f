"""The packed layouts. One definition each; packer, unpacker and their test derive from it.

A code of b bits is cut into fields of widths that divide a byte, low bits first. Each width is one stored plane:
uint8 [n, ceil(k * width / 8)], where byte t of row r holds w[r, t * 8/width + j] at bit j * width.
`lut` cuts every code into single bits, as LUT-GEMM needs (arXiv 2206.09557, section 3); `quick` into the widest fields.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..errors import ArgumentError
from ..formats import GROUPED, code_range, parts_of, validate
from ..types import SCALE_DTYPES, Format, QWeight


@dataclass(frozen=True)
class Layout:
    """A packed layout: `fields[bits]` is the widths that a code of so many bits is cut into, low bits first."""

    name: str
    fields: tuple[tuple[int, ...], ...]
    forms: tuple[str, ...]

    def widths(self, format: Format) -> tuple[int, ...]:
        return self.fields[format.bits]

    def names(self, format: Format) -> tuple[str, ...]:
        """The names of the parts, in the order in which the custom op takes them."""
        planes = tuple(f"plane{i}" for i in range(len(self.widths(format))))
        return planes + parts_of(format) + (("table",) if format.form == "table" else ())

    def shapes(self, format: Format, n: int, k: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part but the table, in order."""
        out: list[tuple[tuple[int, ...], torch.dtype]]
        out = [((n, -(-k * width // 8)), torch.uint8) for width in self.widths(format)]
        scale_dtype, groups = SCALE_DTYPES[format.scale_dtype], k // format.group
        for name in parts_of(format):
            dtype = torch.int16 if name == "zero" and format.zero == "int" else scale_dtype
            # A float zero keeps float32: rounding it to half would move the weight by up to half a scale.
            dtype = torch.float32 if name == "zero" and format.zero == "float" else dtype
            out.append(((n, groups, format.bits) if name == "alpha" else (n, groups), dtype))
        return out

    def pack(self, w: QWeight) -> list[torch.Tensor]:
        """The parts of `w`. Scales are stored as format.scale_dtype, tables as float32. Raises ArgumentError."""
        validate(w)
        if w.format.form not in self.forms:
            raise ArgumentError("form", w.format.form, f"{' | '.join(self.forms)} in layout {self.name}")
        codes = (w.codes.to(torch.int16) - code_range(w.format)[0]).to(torch.uint8)
        parts, shift = [], 0
        for width in self.widths(w.format):
            parts.append(_pack_plane((codes >> shift) & ((1 << width) - 1), width))
            shift += width
        for (_, dtype), name in zip(self.shapes(w.format, w.n, w.k)[len(parts) :], parts_of(w.format), strict=True):
            parts.append(getattr(w, name).to(dtype).contiguous())
        if w.table is not None:
            parts.append(w.table.to(torch.float32).contiguous())
        return parts

    def unpack(self, parts: Sequence[torch.Tensor], format: Format, n: int, k: int) -> QWeight:
        """The weight that `parts` hold: the inverse of `pack`, but that `perm` is left to the caller."""
        check_parts(self, parts, format, n, k)
        widths = self.widths(format)
        codes, shift = torch.zeros((n, k), dtype=torch.uint8, device=parts[0].device), 0
        for part, width in zip(parts, widths, strict=False):
            codes |= unpack_plane(part, width, k, torch.uint8) << shift
            shift += width
        low = code_range(format)[0]
        if low < 0:
            codes = (codes.to(torch.int16) + low).to(torch.int8)
        named = dict(zip(self.names(format), parts, strict=True))
        return QWeight(format, n, k, codes, table=named.get("table"), **{name: named.get(name) for name in GROUPED})


def check_parts(layout: Layout, parts: Sequence[torch.Tensor], format: Format, n: int, k: int) -> None:
    """Raises ArgumentError unless `parts` are exactly what `layout` stores for this format and size.

    Sizes are recomputed from (n, k, format) and never trusted, so that no kernel can read out of bounds.
    """
    expected = _expected(layout, format, n, k)
    if len(parts) != len(expected):
        raise ArgumentError("parts", f"{len(parts)} tensors", ", ".join(name for name, _, _ in expected))
    device = parts[0].device
    for (name, shapes, dtype), part in zip(expected, parts, strict=True):
        if tuple(part.shape) not in shapes or part.dtype != dtype:
            raise ArgumentError(f"parts.{name}", f"{part.dtype} {tuple(part.shape)}", f"{dtype} {shapes}")
        if not part.is_contiguous():
            raise ArgumentError(f"parts.{name}.stride", part.stride(), "contiguous")
        if part.device != device:
            raise ArgumentError(f"parts.{name}.device", part.device, f"{device}, where plane0 is")


@functools.lru_cache(maxsize=4096)
def _expected(
    layout: Layout, format: Format, n: int, k: int
) -> list[tuple[str, tuple[tuple[int, ...], ...], torch.dtype]]:
    if n < 0 or k < 0 or k % format.group:
        raise ArgumentError("format.group", format.group, f"a divisor of k={k}")
    if format.form not in layout.forms:
        raise ArgumentError("form", format.form, f"{' | '.join(layout.forms)} in layout {layout.name}")
    found: list[tuple[str, tuple[tuple[int, ...], ...], torch.dtype]] = [
        (name, (shape,), dtype)
        for name, (shape, dtype) in zip(layout.names(format), layout.shapes(format, n, k), strict=False)
    ]
    if format.form == "table":
        levels = 1 << format.bits
        found.append(("table", ((levels,), (n, levels), (n, k // format.group, levels)), torch.float32))
    return found


def _pack_plane(fields: torch.Tensor, width: int) -> torch.Tensor:
    per_byte = 8 // width
    padded = F.pad(fields, (0, -fields.shape[1] % per_byte)).view(
        fields.shape[0], -(-fields.shape[1] // per_byte), per_byte
    )
    packed = torch.zeros(padded.shape[:2], dtype=torch.uint8, device=fields.device)
    for j in range(per_byte):
        packed |= padded[..., j] << (j * width)
    return packed


def unpack_plane(plane: torch.Tensor, width: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The fields of one plane as [n, k] numbers of `dtype`, a tensor of its own."""
    if width == 8:
        return plane[:, :k].to(dtype, copy=True)
    # In bytes up to the last step: they are a quarter of the traffic of floats.
    fields = torch.stack([(plane >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)], -1)
    return fields.view(plane.shape[0], plane.shape[1] * (8 // width))[:, :k].to(dtype)


_WIDEST = ((), (1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (8,))
LUT = Layout("lut", tuple((1,) * bits for bits in range(9)), ("affine", "table", "binary"))
QUICK = Layout("quick", _WIDEST, ("affine", "table"))
LAYOUTS = {layout.name: layout for layout in (LUT, QUICK)}
