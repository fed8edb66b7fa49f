"""The packed layouts. One definition each; packer, unpacker and their test derive from it.

A code of b bits is cut into fields of widths that divide a byte, low bits first. `lut` cuts every code into single
bits, as LUT-GEMM needs (arXiv 2206.09557, section 3); `quick` into the widest fields. Where the fields stand depends
on the device type: in rows, or in tiles that follow the registers of a tensor core or the vectors of a CPU (`Tiles`).

Rows: each width is one plane, uint8 [n, ceil(k * width / 8)]; byte t of row r holds w[r, t * 8/width + j] at bit
j * width. What has a number for each row and group is stored as [n, groups, ...].
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..errors import ArgumentError
from ..formats import GROUPED, code_range, parts_of, validate
from ..types import SCALE_DTYPES, Format, QWeight
from . import pages

# Codes that are packed at a time.
PIECE = 1 << 21


@dataclass(frozen=True)
class Tiles:
    """Tiles of some rows x 128 columns; each holds its fields alone, so w can be cut between tiles, and joined.

    A row of a tile is written in the digits `rows`, the first counting most: for "O w g" row 16 O + 8 w + g; a column
    in those of `columns`. `order[width]` is the order in which fields of that width stand, the last digits within a
    byte, low bits first: lane 4g + t of a warp then reads, 16 bytes at a time, what its registers of a tensor core's
    operand hold. What has a number for each row and group is stored as [row tiles, groups, (planes,) row of the tile in
    the digits `factors`]. Padding, up to whole tiles, is zero.
    """

    columns: str
    order: Mapping[int, str]
    rows: str = "O w g"
    factors: str = "g O w"

    SIZES: ClassVar[Mapping[str, int]] = {
        "O": 2, "w": 2, "g": 8, "U": 2, "v": 2, "h": 2, "p": 2, "q": 2, "t": 4, "r": 16, "c": 4, "b": 4
    }  # fmt: skip

    @functools.cached_property
    def height(self) -> int:
        """Rows of a tile."""
        return math.prod(self.SIZES[d] for d in self.rows.replace(" ", ""))

    @property
    def _axes(self) -> str:
        return f"N{self.rows}K{self.columns}".replace(" ", "")

    def pack(self, codes: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
        """uint8 codes [n, k] as one uint8 tensor [row tiles, column tiles, bytes of a tile]."""
        n, k = codes.shape
        axes, sizes = self._axes, {"N": -(-n // self.height), "K": -(-k // 128), **self.SIZES}
        digits = F.pad(codes, (0, -k % 128, 0, -n % self.height)).view([sizes[d] for d in axes])
        planes = []
        for fields, width in zip(_fields(digits, widths), widths, strict=True):
            stored = fields.permute([axes.index(d) for d in self._stored(width)])
            flat = stored.reshape(stored.shape[0], stored.shape[1] * 128 * self.height)
            planes.append(_pack_plane(flat, width).view(*stored.shape[:2], 16 * self.height * width))
        return [torch.cat(planes, -1)]

    def unpack(
        self, parts: Sequence[torch.Tensor], widths: Sequence[int], n: int, k: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The codes [n, k] as numbers of `dtype`."""
        out, shift, line = None, 0, 16 * self.height
        for plane, width in zip(parts[0].split([line * w for w in widths], -1), widths, strict=True):
            stored = self._stored(width)
            shape = [*plane.shape[:2], *(self.SIZES[d] for d in stored[2:])]
            flat = plane.reshape(shape[0], shape[1] * line * width)
            fields = unpack_plane(flat, width, shape[1] * 8 * line, torch.uint8)
            fields = fields.view(shape).permute([stored.index(d) for d in self._axes])
            fields = fields.reshape(shape[0] * self.height, shape[1] * 128)[:n, :k] << shift
            out = fields if out is None else out | fields
            shift += width
        assert out is not None
        return out.to(dtype).contiguous()

    def _stored(self, width: int) -> str:
        return "NK" + self.order[width].replace(" ", "")

    def plane_names(self, widths: Sequence[int]) -> tuple[str, ...]:
        return ("planes",)

    def plane_shapes(self, widths: Sequence[int], n: int, k: int) -> list[tuple[int, ...]]:
        return [(-(-n // self.height), -(-k // 128), 16 * self.height * sum(widths))]

    def pack_grouped(self, t: torch.Tensor, group: int) -> torch.Tensor:
        """[n, groups] or [n, groups, planes] in the order of the tiles' rows."""
        wanted, rows = self.grouped_shape(t.shape[0], t.shape[1], group, ()), self.rows.replace(" ", "")
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, wanted[1] - t.shape[1], 0, wanted[0] * self.height - t.shape[0]))
        t = t.view(wanted[0], *(self.SIZES[d] for d in rows), *t.shape[1:])
        t = t.movedim([1 + rows.index(d) for d in self.factors.replace(" ", "")], list(range(-len(rows), 0)))
        return t.reshape(*t.shape[: t.ndim - len(rows)], self.height)

    def unpack_grouped(self, t: torch.Tensor, n: int, groups: int) -> torch.Tensor:
        rows = self.rows.replace(" ", "")
        digits = t.view(*t.shape[:-1], *(self.SIZES[d] for d in self.factors.replace(" ", "")))
        stands = [rows.index(d) + 1 for d in self.factors.replace(" ", "")]
        digits = digits.movedim(list(range(-len(rows), 0)), stands)
        return digits.reshape(t.shape[0] * self.height, *t.shape[1:-1])[:n, :groups]

    def grouped_shape(self, n: int, groups: int, group: int, planes: tuple[int, ...]) -> tuple[int, ...]:
        # Groups that share a tile are padded to whole tiles: what a tile needs stands together.
        padded = -(-groups // (128 // group)) * (128 // group) if 128 % group == 0 else groups
        return (-(-n // self.height), padded, *planes, self.height)


class Rows:
    """Row by row, as the module's text says. Easily read by anybody's code, on any device."""

    def pack(self, codes: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
        """uint8 codes [n, k] as one uint8 plane for each width."""
        return [_pack_plane(fields, width) for fields, width in zip(_fields(codes, widths), widths, strict=True)]

    def unpack(
        self, parts: Sequence[torch.Tensor], widths: Sequence[int], n: int, k: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """The codes [n, k] as numbers of `dtype`."""
        codes, shift = unpack_plane(parts[0], widths[0], k, dtype), widths[0]
        for plane, width in zip(parts[1:], widths[1:], strict=True):
            codes = codes.add(unpack_plane(plane, width, k, dtype), alpha=1 << shift)
            shift += width
        return codes.contiguous()

    def plane_names(self, widths: Sequence[int]) -> tuple[str, ...]:
        return tuple(f"plane{i}" for i in range(len(widths)))

    def plane_shapes(self, widths: Sequence[int], n: int, k: int) -> list[tuple[int, ...]]:
        return [(n, -(-k * width // 8)) for width in widths]

    def pack_grouped(self, t: torch.Tensor, group: int) -> torch.Tensor:
        """[n, groups, ...] as it is."""
        return t

    def unpack_grouped(self, t: torch.Tensor, n: int, groups: int) -> torch.Tensor:
        return t

    def grouped_shape(self, n: int, groups: int, group: int, planes: tuple[int, ...]) -> tuple[int, ...]:
        return (n, groups, *planes)


ROWS = Rows()
# No device's type: a layout's parts stored by rows.
PLAIN = "plain"


@dataclass(frozen=True, eq=False)
class Layout:
    """A packed layout: `fields[bits]` is the widths that a code of so many bits is cut into, low bits first.

    `tiles` maps a device type to the tiles that its kernels read; elsewhere the layout is stored by rows.
    """

    name: str
    fields: tuple[tuple[int, ...], ...]
    forms: tuple[str, ...]
    tiles: Mapping[str, Tiles] = field(default_factory=dict)

    def order(self, device: str) -> Tiles | Rows:
        return self.tiles.get(device, ROWS)

    def widths(self, format: Format, device: str = "cpu") -> tuple[int, ...]:
        """The widths of the fields that a code is cut into."""
        # Codes of a table are looked up by nibbles: narrower fields would have to be put together first.
        if device in self.tiles and format.form == "table" and format.bits <= 4:
            return (4,)
        return self.fields[format.bits]

    def names(self, format: Format, device: str = "cpu") -> tuple[str, ...]:
        """The names of the parts, in the order in which the custom op takes them."""
        planes = self.order(device).plane_names(self.widths(format, device))
        return planes + parts_of(format) + (("table",) if format.form == "table" else ())

    def shapes(self, format: Format, n: int, k: int, device: str = "cpu") -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part but the table, in order."""
        out: list[tuple[tuple[int, ...], torch.dtype]]
        order = self.order(device)
        out = [(shape, torch.uint8) for shape in order.plane_shapes(self.widths(format, device), n, k)]
        scale_dtype, groups = SCALE_DTYPES[format.scale_dtype], k // format.group
        for name in parts_of(format):
            dtype = torch.int16 if name == "zero" and format.zero == "int" else scale_dtype
            # A float zero keeps float32: rounding it to half would move the weight by up to half a scale.
            dtype = torch.float32 if name == "zero" and format.zero == "float" else dtype
            out.append((order.grouped_shape(n, groups, format.group, (format.bits,) if name == "alpha" else ()), dtype))
        return out

    def packed_bytes(self, format: Format, n: int, k: int, device: str) -> int:
        """Bytes of all parts but the table."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes(format, n, k, device))

    def pack(self, w: QWeight, device: str | None = None) -> list[torch.Tensor]:
        """The parts of `w`. Scales are stored as format.scale_dtype, tables as float32. Raises ArgumentError.

        `device` is the type of the device whose kernels will read them, by default the one where `w` is.
        """
        validate(w)
        if w.format.form not in self.forms:
            raise ArgumentError("form", w.format.form, f"{' | '.join(self.forms)} in layout {self.name}")
        device = device or w.codes.device.type
        order = self.order(device)
        low, widths = code_range(w.format)[0], self.widths(w.format, device)
        shapes, at = self.shapes(w.format, w.n, w.k, device), 0
        count = len(order.plane_names(widths))
        parts = [torch.empty(shape, dtype=dtype, device=w.codes.device) for shape, dtype in shapes[:count]]
        # By whole tiles, so that what is needed meanwhile stays below a dense copy of a large weight.
        for codes in w.codes.split(max(PIECE // max(w.k, 1) // 32, 1) * 32):
            planes = order.pack((codes.to(torch.int16) - low).to(torch.uint8), widths)
            for part, plane in zip(parts, planes, strict=True):
                part[at : at + len(plane)] = plane
            at += len(planes[0])
        dtypes = [dtype for _, dtype in shapes[count:]]
        for dtype, name in zip(dtypes, parts_of(w.format), strict=True):
            parts.append(order.pack_grouped(getattr(w, name).to(dtype), w.format.group).contiguous())
        if w.table is not None:
            parts.append(w.table.to(torch.float32).contiguous())
        return pages.together(parts) if w.codes.device.type == device == "cpu" else parts

    def unpack(
        self, parts: Sequence[torch.Tensor], format: Format, n: int, k: int, device: str | None = None
    ) -> QWeight:
        """The weight that `parts` hold: the inverse of `pack`, but that `perm` is left to the caller."""
        device = device or parts[0].device.type
        check_parts(self, parts, format, n, k, device)
        codes, grouped, table = self.read(parts, format, n, k, torch.uint8, device)
        low = code_range(format)[0]
        if low < 0:
            codes = (codes.to(torch.int16) + low).to(torch.int8)
        return QWeight(format, n, k, codes, table=table, **{name: grouped.get(name) for name in GROUPED})

    def read(
        self, parts: Sequence[torch.Tensor], format: Format, n: int, k: int, dtype: torch.dtype, device: str
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | None]:
        """Codes [n, k] counted from 0 as `dtype`, the grouped tensors [n, groups, ...] by name, and the table."""
        order, widths = self.order(device), self.widths(format, device)
        planes = len(order.plane_names(widths))
        codes = order.unpack(parts[:planes], widths, n, k, dtype)
        grouped = {
            name: order.unpack_grouped(part, n, k // format.group)
            for name, part in zip(parts_of(format), parts[planes:], strict=False)
        }
        return codes, grouped, parts[-1] if format.form == "table" else None


def check_parts(
    layout: Layout, parts: Sequence[torch.Tensor], format: Format, n: int, k: int, device: str | None = None
) -> None:
    """Raises ArgumentError unless `parts` are exactly what `layout` stores for this format, size and device type.

    Sizes are recomputed from (n, k, format) and never trusted, so that no kernel can read out of bounds.
    """
    expected = _expected(layout, format, n, k, device or (parts[0].device.type if parts else "cpu"))
    if len(parts) != len(expected):
        raise ArgumentError("parts", f"{len(parts)} tensors", ", ".join(name for name, _, _ in expected))
    where = parts[0].device
    for (name, shapes, dtype), part in zip(expected, parts, strict=True):
        if part.shape not in shapes or part.dtype != dtype:
            raise ArgumentError(f"parts.{name}", f"{part.dtype} {tuple(part.shape)}", f"{dtype} {shapes}")
        if not part.is_contiguous():
            raise ArgumentError(f"parts.{name}.stride", part.stride(), "contiguous")
        if part.device != where:
            raise ArgumentError(f"parts.{name}.device", part.device, f"{where}, where the first part is")


@functools.lru_cache(maxsize=4096)
def _expected(
    layout: Layout, format: Format, n: int, k: int, device: str
) -> list[tuple[str, tuple[tuple[int, ...], ...], torch.dtype]]:
    if n < 0 or k < 0 or k % format.group:
        raise ArgumentError("format.group", format.group, f"a divisor of k={k}")
    if format.form not in layout.forms:
        raise ArgumentError("form", format.form, f"{' | '.join(layout.forms)} in layout {layout.name}")
    found: list[tuple[str, tuple[tuple[int, ...], ...], torch.dtype]] = [
        (name, (shape,), dtype)
        for name, (shape, dtype) in zip(layout.names(format, device), layout.shapes(format, n, k, device), strict=False)
    ]
    if format.form == "table":
        levels = 1 << format.bits
        found.append(("table", ((levels,), (n, levels), (n, k // format.group, levels)), torch.float32))
    return found


def _fields(codes: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
    """The codes cut into fields of these widths, low bits first."""
    lows = itertools.accumulate(widths, initial=0)
    return [(codes >> low) & ((1 << width) - 1) for low, width in zip(lows, widths, strict=False)]


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _pack_plane(fields: torch.Tensor, width: int) -> torch.Tensor:
    """Fields [n, k] of `width` bits, a byte each, as bytes [n, k * width / 8], the first in the lowest bits.

    All fields of a byte are one number, whose product with another has them side by side in its highest byte: on a GPU
    a launch for each of eight fields takes longer than the fields.
    """
    if width == 8:
        return fields
    count = 8 // width
    high, n, k = 8 * (count - 1), fields.shape[0], -(-fields.shape[1] // count)
    words = F.pad(fields, (0, -fields.shape[1] % count)).reshape(-1).view(_WORDS[count]).view(n, k)
    return (words * sum(1 << (high - 8 * j + width * j) for j in range(count)) >> high).to(torch.uint8)


def unpack_plane(plane: torch.Tensor, width: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The fields of one plane as [n, k] numbers of `dtype`, a tensor of its own."""
    if width == 8:
        return plane[:, :k].to(dtype, copy=True)
    # In bytes up to the last step: they are a quarter of the traffic of floats.
    fields = torch.stack([(plane >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)], -1)
    return fields.view(plane.shape[0], plane.shape[1] * (8 // width))[:, :k].to(dtype)


_WIDEST = ((), (1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (8,))
LUT = Layout(
    "lut",
    tuple((1,) * bits for bits in range(9)),
    ("affine", "table", "binary"),
    {
        # The registers of mma.m16n8k128.b1 (width 1), and pairs of them of mma.m16n8k16 (width 4), of kernels/lut.cu.
        "cuda": Tiles("U v h p q t", {1: "g t O w h U v p q", 4: "O w g t U v p q h"}),
        # Lines of 16 dwords, one for each row; a nibble (width 1) is the four columns of a look-up of kernels/lut.cpp.
        "cpu": Tiles("c U b t", {1: "c r b U t", 4: "c r b t U"}, "r", "r"),
    },
)
QUICK = Layout(
    "quick",
    _WIDEST,
    ("affine", "table"),
    {
        # Those of mma.m16n8k16 and of wgmma.m64nNk16, at bit 16h + 8p + 4q + ... of a word, of kernels/quick.cuh.
        "cuda": Tiles(
            "U v p q t h",
            {
                1: "g t O w h p q U v",
                2: "O g t w U h p q v",
                4: "O w g t U v h p q",
                8: "O w U g t v p h q",
            },
        ),
        # Lines of 16 dwords, one for each row; a byte's fields are four columns apart, of kernels/codes.h.
        "cpu": Tiles(
            "c U v h b",
            {1: "c r b U v h", 2: "c U r b v h", 4: "c U v r b h", 8: "c U v h r b"},
            "r",
            "r",
        ),
    },
)
LAYOUTS = {layout.name: layout for layout in (LUT, QUICK)}
