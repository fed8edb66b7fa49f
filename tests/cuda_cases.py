"""What the tests of CUDA kernels run: formats, sizes and weights on the GPU.

Each specialisation of a kernel has to be compiled, so formats are drawn from CASES, each with a few numbers of rows,
and not from all there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
import torch

from lqcompile.formats import GROUPED
from lqcompile.kernels import registry
from lqcompile.kernels.epilogues import outputs
from lqcompile.kernels.layout import LAYOUTS
from lqcompile.kernels.registry import Call
from lqcompile.types import Format, QWeight

from .test_formats import make
from .test_ops import FORMS, random_x

DEVICE = torch.device("cuda", 0)
HALF, BFLOAT = torch.float16, torch.bfloat16
KERNELS = [
    (kernel.name, layout)
    for kernel in registry.discover().values()
    if "cuda" in kernel.devices
    for layout in kernel.layouts
]
# By group, 0 for all of k: groups that share a tile of 128 columns, fill one, span several; k with and without a tail.
KS = {
    32: (32, 64, 96, 128, 160, 256, 384, 1024, 2048),
    64: (64, 128, 256, 384, 1024, 2048),
    128: (128, 256, 384, 1024, 2048),
    256: (256, 1024, 2048),
    384: (384, 1152),
    0: (7, 16, 96, 160, 1000, 2048),
}
NS = (1, 7, 16, 31, 32, 33, 100, 257)


@dataclass(frozen=True)
class Case:
    form: str
    zero: str
    bits: int
    group: int
    scale_dtype: str
    x_dtype: torch.dtype
    ms: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.form}{self.bits}-g{self.group}-{self.zero}-{self.scale_dtype}-{str(self.x_dtype)[6:]}"

    def format(self, k: int) -> Format:
        return Format(self.form, self.bits, self.group or k, self.zero, self.scale_dtype)


# Numbers of rows for which lut.cu, and beyond 8 quick_sm90.cu, have different specialisations, in two shares.
ODD, EVEN = (1, 3, 4, 33), (2, 5, 8, 200)
CASES = [
    Case("affine", "none", 4, 128, "bfloat16", BFLOAT, ODD),
    Case("affine", "none", 1, 32, "float16", HALF, EVEN),
    Case("affine", "none", 5, 256, "float16", BFLOAT, ODD),
    Case("affine", "none", 8, 0, "float32", HALF, EVEN),
    Case("affine", "int", 4, 128, "float16", HALF, (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 31, 64, 130, 257)),
    Case("affine", "int", 2, 64, "float32", BFLOAT, ODD),
    Case("affine", "int", 3, 32, "bfloat16", HALF, EVEN),
    Case("affine", "int", 8, 128, "float16", BFLOAT, ODD),
    Case("affine", "float", 6, 384, "float32", BFLOAT, EVEN),
    Case("affine", "float", 4, 64, "float16", HALF, ODD),
    Case("affine", "float", 7, 32, "bfloat16", BFLOAT, EVEN),
    Case("affine", "float", 1, 0, "float16", HALF, ODD),
    Case("table", "none", 4, 64, "float16", HALF, EVEN),
    Case("table", "none", 3, 32, "bfloat16", BFLOAT, ODD),
    Case("table", "none", 2, 0, "float32", HALF, EVEN),
    Case("table", "none", 1, 256, "float16", BFLOAT, ODD),
    Case("table", "none", 8, 128, "float16", HALF, ODD),
    Case("binary", "none", 3, 32, "float32", BFLOAT, ODD),
    Case("binary", "none", 1, 128, "float16", HALF, EVEN),
    Case("binary", "none", 4, 0, "bfloat16", BFLOAT, ODD),
    Case("binary", "none", 8, 64, "float16", HALF, EVEN),
    Case("binary", "float", 2, 128, "float16", BFLOAT, ODD),
    Case("binary", "float", 4, 256, "float32", HALF, EVEN),
    Case("binary", "float", 5, 32, "bfloat16", HALF, ODD),
    Case("binary", "float", 7, 0, "float16", HALF, EVEN),
]
MAIN = CASES[4]
# One of each form.
SPREAD = [next(case for case in CASES if (case.form, case.zero) == kind) for kind in FORMS]


@dataclass
class Problem:
    """A weight on the GPU, and what a call of a kernel needs besides x and the bias."""

    w: QWeight
    call: Call
    parts: list[torch.Tensor]
    x_dtype: torch.dtype

    def drawn(self, random: Random, m: int) -> torch.Tensor:
        x = random_x(random, m, self.call.k, self.x_dtype, DEVICE)
        if random.random() < 0.3:
            x[random.randrange(m), random.randrange(self.call.k)] *= 1000
        return x.clamp_(-6e4, 6e4)

    def normal(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, self.x_dtype)

    def run(
        self, kernel: str, x: torch.Tensor, bias: torch.Tensor | None = None, other: torch.Tensor | None = None,
        epilogue: str = "",
    ) -> torch.Tensor:  # fmt: skip
        out = x.new_full((x.shape[0], outputs(epilogue, self.call.n)), float("nan"))
        call = dataclasses.replace(self.call, epilogue=epilogue)
        registry.discover()[kernel].run(x, self.parts, bias, call, out, *([other] if epilogue else []))
        return out


def refusal(kernel: str, layout: str, case: Case, k: int) -> str | None:
    if case.form not in LAYOUTS[layout].forms:
        return f"{case.form} in layout {layout}"
    return registry.discover()[kernel].accepts(Call(layout, case.format(k), 1, k), case.x_dtype, "cuda")


Change = Callable[[str, torch.Tensor], torch.Tensor]


def changed(w: QWeight, change: Change) -> QWeight:
    """The weight with each of its tensors t, by name, replaced by change(name, t)."""
    names = [name for name in (*GROUPED, "codes", "table") if getattr(w, name) is not None]
    return dataclasses.replace(w, **{name: change(name, getattr(w, name)) for name in names})


def problem(
    kernel: str,
    layout: str,
    case: Case,
    n: int,
    k: int,
    seed: int = 0,
    rank: int = 1,
    size: float = 1.0,
    change: Change | None = None,
) -> Problem:
    """Skips where the kernel does not take the case."""
    sentence = refusal(kernel, layout, case, k)
    if sentence is not None:
        pytest.skip(sentence)

    def apart(name: str, t: torch.Tensor) -> torch.Tensor:
        # What stands a hair from a code, or planes that all but cancel, leave a weight that is all rounding.
        planes = t.dtype == torch.float32 and name in ("zero", "alpha", "offset")
        return t.mul(1024).round().div(1024) if planes else t

    w = changed(make(case.format(k), n, k, seed, rank, x_scale=size), change or apart)
    w = changed(w, lambda name, t: t.to(DEVICE))
    return Problem(w, Call(layout, w.format, n, k), LAYOUTS[layout].pack(w), case.x_dtype)
