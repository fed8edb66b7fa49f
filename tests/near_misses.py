"""Fifty weights that almost are dequantized constants: where recognition must stop, and what to tell the user.

Each case: tensors that the module holds, its forward, the operation at which `why` must say that it stopped, and words
that its advice must hold. Codes have 8 bits, so that their values alone do not give them away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N, K, G = 32, 64, 16
Forward = Callable[[Any, Tensor], Any]


@dataclass(frozen=True)
class Near:
    """One near miss. `op` and `fix` are what `why` must name; `setup` makes the module's tensors and x."""

    name: str
    op: str
    fix: str
    forward: Forward
    tensors: Callable[[], dict[str, Any]] = dict
    x: Callable[[], Tensor] = lambda: torch.randn(3, K)
    grad: bool = False


class Model(nn.Module):
    """The module of a case: 8-bit codes, scales by group, and whatever the case adds."""

    def __init__(self, case: Near) -> None:
        super().__init__()
        self.case = case
        for name, value in {**base(), **case.tensors()}.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def weight(self) -> Tensor:
        """The dequantized weight [N, K]."""
        codes = self.codes.to(torch.int16).view(N, K // G, G) - 128
        return (codes.to(self.scale.dtype) * self.scale).view(N, K)

    def forward(self, x: Tensor) -> Any:
        return self.case.forward(self, x)


def base() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (N, K), generator=g, dtype=torch.uint8)
    return {"codes": codes, "scale": torch.rand(N, K // G, 1, generator=g) * 0.01 + 0.001}


def _rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _int(*shape: int, high: int = 256, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def _over(f: Callable[[Any, Tensor], Tensor]) -> Forward:
    """A forward that multiplies by what `f` makes of the dequantized weight."""
    return lambda m, x: F.linear(x, f(m, m.weight()))


def _write(m: Any, w: Tensor) -> Tensor:
    w = w.clone()
    w[m.rows, m.columns] = m.outliers
    return w


def _counted(m: Any, x: Tensor) -> Tensor:
    m.scale.mul_(0.5)
    return F.linear(x, m.weight())


def _shifted(m: Any, x: Tensor) -> Tensor:
    m.codes.add_(1)
    return F.linear(x, m.weight())


def _checkpointed(m: Any, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda t: F.linear(t, m.weight()), x, use_reentrant=False)


def _broken(m: Any, x: Tensor) -> Tensor:
    w = m.weight()
    torch._dynamo.graph_break()
    return F.linear(x, w)


BUFFER, BEFORE, ACTIVATION = "parameters or buffers", "before quantizing", "activation by that matrix"
OUTPUT, OUTLIERS, INTEGER = "to the output", "outliers", "integer tensor"

CASES: tuple[Near, ...] = (
    # The scale comes from the input.
    Near("scale_of_amax", "mul", BUFFER, lambda m, x: F.linear(x, m.codes.float() * x.abs().amax())),
    Near("scale_of_norm", "mul", BUFFER, lambda m, x: F.linear(x, m.codes.float() * x.norm())),
    Near("scale_over_mean", "truediv", BUFFER, lambda m, x: F.linear(x, m.codes.float() / x.mean())),
    Near("zero_of_input", "sub", BUFFER, lambda m, x: F.linear(x, m.codes.float() - x.mean())),
    Near("both_of_input", "mul", BUFFER, lambda m, x: x @ (m.codes.float() * x.std()).view(N, K).t()),
    # Something between dequantization and matmul.
    Near("relu", "relu", BEFORE, _over(lambda m, w: F.relu(w))),
    Near("gelu", "gelu", BEFORE, _over(lambda m, w: F.gelu(w))),
    Near("tanh", "tanh", BEFORE, _over(lambda m, w: torch.tanh(w))),
    Near("sigmoid", "sigmoid", BEFORE, _over(lambda m, w: w.sigmoid())),
    Near("softmax", "softmax", BEFORE, _over(lambda m, w: w.softmax(-1))),
    Near("abs", "abs", BEFORE, _over(lambda m, w: w.abs())),
    Near("exp", "exp", BEFORE, _over(lambda m, w: w.exp())),
    Near("square", "pow", BEFORE, _over(lambda m, w: w**2)),
    Near("sorted", "sort", BEFORE, _over(lambda m, w: w.sort(-1).values)),
    Near("cumsum", "cumsum", BEFORE, _over(lambda m, w: w.cumsum(-1))),
    Near("log1p", "log1p", BEFORE, _over(lambda m, w: torch.log1p(w * w))),
    # A norm of the weight itself.
    Near("layer_norm", "layer_norm", "scale", _over(lambda m, w: F.layer_norm(w, (K,)))),
    Near("silu", "silu", BEFORE, _over(lambda m, w: F.silu(w))),
    Near("sine", "sin", BEFORE, _over(lambda m, w: torch.sin(w))),
    # A rotation.
    Near("rotated_in", "matmul", ACTIVATION, _over(lambda m, w: w @ m.rotation), lambda: {"rotation": _rand(K, K)}),
    Near("rotated_out", "matmul", ACTIVATION, _over(lambda m, w: m.rotation @ w), lambda: {"rotation": _rand(N, N)}),
    Near("rotated_mm", "mm", ACTIVATION, _over(lambda m, w: torch.mm(w, m.rotation)),
         lambda: {"rotation": _rand(K, K)}),
    Near("rotated_einsum", "einsum", ACTIVATION, _over(lambda m, w: torch.einsum("nk,kj->nj", w, m.rotation)),
         lambda: {"rotation": _rand(K, K)}),
    # Something dense added.
    Near("lora", "add", OUTPUT, _over(lambda m, w: w + m.b @ m.a), lambda: {"a": _rand(4, K), "b": _rand(N, 4)}),
    Near("delta", "add", OUTPUT, _over(lambda m, w: w + m.delta), lambda: {"delta": _rand(N, K)}),
    Near("delta_sub", "sub", OUTPUT, _over(lambda m, w: w - m.delta), lambda: {"delta": _rand(N, K)}),
    Near("two_codes", "add", OUTPUT, _over(lambda m, w: w + m.more.float() * 0.001),
         lambda: {"more": _int(N, K, dtype=torch.uint8)}),
    # A factor that no group shares.
    Near("awq_scale", "mul", "F.linear(x * s, w)", _over(lambda m, w: w * m.s), lambda: {"s": _rand(K)}),
    Near("smooth_divide", "truediv", "F.linear(x * s, w)", _over(lambda m, w: w / m.s), lambda: {"s": _rand(K) + 5}),
    Near("dense_scale", "mul", "by a group of inputs", lambda m, x: F.linear(x, m.codes.float() * m.s),
         lambda: {"s": _rand(N, K)}),
    Near("pairs", "mul", "by a group of inputs",
         lambda m, x: F.linear(x, (m.codes.float().view(N, K // 2, 2) * m.s).view(N, K)),
         lambda: {"s": _rand(N, K // 2, 1)}),
    Near("mask_of_codes", "mul", "fold the other factor", _over(lambda m, w: w * m.more.float()),
         lambda: {"more": _int(N, K)}),
    # Outliers written over it.
    Near("where", "where", OUTLIERS, _over(lambda m, w: torch.where(m.mask, m.delta, w)),
         lambda: {"mask": _rand(N, K) > 1.5, "delta": _rand(N, K)}),
    Near("outliers_set", "setitem", OUTLIERS, _over(_write),
         lambda: {"rows": torch.arange(8), "columns": torch.arange(8), "outliers": _rand(8)}),
    # Codes that are no codes.
    Near("float_codes", "linear", INTEGER, lambda m, x: F.linear(x, (m.q.view(N, -1, G) * m.scale).view(N, K)),
         lambda: {"q": _int(N, K, high=16).float()}),
    Near("dense_levels", "linear", "few levels stored densely", lambda m, x: F.linear(x, m.w),
         lambda: {"w": _int(N, K, high=16).float() * 0.37 + 0.11}),
    Near("wide_codes", "q", "at most 8 bits", lambda m, x: F.linear(x, (m.q.view(N, -1, G) * m.scale).view(N, K)),
         lambda: {"q": _int(N, K, high=5000, dtype=torch.int16)}),
    # Values that cannot be.
    Near("inf_scale", "bad", "checkpoint", _over(lambda m, w: w * m.bad),
         lambda: {"bad": torch.full((N, 1), torch.inf)}),
    Near("nan_scale", "bad", "checkpoint", _over(lambda m, w: w * m.bad),
         lambda: {"bad": torch.full((N, 1), torch.nan)}),
    # Not to be evaluated ahead of time.
    Near("dropout", "dropout", "randomness", _over(lambda m, w: F.dropout(w, 0.5, training=True))),
    Near("noise", "rand", "randomness", _over(lambda m, w: w + torch.rand_like(w) * 0.01)),
    # Training, writes, free tensors.
    Near("trained_scale", "scale", "requires_grad_", _over(lambda m, w: w),
         lambda: {"scale": nn.Parameter(torch.rand(N, K // G, 1))}, grad=True),
    Near("scale_written", "mul_", "out of forward", _counted),
    Near("codes_written", "add_", "out of forward", _shifted),
    # Spellings and dtypes that are no matmul of ours.
    Near("conv_3x3", "conv2d", "F.unfold", lambda m, x: F.conv2d(x, m.weight().view(N, 4, 4, 4)),
         x=lambda: _rand(2, 4, 8, 8)),
    Near("conv_stride", "conv1d", "F.unfold", lambda m, x: F.conv1d(x, m.weight()[:, :, None], stride=2),
         x=lambda: _rand(2, K, 8)),
    Near("einsum_of_three", "einsum", "one matmul", lambda m, x: torch.einsum("mk,nk,n->mn", x, m.weight(), m.s),
         lambda: {"s": _rand(N)}),
    Near("float64", "linear", "cast before", lambda m, x: F.linear(x, m.weight().double()),
         x=lambda: _rand(3, K).double()),
    # Where Dynamo stands between.
    Near("checkpoint", "linear", "no_grad", _checkpointed, x=lambda: _rand(3, K).requires_grad_(), grad=True),
    Near("graph_break", "linear", "remove the graph break", _broken),
)  # fmt: skip
assert len(CASES) == 50
