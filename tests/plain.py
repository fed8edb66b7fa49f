"""Dequantization as people write it in plain PyTorch: spellings of (codes - zero) * scale, and of packed codes.

Each is stored tensors and a function of them that gives the weight [N, K]; `plain_codes` has binary codes and tables.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

N, K, G = 32, 64, 16
Source = tuple[dict[str, Tensor], Callable[..., Tensor]]
PLAIN: dict[str, tuple[str, Callable[[], Source]]] = {}


def spelling(rule: str) -> Callable[[Callable[[], Source]], Callable[[], Source]]:
    def add(make: Callable[[], Source]) -> Callable[[], Source]:
        PLAIN[make.__name__] = (rule, make)
        return make

    return add


def randoms(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ints(high: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.uint8, seed: int = 2) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (randoms(*shape, seed=3).abs() * 0.05 + 0.01).to(dtype)


def _grouped(high: int = 16, dtype: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """Codes [N, K/G, G], scales and zeros [N, K/G, 1]."""
    return {"q": ints(high, N, K // G, G, dtype=dtype), "s": scales(N, K // G, 1),
            "z": ints(high, N, K // G, 1, seed=4)}  # fmt: skip


def _nibbles() -> dict[str, Tensor]:
    return {"p": ints(256, N, K // 2), "s": scales(N, 1)}


affine = spelling("affine")


@affine
def sub_mul() -> Source:
    return _grouped(), lambda q, s, z: ((q.float() - z.float()) * s).view(N, K)


@affine
def mul_add() -> Source:
    return {"q": ints(16, N, K), "s": scales(N, 1), "b": randoms(N, 1)}, lambda q, s, b: q.float() * s + b


@affine
def addcmul() -> Source:
    return {"q": ints(16, N, K), "s": scales(N, 1), "b": randoms(N, 1)}, lambda q, s, b: torch.addcmul(b, q.float(), s)


@affine
def sub_div() -> Source:
    return _grouped(), lambda q, s, z: ((q.float() - z.float()) / (1 / s)).view(N, K)


@affine
def number_scale() -> Source:
    return {"q": ints(8, N, K, low=-8, dtype=torch.int8)}, lambda q: q.float() * 0.05


@affine
def number_scale_and_zero() -> Source:
    return {"q": ints(16, N, K)}, lambda q: (q.float() - 8) / 30.0


@affine
def number_first() -> Source:
    return {"q": ints(16, N, K), "s": scales(N, 1)}, lambda q, s: (7.5 - q.float()) * s


@affine
def repeat_interleave() -> Source:
    return {"q": ints(16, N, K), "s": scales(N, K // G)}, lambda q, s: q.float() * s.repeat_interleave(G, 1)


@affine
def repeat_interleave_tensor() -> Source:
    t = {"q": ints(16, N, K), "s": scales(N, K // G), "r": torch.full((K // G,), G)}
    return t, lambda q, s, r: q.float() * s.repeat_interleave(r, dim=1, output_size=K)


@affine
def kron() -> Source:
    return {"q": ints(16, N, K), "s": scales(N, K // G)}, lambda q, s: q.float() * torch.kron(s, torch.ones(1, G))


@affine
def g_idx() -> Source:
    order = torch.randperm(K, generator=torch.Generator().manual_seed(5))
    t = {"q": ints(16, K, N), "s": scales(K // G, N), "z": ints(16, K // G, N, seed=4)}
    t["i"] = (torch.arange(K) // G)[order]
    return t, lambda q, s, z, i: ((q.float() - z[i].float()) * s[i]).t()


@affine
def loop_and_cat() -> Source:
    t = {"q": ints(16, N, K), "s": scales(N, K // G)}
    return t, lambda q, s: torch.cat([q[:, G * i : G * i + G].float() * s[:, i : i + 1] for i in range(K // G)], 1)


@affine
def loop_in_place() -> Source:
    def weight(q: Tensor, s: Tensor) -> Tensor:
        w = torch.empty(N, K)
        for i in range(K // G):
            w[:, G * i : G * (i + 1)] = q[:, G * i : G * (i + 1)] * s[:, i, None]
        return w

    return {"q": ints(16, N, K), "s": scales(N, K // G)}, weight


@affine
def loop_of_rows() -> Source:
    t = {"q": ints(16, N, K), "s": scales(N)}
    return t, lambda q, s: torch.stack([q[i].float() * s[i] for i in range(N)])


@affine
def in_place_arithmetic() -> Source:
    return _grouped(), lambda q, s, z: q.float().sub_(z).mul_(s).flatten(1)


@affine
def minus_zero_scaled() -> Source:
    return _grouped(), lambda q, s, z: (q.float() * s - z.float() * s).view(N, K)


@affine
def einsum_scale() -> Source:
    t = {"q": ints(16, N, K // G, G), "s": scales(N, K // G)}
    return t, lambda q, s: torch.einsum("ngk,ng->ngk", q.float(), s).reshape(N, K)


@affine
def diagonal_scale() -> Source:
    return {"q": ints(16, N, K), "s": scales(N)}, lambda q, s: torch.diag(s) @ q.float()


@affine
def half_arithmetic() -> Source:
    t = _grouped() | {"s": scales(N, K // G, 1, dtype=torch.float16)}
    return t, lambda q, s, z: ((q.half() - z.half()) * s).float().view(N, K)


@affine
def bfloat_arithmetic() -> Source:
    t = {"q": ints(16, N, K // G, G), "s": scales(N, K // G, 1, dtype=torch.bfloat16)}
    return t, lambda q, s: ((q.bfloat16() - 8) * s).float().view(N, K)


@affine
def scales_of_scales() -> Source:
    t = {"q": ints(16, N, K // G, G), "s": ints(64, N, K // G, 1, seed=4), "d": scales(N, 1, 1)}
    return t, lambda q, s, d: (q.float() * (d * s)).view(N, K)


@affine
def scales_and_mins_of_scales() -> Source:
    t = {"q": ints(16, N, K // G, G), "s": ints(64, N, K // G, 1, low=1, seed=4), "m": ints(64, N, K // G, 1, seed=6),
         "d": scales(N, 1, 1), "e": scales(N, 1, 1) / 7}  # fmt: skip
    return t, lambda q, s, m, d, e: (q.float() * (d * s) - e * m).view(N, K)


@affine
def blocks_of_128() -> Source:
    t = {"q": ints(128, 256, 256, low=-128, dtype=torch.int8), "s": scales(2, 2)}
    return t, lambda q, s: q.float() * s.repeat_interleave(128, 0).repeat_interleave(128, 1)


@affine
def flat_blocks() -> Source:
    t = {"q": ints(16, N * K // 48 + 1, 48), "s": scales(N * K // 48 + 1, 1)}
    return t, lambda q, s: ((q.float() - 8) * s).reshape(-1)[: N * K].view(N, K)


@affine
def per_tensor() -> Source:
    return {"q": ints(128, N, K, low=-128, dtype=torch.int8), "s": scales()}, lambda q, s: q.float() * s


@affine
def transposed_storage() -> Source:
    t = {"q": ints(16, K, N), "s": scales(K // G, N)}
    return t, lambda q, s: (q.view(K // G, G, N).float() * s[:, None]).view(K, N).t()


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
    t = {"p": ints(128, N, K // 2, low=-128, dtype=torch.int8), "s": scales(N, 1)}
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
    t = {"p": ints(256, N, K // 4), "s": scales(N, 1)}
    return t, lambda p, s: (torch.stack([(p >> i) & 3 for i in (0, 2, 4, 6)], -1).view(N, K).float() - 1) * s


@affine
def one_bit() -> Source:
    t = {"p": ints(256, N, K // 8), "s": scales(N, 1)}
    return t, lambda p, s: (torch.stack([(p >> i) & 1 for i in range(8)], -1).view(N, K).float() - 0.5) * s


@affine
def three_planes() -> Source:
    t = {"p": ints(256, 3, N, K // 8), "s": scales(N, 1)}

    def weight(p: Tensor, s: Tensor) -> Tensor:
        bits = ((p.unsqueeze(-1) >> torch.arange(8)) & 1).view(3, N, K)
        return ((bits[0] | (bits[1] << 1) | (bits[2] << 2)).float() - 4) * s

    return t, weight


@affine
def three_bits_two_and_one() -> Source:
    t = {"low": ints(256, N, K // 4), "high": ints(256, N, K // 8, seed=7), "s": scales(N, 1)}

    def weight(low: Tensor, high: Tensor, s: Tensor) -> Tensor:
        a = ((low.unsqueeze(-1) >> torch.tensor([0, 2, 4, 6])) & 3).view(N, K)
        b = ((high.unsqueeze(-1) >> torch.arange(8)) & 1).view(N, K)
        return (a + 4 * b).float() * s

    return t, weight


@affine
def ten_per_word() -> Source:
    t = {"p": ints(2**30, N, 7, dtype=torch.int32), "s": scales(N, 1)}

    def weight(p: Tensor, s: Tensor) -> Tensor:
        fields = torch.stack([(p >> 3 * i) & 7 for i in range(9, -1, -1)], 2)
        return (fields.view(N, 70)[:, :K].float() - 4) * s

    return t, weight


@affine
def base_three() -> Source:
    t = {"p": ints(243, N, 13), "s": scales(N, 1)}
    return t, lambda p, s: (torch.stack([p // 3**i % 3 for i in range(5)], -1).view(N, 65)[:, :K].float() - 1) * s


@affine
def straddling_words() -> Source:
    t = {"p": ints(2**31, 3 * K // 32, N, low=-(2**31), dtype=torch.int32), "s": scales(N)}

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
    t = {"p": ints(2**31, K // 8, N, low=-(2**31), dtype=torch.int32), "s": scales(K // G, N, dtype=torch.float16),
         "z": ints(2**31, K // G, N // 8, low=-(2**31), dtype=torch.int32, seed=8), "wf": torch.arange(0, 32, 4),
         "g": torch.arange(K) // G}  # fmt: skip

    def weight(p: Tensor, s: Tensor, z: Tensor, wf: Tensor, g: Tensor) -> Tensor:
        zeros = torch.bitwise_right_shift(z.unsqueeze(2).expand(-1, -1, 8), wf[None, None]).to(torch.int16)
        zeros = ((zeros & 15) + 1).reshape(s.shape)
        q = torch.bitwise_right_shift(p.unsqueeze(1).expand(-1, 8, -1), wf[None, :, None]).to(torch.int16) & 15
        return (s[g.long()] * (q.reshape(K, N) - zeros[g.long()])).t().float()

    return t, weight


@affine
def awq() -> Source:
    t = {"p": ints(2**31, K, N // 8, low=-(2**31), dtype=torch.int32), "s": scales(K // G, N, dtype=torch.float16),
         "z": ints(2**31, K // G, N // 8, low=-(2**31), dtype=torch.int32, seed=8)}  # fmt: skip
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
    t = {"p": ints(256, N, K * 5 // 8), "s": scales(N, 1)}

    def weight(p: Tensor, s: Tensor) -> Tensor:
        bits = ((p.unsqueeze(-1) >> torch.arange(8)) & 1).view(N, K, 5)
        return ((bits * (1 << torch.arange(5))).sum(-1).float() - 16) * s

    return t, weight


@affine
def six_bits_of_bytes() -> Source:
    t = {"p": ints(256, N, K // 4, 3), "s": scales(N, 1)}

    def weight(p: Tensor, s: Tensor) -> Tensor:
        a, b, c = p.unbind(-1)
        fields = [a & 63, (a >> 6) | ((b & 15) << 2), (b >> 4) | ((c & 3) << 4), c >> 2]
        return (torch.stack(fields, -1).view(N, K).float() - 32) * s

    return t, weight
