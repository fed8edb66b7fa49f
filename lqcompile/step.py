"""One step of decoding from near: what its time goes to, and whether thousands of them leave anything behind."""

from __future__ import annotations

import json
import re
import resource
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile, record_function

from .table import Line
from .ways import Runner, recordings, synchronize

# The first whose pattern is found in a kernel's name has it; Triton names kernels after what they fuse.
GROUPS = (
    ("packed matmuls", r"\b(lut|quick)_|^lq::"),
    ("attention", r"softmax|scaled_dot|flash|fmha|attention|bmm"),
    ("dense matmuls", r"gemm|gemv|gemvx|nvjet|cutlass|cublas|aten::(mm|addmm|linear|_weight)|mkl"),
    ("copies", r"(?i)memcpy|memset|copy|aten::clone"),
    ("norms and the like", r"triton_|elementwise|reduce_kernel|aten::"),
)
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
MARK = "lq step"


@dataclass(frozen=True)
class Endurance:
    """What `steps` steps added: graphs that Dynamo compiled, CUDA graphs recorded, bytes held (most of the process)."""

    way: str
    batch: int
    steps: int
    seconds: float
    compiled: int
    recorded: int
    bytes: int

    def line(self) -> Line:
        """All of it, in a sentence."""
        grown = "" if not (self.compiled or self.recorded or self.bytes) else "bold yellow"
        what = f"{self.compiled} recompiles, {self.recorded} CUDA graphs recorded, {self.bytes:+,} bytes of memory"
        return grown, f"{self.way}, batch {self.batch}: {self.steps:,} steps in {self.seconds:.1f} s: {what}"


def endure(runner: Runner, tokens: Tensor, steps: int, length: int) -> Endurance:
    """`steps` greedy steps, from position 0 again whenever the cache of `length` tokens is full."""
    # What is made once, at the first wrap say, is no growth.
    runner.decode(tokens, 0, min(length, steps))
    before, begun = _state(tokens.device), time.perf_counter()
    for done in range(0, steps, length):
        runner.decode(tokens, 0, min(length, steps - done))
    seconds = time.perf_counter() - begun
    added = [now - then for now, then in zip(_state(tokens.device), before, strict=True)]
    return Endurance(runner.name, len(tokens), steps, seconds, *added)


def _state(device: torch.device) -> tuple[int, int, int]:
    """Graphs compiled, CUDA graphs recorded, bytes held."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
    return int(counters["stats"]["unique_graphs"]), recordings(device), held


def trace(runner: Runner, tokens: Tensor, position: Tensor, path: Path) -> dict[str, Any]:
    """Writes a Chrome trace of one step to `path`; returns its seconds, by group of kernels, and the gaps between them.

    `seconds` goes from the first kernel to the last on a GPU, and is the call's on a CPU, where what generated code
    does without the dispatcher stands under "generated code".
    """
    cuda = tokens.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    # The first use of the profiler takes longer than the step.
    for _ in range(2):
        synchronize(tokens.device)
        with profile(activities=activities) as found:
            with record_function(MARK):
                runner(tokens, position)
            synchronize(tokens.device)
    found.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    complete = [e for e in events if e.get("ph") == "X" and "dur" in e]
    if cuda:
        return _split([e for e in complete if e.get("cat") in ON_GPU], None)
    whole = next(e for e in complete if e["name"] == MARK)
    # Operators alone: the marks of Dynamo and Inductor hold everything.
    return _split([e for e in complete if e.get("cat") == "cpu_op" and "::" in e["name"]], whole)


def _split(events: Sequence[dict[str, Any]], whole: dict[str, Any] | None) -> dict[str, Any]:
    spans = sorted(((e["ts"], e["ts"] + e["dur"], e["name"]) for e in events), key=lambda s: (s[0], -s[1]))
    seconds: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    names: dict[str, float] = defaultdict(float)
    begin = whole["ts"] if whole else min((s[0] for s in spans), default=0.0)
    end = begin + whole["dur"] if whole else max((s[1] for s in spans), default=0.0)
    reached = begin
    for start, stop, name in spans:
        # What runs while another does counts from that one's end: parts add up to the whole.
        own = max(0.0, min(stop, end) - max(start, reached))
        if start < begin or (whole and own == 0.0):
            continue
        group = next((group for group, pattern in GROUPS if re.search(pattern, name)), "other")
        seconds[group] += own / 1e6
        launches[group] += 1
        names[name] += own / 1e6
        reached = max(reached, min(stop, end))
    seconds["generated code" if whole else "gaps"] = (end - begin) / 1e6 - sum(seconds.values())
    most = sorted(names.items(), key=lambda item: -item[1])[:12]
    return {
        "seconds": (end - begin) / 1e6,
        "groups": {group: {"seconds": s, "launches": launches[group]} for group, s in seconds.items()},
        "longest": [{"name": name, "seconds": s} for name, s in most],
    }


def told(found: dict[str, Any], light: float | None) -> list[Line]:
    """A trace in words; `light`: seconds in which the step's weights can be read."""
    whole = found["seconds"]
    lines: list[Line] = [("bold", f"one step of decoding, traced: {1e6 * whole:.1f} us")]
    if light is not None:
        lines.append(
            ("", f"  reading its weights takes {1e6 * light:.1f} us; what is not that: {1e6 * (whole - light):.1f} us")
        )
    for name, group in sorted(found["groups"].items(), key=lambda item: -item[1]["seconds"]):
        count = f"{group['launches']} launches" if group["launches"] else ""
        share = 100 * group["seconds"] / whole if whole else 0.0
        lines.append(("", f"  {name:<20}{1e6 * group['seconds']:>10.1f} us {share:>4.0f} %  {count}".rstrip()))
    for kernel in found["longest"]:
        lines.append(("dim", f"    {1e6 * kernel['seconds']:>8.1f} us  {kernel['name'][:100]}"))
    return lines
