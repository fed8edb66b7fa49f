"""The ways to run one quantized model that `lq bench --model` compares, each compiled as a user would compile it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import sympy
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from . import backend
from .decoder import Decoder, dense, replaced, share, weight_bytes
from .neighbours import Tinygemm, tinygemm
from .packed import PackedLinear
from .quantize import QuantLinear, quantize
from .report import Report
from .types import SCALE_DTYPES, Problem


@dataclass(frozen=True)
class Way:
    """Whose layers stand in the model (None: the quantized ones as they are), and the backend of torch.compile.

    other   their weights are others, so that what is right is what eager makes of themselves
    """

    backend: str
    layer: Callable[[QuantLinear], nn.Module] | None = None
    other: bool = False


class Int4Pack(nn.Module):
    """torch's own int4 matmul on the codes of a quantized layer: what one would swap in by hand."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        weight = layer.qweight()
        refusal = Tinygemm().accepts(_problem(layer))
        if refusal is not None or weight.scale is None or weight.zero is None:
            raise ValueError(f"torch's int4 matmul takes {refusal or 'weights with a zero point'}")
        packed, both = tinygemm(weight.codes, weight.scale, ((8 - weight.zero) * weight.scale).to(weight.scale.dtype))
        self.register_buffer("packed", packed)
        self.register_buffer("both", both)
        self.group, self.bias = weight.format.group, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = Tinygemm().run((self.packed, self.both, self.group), x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def converted(layer: QuantLinear) -> PackedLinear:
    """What `lqcompile.convert` makes of a layer."""
    weight = layer.qweight()
    return PackedLinear.from_weight(weight, layer._parameters["bias"], x_dtype=SCALE_DTYPES[weight.format.scale_dtype])


def bcq3(layer: QuantLinear) -> nn.Module:
    """Binary codes of 3 bits of a layer's weight, in groups as large: as good as one greedy round makes them."""
    return quantize(dense(layer), 3, layer.format.group, "bcq", rounds=1)


WAYS: Mapping[str, Way] = {
    "lq": Way("lq"),
    "inductor": Way("inductor"),
    "dense": Way("inductor", dense),
    "int4pack": Way("inductor", Int4Pack),
    "converted": Way("lq", converted),
    "bcq3": Way("lq", bcq3, other=True),
}


def _problem(layer: QuantLinear) -> Problem:
    device = next(layer.buffers()).device
    return Problem(
        sympy.Integer(1), (1, 1), layer.out_features, layer.in_features, layer.format, torch.bfloat16, device
    )


@dataclass
class Runner:
    """One way, compiled at its first call. Its tokens and positions are tensors on the model's device.

    compile_seconds  of the first call, with an empty Inductor cache: traced, rewritten, packed, compiled, run once
    weight_bytes     that every step reads, as this way holds them
    report           what "lq" decided; None for other ways
    graphs_skipped   how often Inductor did without CUDA graphs
    """

    name: str
    model: Decoder
    compiled: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = field(init=False)
    compile_seconds: float = 0.0
    weight_bytes: int = 0
    report: Report | None = None
    graphs_skipped: int = 0

    def __post_init__(self) -> None:
        self.compiled = torch.compile(
            self.model, backend=WAYS[self.name].backend, mode="reduce-overhead", fullgraph=True, dynamic=False
        )

    def compile(self, tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The first call. Raises whatever compiling raises."""
        skipped, given = counters["inductor"]["cudagraph_skips"], tokens.numel()
        with fresh_cache(), backend.recording() as reports:
            start = time.perf_counter()
            tokens, logits = self(tokens, position)
            synchronize(logits.device)
            self.compile_seconds = time.perf_counter() - start
        self.weight_bytes = weight_bytes(self.model, given)
        if reports:
            self.report = Report.merged(reports)
            sources = [(f"{name}.", m) for name, m in self.model.named_modules() if isinstance(m, QuantLinear)]
            held = sum(share(self.model, name, given) * t.nbytes for name, m in sources for t in m.buffers())
            packed = [d for d in self.report.decisions if d.outcome == "rewritten"]
            read = self.model.shape.read(given) if self.model.shape.experts else 1.0
            taken = sum((read if "experts" in d.problem else 1.0) * d.bytes_after for d in packed)
            self.weight_bytes += round(taken - held)
        self.graphs_skipped = counters["inductor"]["cudagraph_skips"] - skipped
        return tokens, logits

    def __call__(self, tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens and their logits; both are overwritten by the next call."""
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(tokens, position)

    def decode(self, tokens: Tensor, start: int, steps: int) -> float:
        """Seconds of a step, over `steps` greedy steps from position `start` on."""
        position = torch.tensor([start], device=tokens.device)
        synchronize(tokens.device)
        begun = time.perf_counter()
        for _ in range(steps):
            tokens = self(tokens, position)[0].clone()
            position += 1
        synchronize(tokens.device)
        return (time.perf_counter() - begun) / steps

    def prompt(self, tokens: Tensor, position: Tensor, count: int) -> float:
        """Seconds of a prompt, over `count` runs of it."""
        synchronize(tokens.device)
        begun = time.perf_counter()
        for _ in range(count):
            self(tokens, position)
        synchronize(tokens.device)
        return (time.perf_counter() - begun) / count


def model_of(name: str, quantized: Decoder) -> Decoder:
    """The model that a way runs. Raises ValueError where its layers cannot be of this format."""
    layer = WAYS[name].layer
    if layer is Int4Pack and quantized.shape.experts:
        raise ValueError("torch's int4 matmul takes no experts")
    return quantized if layer is None else replaced(quantized, layer)


def estimate(name: str, quantized: Decoder) -> int:
    """Bytes that a way needs beside the quantized model, about."""
    layers = [m for m in quantized.modules() if isinstance(m, QuantLinear)]
    if WAYS[name].layer is dense:
        return sum(2 * m.out_features * m.in_features for m in layers)
    return 0 if name == "inductor" else sum(t.nbytes for m in layers for t in m.buffers())


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def recordings(device: torch.device) -> int:
    """How many CUDA graphs Inductor has recorded for a device and still holds."""
    if device.type != "cuda":
        return 0
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(device.index or 0, create_if_none_exists=False)
    todo = [] if manager is None else list(itertools.chain.from_iterable(manager.roots.values()))
    count = 0
    while todo:
        node = todo.pop()
        count += 1
        todo.extend(itertools.chain.from_iterable(node.children.values()))
    return count
