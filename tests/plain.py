"""Dequantization as people write it in plain PyTorch: the spellings of IDIOMS.md, section 1b, each as stored tensors and
a function of them that gives the weight [N, K].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

N, K, G = 32, 64, 16
Source = tuple[dict[str, Tensor], Callable[..., Tensor]]
PLAIN: dict[str, tuple[str, Callable[[], Source]]] = {}


def _spelling(rule: str) -> Callable[[Callable[[], Source]], Callable[[], Source]]:
    def add(make: Callable[[], Source]) -> Callable[[], Source]:
        PLAIN[make.__name__] = (rule, make)
        return make

    return add


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _int(high: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.uint8, seed: int = 2) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _scales(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (_random(*shape, seed=3).abs() * 0.05 + 0.01).to(dtype)


def _grouped(high: int = 16, dtype: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """Codes [N, K/G, G], scales and zeros [N, K/G, 1]."""
    return {"q": _int(high, N, K // G, G, dtype=dtype), "s": _scales(N, K // G, 1),
            "z": _int(high, N, K // G, 1, seed=4)}  # fmt: skip


def _nibbles() -> dict[str, Tensor]:
    return {"p": _int(256, N, K // 2), "s": _scales(N, 1)}


affine = _spelling("affine")


@affine
def sub_mul() -> Source:
    return _grouped(), lambda q, s, z: ((q.float() - z.float()) * s).view(N, K)


@affine
def mul_add() -> Source:
    return {"q": _int(16, N, K), "s": _scales(N, 1), "b": _random(N, 1)}, lambda q, s, b: q.float() * s + b


@affine
def addcmul() -> Source:
    return {"q": _int(16, N, K), "s": _scales(N, 1), "b": _random(N, 1)}, lambda q, s, b: torch.addcmul(b, q.float(), s)


@affine
def sub_div() -> Source:
    return _grouped(), lambda q, s, z: ((q.float() - z.float()) / (1 / s)).view(N, K)


@affine
def number_scale() -> Source:
    return {"q": _int(8, N, K, low=-8, dtype=torch.int8)}, lambda q: q.float() * 0.05


@affine
def number_scale_and_zero() -> Source:
    return {"q": _int(16, N, K)}, lambda q: (q.float() - 8) / 30.0


@affine
def number_first() -> Source:
    return {"q": _int(16, N, K), "s": _scales(N, 1)}, lambda q, s: (7.5 - q.float()) * s


@affine
def repeat_interleave() -> Source:
    return {"q": _int(16, N, K), "s": _scales(N, K // G)}, lambda q, s: q.float() * s.repeat_interleave(G, 1)


@affine
def repeat_interleave_tensor() -> Source:
    t = {"q": _int(16, N, K), "s": _scales(N, K // G), "r": torch.full((K // G,), G)}
    return t, lambda q, s, r: q.float() * s.repeat_interleave(r, dim=1, output_size=K)


@affine
def kron() -> Source:
    return {"q": _int(16, N, K), "s": _scales(N, K // G)}, lambda q, s: q.float() * torch.kron(s, torch.ones(1, G))


@affine
def g_idx() -> Source:
    order = torch.randperm(K, generator=torch.Generator().manual_seed(5))
    t = {"q": _int(16, K, N), "s": _scales(K // G, N), "z": _int(16, K // G, N, seed=4), "i": (torch.arange(K) // G)[order]}
    return t, lambda q, s, z, i: ((q.float() - z[i].float()) * s[i]).t()


@affine
def loop_and_cat() -> Source:
    t = {"q": _int(16, N, K), "s": _scales(N, K // G)}
    return t, lambda q, s: torch.cat([q[:, G * i : G * i + G].float() * s[:, i : i + 1] for i in range(K // G)], 1)


@affine
def loop_in_place() -> Source:
    def weight(q: Tensor, s: Tensor) -> Tensor:
        w = torch.empty(N, K)
        for i in range(K // G):
            w[:, G * i : G * (i + 1)] = q[:, G * i : G * (i + 1)] * s[:, i, None]
        return w

    return {"q": _int(16, N, K), "s": _scales(N, K // G)}, weight


@affine
def loop_of_rows() -> Source:
    t = {"q": _int(16, N, K), "s": _scales(N)}
    return t, lambda q, s: torch.stack([q[i].float() * s[i] for i in range(N)])


@affine
def in_place_arithmetic() -> Source:
    return _grouped(), lambda q, s, z: q.float().sub_(z).mul_(s).flatten(1)


@affine
def minus_zero_scaled() -> Source:
    return _grouped(), lambda q, s, z: (q.float() * s - z.float() * s).view(N, K)


@affine
def einsum_scale() -> Source:
    t = {"q": _int(16, N, K // G, G), "s": _scales(N, K // G)}
    return t, lambda q, s: torch.einsum("ngk,ng->ngk", q.float(), s).reshape(N, K)


@affine
def diagonal_scale() -> Source:
    return {"q": _int(16, N, K), "s": _scales(N)}, lambda q, s: torch.diag(s) @ q.float()


@affine
def half_arithmetic() -> Source:
    t = {"q": _int(16, N, K // G, G), "s": _scales(N, K // G, 1, dtype=torch.float16), "z": _int(16, N, K // G, 1, seed=4)}
    return t, lambda q, s, z: ((q.half() - z.half()) * s).float().view(N, K)


@affine
def bfloat_arithmetic() -> Source:
    t = {"q": _int(16, N, K // G, G), "s": _scales(N, K // G, 1, dtype=torch.bfloat16)}
    return t, lambda q, s: ((q.bfloat16() - 8) * s).float().view(N, K)


@affine
def scales_of_scales() -> Source:
    t = {"q": _int(16, N, K // G, G), "s": _int(64, N, K // G, 1, seed=4), "d": _scales(N, 1, 1)}
    return t, lambda q, s, d: (q.float() * (d * s)).view(N, K)


@affine
def scales_and_mins_of_scales() -> Source:
    t = {"q": _int(16, N, K // G, G), "s": _int(64, N, K // G, 1, low=1, seed=4), "m": _int(64, N, K // G, 1, seed=6),
         "d": _scales(N, 1, 1), "e": _scales(N, 1, 1) / 7}  # fmt: skip
    return t, lambda q, s, m, d, e: (q.float() * (d * s) - e * m).view(N, K)


@affine
def blocks_of_128() -> Source:
    t = {"q": _int(128, 256, 256, low=-128, dtype=torch.int8), "s": _scales(2, 2)}
    return t, lambda q, s: q.float() * s.repeat_interleave(128, 0).repeat_interleave(128, 1)


@affine
def flat_blocks() -> Source:
    t = {"q": _int(16, N * K // 48 + 1, 48), "s": _scales(N * K // 48 + 1, 1)}
    return t, lambda q, s: ((q.float() - 8) * s).reshape(-1)[: N * K].view(N, K)


@affine
def per_tensor() -> Source:
    return {"q": _int(128, N, K, low=-128, dtype=torch.int8), "s": _scales()}, lambda q, s: q.float() * s


@affine
def transposed_storage() -> Source:
    t = {"q": _int(16, K, N), "s": _scales(K // G, N)}
    return t, lambda q, s: (q.view(K // G, G, N).float() * s[:, None]).view(K, N).t()


# --- packed codes


@affine
def nibbles_stack() -> Source:
    return _nibbles(), lambda p, s: (torch.stack([p & 15, p >> 4], -1).view(N, K).float() - 8) * s


@affine
def nibbles_cat() -> Source:
    return _nibbles(), lambda p, s: (torch.cat([p & 0x0F, (p & 0xF0) >> 4], 1).float() - 8) * s


@affine
def nibbles_empty() -> Source:
    def weight(p: Tensor, s: Tensor) -> Tensor:
        q = torch.empty(N, K, dtype=torch.uint8)
        q[:, ::2] = p & 15
        q[:, 1::2] = p >> 4
        return (q.float() - 8) * s

    return _nibbles(), weight


@affine
def nibbles_divided() -> Source:
    return _nibbles(), lambda p, s: (torch.stack([p % 16, p // 16], -1).view(N, K).float() - 8) * s


@affine
def nibbles_shifted_by_tensor() -> Source:
    t = _nibbles() | {"shifts": torch.tensor([0, 4], dtype=torch.uint8)}
    return t, lambda p, s, shifts: (((p[..., None] >> shifts) & 15).view(N, K).float() - 8) * s


@affine
def nibbles_sign_extended() -> Source:
    t = {"p": _int(128, N, K // 2, low=-128, dtype=torch.int8), "s": _scales(N, 1)}
    return t, lambda p, s: torch.stack([(p << 4) >> 4, p >> 4], -1).view(N, K) * s


@affine
def nibbles_xor_sub() -> Source:
    t = _nibbles()
    return t, lambda p, s: ((torch.stack([p & 15, p >> 4], -1).view(N, K) ^ 8).to(torch.int8) - 8) * s


@affine
def nibbles_where() -> Source:
    def weight(p: Tensor, s: Tensor) -> Tensor:
        q = torch.stack([p & 15, p >> 4], -1).view(N, K).to(torch.int8)
        return torch.where(q > 7, q - 16, q).float() * s

    return _nibbles(), weight


@affine
def nibbles_float_where() -> Source:
    def weight(p: Tensor, s: Tensor) -> Tensor:
        q = torch.stack([p & 15, p >> 4], -1).view(N, K).float()
        return torch.where(q >= 8, q - 16, q) * s

    return _nibbles(), weight


@affine
def two_bits() -> Source:
    t = {"p": _int(256, N, K // 4), "s": _scales(N, 1)}
    return t, lambda p, s: (torch.stack([(p >> i) & 3 for i in (0, 2, 4, 6)], -1).view(N, K).float() - 1) * s


@affine
def one_bit() -> Source:
    t = {"p": _int(256, N, K // 8), "s": _scales(N, 1)}
    return t, lambda p, s: (torch.stack([(p >> i) & 1 for i in range(8)], -1).view(N, K).float() - 0.5) * s


@affine
def three_planes() -> Source:
    t = {"p": _int(256, 3, N, K // 8), "s": _scales(N, 1)}

    def weight(p: Tensor, s: Tensor) -> Tensor:
        bits = ((p.unsqueeze(-1) >> torch.arange(8)) & 1).view(3, N, K)
        return ((bits[0] | (bits[1] << 1) | (bits[2] << 2)).float() - 4) * s

    return t, weight


@affine
def three_bits_two_and_one() -> Source:
    t = {"low": _int(256, N, K // 4), "high": _int(256, N, K // 8, seed=7), "s": _scales(N, 1)}

    def weight(low: Tensor, high: Tensor, s: Tensor) -> Tensor:
        a = ((low.unsqueeze(-1) >> torch.tensor([0, 2, 4, 6])) & 3).view(N, K)
        b = ((high.unsqueeze(-1) >> torch.arange(8)) & 1).view(N, K)
        return (a + 4 * b).float() * s

    return t, weight


@affine
def ten_per_word() -> Source:
    t = {"p": _int(2**30, N, 7, dtype=torch.int32), "s": _scales(N, 1)}
    return t, lambda p, s: (torch.stack([(p >> 3 * i) & 7 for i in range(9, -1, -1)], 2).view(N, 70)[:, :K].float() - 4) * s


@affine
def base_three() -> Source:
    t = {"p": _int(243, N, 13), "s": _scales(N, 1)}
    return t, lambda p, s: (torch.stack([p // 3**i % 3 for i in range(5)], -1).view(N, 65)[:, :K].float() - 1) * s


@affine
def straddling_words() -> Source:
    t = {"p": _int(2**31, 3 * K // 32, N, low=-(2**31), dtype=torch.int32), "s": _scales(N)}

    def weight(p: Tensor, s: Tensor) -> Tensor:
        wide = p.to(torch.int64) & 0xFFFFFFFF
        fields = []
        for i in range(K):
            word, bit = divmod(3 * i, 32)
            field = wide[word] >> bit
            if bit > 29:
                field = field | (wide[word + 1] << (32 - bit))
            fields.append(field & 7)
        return torch.stack(fields, 1).float() * s[:, None]

    return t, weight


@affine
def gptq() -> Source:
    t = {"p": _int(2**31, K // 8, N, low=-(2**31), dtype=torch.int32), "s": _scales(K // G, N, dtype=torch.float16),
         "z": _int(2**31, K // G, N // 8, low=-(2**31), dtype=torch.int32, seed=8), "wf": torch.arange(0, 32, 4),
         "g": torch.arange(K) // G}  # fmt: skip

    def weight(p: Tensor, s: Tensor, z: Tensor, wf: Tensor, g: Tensor) -> Tensor:
        zeros = torch.bitwise_right_shift(z.unsqueeze(2).expand(-1, -1, 8), wf[None, None]).to(torch.int16)
        zeros = ((zeros & 15) + 1).reshape(s.shape)
        q = torch.bitwise_right_shift(p.unsqueeze(1).expand(-1, 8, -1), wf[None, :, None]).to(torch.int16) & 15
        return (s[g.long()] * (q.reshape(K, N) - zeros[g.long()])).t().float()

    return t, weight


@affine
def awq() -> Source:
    t = {"p": _int(2**31, K, N // 8, low=-(2**31), dtype=torch.int32), "s": _scales(K // G, N, dtype=torch.float16),
         "z": _int(2**31, K // G, N // 8, low=-(2**31), dtype=torch.int32, seed=8)}  # fmt: skip
    order = [0, 4, 1, 5, 2, 6, 3, 7]

    def unpacked(p: Tensor) -> Tensor:
        q = (p[:, :, None] >> torch.arange(0, 32, 4)[None, None]).to(torch.int8).view(p.shape[0], N)
        return q[:, torch.arange(N).view(-1, 8)[:, order].reshape(-1)] & 15

    def weight(p: Tensor, s: Tensor, z: Tensor) -> Tensor:
        zeros, scales = unpacked(z).repeat_interleave(G, 0), s.repeat_interleave(G, 0)
        return ((unpacked(p) - zeros) * scales).t().float()

    return t, weight


@affine
def bit_stream() -> Source:
    t = {"p": _int(256, N, K * 5 // 8), "s": _scales(N, 1)}

    def weight(p: Tensor, s: Tensor) -> Tensor:
        bits = ((p.unsqueeze(-1) >> torch.arange(8)) & 1).view(N, K, 5)
        return ((bits * (1 << torch.arange(5))).sum(-1).float() - 16) * s

    return t, weight


@affine
def six_bits_of_bytes() -> Source:
    t = {"p": _int(256, N, K // 4, 3), "s": _scales(N, 1)}

    def weight(p: Tensor, s: Tensor) -> Tensor:
        a, b, c = p.unbind(-1)
        fields = [a & 63, (a >> 6) | ((b & 15) << 2), (b >> 4) | ((c & 3) << 4), c >> 2]
        return (torch.stack(fields, -1).view(N, K).float() - 32) * s

    return t, weight


# --- binary codes

binary = _spelling("binary")
Q = 3


def _signs() -> dict[str, Tensor]:
    return {"b": _int(2, Q, N, K, dtype=torch.int8) * 2 - 1, "a": _scales(Q, N, 1) * torch.tensor([4.0, 2, 1]).view(Q, 1, 1)}


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
    t = {"p": _int(256, Q, N, K // 8), "a": _signs()["a"]}
    return t, lambda p, a: ((((p.unsqueeze(-1) >> torch.arange(8)) & 1).view(Q, N, K) * 2 - 1) * a).sum(0)


@binary
def bcq_einsum() -> Source:
    t = _signs()
    return {"b": t["b"], "a": t["a"].squeeze(-1)}, lambda b, a: torch.einsum("qnk,qn->nk", b.float(), a)


@binary
def bcq_einsum_groups() -> Source:
    t = {"b": _signs()["b"].view(Q, N, K // G, G), "a": _scales(Q, N, K // G)}
    return t, lambda b, a: torch.einsum("qngk,qng->ngk", b.float(), a).reshape(N, K)


@binary
def bcq_offset() -> Source:
    return _signs() | {"z": _random(N, 1) * 0.1}, lambda b, a, z: (b * a).sum(0) + z


@binary
def bcq_bits_times_two() -> Source:
    t = _signs()
    return {"b": (t["b"] > 0).to(torch.uint8), "a": t["a"]}, lambda b, a: ((2.0 * b - 1) * a).sum(dim=0)


@binary
def bcq_stack_of_products() -> Source:
    return _signs(), lambda b, a: torch.stack([b[i].float() * a[i] for i in range(Q)]).sum(0)


# --- tables

table = _spelling("table")


def _book(levels: int = 16) -> dict[str, Tensor]:
    return {"t": _random(levels).sort().values, "q": _int(levels, N, K, dtype=torch.int64), "s": _scales(N, 1)}


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
    t = {"t": _random(16).sort().values, "p": _int(256, N, K // 2), "s": _scales(N, 1)}

    def weight(t: Tensor, p: Tensor, s: Tensor) -> Tensor:
        byte = torch.arange(256)
        pairs = torch.stack([t[byte & 15], t[byte >> 4]], -1)
        return pairs[p.long()].view(N, K) * s

    return t, weight


@table
def book_of_byte_pairs_stored() -> Source:
    levels, byte = _random(16).sort().values, torch.arange(256)
    t = {"t": torch.stack([levels[byte & 15], levels[byte >> 4]], -1), "p": _int(256, N, K // 2), "s": _scales(N, 1)}
    return t, lambda t, p, s: t[p.long()].view(N, K) * s


@table
def book_of_rows_gather() -> Source:
    t = {"t": _random(N, 16), "q": _int(16, N, K, dtype=torch.int64)}
    return t, lambda t, q: torch.gather(t, 1, q)


@table
def book_of_rows_index() -> Source:
    t = {"t": _random(N, 16), "q": _int(16, N, K, dtype=torch.int64)}
    return t, lambda t, q: t[torch.arange(N)[:, None], q]


@table
def book_of_rows_flat() -> Source:
    t = {"t": _random(N, 8), "q": _int(8, N, K, dtype=torch.int64)}
    return t, lambda t, q: t.view(-1)[q + 8 * torch.arange(N)[:, None]]


@table
def book_of_groups() -> Source:
    t = {"t": _random(N, 2, 4), "q": _int(4, N, 2, K // 2, dtype=torch.int64)}
    return t, lambda t, q: torch.gather(t, 2, q).view(N, K)


@table
def book_of_nibbles() -> Source:
    t = {"t": _random(16).sort().values, "p": _int(256, N, K // 2), "s": _scales(N, 1)}
    return t, lambda t, p, s: t[torch.stack([p >> 4, p & 15], -1).view(N, K).int()] * s


@table
def fp8_cast() -> Source:
    t = {"q": _random(N, K).to(torch.float8_e4m3fn), "s": _scales(N, 1)}
    return t, lambda q, s: q.float() * s


@table
def fp8_of_bytes() -> Source:
    t = {"q": _random(N, K).to(torch.float8_e5m2).view(torch.uint8), "s": _scales(N, 1)}
    return t, lambda q, s: q.view(torch.float8_e5m2).float() * s


@table
def fp8_blocks() -> Source:
    t = {"q": _random(256, 256).to(torch.float8_e4m3fn), "s": _scales(2, 2)}
    return t, lambda q, s: q.float() * s.repeat_interleave(128, 0).repeat_interleave(128, 1)


@table
def e2m1_arithmetic() -> Source:
    def weight(q: Tensor, s: Tensor) -> Tensor:
        sign, exponent, mantissa = 1 - 2.0 * (q >> 3), ((q >> 1) & 3).float(), (q & 1).float()
        size = torch.where(exponent == 0, mantissa * 0.5, (1 + mantissa * 0.5) * torch.exp2(exponent - 1))
        return sign * size * s

    return {"q": _int(16, N, K), "s": _scales(N, 1)}, weight


@table
def ldexp() -> Source:
    t = {"t": _random(16), "q": _int(16, N, K // 32, 32, dtype=torch.int64), "e": _int(10, N, K // 32, 1, low=1)}
    return t, lambda t, q, e: torch.ldexp(t[q], e.to(torch.int32) - 8).view(N, K)


@table
def exponent_bits() -> Source:
    t = {"t": _random(16), "q": _int(16, N, K // 32, 32, dtype=torch.int64), "e": _int(130, N, K // 32, 1, low=120)}
    return t, lambda t, q, e: (t[q] * (e.to(torch.int32) << 23).view(torch.float32)).view(N, K)


@table
def nested_absmax() -> Source:
    t = {"t": _random(16), "q": _int(16, N, K // G, G, dtype=torch.int64), "c": _int(256, N, K // G, 1),
         "book": _random(256).sort().values.abs() + 0.1, "d": _scales(1), "m": _random(1)}  # fmt: skip
    return t, lambda t, q, c, book, d, m: (t[q] * (book[c.long()] * d + m)).view(N, K)


@table
def signs_and_magnitudes() -> Source:
    t = {"t": _random(8).abs(), "q": _int(16, N, K), "s": _scales(N, 1)}
    return t, lambda t, q, s: t[(q & 7).long()] * torch.where((q & 8).bool(), -1.0, 1.0) * s
