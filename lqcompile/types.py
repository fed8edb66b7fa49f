"""The nouns: every dataclass that flows from the graph to the report. Frozen, printable, JSON-able."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from .errors import ArgumentError, Reason

FORMS = ("affine", "table", "binary")
ZEROS = ("none", "int", "float")
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Format:
    """How a weight is quantized (DESIGN section 5). `group` counts consecutive input features that share a scale.

    affine: w = (codes - zero) * scale; codes are unsigned, but for zero="none" signed and w = codes * scale.
    table:  w = table[codes] * scale.
    binary: w = sum_i alpha_i * (2 * bit_i(codes) - 1) + offset; `bits` planes, offset only for zero="float".
    """

    form: str
    bits: int
    group: int
    zero: str
    scale_dtype: str

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("form", self.form, FORMS),
            ("zero", self.zero, ZEROS),
            ("scale_dtype", self.scale_dtype, tuple(SCALE_DTYPES)),
        ):
            if value not in accepted:
                raise ArgumentError(f"format.{name}", value, " | ".join(accepted))
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise ArgumentError("format.bits", self.bits, "an int from 1 to 8")
        if type(self.group) is not int or self.group < 1:
            raise ArgumentError("format.group", self.group, "a positive int")
        if self.form == "table" and self.zero != "none":
            raise ArgumentError("format.zero", self.zero, "none, for a table")
        if self.form == "binary" and self.zero == "int":
            raise ArgumentError("format.zero", self.zero, "none | float, for a binary weight")

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.form, self.bits, self.group, self.zero, self.scale_dtype))

    def __hash__(self) -> int:
        # Looked up by every launch.
        return self._hash

    @property
    def spec(self) -> str:
        """The one-line form that custom ops take; `Format.parse` reads it back."""
        return f"{self.form}:{self.bits}:{self.group}:{self.zero}:{self.scale_dtype}"

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(spec: str) -> Format:
        fields = spec.split(":")
        if len(fields) != 5 or not fields[1].isdecimal() or not fields[2].isdecimal():
            raise ArgumentError("format", spec, "form:bits:group:zero:scale_dtype")
        return Format(fields[0], int(fields[1]), int(fields[2]), fields[3], fields[4])

    def __str__(self) -> str:
        name = {"affine": "int", "table": "table", "binary": "bcq"}[self.form]
        tail = {"none": "", "int": " zero", "float": " float zero"}[self.zero]
        return f"{name}{self.bits} g{self.group}{tail}"


@dataclass(frozen=True)
class QWeight:
    """A weight of `n` outputs and `k` inputs, by its meaning and not by how it was packed.

    codes  [n, k] uint8 (int8 for affine with zero="none"); bit i of a binary code is plane i, set for +1
    scale  [n, k/group] (affine, table)      alpha  [n, k/group, bits] (binary)
    zero   [n, k/group] int16 or float64 (affine)     offset [n, k/group] (binary, zero="float")
    table  [2**bits], [n, 2**bits] or [n, k/group, 2**bits] float (table)
    perm   [k] int64: column j of codes belongs to input perm[j] (act-order); None where it is the identity
    """

    format: Format
    n: int
    k: int
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    table: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    perm: torch.Tensor | None = None

    def __str__(self) -> str:
        return f"{self.format} [{self.n}, {self.k}]"


@dataclass(frozen=True)
class Rounding:
    """Unit roundoffs that a kernel declares: of the weight it multiplies by, of its accumulator, of its output.

    input  of x where it is held as fixed point: relative to the largest |x| among `block` consecutive inputs
    """

    weight: float
    accumulate: float
    out: float
    input: float = 0.0
    block: int = 1


@dataclass(frozen=True)
class Problem:
    """One matmul to plan: y[m, n] = x[m, k] @ w[n, k].T. `m` may be symbolic; `m_range` bounds it, inclusive."""

    m: sympy.Expr
    m_range: tuple[int, int]
    n: int
    k: int
    format: Format
    x_dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Where:
    """Where a matmul stands in the user's program. `path` is the module path, `file` and `line` the user's source."""

    path: str
    file: str
    line: int
    code: str
    op: str


@dataclass(frozen=True)
class NearMiss:
    """The rule that came closest on a matmul that was kept, and the node it stopped at."""

    rule: str
    reason: Reason
    at: str


@dataclass(frozen=True)
class Candidate:
    """A kernel that could run a problem, and its time as an expression in m.

    measured  (m, seconds) where it was timed; `seconds` goes through these points. Elsewhere it is predicted.
    """

    kernel: str
    layout: str
    seconds: sympy.Expr
    measured: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """One range of m, inclusive, and the kernel that serves it from the copy in `layout`."""

    low: int
    high: int | None
    kernel: str
    seconds: float
    layout: str = ""


@dataclass(frozen=True)
class Step:
    """One operation near a matmul, by what it does and not by the name of its node: equal layers have equal steps.

    text    the call, its tensor operands as %i; value: dtype and shape of the result
    inputs  their places in the tuple that holds this step
    role    "weight" (a parameter or buffer), "constant", "input", "packed", "matmul", "activation"
    state   "understood", "stopped" (where recognition ended), or ""
    source  file:line of the user's program; code: that line
    gone    the lowered graph does not have it any more
    """

    text: str
    value: str
    inputs: tuple[int, ...]
    role: str
    state: str = ""
    source: str = ""
    code: str = ""
    gone: bool = False


@dataclass(frozen=True)
class Decision:
    """What became of one matmul, and why.

    bytes_before  of the dense weight that the matmul read; bytes_after: of the packed one that it reads now
    candidates    what was compared; dense: the same matmul on a dense weight, by the vendor
    light         seconds in which the packed weight can be read once
    advice        what to change, where that is known better than from the reason alone
    before, after the operations around the matmul in the user's graph and in the lowered one
    """

    where: Where
    outcome: str
    problem: Mapping[str, Any] = field(default_factory=dict)
    format: Format | None = None
    rule: str = ""
    proof: str = ""
    layout: str = ""
    pieces: tuple[Piece, ...] = ()
    reason: Reason | None = None
    near_misses: tuple[NearMiss, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    candidates: tuple[Candidate, ...] = ()
    dense: Candidate | None = None
    light: float = 0.0
    advice: str = ""
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
