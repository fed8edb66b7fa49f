"""One sequence decoded by layers of Llama-3-70B's shape, W4 g128: one device against several, cut by our styles.

Weights are random and made packed: nothing dense of their size ever is. On a GPU each step is one CUDA graph. What is
measured is printed at once, so that little is lost where a later part fails or time runs out.
"""

from __future__ import annotations

import datetime
import functools
import gc
import os
import socket
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torch.nn import functional as F

from lqcompile.config import WORKLOAD
from lqcompile.kernels import peers
from lqcompile.kernels.layout import LAYOUTS
from lqcompile.packed import PackedLinear, plan
from lqcompile.parallel import ColwisePacked, RowwisePacked
from lqcompile.passes.pack import Packed
from lqcompile.types import Format

HEAD, CACHE, VOCABULARY, STEPS = 128, 512, 4096, 32
FORMAT = Format("affine", 4, 128, "int", "bfloat16")
# How the ranks' results are added up.
SUMS = {"collective": False, "one shot": True}


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

    def __init__(
        self, shape: Shape, layers: int, device: torch.device, mesh: DeviceMesh | None = None, one_shot: bool = False
    ) -> None:
        super().__init__()
        styles: dict[str, ParallelStyle] = {name: ColwisePacked() for name in ("q", "k", "v", "gate", "up")}
        styles |= {name: RowwisePacked(one_shot=one_shot) for name in ("o", "down")}
        g = torch.Generator(device).manual_seed(0)
        table = torch.randn((VOCABULARY, shape.hidden), generator=g, device=device).to(torch.bfloat16)
        self.register_buffer("table", table)
        self.layers = nn.ModuleList()
        for i in range(layers):
            self.layers.append(Layer(shape, i, device))
            if mesh is not None:
                # Layer by layer: of the whole model no rank ever holds more than its part.
                parallelize_module(self.layers[i], mesh, styles)
                rank, heads = mesh.get_local_rank(), shape.kv // mesh.size()
                for name in ("keys", "values"):
                    own = getattr(self.layers[i], name)[:, rank * heads : (rank + 1) * heads]
                    setattr(self.layers[i], name, own.clone())

    def forward(self, token: Tensor) -> Tensor:
        x = F.embedding(token, self.table).view(1, 1, -1)
        for layer in self.layers:
            x = layer(x)
        return F.linear(F.rms_norm(x, x.shape[-1:]), self.table).view(-1)


def recorded(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of what is run, after it has run, and the tensor that each replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread asks for events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()
    return graph.replay, out


def stepper(model: nn.Module, device: torch.device, eager: bool) -> Callable[[Tensor], Tensor]:
    """One step as it is timed: compiled unless `eager` and, on a GPU, recorded as a CUDA graph."""
    step = model if eager else torch.compile(model, backend="lq", fullgraph=True, dynamic=False)
    token = torch.zeros(1, dtype=torch.int64, device=device)
    if device.type != "cuda":
        # So that it is compiled.
        step(token)
        return step
    replay, logits = recorded(lambda: step(token))

    def run(given: Tensor) -> Tensor:
        token.copy_(given)
        replay()
        return logits

    return run


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


def seconds_of_a_sum(mesh: DeviceMesh, device: torch.device, width: int, one_shot: bool) -> float:
    """Of one all-reduce of a token's activations, in a row of them."""
    group, count = mesh.get_group(), 40
    if one_shot:
        peers.meet(group, device.type)
    x = torch.ones((1, 1, width), dtype=torch.bfloat16, device=device)

    def run() -> Tensor:
        for _ in range(count):
            if one_shot:
                y = peers.ALL_REDUCE(x, group.group_name)
            else:
                y = collectives.wait_tensor(collectives.all_reduce(x, "sum", group))
        return y

    step = recorded(run)[0] if device.type == "cuda" else run
    assert torch.equal(run(), x * mesh.size())
    return seconds(lambda _: step(), device, 3) / count


class Rank:
    """One process: its device, its part of the mesh, and what was measured so far. Rank 0 tells of it."""

    def __init__(self, rank: int, ranks: int, kind: str, layers: int, eager: bool, repeats: int) -> None:
        self.rank, self.ranks, self.kind, self.layers, self.eager, self.repeats = (
            rank, ranks, kind, layers, eager, repeats)  # fmt: skip
        self.device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
        self.shape, self.begun = SHAPES[kind], time.monotonic()

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"{time.monotonic() - self.begun:5.0f} s  {text}", flush=True)

    def run(self) -> None:
        mesh = init_device_mesh(self.kind, (self.ranks,))
        tokens = torch.zeros(STEPS, dtype=torch.int64, device=self.device)
        wanted, alone = None, 0.0
        how = "eager" if self.eager else "compiled"
        self.say(f"{self.layers} layers of {self.shape}, {how}, {self.ranks} ranks")
        for name, one_shot in SUMS.items():
            t = seconds_of_a_sum(mesh, self.device, self.shape.hidden, one_shot)
            self.say(f"{name}: {1e6 * t:.1f} us an all-reduce of {self.shape.hidden} bfloat16")
        if self.rank == 0:
            step = self.made(None, False)
            wanted, alone = decode(step, self.device, None), seconds(step, self.device, self.repeats)
            tokens.copy_(wanted.argmax(-1))
            self.say(f"1 {self.kind}: {1e3 * alone:.3f} ms a token ({1 / alone:.1f} tokens/s)")
            del step
        for name, one_shot in SUMS.items():
            # Other ranks are ahead of rank 0 here: they compile while it decodes alone, and wait in their first sum.
            step = self.made(mesh, one_shot)
            dist.broadcast(tokens, 0)
            got, t = decode(step, self.device, tokens), seconds(step, self.device, self.repeats)
            if wanted is not None:
                same = int((got.argmax(-1) == tokens).sum())
                off, most = (got - wanted).norm() / wanted.norm(), (got - wanted).abs().max()
                self.say(
                    f"{self.ranks} {self.kind}, {name}: {1e3 * t:.3f} ms a token ({1 / t:.1f} tokens/s), "
                    f"{alone / t:.2f}x; {same} of {STEPS} tokens the same, logits differ by {off:.1e} of their norm, "
                    f"{most:.1e} at most, the largest being {wanted.abs().max():.1e}"
                )
            del step

    def made(self, mesh: DeviceMesh | None, one_shot: bool) -> Callable[[Tensor], Tensor]:
        """The step of a model of its own; of the one before nothing is left."""
        torch._dynamo.reset()
        gc.collect()
        model = Decoder(self.shape, self.layers, self.device, mesh, one_shot)
        held = sum(t.nbytes for t in model.buffers())
        self.say(f"made, {held / 1e9:.1f} GB on this rank")
        step = stepper(model, self.device, self.eager)
        self.say("compiled")
        return step


def rank_of(rank: int, ranks: int, kind: str, layers: int, eager: bool, repeats: int, port: int, limit: float) -> None:
    """What each process does; rank 0 also decodes alone, first."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(ranks)}
    here = Rank(rank, ranks, kind, layers, eager, repeats)
    how = {"backend": "nccl", "device_id": here.device} if kind == "cuda" else {"backend": "gloo"}
    if kind == "cuda":
        torch.cuda.set_device(here.device)
    dist.init_process_group(timeout=datetime.timedelta(seconds=limit), **how)
    try:
        with torch.no_grad():
            here.run()
    except BaseException:  # noqa: BLE001  to leave in any other way would wait for ranks that wait for this one
        traceback.print_exc()
        os._exit(1)
    # A communicator waits for the graphs that hold its kernels.
    torch._dynamo.reset()
    gc.collect()
    if kind == "cuda":
        torch.cuda.synchronize()
    dist.destroy_process_group()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def measure(ranks: int, kind: str, layers: int, eager: bool, repeats: int, limit: float) -> None:
    """Runs `ranks` processes, for `limit` seconds at most. Raises SystemExit where that is not enough."""
    # NVLink multicast is not everywhere allowed, and these messages are small.
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    run = functools.partial(
        rank_of, ranks=ranks, kind=kind, layers=layers, eager=eager, repeats=repeats, port=free_port(), limit=limit
    )
    until = time.monotonic() + limit
    context = torch.multiprocessing.spawn(run, nprocs=ranks, join=False)
    try:
        while not context.join(max(0.1, until - time.monotonic())):
            if time.monotonic() > until:
                raise SystemExit(f"not done after {limit:.0f} s")
    finally:
        for process in context.processes:
            process.kill()
