"""`lq bench --moe`: one layer of a mixture of experts, by lq and on dense weights by torch's grouped matmul."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from . import backend, decoder, timing
from .bench import first_line
from .cli import Exit
from .decoder import Mixture
from .errors import ArgumentError
from .model_check import DTYPE, relative
from .model_options import Options
from .model_results import SCHEMA, Row, heading, line, summary, written
from .quantize import QuantLinear
from .report import Report, size
from .results import clocks, facts
from .terminal import show
from .ways import WAYS, synchronize

COMPARED = ("lq", "dense")
# Batches that take turns, each with a routing of its own.
INPUTS = 4
# Logits of a router that are further apart are chosen alike in bfloat16 and float32.
APART = 0.1


def bench_moe(options: Options, command: Sequence[str] = ("lq", "bench")) -> int:
    """Prints a row for each of COMPARED at each batch. Exit.PROOF_FAILED if one is wrong, or lq fails.

    Router, experts and the sum of what they give are compiled as a whole and timed as CUDA graphs, in turns. Raises
    ArgumentError for a model without experts.
    """
    shape = options.shape
    if not shape.experts:
        raise ArgumentError("--moe", options.model, " | ".join(n for n, s in decoder.SHAPES.items() if s.experts))
    torch.manual_seed(0)
    device, timer = options.device, timing.timer(options.device)
    here = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), here:
        how = {"rounds": 1} if options.method == "bcq" else {}
        layer = decoder.made(lambda: Mixture(shape), device, DTYPE)
        layer = decoder.quantized(layer, bits=options.bits, group=options.group, method=options.method, **how)
        layers = {"lq": layer, "dense": decoder.replaced(layer, decoder.dense)}
        document = {
            "kind": "model",
            **facts(device, command),
            "schema": SCHEMA,
            "model": f"{options.model}, a layer's experts",
            "bits": options.bits,
            "group": options.group,
            "method": options.method,
            "dtype": "bfloat16",
            "light": timer.light_name(),
        }
        show([*_head(document, shape), ("", ""), heading()])
        rows: list[Row] = []
        begun = time.monotonic()
        for batch in options.batches:
            if options.time_limit is not None and time.monotonic() - begun > options.time_limit:
                rows += [Row(way, "layer", batch, 1, "skipped", "time limit") for way in COMPARED]
                continue
            rows += _measured(layers, shape, batch, timer, options.repeats)
        document["clocks_at_end"] = clocks(device)
        written(options.json, document, rows)
    show([("", ""), *summary(rows)])
    return Exit.PROOF_FAILED if any(row.bad for row in rows) else Exit.FINE


def _head(document: dict[str, Any], shape: decoder.Shape) -> list[tuple[str, str]]:
    """The machine, the layer and the method, in words."""
    lines = [
        f"{document['device']['name']}, torch {document['torch']}, {document['date']}",
        f"{document['model']}: {shape.experts} of {shape.hidden} x {shape.intermediate}, {shape.top} for each token; "
        f"weights: {document['bits']} bits {document['method']}, groups of {document['group']}, random",
        f"{INPUTS} batches in turns, each with its own routing; dense: torch._grouped_mm on bfloat16; medians",
        "error: of the output, against float32, and what is allowed",
        f"light: of the experts that are routed to; {document['light']}",
    ]
    return [("dim", text) for text in lines]


def _measured(
    layers: dict[str, nn.Module], shape: decoder.Shape, batch: int, timer: timing.Timer, repeats: int
) -> list[Row]:
    """The rows of one batch, printed."""
    xs = [_tokens(layers["lq"], batch, shape.hidden, timer.device) for _ in range(INPUTS)]
    exact = [layers["lq"](x.float()) for x in xs]
    # Twice what eager's own roundings make of it, and one of the result.
    allowed = 2 * max(relative(layers["dense"](x), y) for x, y in zip(xs, exact, strict=True))
    allowed += torch.finfo(DTYPE).eps
    torch._dynamo.reset()
    rows: list[Row] = []
    runs: dict[str, list[Callable[[], object]]] = {}
    for way in COMPARED:
        row = Row(way, "layer", batch, 1, "ok", allowed=allowed)
        try:
            row, compiled = _compiled(way, layers[way], xs, exact, row)
        except Exception as error:  # noqa: BLE001  one way that cannot run must not cost the other
            row = dataclasses.replace(row, verdict="FAILED", note=first_line(error))
        else:
            if row.verdict == "ok":
                runs[way] = [partial(compiled, x) for x in xs]
        rows.append(row)
    if timer.device.type == "cuda":
        torch.cuda.empty_cache()
    samples = timing.interleaved([timer.sampler(some) for some in runs.values()], repeats)
    read = sum(_chosen(layers["lq"], x) for x in xs) / INPUTS / shape.experts
    lights: dict[int, float | None] = {}
    for way, s in zip(runs, samples, strict=True):
        i = next(i for i, row in enumerate(rows) if row.way == way)
        bytes = round((rows[i].weight_bytes or 0) * read)
        if bytes not in lights:
            lights[bytes] = _light(timer, bytes)
        rows[i] = dataclasses.replace(rows[i].timed(s), weight_bytes=bytes, light=lights[bytes])
    show([*(line(row) for row in rows), ("dim", f"experts read, on average: {read * shape.experts:.1f}")])
    return rows


def _tokens(layer: nn.Module, batch: int, hidden: int, device: torch.device) -> Tensor:
    """Random tokens whose routing no rounding changes."""
    x = torch.randn((batch, hidden), device=device).to(DTYPE)
    while bool((close := _undecided(layer, x)).any()):
        x = torch.where(close[:, None], torch.randn((batch, hidden), device=device).to(DTYPE), x)
    return x


def _undecided(layer: Any, x: Tensor) -> Tensor:
    """Which tokens the router may send elsewhere where it rounds otherwise: bool [batch]."""
    logits = (x.float() @ layer.router.weight.float().T).sort(-1, descending=True).values
    return logits[:, layer.top - 1] - logits[:, layer.top] < APART


def _chosen(layer: Any, x: Tensor) -> int:
    """How many experts are routed to."""
    return len((x.float() @ layer.router.weight.float().T).topk(layer.top).indices.unique())


def _compiled(
    way: str, layer: nn.Module, xs: Sequence[Tensor], exact: Sequence[Tensor], row: Row
) -> tuple[Row, Callable[[Tensor], Tensor]]:
    """One way, compiled and checked on all of `xs`."""
    compiled = torch.compile(layer, backend=WAYS[way].backend, fullgraph=True, dynamic=False)
    with fresh_cache(), backend.recording() as reports:
        start = time.perf_counter()
        compiled(xs[0])
        synchronize(xs[0].device)
        seconds = time.perf_counter() - start
    error = max(relative(compiled(x), y) for x, y in zip(xs, exact, strict=True))
    held = sum(t.nbytes for name, t in layer.state_dict().items() if ".stacked." in f".{name}")
    row = dataclasses.replace(row, compile_seconds=seconds, error=error, weight_bytes=held)
    if not error <= (row.allowed or 0.0):
        row = dataclasses.replace(row, verdict="WRONG", note=f"off by {error:.3g}, allowed {row.allowed:.3g}")
    if reports:
        found, layers = Report.merged(reports), sum(isinstance(m, QuantLinear) for m in layer.modules())
        note = f"{found.rewritten} of {layers} matmuls rewritten" if found.rewritten < layers else row.note
        row = dataclasses.replace(row, note=note, quantized=layers, rewritten=found.rewritten)
        row = dataclasses.replace(row, weight_bytes=found.bytes_after or held)
    return row, compiled


def _light(timer: timing.Timer, bytes: int) -> float | None:
    """Seconds of a pure read; None, and a line, where nothing can tell."""
    try:
        return timing.interleaved([timer.sampler(timer.light(bytes)[0])], 5)[0].median
    except Exception as error:  # noqa: BLE001  without a compiler there is no light; the rest is measured
        show([("yellow", f"no light of {size(bytes)}: {first_line(error)}")])
        return None
