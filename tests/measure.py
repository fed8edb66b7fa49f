"""What README's table of measurements states, measured again: `python -m tests.measure WHAT`: compile, explain,
freshness, kernel (the C++ of one), memory (of a converted model), plan, recognise (224 linears, and all passes;
--device cuda), sentences (MiniLM) or parallel (decode of Llama-3-70B's shape on several devices).

Every figure is a ratio, or a difference, within one run: candidates take turns, medians are printed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn

import lqcompile
from lqcompile import backend, demo, quantize
from lqcompile.passes import pipeline
from lqcompile.passes.constants import Constants
from lqcompile.passes.plan import with_threads
from lqcompile.passes.recognise import Match, Recogniser
from lqcompile.report import Report
from tests import converted_memory, decode_parallel
from tests.memory import peak
from tests.models import Dequant

DIM, HIDDEN, BLOCKS = 256, 512, 8


class Block(nn.Module):
    """The seven linears of a Llama block: q, k, v, o, gate, up, down."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        make = lambda n, k, i: Dequant(n, k, 32, seed=7 * seed + i)  # noqa: E731
        self.q, self.k, self.v, self.o = (make(DIM, DIM, i) for i in range(4))
        self.gate, self.up, self.down = make(HIDDEN, DIM, 4), make(HIDDEN, DIM, 5), make(DIM, HIDDEN, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attention = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x)
        x = nn.functional.rms_norm(x + self.o(attention), (DIM,))
        return nn.functional.rms_norm(x + self.down(nn.functional.silu(self.gate(x)) * self.up(x)), (DIM,))


def one_compile(name: str) -> None:
    """Compiles the 56-linear model once in this process.

    Prints the seconds, those of our passes, those of the report (with LQ_EXPLAIN=1), and cache hits.
    """
    from torch._dynamo.utils import counters

    model, x = nn.Sequential(*(Block(i) for i in range(BLOCKS))).eval(), torch.randn(1, 16, DIM)
    spent: list[float] = []
    rewritten: list[int] = []
    run = pipeline.run

    def timed(*args):
        start = time.perf_counter()
        outcome = run(*args)
        spent.append(time.perf_counter() - start)
        rewritten.append(sum(d.outcome == "rewritten" for d in outcome.decisions))
        return outcome

    told: list[float] = []
    report_of, text = backend.report_of, Report.text

    def clocked(function):
        def measured(*args):
            start = time.perf_counter()
            result = function(*args)
            told.append(time.perf_counter() - start)
            return result

        return measured

    pipeline.run, backend.report_of, Report.text = timed, clocked(report_of), clocked(text)
    with torch.no_grad():
        # Imports and the first use of the compiler are not what is compared.
        torch.compile(nn.Linear(4, 4), backend=name)(torch.randn(2, 4))
        spent.clear()
        told.clear()
        counters.clear()
        start = time.perf_counter()
        torch.compile(model, backend=name)(x)
        seconds = time.perf_counter() - start
    assert name != "lq" or rewritten[-1] == 7 * BLOCKS, rewritten
    hits = (counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"])
    print(seconds, sum(spent), sum(told), *hits)


def compile_time(repeats: int) -> None:
    """Cold and warm compile of one dequantizing model, by "lq" and default Inductor in turns, each in a new process."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for _ in range(repeats):
        for name in ("inductor", "lq"):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    row = _one(name, cache)
                    found.setdefault((state, name), []).append(row)
                    print(state, name, *(f"{v:.2f}" for v in row), flush=True)
    for state in ("cold", "warm"):
        lq, inductor = (statistics.median(r[0] for r in found[state, name]) for name in ("lq", "inductor"))
        rewrite = statistics.median(r[1] for r in found[state, "lq"])
        print(f"{state}: lq {lq:.2f} s, inductor {inductor:.2f} s, ratio {lq / inductor:.2f}; rewrite {rewrite:.2f} s")


def _one(name: str, cache: str, **environment: str) -> list[float]:
    """What `one` prints in a new process."""
    out = subprocess.run(
        [sys.executable, "-m", "tests.measure", "one", "--backend", name],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(v) for v in out.stdout.split()[-5:]]


def explaining(repeats: int) -> None:
    """What LQ_EXPLAIN=1 adds to a compile, cold and warm: the share of its seconds that the report takes."""
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                seconds, _, told, *_ = _one("lq", cache, LQ_EXPLAIN="1")
                print(
                    f"{state}: compile {seconds:.2f} s, report {told:.3f} s, {100 * told / seconds:.1f} %", flush=True
                )


def freshness(repeats: int) -> None:
    """What the freshness check adds to a call with 200 packed weights, three source tensors each.

    The compiled graph is replaced by a function that does nothing: its own time would drown the check's.
    """
    model = nn.Sequential(*(Dequant(32, 32, 32, seed=i) for i in range(200))).eval()
    seen: list[tuple] = []
    call = backend.Compiled.__call__

    def spy(self, *args):
        seen.append((self, args))
        return call(self, *args)

    backend.Compiled.__call__ = spy
    with torch.no_grad():
        torch.compile(model, backend="lq")(torch.randn(1, 32))
    compiled, args = seen[-1]
    compiled._compiled = lambda *_: None
    configs = {"checked": compiled._config, "unchecked": dataclasses.replace(compiled._config, check_weights="never")}
    times: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(20 * repeats):
        for name, config in configs.items():
            compiled._config = config
            start = time.perf_counter()
            for _ in range(100):
                call(compiled, *args)
            times[name].append((time.perf_counter() - start) * 1e4)
    checked, unchecked = (statistics.median(times[name]) for name in ("checked", "unchecked"))
    sources = len(compiled._snapshot.sources)
    print(
        f"{checked - unchecked:.1f} us a call for 200 packed weights of {sources} source tensors, median of 100 calls"
    )


KERNEL = """
import time, torch
from lqcompile.kernels import cpu, native
from lqcompile.kernels.registry import Call
from lqcompile.types import Format
native.isas(), native.has_compiler()
start = time.perf_counter()
call = Call("quick", Format("affine", 4, 128, "int", "float32"), 512, 512)
cpu.Launcher("quick.cpp", call, torch.float32, native.isas()[0])
print(time.perf_counter() - start)
"""


def kernel(repeats: int) -> None:
    """Seconds until one CPU kernel is compiled and loaded, and until a new process has it from the cache."""
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "new process"):
                out = subprocess.run(
                    [sys.executable, "-c", KERNEL],
                    env={**os.environ, "LQ_CACHE_DIR": f"{folder}/lq"},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                print(f"{state}: {float(out.stdout):.3f} s", flush=True)


def planning(repeats: int) -> None:
    """What planning, with packing, takes of a model of 301 quantized matmuls and an unknown number of rows.

    For this CPU, and for a GPU that is not here.
    """
    model = nn.Sequential(*(Block(i) for i in range(43))).eval()
    for options in ({}, {"arch": "sm_90"}):
        spent = []
        for _ in range(repeats):
            torch._dynamo.reset()
            x = torch.randn(1, 16, DIM)
            torch._dynamo.mark_dynamic(x, 1)
            with torch.no_grad():
                report = lqcompile.explain(model, x, options=options)
            assert len(report.decisions) == 301 + 2 * 43, len(report.decisions)
            spent.append(next(p.seconds for p in report.passes if p.name == "plan"))
        print(f"{report.device['name']}: {report.rewritten} rewritten, planned in {statistics.median(spent):.2f} s")


def sentences(repeats: int) -> None:
    """One and 32 sentences of MiniLM: int4 by "lq" and by default torch.compile, and fp32 by the latter, in turns."""
    loaded = demo._load()
    assert not isinstance(loaded, str), loaded
    fp32, inputs = loaded
    model = quantize(copy.deepcopy(fp32), **demo.QUANTIZERS["int4"])
    for count in (1, len(demo.SENTENCES)):
        given = tuple(t[:count].contiguous() for t in inputs)
        torch._dynamo.reset()
        ways = {
            "lq": torch.compile(model, backend="lq", dynamic=False),
            "default": torch.compile(model, dynamic=False),
            "fp32": torch.compile(fp32, dynamic=False),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        with torch.no_grad():
            for turn in range(1 + 7 * repeats):
                for name, way in ways.items():
                    start = time.perf_counter()
                    way(*given)
                    # The first turn compiles.
                    times[name].extend([time.perf_counter() - start] if turn else [])
        lq, default, plain = (1e3 * statistics.median(times[name]) for name in ways)
        print(
            f"{count} sentences: lq {lq:.1f} ms, default {default:.1f} ms ({default / lq:.2f}x), "
            f"fp32 {plain:.1f} ms ({plain / lq:.2f}x)",
            flush=True,
        )


# Outputs of gate and up, and inputs of the others, of 32 blocks: as in MiniLM-L12, as wide as Llama-1B, and, on a GPU,
# as Llama-3-8B.
SIZES = {"small": (384, 1536), "large": (2048, 5632), "8b": (4096, 14336)}
# What makes the CPU wait for a GPU, and what starts work on it.
WAITS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaMemcpyAsync", "cudaMemsetAsync")


class Wide(nn.Module):
    """The seven linears of a Llama block, each on the result of the one before, with groups of 128."""

    def __init__(self, dim: int, hidden: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = [(dim, dim)] * 4 + [(hidden, dim), (dim, hidden), (hidden, dim)]
        self.linears = nn.Sequential(*(Dequant(n, k, 128, 7 * seed + i) for i, (n, k) in enumerate(shapes))).to(dtype)
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linears(x)[..., : self.dim]


def recognising(name: str, device: str, repeats: int) -> None:
    """Seconds to recognise 32 blocks of seven linears (codes unpacked, proved), and the peak of one linear's memory."""
    dim, hidden = SIZES[name]
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = nn.Sequential(*(Wide(dim, hidden, i, dtype) for i in range(32))).to(device).eval()
    weights = sum(2 * m.q.numel() for m in model.modules() if isinstance(m, Dequant))
    graphs: list[tuple] = []

    def keep(module, inputs):
        graphs.append((module, inputs))
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=keep)(torch.randn(1, dim, device=device, dtype=dtype))
        one = Dequant(hidden, dim, 128).to(dtype).to(device)
        torch.compile(one, backend=keep)(torch.randn(1, dim, device=device, dtype=dtype))
        torch.compile(model[:4], backend=keep)(torch.randn(1, dim, device=device, dtype=dtype))

    threads = torch.get_num_threads()

    def recogniser(module, inputs, threads: int = 1) -> Recogniser:
        constants = Constants(module.graph, pipeline.static_values(module, inputs))
        return Recogniser(module, constants, strict=True, threads=threads)

    whole, single, part = graphs
    for _ in range(repeats):
        ready = recogniser(*whole, threads)
        start, busy = time.perf_counter(), time.process_time()
        with with_threads(1):
            found = ready.run()
        spent, busy = time.perf_counter() - start, time.process_time() - busy
        print(
            f"{name} on {device}: {spent:.2f} s ({busy:.2f} s of CPU) for {sum(isinstance(m, Match) for m in found)} "
            f"linears of {weights / 1e6:.0f} M weights in all, {ready.reader.analysed} analysed, "
            f"{ready.reader.played} as before, {threads} threads",
            flush=True,
        )
        del found, ready
    for _ in range(repeats):
        outcome = pipeline.run(*whole, lqcompile.config.make(None, {}))
        print(", ".join(f"{step} {seconds:.2f} s" for step, seconds, _ in outcome.passes), flush=True)
        del outcome
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        linears = len(recogniser(*part).run())
    count = {event.key: event.count / linears for event in profile.key_averages()}
    calls = sum(n for key, n in count.items() if key.startswith("aten::"))
    waits, launches = (sum(count.get(key, 0) for key in keys) for keys in (WAITS, LAUNCHES))
    print(f"a linear: {calls:.0f} calls of aten, {launches:.0f} launches, {waits:.1f} waits", flush=True)
    most = peak(recogniser(*single).run, device)
    dense = hidden * dim * dtype.itemsize
    print(f"peak for {hidden} x {dim}: {most / 1e6:.1f} MB, dense in {dtype}: {dense / 1e6:.1f} MB")


def main() -> None:
    """Parses the command line and runs one measurement."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure", description=__doc__)
    whats = ("compile", "explain", "freshness", "kernel", "memory", "plan", "recognise", "sentences", "parallel")
    parser.add_argument("what", choices=(*whats, "one"))
    parser.add_argument("--backend", default="lq")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--limit", type=float, default=540, help="parallel: seconds after which it gives up")
    parser.add_argument("--eager", action="store_true", help="parallel: without torch.compile")
    given = parser.parse_args()
    if given.what == "one":
        one_compile(given.backend)
    elif given.what == "compile":
        compile_time(given.repeats)
    elif given.what == "explain":
        explaining(given.repeats)
    elif given.what == "kernel":
        kernel(given.repeats)
    elif given.what == "memory":
        converted_memory.measure(torch.device(given.device), given.layers)
    elif given.what == "plan":
        planning(given.repeats)
    elif given.what == "recognise":
        for name in SIZES if given.device == "cuda" else ("small", "large"):
            recognising(name, given.device, given.repeats)
    elif given.what == "parallel":
        decode_parallel.measure(given.ranks, given.device, given.layers, given.eager, given.repeats, given.limit)
    elif given.what == "sentences":
        sentences(given.repeats)
    else:
        freshness(given.repeats)


if __name__ == "__main__":
    main()
