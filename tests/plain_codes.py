"""Binary codes and look-ups in tables as people write them in plain PyTorch; see `plain`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .plain import PLAIN, G, K, N, Source, ints, randoms, scales, spelling

__all__ = ["PLAIN"]

binary = spelling("binary")
Q = 3


def _signs() -> dict[str, Tensor]:
    alpha = scales(Q, N, 1) * torch.tensor([4.0, 2, 1]).view(Q, 1, 1)
    return {"b": ints(2, Q, N, K, dtype=torch.int8) * 2 - 1, "a": alpha}


@binary
def bcq_signs_sum() -> Source:
    return _signs(), lambda b, a: (b * a).sum(0)


@binary
def bcq_loop() -> Source:
    return _signs(), lambda b, a: sum(b[i] * a[i] for i in range(Q))


@binary
def bcq_where() -> Source:
    t = _signs()
    return {"b": t["b"] > 0, "a": t["a"]}, lambda b, a: torch.where(b, a, -a).sum(0)


@binary
def bcq_packed_bits() -> Source:
    t = {"p": ints(256, Q, N, K // 8), "a": _signs()["a"]}
    return t, lambda p, a: ((((p.unsqueeze(-1) >> torch.arange(8)) & 1).view(Q, N, K) * 2 - 1) * a).sum(0)


@binary
def bcq_einsum() -> Source:
    t = _signs()
    return {"b": t["b"], "a": t["a"].squeeze(-1)}, lambda b, a: torch.einsum("qnk,qn->nk", b.float(), a)


@binary
def bcq_einsum_groups() -> Source:
    t = {"b": _signs()["b"].view(Q, N, K // G, G), "a": scales(Q, N, K // G)}
    return t, lambda b, a: torch.einsum("qngk,qng->ngk", b.float(), a).reshape(N, K)


@binary
def bcq_offset() -> Source:
    return _signs() | {"z": randoms(N, 1) * 0.1}, lambda b, a, z: (b * a).sum(0) + z


@binary
def bcq_bits_times_two() -> Source:
    t = _signs()
    return {"b": (t["b"] > 0).to(torch.uint8), "a": t["a"]}, lambda b, a: ((2.0 * b - 1) * a).sum(dim=0)


@binary
def bcq_stack_of_products() -> Source:
    return _signs(), lambda b, a: torch.stack([b[i].float() * a[i] for i in range(Q)]).sum(0)


table = spelling("table")


def _book(levels: int = 16) -> dict[str, Tensor]:
    return {"t": randoms(levels).sort().values, "q": ints(levels, N, K, dtype=torch.int64), "s": scales(N, 1)}


@table
def book_index() -> Source:
    return _book(), lambda t, q, s: t[q] * s


@table
def book_gather() -> Source:
    return _book(), lambda t, q, s: torch.gather(t, 0, q.view(-1)).view(N, K) * s


@table
def book_take() -> Source:
    return _book(), lambda t, q, s: t.take(q) * s


@table
def book_embedding() -> Source:
    return _book(), lambda t, q, s: F.embedding(q, t[:, None]).squeeze(-1) * s


@table
def book_index_select() -> Source:
    return _book(), lambda t, q, s: t.index_select(0, q.flatten()).view(N, K) * s


@table
def book_one_hot() -> Source:
    return _book(8), lambda t, q, s: (F.one_hot(q, 8).to(t.dtype) @ t) * s


@table
def book_where_chain() -> Source:
    def weight(t: Tensor, q: Tensor, s: Tensor) -> Tensor:
        w = torch.zeros(N, K)
        for i in range(8):
            w = torch.where(q == i, t[i], w)
        return w * s

    return _book(8), weight


@table
def book_of_byte_pairs() -> Source:
    t = {"t": randoms(16).sort().values, "p": ints(256, N, K // 2), "s": scales(N, 1)}

    def weight(t: Tensor, p: Tensor, s: Tensor) -> Tensor:
        byte = torch.arange(256)
        pairs = torch.stack([t[byte & 15], t[byte >> 4]], -1)
        return pairs[p.long()].view(N, K) * s

    return t, weight


@table
def book_of_byte_pairs_stored() -> Source:
    levels, byte = randoms(16).sort().values, torch.arange(256)
    t = {"t": torch.stack([levels[byte & 15], levels[byte >> 4]], -1), "p": ints(256, N, K // 2), "s": scales(N, 1)}
    return t, lambda t, p, s: t[p.long()].view(N, K) * s


@table
def book_of_rows_gather() -> Source:
    t = {"t": randoms(N, 16), "q": ints(16, N, K, dtype=torch.int64)}
    return t, lambda t, q: torch.gather(t, 1, q)


@table
def book_of_rows_index() -> Source:
    t = {"t": randoms(N, 16), "q": ints(16, N, K, dtype=torch.int64)}
    return t, lambda t, q: t[torch.arange(N)[:, None], q]


@table
def book_of_rows_flat() -> Source:
    t = {"t": randoms(N, 8), "q": ints(8, N, K, dtype=torch.int64)}
    return t, lambda t, q: t.view(-1)[q + 8 * torch.arange(N)[:, None]]


@table
def book_of_groups() -> Source:
    t = {"t": randoms(N, 2, 4), "q": ints(4, N, 2, K // 2, dtype=torch.int64)}
    return t, lambda t, q: torch.gather(t, 2, q).view(N, K)


@table
def book_of_nibbles() -> Source:
    t = {"t": randoms(16).sort().values, "p": ints(256, N, K // 2), "s": scales(N, 1)}
    return t, lambda t, p, s: t[torch.stack([p >> 4, p & 15], -1).view(N, K).int()] * s


@table
def fp8_cast() -> Source:
    t = {"q": randoms(N, K).to(torch.float8_e4m3fn), "s": scales(N, 1)}
    return t, lambda q, s: q.float() * s


@table
def fp8_of_bytes() -> Source:
    t = {"q": randoms(N, K).to(torch.float8_e5m2).view(torch.uint8), "s": scales(N, 1)}
    return t, lambda q, s: q.view(torch.float8_e5m2).float() * s


@table
def fp8_blocks() -> Source:
    t = {"q": randoms(256, 256).to(torch.float8_e4m3fn), "s": scales(2, 2)}
    return t, lambda q, s: q.float() * s.repeat_interleave(128, 0).repeat_interleave(128, 1)


@table
def e2m1_arithmetic() -> Source:
    def weight(q: Tensor, s: Tensor) -> Tensor:
        sign, exponent, mantissa = 1 - 2.0 * (q >> 3), ((q >> 1) & 3).float(), (q & 1).float()
        size = torch.where(exponent == 0, mantissa * 0.5, (1 + mantissa * 0.5) * torch.exp2(exponent - 1))
        return sign * size * s

    return {"q": ints(16, N, K), "s": scales(N, 1)}, weight


@table
def ldexp() -> Source:
    t = {"t": randoms(16), "q": ints(16, N, K // 32, 32, dtype=torch.int64), "e": ints(10, N, K // 32, 1, low=1)}
    return t, lambda t, q, e: torch.ldexp(t[q], e.to(torch.int32) - 8).view(N, K)


@table
def exponent_bits() -> Source:
    t = {"t": randoms(16), "q": ints(16, N, K // 32, 32, dtype=torch.int64), "e": ints(130, N, K // 32, 1, low=120)}
    return t, lambda t, q, e: (t[q] * (e.to(torch.int32) << 23).view(torch.float32)).view(N, K)


@table
def nested_absmax() -> Source:
    t = {"t": randoms(16), "q": ints(16, N, K // G, G, dtype=torch.int64), "c": ints(256, N, K // G, 1),
         "book": randoms(256).sort().values.abs() + 0.1, "d": scales(1), "m": randoms(1)}  # fmt: skip
    return t, lambda t, q, c, book, d, m: (t[q] * (book[c.long()] * d + m)).view(N, K)


@table
def signs_and_magnitudes() -> Source:
    t = {"t": randoms(8).abs(), "q": ints(16, N, K), "s": scales(N, 1)}
    return t, lambda t, q, s: t[(q & 7).long()] * torch.where((q & 8).bool(), -1.0, 1.0) * s
