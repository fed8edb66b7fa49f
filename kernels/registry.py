"""What a kernel declares. A file in this folder that registers one is found, tested and shown by itself."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch

from ..device import Device
from ..errors import ArgumentError
from ..types import Format, Problem, Rounding

X_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Call:
    """The unchanging facts of one matmul: y[m, n] = x[m, k] @ w[n, k].T, w stored as `layout` stores `format`.

    `epilogue` is what is done to it before y is stored: one of epilogues.EPILOGUES.
    """

    layout: str
    format: Format
    n: int
    k: int
    epilogue: str = ""

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.layout, self.format, self.n, self.k, self.epilogue))

    def __hash__(self) -> int:
        # Each launch looks itself up by its call.
        return self._hash


@dataclass(frozen=True, eq=False)
class Grouped:
    """How a kernel multiplies each row of x by the weight of its own expert, on a GPU and without a look at `ends`.

    run(x, parts, ends, call, out)             as grouped.py tells; `call` is of one expert, with its epilogue
    accepts(call, x_dtype)                     None, or the sentence that says what it does not accept
    seconds(problem, experts, layout, device)  predicted time, a sympy expression in problem.m, the rows of all
    """

    run: Callable[..., None]
    accepts: Callable[[Call, torch.dtype], str | None]
    seconds: Callable[[Problem, int, str, Device], sympy.Expr]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One way to run a packed matmul.

    run(x, parts, bias, call, out)   x [m, k] contiguous, m and k > 0; writes y [m, n] to `out`
    epilogues                        what it fuses; run then takes what is added, [m, n], as a sixth argument
    accepts(call, x_dtype, device)   None, or the sentence that says what it does not accept
    rounding(call, x_dtype)          the unit roundoffs from which every test derives its bound
    seconds(problem, layout, device) predicted time, a sympy expression in problem.m
    grouped                          the same for the weights of many experts, None where it takes one at a time
    """

    name: str
    layouts: tuple[str, ...]
    devices: tuple[str, ...]
    summary: str
    run: Callable[..., None]
    accepts: Callable[[Call, torch.dtype, str], str | None]
    rounding: Callable[[Call, torch.dtype], Rounding]
    seconds: Callable[[Problem, str, Device], sympy.Expr]
    epilogues: tuple[str, ...] = ()
    grouped: Grouped | None = None
    deterministic: bool = True
    batch_invariant: bool = False


KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Adds a kernel. Its name must be new: two kernels of one name would silently shadow each other."""
    if kernel.name in KERNELS:
        raise ArgumentError("kernel.name", kernel.name, "a name not yet registered")
    KERNELS[kernel.name] = kernel
    return kernel


@functools.cache
def discover() -> dict[str, Kernel]:
    """Every kernel, by importing each file of this folder once."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return KERNELS
