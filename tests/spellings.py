"""Every spelling of a matmul against a weight [n, k], and dressings that leave a weight what it is."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]


def generator(random: Random) -> torch.Generator:
    """A torch generator that the draw determines."""
    return torch.Generator().manual_seed(random.getrandbits(31))


def _copied(w: Tensor, _: Any) -> Tensor:
    out = torch.empty_like(w)
    out.copy_(w)
    return out


def _set(w: Tensor, _: Any) -> Tensor:
    out = torch.zeros(w.shape, dtype=w.dtype)
    half = w.shape[1] // 2
    out[:, :half] = w[:, :half]
    out[:, half:] = w[:, half:]
    return out


def _set_rows(w: Tensor, _: Any) -> Tensor:
    out = torch.empty(w.shape, dtype=w.dtype)
    out[::2] = w[::2]
    out[1::2].copy_(w[1::2])
    return out


def _dead(w: Tensor, _: Any) -> Tensor:
    (w * 2).sum()
    w.clone().zero_()
    return w


DRESSINGS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "double_transpose": lambda w, _: w.t().contiguous().t(),
    "transposes": lambda w, _: w.T.mT,
    "flat": lambda w, _: w.reshape(-1).view(w.shape),
    "thirds": lambda w, _: w.reshape(2, -1, 2, w.shape[1] // 2).reshape(w.shape),
    "contiguous": lambda w, _: w.contiguous(),
    "clone": lambda w, _: w.clone(),
    "cat_rows": lambda w, _: torch.cat([w[:3], w[3:]]),
    "cat_columns": lambda w, _: torch.cat([w[:, :8], w[:, 8:]], dim=1),
    "stack": lambda w, _: torch.stack(w.unbind(0)),
    "stack_columns": lambda w, _: torch.stack([w[:, ::2], w[:, 1::2]], dim=-1).flatten(1),
    "copied": _copied,
    "set_columns": _set,
    "set_rows": _set_rows,
    "detach": lambda w, _: w.detach(),
    "double": lambda w, _: w.double().to(w.dtype),
    "float": lambda w, _: w.float().to(w.dtype),
    "arange": lambda w, _: w[torch.arange(w.shape[0])],
    "row_order": lambda w, index: w[index],
    "column_order": lambda w, index: w.index_select(1, index),
    "larger": lambda w, _: torch.cat([w, w.flip(0)])[: w.shape[0]],
    "narrow": lambda w, _: torch.cat([w.flip(1), w], 1).narrow(1, w.shape[1], w.shape[1]),
    "split": lambda w, _: torch.cat(w.split(2)),
    "chunk": lambda w, _: torch.cat(w.chunk(2, dim=1), dim=1),
    "dead": _dead,
    "flatten": lambda w, _: w.flatten().unflatten(0, w.shape),
    "permute": lambda w, _: w.reshape(2, -1, w.shape[1]).permute(2, 0, 1).permute(1, 2, 0).flatten(0, 1),
    "times_one": lambda w, _: w * 1.0,
    "over_one": lambda w, _: w / 1,
    "plus_zero": lambda w, _: w + 0,
    "negated": lambda w, _: torch.neg(-w),
    "unsqueeze": lambda w, _: w.unsqueeze(1).squeeze(1),
    "expand": lambda w, _: w.unsqueeze(0).expand(3, -1, -1)[1],
    "roll": lambda w, _: w.roll(1, 0).roll(-1, 0),
    "flip": lambda w, _: w.flip(1).flip(1),
    "where": lambda w, _: torch.where(torch.ones_like(w, dtype=torch.bool), w, 0.0),
    "padded": lambda w, _: F.pad(w, (0, 4))[:, :-4],
    "index_copy": lambda w, index: torch.zeros_like(w).index_copy_(0, index, w),
    "add_into": lambda w, _: torch.zeros_like(w).add_(w),
    "halves": lambda w, _: (w * 2) * 0.5,
}


def index_for(random: Random, label: str, n: int, k: int) -> list[Tensor]:
    sizes = {"row_order": n, "index_copy": n, "column_order": k}
    return [torch.randperm(sizes[label], generator=generator(random))] if label in sizes else []


def _bias(t: Tensors, w: Tensor) -> Tensor:
    return t["bias"] if t["bias"].shape[0] == w.shape[0] else t["bias"][: w.shape[0]]


def _pair(w: Tensor) -> Tensor:
    return w.reshape(2, -1, w.shape[-1])


# name: (arrangement of x, the matmul). The bias has as many numbers as the weight has rows, or more.
SPELLINGS: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensors], Tensor]]] = {
    "linear": ("rows", lambda x, w, t: F.linear(x, w)),
    "linear_bias": ("rows", lambda x, w, t: F.linear(x, w, _bias(t, w))),
    "linear_1d": ("vector", lambda x, w, t: F.linear(x, w)),
    "at": ("rows", lambda x, w, t: x @ w.t()),
    "at_plus_bias": ("rows", lambda x, w, t: x @ w.t() + _bias(t, w)),
    "matmul": ("rows", lambda x, w, t: torch.matmul(x, w.transpose(0, 1))),
    "method": ("rows", lambda x, w, t: x.matmul(w.mT)),
    "mm": ("matrix", lambda x, w, t: torch.mm(x, w.t())),
    "addmm": ("matrix", lambda x, w, t: torch.addmm(_bias(t, w), x, w.t())),
    "addmm_scaled": ("matrix", lambda x, w, t: torch.addmm(_bias(t, w)[None], x, w.t(), alpha=0.5, beta=2)),
    "addmm_rows": ("matrix", lambda x, w, t: torch.addmm(_bias(t, w)[:, None], w, x.t(), beta=0.5)),
    "weight_first": ("columns", lambda x, w, t: w @ x),
    "weight_first_t": ("matrix", lambda x, w, t: torch.mm(w, x.t())),
    "weight_first_batched": ("batch", lambda x, w, t: w @ x.transpose(1, 2)),
    "einsum": ("matrix", lambda x, w, t: torch.einsum("mk,nk->mn", x, w)),
    "einsum_dots": ("rows", lambda x, w, t: torch.einsum("...k,nk->...n", x, w)),
    "einsum_dots_first": ("rows", lambda x, w, t: torch.einsum("nk, ...k -> ...n", w, x)),
    "einsum_implicit": ("matrix", lambda x, w, t: torch.einsum("mk,nk", x, w)),
    "einsum_transposed": ("matrix", lambda x, w, t: torch.einsum("bi,oi->ob", x, w)),
    "einsum_kn": ("batch", lambda x, w, t: torch.einsum("bmk,kn->bmn", x, w.t())),
    "einsum_heads": ("batch", lambda x, w, t: torch.einsum("bmk,hdk->bhmd", x, w.reshape(2, -1, w.shape[1]))),
    "einsum_two_k": (
        "batch",
        lambda x, w, t: torch.einsum("bmhd,nhd->bmn", x.unflatten(-1, (4, -1)), w.unflatten(1, (4, -1))),
    ),
    "einsum_batch": ("batch", lambda x, w, t: torch.einsum("bmk,bnk->bmn", x, _pair(w))),
    "bmm_one": ("one", lambda x, w, t: torch.bmm(x, w.t().unsqueeze(0))),
    "bmm_expand": ("batch", lambda x, w, t: torch.bmm(x, w.t().unsqueeze(0).expand(2, -1, -1))),
    "bmm_two": ("batch", lambda x, w, t: torch.bmm(x, _pair(w).transpose(1, 2))),
    "matmul_two": ("batch", lambda x, w, t: x @ _pair(w).mT),
    "matmul_broadcast": ("batch", lambda x, w, t: torch.matmul(x, w.t()[None])),
    "matmul_spread": ("matrix", lambda x, w, t: torch.matmul(x, _pair(w).mT)),
    "baddbmm": (
        "batch",
        lambda x, w, t: torch.baddbmm(t["bias"][: w.shape[0] // 2], x, _pair(w).transpose(1, 2), alpha=2),
    ),
    "conv1d": ("conv1", lambda x, w, t: F.conv1d(x, w.unsqueeze(-1))),
    "conv1d_bias": ("conv1", lambda x, w, t: F.conv1d(x, w[:, :, None], _bias(t, w))),
    "conv2d": (
        "conv2",
        lambda x, w, t: F.conv2d(x, w.reshape(*w.shape, 1, 1), _bias(t, w), stride=1, padding=0),
    ),
    "tensordot": ("rows", lambda x, w, t: torch.tensordot(x, w, dims=([-1], [1]))),
    "tensordot_1": ("rows", lambda x, w, t: torch.tensordot(x, w.t(), dims=1)),
    "inner": ("rows", lambda x, w, t: torch.inner(x, w)),
    "mv": ("vector", lambda x, w, t: torch.mv(w, x)),
    "at_1d": ("vector", lambda x, w, t: x @ w.t()),
    "addmv": ("vector", lambda x, w, t: torch.addmv(_bias(t, w), w, x, alpha=0.5)),
}


def arranged(random: Random, arrangement: str, k: int, dtype: torch.dtype) -> tuple[str, Tensor]:
    """x: mostly the identity, through which each weight shows by itself."""
    g = generator(random)
    eye = arrangement != "vector" and random.random() < 0.7
    rows = torch.eye(k) if eye else torch.randn((random.choice((1, 2, 4, 6, 17)), k), generator=g)
    rows = rows.to(torch.bfloat16 if random.random() < 0.5 else dtype).to(dtype)
    m, halves = rows.shape[0], 2 - rows.shape[0] % 2
    if arrangement == "rows":
        rows = rows.view(random.choice(((m, k), (1, m, k), (halves, -1, k), (1, halves, -1, k))))
    elif arrangement == "columns":
        rows = rows.t() if random.random() < 0.5 else rows.t().contiguous()
    elif arrangement == "vector":
        rows = rows[0].contiguous()
    elif arrangement == "batch":
        rows = torch.stack([rows, rows.flip(0) if eye else rows * 2])
    elif arrangement == "one":
        rows = rows[None]
    elif arrangement == "conv1":
        rows = rows.view(halves, -1, k).transpose(1, 2).contiguous()
    elif arrangement == "conv2":
        rows = rows.view(1, halves, -1, k).permute(0, 3, 1, 2)
        rows = rows.contiguous() if random.random() < 0.5 else rows
    return "identity" if eye else "random", rows
