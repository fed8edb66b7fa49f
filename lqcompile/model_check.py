"""Whether a way computes what the model means: its logits and greedy tokens, against eager and against float32."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bench import first_line
from .decoder import Decoder
from .model_options import CHECKED
from .model_results import Row
from .ways import Runner

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Point:
    """What is timed: a step of `batch` sequences (tokens 1), or a prompt of `tokens`, with a cache of `length`."""

    batch: int
    tokens: int
    length: int

    @property
    def phase(self) -> str:
        return "decode" if self.tokens == 1 else "prefill"


@dataclass(frozen=True)
class Checked:
    """One call to check: its inputs, and what eager bfloat16 and the same model in float32 make of them."""

    tokens: Tensor
    position: Tensor
    next: Tensor
    logits: Tensor
    exact: Tensor


def references(model: Decoder, point: Point) -> list[Checked]:
    """The calls to check, on the quantized model: greedy steps of eager, or one prompt again and again."""
    device, vocabulary = model.norm.weight.device, model.shape.vocabulary
    tokens, decoding = torch.randint(0, vocabulary, (point.batch, point.tokens), device=device), point.tokens == 1
    model.empty_cache(point.batch, point.length, DTYPE)
    eager = []
    for i in range(CHECKED if decoding else 1):
        position = torch.arange(point.tokens, device=device) + (i if decoding else 0)
        after, logits = model(tokens, position)
        eager.append((tokens, position, after, logits))
        tokens = after if decoding else tokens
    model.empty_cache(point.batch, point.length, torch.float32)
    with _wide_biases(model):
        found = [Checked(*call, exact=model(*call[:2])[1]) for call in eager]
    return found if decoding else found * CHECKED


@contextlib.contextmanager
def _wide_biases(model: Decoder) -> Iterator[None]:
    """Biases in float32 meanwhile: F.linear wants them in the dtype of x. The same tensors are put back."""
    kept = [(p, p.data) for name, p in model.named_parameters() if name.endswith(".bias")]
    try:
        for p, data in kept:
            p.data = data.float()
        yield
    finally:
        for p, data in kept:
            p.data = data


def judged(runner: Runner, point: Point, checked: Sequence[Checked]) -> Row:
    """Compiles a way and compares its logits and next tokens with eager's. Raises whatever compiling raises."""
    errors, same, wrong = [], 0, ""
    eager = max(relative(c.logits, c.exact) for c in checked)
    # Twice what eager's own roundings make of the logits, and one rounding of them.
    allowed = 2 * eager + torch.finfo(DTYPE).eps
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for i, c in enumerate(checked):
            after, logits = (runner if i else runner.compile)(c.tokens, c.position)
            errors.append(relative(logits, c.exact))
            same += int((after == c.next).sum())
            # Of two logits that rounding may exchange, either is the greatest.
            gap = c.exact.gather(1, c.next) - c.exact.gather(1, after)
            if not bool((gap <= 6 * allowed * c.exact.square().mean(1, keepdim=True).sqrt()).all()):
                wrong = wrong or f"call {i + 1} chooses another token than eager"
    error = max(errors)
    if not error <= allowed:
        wrong = f"the logits are off by {error:.3g}, allowed {allowed:.3g}"
    row = row_of(runner.name, point, "WRONG" if wrong else "ok", wrong)
    notes = [wrong] if wrong else []
    quantized = rewritten = passes = None
    if runner.report is not None:
        quantized, rewritten = runner.report.quantized, runner.report.rewritten + runner.report.packed
        passes = sum(p.seconds for p in runner.report.passes)
        notes += [f"{quantized - rewritten} of {quantized} matmuls not rewritten"] if rewritten < quantized else []
        notes += [first_line(w.message) for w in told if "lqcompile" in str(w.message)]
    if runner.graphs_skipped and checked[0].tokens.is_cuda:
        notes.append("without CUDA graphs: Inductor skipped them")
    return dataclasses.replace(
        row,
        note="; ".join(notes),
        compile_seconds=runner.compile_seconds,
        pass_seconds=passes,
        weight_bytes=runner.weight_bytes,
        error=error if error < float("inf") else None,
        allowed=allowed,
        same=same,
        checked=sum(len(c.tokens) for c in checked),
        quantized=quantized,
        rewritten=rewritten,
    )


def relative(y: Tensor, exact: Tensor) -> float:
    """The norm of the error over that of the truth, of the worst row; inf where any element is not finite."""
    if not bool(y.isfinite().all()):
        return float("inf")
    y, exact = y.double(), exact.double()
    return float(((y - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def row_of(name: str, point: Point, verdict: str, note: str) -> Row:
    """A row without figures."""
    return Row(name, point.phase, point.batch, point.tokens, verdict, note)
