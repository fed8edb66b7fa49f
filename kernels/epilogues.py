"""What is done to a product before it is stored: silu(gate) * up of two matmuls run as one, or a residual added.

silu_mul   w holds `gate` and `up` by turns, eight rows of each, so that one thread of a tensor core meets both of a
           pair; y[m, n/2] = silu(x gate.T) * (x up.T), rounded once
add        y[m, n] = x w.T, rounded, + other[m, n], rounded: what two operations would give
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .registry import Call

# By name what the CUDA kernels know each as.
EPILOGUES = {"": 0, "silu_mul": 1, "add": 2}
TURN = 8


def outputs(epilogue: str, n: int) -> int:
    """Columns of y for a weight of `n` rows."""
    return n // 2 if epilogue == "silu_mul" else n


def by_turns(n: int) -> Tensor:
    """The rows of [gate; up], `n` in all, in the order in which silu_mul wants them: int64 [n]."""
    return torch.arange(n).view(2, -1, TURN).transpose(0, 1).reshape(-1)


def finish(y: Tensor, other: Tensor | None, epilogue: str) -> Tensor:
    """The epilogue of a product y [m, n] in operations of torch, for kernels that do not fuse it."""
    if epilogue == "add":
        assert other is not None
        return y + other
    gate, up = _pairs(y)
    # As the kernels do: in float32, rounded once.
    return (F.silu(gate.float()) * up.float()).to(y.dtype).flatten(1)


def unfused(
    run: Callable[..., None], x: Tensor, parts: Sequence[Tensor], bias: Tensor | None, call: Call, out: Tensor,
    other: Tensor | None,
) -> None:  # fmt: skip
    """A call by `run`, which takes none with an epilogue: the product by itself, then what follows."""
    y = x.new_empty(x.shape[0], call.n)
    run(x, parts, bias, replace(call, epilogue=""), y)
    out.copy_(finish(y, other, call.epilogue))


def gradient(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient of the product y [m, n] from that of its silu_mul, [m, n/2]."""
    gate, up = (t.float() for t in _pairs(y))
    grad = grad.float().view(gate.shape)
    sigmoid = gate.sigmoid()
    both = (grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid)
    return torch.stack(both, 2).flatten(1).to(y.dtype)


def _pairs(y: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = y.view(y.shape[0], -1, 2, TURN).unbind(2)
    return gate, up
