"""Decoder-only language models of real sizes with random weights, in plain PyTorch: what `lq bench --model` runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .quantize import QuantLinear, quantize

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, as its config.json has them.

    bias         of the q, k and v projections
    tied         the head is the embedding's own weight
    gelu         in place of SiLU, in its tanh form
    sandwich     norms after attention and MLP too, before the residual is added
    scaled       the embedding is multiplied by sqrt(hidden)
    soft_cap     logits are soft_cap * tanh(logits / soft_cap); 0: as they are
    experts      of which each token is given to `top`, in place of one MLP; 0: none
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    vocabulary: int
    theta: float
    epsilon: float = 1e-5
    bias: bool = False
    tied: bool = False
    gelu: bool = False
    sandwich: bool = False
    scaled: bool = False
    soft_cap: float = 0.0
    experts: int = 0
    top: int = 0

    def read(self, tokens: int) -> float:
        """The share of all experts that so many tokens read, on average, where routing is even."""
        return 1 - (1 - self.top / self.experts) ** tokens


SHAPES: Mapping[str, Shape] = {
    "llama3-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256, 5e5),
    "llama3-70b": Shape(80, 8192, 64, 8, 128, 28672, 128256, 5e5),
    "qwen2.5-7b": Shape(28, 3584, 28, 4, 128, 18944, 152064, 1e6, 1e-6, bias=True),
    "mistral-7b": Shape(32, 4096, 32, 8, 128, 14336, 32768, 1e6),
    # Without the soft cap of attention scores, which F.scaled_dot_product_attention does not have.
    "gemma2-9b": Shape(
        42, 3584, 16, 8, 256, 14336, 256000, 1e4, 1e-6, tied=True, gelu=True, sandwich=True, scaled=True, soft_cap=30.0
    ),
    "mixtral-8x7b": Shape(32, 4096, 32, 8, 128, 14336, 32000, 1e6, experts=8, top=2),
    "tiny": Shape(2, 256, 4, 2, 64, 512, 512, 1e4),
    "tiny-moe": Shape(2, 256, 4, 2, 64, 512, 512, 1e4, experts=4, top=2),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 inside."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(size)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return wide.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and a static cache of keys and values.

    keys, values  [batch, kv_heads, length, head], set by Decoder.empty_cache; the dtype of activations is theirs
    """

    keys: Tensor
    values: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head = shape.head
        self.q = nn.Linear(shape.hidden, shape.heads * shape.head, bias=shape.bias)
        self.k = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=shape.bias)
        self.v = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=shape.bias)
        self.o = nn.Linear(shape.heads * shape.head, shape.hidden, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotated(self.q(x).unflatten(-1, (-1, self.head)).transpose(1, 2), cos, sin)
        k = rotated(self.k(x).unflatten(-1, (-1, self.head)).transpose(1, 2), cos, sin)
        v = self.v(x).unflatten(-1, (-1, self.head)).transpose(1, 2)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x [batch, heads, tokens, head] by cos and sin [tokens, head]."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gelu = shape.gelu
        self.gate, self.up = (nn.Linear(shape.hidden, shape.intermediate, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.gate(x), approximate="tanh") if self.gelu else F.silu(self.gate(x))
        return self.down(gate * self.up(x))


class Experts(nn.Module):
    """A linear layer for each expert, stacked as [experts * n, k]: x stands expert by expert.

    Expert e's rows end at ends[e]; int32 [experts].
    """

    def __init__(self, experts: int, n: int, k: int) -> None:
        super().__init__()
        self.experts, self.stacked = experts, nn.Linear(k, experts * n, bias=False)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        w = self.stacked.weight.to(x.dtype).unflatten(0, (self.experts, -1))
        if x.dtype == torch.bfloat16:
            return torch._grouped_mm(x, w.transpose(1, 2), offs=ends)
        # torch's grouped matmul is for bfloat16; a float32 reference runs here.
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        return torch.cat([F.linear(rows, own) for rows, own in zip(x.split(sizes), w, strict=True)])


class Mixture(nn.Module):
    """Of several MLPs, those that a router chooses for each token, each weighed by how much it is chosen (Mixtral)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.experts, self.top = shape.experts, shape.top
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.gate, self.up = (Experts(shape.experts, shape.intermediate, shape.hidden) for _ in range(2))
        self.down = Experts(shape.experts, shape.hidden, shape.intermediate)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        logits = F.linear(tokens, self.router.weight.to(x.dtype))
        shares, chosen = logits.float().softmax(-1).topk(self.top)
        shares, chosen = (shares / shares.sum(-1, keepdim=True)).to(x.dtype), chosen.flatten()
        # Where each choice stands among those of its expert, counted: to sort a few takes a GPU longer.
        counts = (chosen[:, None] == torch.arange(self.experts, device=x.device)).cumsum(0)
        ends = counts[-1].cumsum(0)
        places = (ends - counts[-1])[chosen] + counts.gather(1, chosen[:, None]).squeeze(1) - 1
        order = torch.empty_like(places).scatter(0, places, torch.arange(len(places), device=x.device))
        rows, ends = tokens[order // self.top], ends.to(torch.int32)
        y = self.down(F.silu(self.gate(rows, ends)) * self.up(rows, ends), ends)
        # Token by token again.
        return (y[places].unflatten(0, (-1, self.top)) * shares.unsqueeze(-1)).sum(1).view(x.shape)


class Block(nn.Module):
    """Attention and MLP, each on a norm of the residual, or between two norms."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(shape), Mixture(shape) if shape.experts else MLP(shape)
        self.before_attention, self.before_mlp = (RMSNorm(shape.hidden, shape.epsilon) for _ in range(2))
        self.after_attention, self.after_mlp = (
            RMSNorm(shape.hidden, shape.epsilon) if shape.sandwich else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.after_attention(self.attention(self.before_attention(x), position, mask, cos, sin))
        return x + self.after_mlp(self.mlp(self.before_mlp(x)))


class Decoder(nn.Module):
    """Tokens [batch, tokens] at `position` [tokens] to the next token of each row [batch, 1] and its logits.

    One token is a step of decoding, which sees the cache up to its position. More are a prompt, from position 0.
    Until `empty_cache` there is no cache, and no call is possible.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList()
        self.norm = RMSNorm(shape.hidden, shape.epsilon)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def empty_cache(self, batch: int, length: int, dtype: torch.dtype) -> None:
        """Room for `length` tokens of `batch` sequences; activations are of `dtype` from now on.

        Tensors that fit are emptied in place: what was compiled for their addresses stays valid.
        """
        device, shape = self.norm.weight.device, self.shape
        blocks: list[Any] = list(self.blocks)
        size = (batch, shape.kv_heads, length, shape.head)
        held = [t for block in blocks for t in (block.attention.keys, block.attention.values)]
        if all(t.shape == size and t.dtype == dtype for t in held):
            for t in held:
                t.zero_()
            return
        frequencies = shape.theta ** (-torch.arange(0, shape.head, 2, device=device) / shape.head)
        angles = torch.outer(torch.arange(length, device=device), frequencies).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        for block in blocks:
            block.attention.keys = torch.zeros(size, dtype=dtype, device=device)
            block.attention.values = torch.zeros(size, dtype=dtype, device=device)

    def forward(self, tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens).to(self.cos.dtype)
        if self.shape.scaled:
            x = x * self.shape.hidden**0.5
        cos, sin = self.cos[position], self.sin[position]
        # A prompt fills an empty cache, so its attention is causal among its own tokens.
        one = tokens.shape[1] == 1
        mask = torch.arange(len(self.cos), device=x.device) <= position[:, None] if one else None
        for block in self.blocks:
            x = block(x, position, mask, cos, sin)
        # A float32 reference runs through the same head.
        logits = self.lm_head(self.norm(x[:, -1]).to(self.lm_head.weight.dtype))
        if self.shape.soft_cap:
            logits = self.shape.soft_cap * torch.tanh(logits / self.shape.soft_cap)
        return logits.argmax(-1, keepdim=True), logits


@torch.no_grad()
def made(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A module with random weights of `dtype`."""
    with torch.device("meta"):
        module = build()
    module.to(dtype).to_empty(device=device).requires_grad_(False)
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            # Of unit variance behind every matmul of an input of unit variance.
            size = p.shape[-1] ** -0.5 if isinstance(part, nn.Linear) and p.ndim == 2 else 1.0
            p.fill_(1.0) if isinstance(part, RMSNorm) else p.normal_(0.0, 0.02 if name == "bias" else size)
    return module


@torch.no_grad()
def random(shape: Shape, device: torch.device, dtype: torch.dtype, **how: Any) -> Decoder:
    """A model with random weights, each block quantized by `quantize(block, **how)` before the next one is made.

    Embedding, head and routers stay dense, of `dtype`. At most one dense block is held at a time.
    """
    model: Decoder = made(lambda: Decoder(shape), device, dtype)
    if shape.tied:
        model.lm_head.weight = model.embedding.weight
    for _ in range(shape.layers):
        model.blocks.append(quantized(made(lambda: Block(shape), device, dtype), **how))
    return model.eval()


def quantized(module: nn.Module, **how: Any) -> nn.Module:
    """`module`, all its linear layers but routers quantized."""
    return quantize(module, modules=lambda name, _: not name.endswith("router"), **how)


def replaced(model: Module, change: Callable[[QuantLinear], nn.Module]) -> Module:
    """The same model, with `change` of each quantized layer in its place; all other tensors are shared."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo |= {id(part): change(part) for part in model.modules() if isinstance(part, QuantLinear)}
    return copy.deepcopy(model, memo)


def dense(layer: QuantLinear) -> nn.Linear:
    """A plain layer of the weight that `layer` dequantizes to."""
    n, k = layer.out_features, layer.in_features
    made = nn.Linear(k, n, bias=False, device="meta")
    made.weight = nn.Parameter(layer.weight, requires_grad=False)
    made.register_parameter("bias", layer._parameters["bias"])
    return made


def weight_bytes(model: Decoder, tokens: int = 1) -> int:
    """Bytes that a step of so many tokens reads: all weights but the embedding, of which it reads a row for each.

    Of experts as many as even routing chooses on average.
    """
    tensors = {name: t for name, t in model.state_dict().items() if name != "embedding.weight"}
    return round(sum(share(model, name, tokens) * t.nbytes for name, t in tensors.items()))


def share(model: Decoder, name: str, tokens: int) -> float:
    """How much of a tensor so many tokens read: 1, but of the experts'."""
    return model.shape.read(tokens) if ".stacked." in name else 1.0
