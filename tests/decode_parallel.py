"""One sequence decoded by layers of Llama-3-70B's shape, W4 g128: one device against several, cut by our styles.

Weights are random and made packed: nothing dense of their size ever is. On a GPU each step is one CUDA graph.
"""

from __future__ import annotations

import datetime
import functools
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F

from lqcompile.config import WORKLOAD
from lqcompile.kernels.layout import LAYOUTS
from lqcompile.packed import PackedLinear, plan
from lqcompile.parallel import ColwisePacked, RowwisePacked
from lqcompile.passes.plan import Packed
from lqcompile.types import Format

HEAD, CACHE, VOCABULARY, STEPS = 128, 512, 4096, 32
FORMAT = Format("affine", 4, 128, "int", "bfloat16")
PLAN = {
    **{f"layers.*.{name}": ColwisePacked() for name in ("q", "k", "v", "gate", "up")},
    **{f"layers.*.{name}": RowwisePacked() for name in ("o", "down")},
}


@dataclass(frozen=True)
class Shape:
    hidden: int
    wide: int
    heads: int
    kv: int


SHAPES = {"cuda": Shape(8192, 28672, 64, 8), "cpu": Shape(512, 1024, 4, 2)}


def packed(n: int, k: int, seed: int, device: torch.device) -> PackedLinear:
    """A layer of random codes, the same on every device of one type."""
    g = torch.Generator(device).manual_seed(seed)
    layout = plan(FORMAT, n, k, torch.bfloat16, device, WORKLOAD).layout
    parts = []
    for size, dtype in LAYOUTS[layout].shapes(FORMAT, n, k, device.type):
        if dtype.is_floating_point:
            # Differences of two codes of 4 bits have a variance of 42.5; weights have one of 1 / k.
            parts.append((torch.rand(size, generator=g, device=device) + 0.5).div((42.5 * k) ** 0.5).to(dtype))
        else:
            most = 256 if dtype == torch.uint8 else 16
            parts.append(torch.randint(0, most, size, generator=g, device=device, dtype=dtype))
    return PackedLinear(Packed(layout, FORMAT, n, k, parts, None), x_dtype=torch.bfloat16)


class Layer(nn.Module):
    """A decoder layer that attends to a full cache."""

    def __init__(self, shape: Shape, seed: int, device: torch.device) -> None:
        super().__init__()
        query, key = shape.heads * HEAD, shape.kv * HEAD
        sizes = {"q": (query, shape.hidden), "k": (key, shape.hidden), "v": (key, shape.hidden),
                 "o": (shape.hidden, query), "gate": (shape.wide, shape.hidden), "up": (shape.wide, shape.hidden),
                 "down": (shape.hidden, shape.wide)}  # fmt: skip
        for i, (name, (n, k)) in enumerate(sizes.items()):
            setattr(self, name, packed(n, k, 7 * seed + i, device))
            getattr(self, name).path = f"layers.{seed}.{name}"
        g = torch.Generator(device).manual_seed(seed)
        for name in ("keys", "values"):
            cache = torch.randn((1, shape.kv, CACHE, HEAD), generator=g, device=device).to(torch.bfloat16)
            self.register_buffer(name, cache)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:])
        q, k, v = (f(h).view(1, 1, -1, HEAD).transpose(1, 2) for f in (self.q, self.k, self.v))
        self.keys[:, :, -1:] = k
        self.values[:, :, -1:] = v
        y = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(1, 1, -1))
        h = F.rms_norm(x, x.shape[-1:])
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Logits of the next token from this one; embedding and head are dense, and not cut."""

    def __init__(self, shape: Shape, layers: int, device: torch.device, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        g = torch.Generator(device).manual_seed(0)
        table = torch.randn((VOCABULARY, shape.hidden), generator=g, device=device).to(torch.bfloat16)
        self.register_buffer("table", table)
        self.layers = nn.ModuleList()
        for i in range(layers):
            self.layers.append(Layer(shape, i, device))
            if mesh is not None:
                # Layer by layer: of the whole model no rank ever holds more than its part.
                parallelize_module(self.layers[i], mesh, {name[9:]: style for name, style in PLAN.items()})
                rank, heads = mesh.get_local_rank(), shape.kv // mesh.size()
                for name in ("keys", "values"):
                    own = getattr(self.layers[i], name)[:, rank * heads : (rank + 1) * heads]
                    setattr(self.layers[i], name, own.clone())

    def forward(self, token: Tensor) -> Tensor:
        x = F.embedding(token, self.table).view(1, 1, -1)
        for layer in self.layers:
            x = layer(x)
        return F.linear(F.rms_norm(x, x.shape[-1:]), self.table).view(-1)


def stepper(model: nn.Module, device: torch.device, eager: bool) -> Callable[[Tensor], Tensor]:
    """One step as it is timed: compiled unless `eager` and, on a GPU, recorded as a CUDA graph."""
    step = model if eager else torch.compile(model, backend="lq", fullgraph=True, dynamic=False)
    token = torch.zeros(1, dtype=torch.int64, device=device)
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(token)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(token)

    def replay(given: Tensor) -> Tensor:
        token.copy_(given)
        graph.replay()
        return logits

    return replay


def decode(step: Callable[[Tensor], Tensor], device: torch.device, given: Tensor | None) -> Tensor:
    """The logits [steps, vocabulary] of a sequence: that of `given` tokens, or else its own choice."""
    token, out = torch.zeros(1, dtype=torch.int64, device=device), []
    for i in range(STEPS):
        logits = step(token).clone()
        out.append(logits)
        token = logits.argmax().view(1) if given is None else given[i : i + 1]
    return torch.stack(out)


def seconds(step: Callable[[Tensor], Tensor], device: torch.device, repeats: int) -> float:
    """Of one step, the median over `repeats` runs of STEPS."""
    token, found = torch.zeros(1, dtype=torch.int64, device=device), []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(1 + repeats):
        wait()
        start = time.perf_counter()
        for _ in range(STEPS):
            step(token)
        wait()
        found.append((time.perf_counter() - start) / STEPS)
    # The first run warms caches.
    return statistics.median(found[1:])


def rank_of(rank: int, ranks: int, kind: str, layers: int, eager: bool, repeats: int, port: int) -> None:
    """What each process does; rank 0 also decodes alone, first, and prints."""
    # NVLink multicast is not everywhere allowed, and these messages are small.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks),
                   "NCCL_NVLS_ENABLE": "0"}  # fmt: skip
    device, shape = torch.device(kind, rank) if kind == "cuda" else torch.device(kind), SHAPES[kind]
    if kind == "cuda":
        torch.cuda.set_device(device)
    # The others wait for rank 0 to compile and decode alone.
    how = {"backend": "nccl", "device_id": device} if kind == "cuda" else {"backend": "gloo"}
    dist.init_process_group(timeout=datetime.timedelta(hours=1), **how)
    try:
        mesh, tokens = init_device_mesh(kind, (ranks,)), torch.zeros(STEPS, dtype=torch.int64, device=device)
        with torch.no_grad():
            if rank == 0:
                step = stepper(Decoder(shape, layers, device), device, eager)
                wanted, alone = decode(step, device, None), seconds(step, device, repeats)
                tokens.copy_(wanted.argmax(-1))
                del step
            dist.broadcast(tokens, 0)
            step = stepper(Decoder(shape, layers, device, mesh), device, eager)
            got = decode(step, device, tokens)
            dist.barrier()
            together = seconds(step, device, repeats)
        if rank == 0:
            same, off = int((got.argmax(-1) == tokens).sum()), float((got - wanted).norm() / wanted.norm())
            times = ", ".join(
                f"{n} {kind} {1e3 * t:.3f} ms a token ({1 / t:.1f} tokens/s)"
                for n, t in ((1, alone), (ranks, together))
            )
            print(
                f"{layers} layers of {shape}, {'eager' if eager else 'compiled'}: {times}, {alone / together:.2f}x; "
                f"{same} of {STEPS} tokens the same, logits differ by {off:.1e}",
                flush=True,
            )
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def measure(ranks: int, kind: str, layers: int, eager: bool, repeats: int) -> None:
    """Runs `ranks` processes."""
    run = functools.partial(
        rank_of, ranks=ranks, kind=kind, layers=layers, eager=eager, repeats=repeats, port=free_port()
    )
    torch.multiprocessing.spawn(run, nprocs=ranks)
